"""The holes of a sparse file, looked up ahead, so that the event loop knows them without a system call."""

from __future__ import annotations

import errno
import os
from array import array
from bisect import bisect_right

__all__ = ["Holes", "next_data"]

_MAX_EXTENTS = 1 << 20  # of which the places are kept: 16 MiB


def next_data(fd: int, at: int, size: int) -> tuple[int, int]:
    """Return (start, end) of the first data at or behind `at`; (size, size): there is none. Waits for the file system.

    Args:
        fd: of a file. Where its file system knows no holes, all of it is data.
        at: an offset below `size`.
        size: of the file.
    """
    try:
        start = os.lseek(fd, at, os.SEEK_DATA)
        return (start, min(os.lseek(fd, start, os.SEEK_HOLE), size)) if start < size else (size, size)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return size, size


class Holes:
    """Where the data of an open file is, from its beginning up to where it has been looked up.

    One thread looks up while others ask.

    Attributes:
        known: offset up to which the holes are known.
        complete: whether there is nothing more to look up.
    """

    def __init__(self, fd: int, size: int) -> None:
        self.known: int = 0
        self.complete: bool = size == 0
        self._fd = fd
        self._size = size
        self._starts = array("q")
        self._ends = array("q")

    def at(self, offset: int, length: int) -> int:
        """Return how many bytes from `offset` on are known to be in a hole, at most `length`."""
        known = self.known  # once, and first: the data below it is in the arrays, whatever the thread adds now
        if offset >= known:
            return 0
        index = bisect_right(self._starts, offset)
        if index and offset < self._ends[index - 1]:
            return 0
        end = self._starts[index] if index < len(self._starts) else known
        return min(end - offset, length)

    def look_up(self, extents: int) -> None:
        """Look up the next extents of data (lseek with SEEK_DATA and SEEK_HOLE). Waits for the file system."""
        for _ in range(extents):
            if self.complete:
                return
            start, end = next_data(self._fd, self.known, self._size)
            if start < self._size:
                self._ends.append(end)
                self._starts.append(start)
            self.known = end  # last: it says that the rest is complete
            self.complete = end >= self._size or len(self._starts) >= _MAX_EXTENTS
