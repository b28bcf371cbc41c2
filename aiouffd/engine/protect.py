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
import re
from typing import TYPE_CHECKING, Self

from aiouffd.kernel.memory import map_file
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.kernel.pagemap import data_ranges
from aiouffd.ranges import Range, RangeSet, align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["WrittenPages"]

_NOTED = re.compile(b"[^\0]+")
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

    def ranges(self, start: int, end: int) -> Iterator[Range]:
        """Yield the written pages of [start, end), in order; the parts of a long run may come one by one."""
        page, first, last = self._page, start // self._page, min(align_up(end, self._page) // self._page, self._count)
        for low, high in data_ranges(self.fileno(), last, first):  # to read a hole would allocate its pages
            for run in _NOTED.finditer(self._notes, low, high):
                yield Range.between(run.start() * page, run.end() * page)

    def clean(self, start: int, end: int) -> list[Range]:
        """Return the whole pages of [start, end) that were not written, in order, joined."""
        start = align_up(start, self._page)
        end = min(align_down(end, self._page), self._count * self._page)
        return list(RangeSet(self.ranges(start, end)).gaps(start, end))

    def forget(self, start: int, end: int) -> None:
        """Take back what was noted of the whole pages of [start, end)."""
        for run in list(self.ranges(start, end)):
            self._change(run.start, run.end, _FORGOTTEN)

    def begin(self, start: int, end: int) -> None:
        """Take note that what was written of [start, end) is about to be saved, before it is protected and read.

        The range is one of those that `ranges` has yielded: it counts as written until `end` says that it is not, also
        for a successor.
        """
        self._change(start, end, _BEGUN)

    def end(self, start: int, end: int, *, saved: bool) -> None:
        """Take note that it was saved, but for what was written again since `begin`; or that it was not."""
        self._change(start, end, _SAVED if saved else _NOT_SAVED)

    def _change(self, start: int, end: int, table: bytes) -> None:
        first, last = start // self._page, end // self._page
        self._notes[first:last] = self._notes[first:last].translate(table)

    def close(self) -> None:
        """Close the descriptor."""
        self._owned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
