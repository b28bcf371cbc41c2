"""A region as a file, whose reads raise where a touch would end the process."""

from __future__ import annotations

import io
import os
from typing import Any

__all__ = ["RegionFile"]


class RegionFile(io.RawIOBase):
    """Reads a region from a position of its own. Closing it leaves the region open.

    Args:
        region: what is read; it is kept alive.
    """

    def __init__(self, region: Any) -> None:
        self._region: Any = region
        self._at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position, which may lie behind the end, and return it."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._region)}.get(whence)
        if start is None or start + offset < 0:
            raise ValueError(f"seek({offset}, {whence}) is not within a file of {len(self._region)} bytes")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        """Copy from the position on, and return how many bytes; 0: there are none."""
        with memoryview(buffer).cast("B") as target, memoryview(self._region) as source:
            length = max(0, min(len(target), len(source) - self._at))
            self._region.bring(self._at, length)
            target[:length] = source[self._at : self._at + length]
        self._at += length
        return length
