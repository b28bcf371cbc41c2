"""A file of memory that several spaces map: what one of them empties (MADV_REMOVE) is a hole for all of them.

The kernel tells that only to the space through which it was done. Where another one is touched, the page is missing as
any that has not come yet: the source's bytes would come back, and for all. So its REMOVE counts for each of them.

Spaces that map one file show the source at the same offsets, those of the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self
from weakref import WeakSet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from aiouffd.engine.mappings import Mappings

__all__ = ["CommonFile"]


class _Space(Protocol):
    """What is needed of a space."""

    mappings: Mappings
    closing: bool
    is_gone: bool


class _Waiting(Protocol):
    """What is needed of a space that is about to be served again."""

    mappings: Mappings
    changed: bool


class CommonFile:
    """The spaces that map one file. Used on one loop.

    Args:
        name: names the file, also to a successor.
        waiting: returns those that map it, and are no spaces yet: their sources are being opened again.
    """

    def __init__(self, name: str, waiting: Callable[[], Iterable[_Waiting]] = tuple) -> None:
        self.name: str = name
        self._waiting = waiting
        self._spaces: WeakSet[_Space] = WeakSet()

    def enter(self, space: _Space) -> Self:
        """Take note of a space that maps it; return this."""
        self._spaces.add(space)
        return self

    def elsewhere(self, space: _Space, start: int, end: int) -> Iterator[tuple[_Space, int, int]]:
        """Yield where else is what a space shows at the addresses [start, end): the space, and the addresses there.

        Also in this space: MREMAP_DONTUNMAP leaves such a place. Those that wait show zeros there, and are not told.
        """
        for waiting, low, high in space.mappings.alike(start, end, self._waiting()):
            waiting.mappings.remove(low, high)
            waiting.changed = True
        others = [each for each in self._spaces if not (each.closing or each.is_gone)]
        for each, low, high in space.mappings.alike(start, end, others):
            if each is not space or low < start or high > end:
                yield each, low, high
