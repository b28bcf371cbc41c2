"""What the other spaces of a loop are at: for who brings something for some of them, and lets the others go first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

from aiouffd.engine.statistics import Counter

if TYPE_CHECKING:
    import select
    from collections.abc import Callable, Collection, Mapping

    from aiouffd.engine.common_file import CommonFile
    from aiouffd.engine.statistics import Counters

__all__ = ["Others"]

_LOOKED_AT: Final = 32  # descriptors, to see whether one of them has messages: those come last then
_FAULTS: Final = int(Counter.FAULTS)


class _Space(Protocol):
    """What is needed of a space."""

    counters: Counters
    file: CommonFile | None


class Others:
    """The spaces of one dispatcher. Used on its loop, but by the dispatcher itself.

    Args:
        spaces: by descriptor.
        epoll: tells which descriptors have messages; None: there is no space.
        read: reads a turn of messages of one descriptor, and serves them.
    """

    def __init__(
        self,
        spaces: Mapping[int, _Space] | None = None,
        epoll: select.epoll | None = None,
        read: Callable[[int], object] = lambda _: None,
    ) -> None:
        self._spaces = {} if spaces is None else spaces
        self._epoll = epoll
        self._read = read

    def wait(self, spaces: Collection[_Space]) -> bool | None:
        """Tell whether a space has messages that is not one of these; None: there is no other."""
        return bool(self._waiting(spaces)) if len(self._spaces) > len(spaces) else None

    def serve(self, spaces: Collection[_Space]) -> bool | None:
        """Serve a turn of each space that is not one of these; tell as `wait` does, whether they wait still.

        For who is placing pages of these, and goes on then. So nothing is read of memory that others may show as well:
        it could be emptied (REMOVE) as soon as that is read, and be filled again by what is being placed.
        """
        if len(self._spaces) <= len(spaces):
            return None
        waiting = self._waiting(spaces)
        for fd, space in waiting:
            if space.file is None and self._spaces.get(fd) is space:  # to serve one may be to drop another
                self._read(fd)
        return bool(waiting and self._waiting(spaces))

    def _waiting(self, spaces: Collection[_Space]) -> list[tuple[int, _Space]]:
        assert self._epoll is not None
        found = [(fd, self._spaces.get(fd)) for fd, _ in self._epoll.poll(0, _LOOKED_AT)]
        return [(fd, space) for fd, space in found if space is not None and space not in spaces]

    def faults(self, spaces: Collection[_Space]) -> dict[Any, int]:
        """Return how many faults there have been of each space that is not one of these, or of those it counts with."""
        return {space: space.counters.words[_FAULTS] for space in self._spaces.values() if space not in spaces}
