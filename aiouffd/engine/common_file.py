"""A file of memory that several spaces map: what one of them empties (MADV_REMOVE) is a hole for all of them.

The kernel tells that only to the space through which it was done. Where another one is touched, the page is missing as
any that has not come yet: the source's bytes would come back, and for all. So its REMOVE counts for each of them.

Spaces that map one file show the source at the same offsets, those of the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self
from weakref import WeakSet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiouffd.engine.mappings import Mappings

__all__ = ["CommonFile"]


class _Space(Protocol):
    """What is needed of a space."""

    mappings: Mappings
    closing: bool
    is_gone: bool


class CommonFile:
    """The spaces that map one file. Used on one loop.

    Args:
        name: names the file, also to a successor.
    """

    def __init__(self, name: str) -> None:
        self.name: str = name
        self._spaces: WeakSet[_Space] = WeakSet()

    def enter(self, space: _Space) -> Self:
        """Take note of a space that maps it; return this."""
        self._spaces.add(space)
        return self

    def elsewhere(self, space: _Space, start: int, end: int) -> Iterator[tuple[_Space, int, int]]:
        """Yield where else is what a space shows at the addresses [start, end): the space, and the addresses there.

        Also in this space: MREMAP_DONTUNMAP leaves such a place.
        """
        others = [each for each in self._spaces if not (each.closing or each.is_gone)]
        for each, low, high in space.mappings.alike(start, end, others):
            if each is not space or low < start or high > end:
                yield each, low, high
