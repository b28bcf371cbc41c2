"""Which pages of this process are there: PAGEMAP_SCAN (Linux 6.7) on /proc/self/pagemap, and a memfd's holes."""

from __future__ import annotations

import errno
import fcntl
import os

from aiouffd.kernel import abi
from aiouffd.kernel.memory import address_of
from aiouffd.ranges import Range, RangeSet

__all__ = ["missing", "scan"]

_VECTOR = 512


def missing(address: int, length: int, fd: int = -1) -> list[Range]:
    """Return the ranges of addresses of [address, address + length) that a first touch would ask for.

    Args:
        address: page-aligned.
        length: in bytes, whole pages.
        fd: the memfd behind it, from offset 0 on; -1: private anonymous memory. A page of a file is there when the
            file has it, mapped or not.

    Raises:
        OSError: ENOTTY: the kernel has no PAGEMAP_SCAN.
    """
    present = RangeSet()
    if fd >= 0:
        at = 0
        while at < length:
            try:
                begin = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                    break
                raise
            at = os.lseek(fd, begin, os.SEEK_HOLE)
            present.add(address + begin, address + at)
    else:
        there = abi.PAGE_IS_PRESENT | abi.PAGE_IS_SWAPPED
        for found in scan(address, length, anyof=there):
            present.add(found.start, found.end)
    return list(present.gaps(address, address + length))


def scan(address: int, length: int, *, mask: int = 0, anyof: int = 0, flags: int = 0) -> list[Range]:
    """PAGEMAP_SCAN (Linux 6.7): return the ranges whose pages are in all categories of `mask` and any of `anyof`.

    Args:
        address: page-aligned.
        length: in bytes, whole pages.
        mask: PAGE_IS_*.
        anyof: PAGE_IS_*; 0: not asked for.
        flags: PM_SCAN_WP_MATCHING write-protects what is found, in the same step.

    Raises:
        OSError: ENOTTY: the kernel has no PAGEMAP_SCAN; EPERM: PM_SCAN_CHECK_WPASYNC, and the range is not registered
            with Feature.WP_ASYNC.
    """
    found: list[Range] = []
    start, end = address, address + length
    vector = bytearray(abi.PAGE_REGION.size * _VECTOR)
    place = address_of(vector)
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        while start < end:
            argument = bytearray(
                abi.PM_SCAN_ARG.pack(
                    abi.PM_SCAN_ARG.size, flags, start, end, 0, place, _VECTOR, 0, 0, mask, anyof, mask | anyof
                )
            )
            count = fcntl.ioctl(pagemap, abi.PAGEMAP_SCAN, argument)
            for index in range(count):
                low, high, _ = abi.PAGE_REGION.unpack_from(vector, index * abi.PAGE_REGION.size)
                if found and found[-1].end == low:  # the vector was full in the middle of a range
                    found[-1] = Range(found[-1].start, high - found[-1].start)
                else:
                    found.append(Range(low, high - low))
            start = abi.PM_SCAN_ARG.unpack(argument)[4]  # walk_end: where it stopped
    finally:
        os.close(pagemap)
    return found
