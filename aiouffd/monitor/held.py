"""Who keeps a region: its Monitor, or those who use it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from aiouffd.errors import ClosedError

if TYPE_CHECKING:
    from aiouffd.kernel.region import Region

__all__ = ["Held"]


class Held:
    """A region, kept until `release`. After that it is found as long as others keep it.

    A region keeps its Monitor. With a reference back, only the garbage collector would end both.
    """

    def __init__(self, region: Region) -> None:
        self.keep(region)

    def keep(self, region: Region) -> None:
        """Keep the region. Its finalizer passes it: references of `release` may be cleared by then."""
        self._kept: Region | None = region
        self._found = weakref.ref(region)

    def release(self) -> None:
        """Leave it to others to keep the region."""
        self._kept = None

    @property
    def region(self) -> Region:
        """The region.

        Raises:
            ClosedError: nobody has kept it.
        """
        if (region := self._found()) is None:
            raise ClosedError("the region is gone: nobody has kept it or a view of it")
        return region

    def __repr__(self) -> str:
        region = self._found()
        return "a region that is gone" if region is None else repr(region)
