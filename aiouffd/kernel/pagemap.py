"""Which pages of this process are present: /proc/self/pagemap, and the holes of a memfd.

The kernel offers three interfaces, and `missing` uses the best that it finds:

- PAGEMAP_SCAN (Linux 6.7), an ioctl of /proc/self/pagemap that returns ranges;
- read(2) of /proc/self/pagemap, which has 64 bits a page: bit 63 for a present page, bit 62 for one in swap;
- mincore(2), which needs no /proc, and does not tell a page in swap from a missing one.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
from typing import TYPE_CHECKING, Final, Self

from aiouffd.kernel import abi, libc
from aiouffd.kernel.memory import address_of
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.ranges import Range, RangeSet, align_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Pagemap", "data_ranges"]

_PATH: Final = "/proc/self/pagemap"
_FEW: Final = 16  # ranges that the first PAGEMAP_SCAN returns at most: new memory for more takes 7 us
_MANY: Final = 512  # that those behind it return
_ENTRY: Final = 8  # bytes of /proc/self/pagemap for each page
_PAGES_PER_READ: Final = 1 << 16
_PRESENT_OR_SWAPPED: Final = bytes(1 if value & 0xC0 else 0 for value in range(256))  # of an entry's highest byte
_IN_MEMORY: Final = bytes(value & 1 for value in range(256))  # of a byte of mincore's vector
_ONES: Final = re.compile(b"\1+")


class Pagemap(OwnedDescriptor):
    """/proc/self/pagemap, opened once. A context manager that closes it.

    The kernel checks the permission when the file is opened. A process that drops its privileges (setuid) or becomes
    undumpable may not open it any more, but can go on using this object. A forked child that inherits it sees the
    pages of its parent.

    Raises:
        OSError: there is no /proc, or this process may not read it.
    """

    def __init__(self) -> None:
        super().__init__(os.open(_PATH, os.O_RDONLY | os.O_CLOEXEC))

    @classmethod
    def open_if_possible(cls) -> Self:
        """Open it. Where that fails the object has no file: `missing` falls back to mincore(2), `scan` raises."""
        try:
            return cls()
        except OSError:
            return cls.__new__(cls)

    @classmethod
    def of(cls, fd: int) -> Self:
        """Use the descriptor of another process, which it has opened for itself; it belongs to this object."""
        self = cls.__new__(cls)
        self._own(fd)
        return self

    def missing(self, address: int, length: int, fd: int = -1, page_size: int = mmap.PAGESIZE) -> list[Range]:
        """Return the ranges of addresses of [address, address + length) whose pages are missing.

        Args:
            address: aligned to `page_size`.
            length: in bytes, whole pages.
            fd: the memfd behind the mapping, from offset 0 on; -1: private anonymous memory. A page of a memfd counts
                as present if the file has it, mapped or not.
            page_size: of the mapping.
        """
        present = self.present(address, length, fd, page_size)
        return list(present.gaps(address, address + length))

    def present(self, address: int, length: int, fd: int = -1, page_size: int = mmap.PAGESIZE) -> RangeSet:
        """Return the ranges of the pages that are not missing; as `missing`."""
        present = RangeSet()
        for start, end in self.spans(address, length, fd, page_size):
            present.add(start, end)
        return present

    def spans(self, address: int, length: int, fd: int, page_size: int) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of the pages that are not missing, in order; as `missing`. Neighbors may not be joined."""
        # hugetlbfs has no SEEK_HOLE: its llseek reports the whole file as data. What counts there is what is mapped.
        if fd >= 0 and page_size == mmap.PAGESIZE:
            for start, end in data_ranges(fd, length):
                yield address + start, address + end
            return
        has_begun = False
        try:
            # Huge pages are not swapped. One that was dropped leaves its protection as an entry that counts as swapped.
            swapped = abi.PAGE_IS_SWAPPED if page_size == mmap.PAGESIZE else 0
            for found in self._scan(address, length, anyof=abi.PAGE_IS_PRESENT | swapped):
                has_begun = True
                yield from found
        except OSError as error:
            if has_begun or error.errno not in (errno.ENOTTY, errno.EBADF, errno.EPERM, errno.EACCES):
                raise
            yield from self._read(address, length)

    def _read(self, address: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield the present ranges as read(2) tells them, or mincore(2)."""
        try:
            yield from _runs(address, length, self._highest_bytes)
        except OSError:
            yield from _runs(address, length, lambda start, size: libc.mincore(start, size).translate(_IN_MEMORY))

    def _highest_bytes(self, start: int, size: int) -> bytes:
        count = size // mmap.PAGESIZE
        if not self.intact:
            raise OSError(errno.EBADF, f"{_PATH} is not open")
        entries = os.pread(self._fd, count * _ENTRY, start // mmap.PAGESIZE * _ENTRY)
        if len(entries) < count * _ENTRY:
            raise OSError(errno.EIO, f"{_PATH} is shorter than the address space")
        return entries[_ENTRY - 1 :: _ENTRY].translate(_PRESENT_OR_SWAPPED)  # little-endian, as all known processors

    def scan(self, address: int, length: int, *, mask: int = 0, anyof: int = 0, flags: int = 0) -> list[Range]:
        """PAGEMAP_SCAN (Linux 6.7): return the ranges whose pages are in all categories of `mask` and any of `anyof`.

        Args:
            address: page-aligned.
            length: in bytes, whole pages.
            mask: PAGE_IS_*.
            anyof: PAGE_IS_*; 0: no such condition.
            flags: PM_SCAN_WP_MATCHING write-protects what is found, in the same step.

        Raises:
            OSError: ENOTTY: the kernel has no PAGEMAP_SCAN; EPERM: PM_SCAN_CHECK_WPASYNC, and the range is not
                registered with Feature.WP_ASYNC; EBADF: /proc/self/pagemap could not be opened.
        """
        found: list[Range] = []
        for spans in self._scan(address, length, mask=mask, anyof=anyof, flags=flags):
            for low, high in spans:
                if found and found[-1].end == low:  # the vector was full in the middle of a range
                    found[-1] = Range.between(found[-1].start, high)
                else:
                    found.append(Range.between(low, high))
        return found

    def _scan(
        self, address: int, length: int, *, mask: int = 0, anyof: int = 0, flags: int = 0
    ) -> Iterator[list[tuple[int, int]]]:
        """Yield (start, end) of what `scan` finds, as many at once as the vector has room for."""
        if not self.intact:
            raise OSError(errno.EBADF, f"{_PATH} is not open")
        start, end = address, address + length
        room = _FEW
        while start < end:
            vector = bytearray(abi.PAGE_REGION.size * room)
            place = address_of(vector)
            argument = bytearray(
                abi.PM_SCAN_ARG.pack(
                    abi.PM_SCAN_ARG.size, flags, start, end, 0, place, room, 0, 0, mask, anyof, mask | anyof
                )
            )
            count = fcntl.ioctl(self._fd, abi.PAGEMAP_SCAN, argument)
            start = abi.PM_SCAN_ARG.unpack(argument)[4]  # walk_end: where the kernel stopped
            filled = memoryview(vector)[: count * abi.PAGE_REGION.size]
            yield [(low, high) for low, high, _ in abi.PAGE_REGION.iter_unpack(filled)]
            room = _MANY


def data_ranges(fd: int, length: int, at: int = 0) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of what a memfd or file has from `at` to `length`, in whole pages; the rest is holes."""
    while at < length:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            at = align_up(os.lseek(fd, start, os.SEEK_HOLE), mmap.PAGESIZE)  # the file may end within its last page
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end; or it was truncated in between
                return
            raise
        if start < length:
            yield start, min(at, length)


def _runs(address: int, length: int, present: Callable[[int, int], bytes]) -> Iterator[tuple[int, int]]:
    """Yield the present ranges. `present` returns a byte for each page of a start and a size: 1 if it is present."""
    step = _PAGES_PER_READ * mmap.PAGESIZE
    for start in range(address, address + length, step):
        for run in _ONES.finditer(present(start, min(step, address + length - start))):
            yield start + run.start() * mmap.PAGESIZE, start + run.end() * mmap.PAGESIZE
