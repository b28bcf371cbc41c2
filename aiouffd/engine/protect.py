"""Which pages were written since they came, by synchronous write protection.

Each page comes write-protected (COPY and CONTINUE with MODE_WP). The first write to it is a message. The page is noted
here, and then the protection is lifted. So a page without a note has the bytes of its source, whatever happened to it:
it may be dropped, and brought again. No note is lost with the process that made it: notes are in a memfd that the
owner of the memory has, too.

The page tables could be asked in place of this (PAGEMAP_SCAN). They do not tell of the pages of a file that another
process has written, nor of those that were swapped out and have no entry any more.

Writes by a device (DMA) into pinned memory, by write(2) to the memfd of shared memory, and through a mapping that no
Monitor serves are seen by no protection.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, Self

from aiouffd.kernel.memory import map_file
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.kernel.pagemap import data_ranges
from aiouffd.ranges import Range, RangeSet, align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["WrittenPages"]

_NOTED = bytes([0]) + bytes([1]) * 255
_PART = 64 << 10  # notes that are looked at together
_WRITTEN, _BEING_SAVED = 1, 2
_FORGOTTEN = bytes(256)
_BEGUN = bytes([0, _BEING_SAVED, _BEING_SAVED]) + bytes(253)
_SAVED = bytes([0, _WRITTEN, 0]) + bytes(253)
_NOT_SAVED = bytes([0, _WRITTEN, _WRITTEN]) + bytes(253)


class WrittenPages:
    """A note for each page that was written: a byte for each page of a region, by offset, in a memfd.

    Args:
        fd: of `create`; it belongs to this object.
        page: bytes of a page.
    """

    def __init__(self, fd: int, page: int) -> None:
        self._owned = OwnedDescriptor(fd)
        self._page = page
        self._count = os.fstat(fd).st_size
        self._notes = map_file(fd, self._count, mmap.ACCESS_WRITE)
        self.losses: int = 0
        """How often notes were taken back."""

    @classmethod
    def create(cls, length: int, page: int) -> Self:
        """Make notes for so many bytes, in which nothing is written."""
        fd = os.memfd_create("aiouffd-written", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, align_up(length, page) // page)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, page)

    def fileno(self) -> int:
        """Return the descriptor, which stays this object's."""
        return self._owned.fileno()

    def note(self, offset: int, length: int = 1) -> None:
        """Note that the page at an offset, or more of them, is about to be written: before its protection is lifted."""
        first, end = offset // self._page, min(align_up(offset + length, self._page) // self._page, self._count)
        if first < end:
            self._notes[first:end] = bytes([_WRITTEN]) * (end - first)

    def __len__(self) -> int:
        """Bytes of the region that they are about."""
        return self._count * self._page

    def __contains__(self, offset: int) -> bool:
        index = offset // self._page
        return index >= self._count or self._notes[index] != 0

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of the written pages of [start, end), in order; a long run may come in parts."""
        page, first, last = self._page, start // self._page, min(align_up(end, self._page) // self._page, self._count)
        for low, high in data_ranges(self.fileno(), last, first):  # to read a hole would allocate its pages
            for part in range(low, high, _PART):
                # `find` of one byte in bytes: a twentieth of what a regular expression takes.
                notes = self._notes[part : min(part + _PART, high)].translate(_NOTED)
                at = notes.find(1)
                while at >= 0:
                    stop = notes.find(0, at)
                    stop = len(notes) if stop < 0 else stop
                    yield (part + at) * page, (part + stop) * page
                    at = notes.find(1, stop)

    def ranges(self, start: int, end: int) -> Iterator[Range]:
        """As `runs`, as ranges."""
        return (Range.between(*run) for run in self.runs(start, end))

    def clean(self, start: int, end: int) -> list[Range]:
        """Return the whole pages of [start, end) that were not written, in order, joined."""
        start = align_up(start, self._page)
        end = min(align_down(end, self._page), self._count * self._page)
        return list(RangeSet(self.ranges(start, end)).gaps(start, end))

    def forget(self, start: int, end: int) -> None:
        """Take back what was noted of the whole pages of [start, end)."""
        for run in list(self.runs(start, end)):
            self._change(*run, _FORGOTTEN)
            self.losses += 1

    def begin(self, start: int, end: int, size: int, count: int) -> list[tuple[int, int]]:
        """Take note that what was written first of [start, end) is about to be saved: before it is protected and read.

        It counts as written until `end` says that it is not, also for a successor.

        Args:
            start: where to begin.
            end: where to end.
            size: the most bytes.
            count: the most runs of pages.

        Returns:
            Start and end of each run, in order; none: nothing was written there.
        """
        found = list[tuple[int, int]]()
        for low, high in self.runs(start, end):
            found.append((low, min(high, low + size)))
            size -= found[-1][1] - low
            if not size or len(found) == count:
                break
        if found:
            self._change(found[0][0], found[-1][1], _BEGUN)
        return found

    def end(self, start: int, end: int, *, saved: bool) -> None:
        """Take note that it was saved, but for what was written again since `begin`; or that it was not."""
        self._change(start, end, _SAVED if saved else _NOT_SAVED)

    def _change(self, start: int, end: int, table: bytes) -> None:
        for low, high in data_ranges(self.fileno(), end // self._page, start // self._page):
            self._notes[low:high] = self._notes[low:high].translate(table)

    def close(self) -> None:
        """Close the descriptor."""
        self._owned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
