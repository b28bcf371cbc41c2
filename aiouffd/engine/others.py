"""What the other spaces of a loop are at: for who brings something for some of them, and lets the others go first."""

from __future__ import annotations

from time import perf_counter_ns
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    import select
    from collections.abc import Callable, Collection, Iterable, Mapping

    from aiouffd.engine.common_file import CommonFile

__all__ = ["Others"]

_LOOKED_AT: Final = 32  # descriptors, to see whether one of them has messages: those come last then


class _Space(Protocol):
    """What is needed of a space."""

    file: CommonFile | None


class Others:
    """The spaces of one dispatcher, for who else runs on its loop.

    Args:
        spaces: by descriptor.
        epoll: tells which descriptors have messages; None: there is no space.
        read: reads a turn of messages of one descriptor, and serves them.
        turns: returns a number for each descriptor: another one whenever messages of it have been read.
    """

    def __init__(
        self,
        spaces: Mapping[int, _Space] | None = None,
        epoll: select.epoll | None = None,
        read: Callable[[int], None] = lambda _: None,
        turns: Callable[[Iterable[int]], dict[int, int]] = lambda _: {},
    ) -> None:
        self._spaces = {} if spaces is None else spaces
        self._epoll = epoll
        self._read = read
        self._turns = turns

    def wait(self, spaces: Collection[_Space]) -> bool | None:
        """Tell whether a space has messages that is not one of these; None: there is no other."""
        return bool(self._waiting(spaces)) if len(self._spaces) > len(spaces) else None

    def serve(self, spaces: Collection[_Space], until_ns: int) -> bool | None:
        """Serve a turn of each space that is not one of these; tell as `wait` does, whether they wait still.

        For who is placing pages of these, and goes on then. So nothing is read of memory that others may show as well:
        it could be emptied (REMOVE) as soon as that is read, and be filled again by what is being placed.

        Args:
            spaces: that are not served.
            until_ns: when the loop is due for a turn. Who waits then, waits.
        """
        if len(self._spaces) <= len(spaces):
            return None
        waiting = self._waiting(spaces)
        for fd, space in waiting:
            if space.file is None and self._spaces.get(fd) is space:  # to serve one may be to drop another
                self._read(fd)
                if perf_counter_ns() >= until_ns:
                    return True
        return self.wait(spaces) if waiting else False

    def _waiting(self, spaces: Collection[_Space]) -> list[tuple[int, _Space]]:
        assert self._epoll is not None
        found = [(fd, self._spaces.get(fd)) for fd, _ in self._epoll.poll(0, _LOOKED_AT)]
        return [(fd, space) for fd, space in found if space is not None and space not in spaces]

    def turns(self, spaces: Collection[_Space]) -> dict[int, int]:
        """Return a number for each descriptor of other spaces: another one whenever messages of it have been read."""
        return self._turns(fd for fd, space in self._spaces.items() if space not in spaces)
