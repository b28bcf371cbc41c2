"""Pages that the kernel filled with zeros before a region is registered. They never fault, and read as zeros for good.

Three things fill them:

- mlockall(MCL_FUTURE) fills each new mapping, and the holes of a shared one for every process that maps the file
  (`Region` prevents it for its own mapping, see `locked`);
- mlock and mlockall(MCL_CURRENT) fill a mapping that exists;
- a transparent huge page: a touch of one byte fills 2 MiB.

MCL_ONFAULT and MLOCK_ONFAULT fill nothing. After registering, all of these are harmless: the kernel reports a fault for
each missing page, or leaves it missing.
"""

from __future__ import annotations

import mmap
import re
from typing import TYPE_CHECKING, Final

from aiouffd.errors import PopulatedError
from aiouffd.kernel import libc
from aiouffd.kernel.locked import smaps
from aiouffd.kernel.memory import zero_blocks
from aiouffd.ranges import Range, RangeSet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiouffd.kernel.pagemap import Pagemap
    from aiouffd.kernel.region import Region

__all__ = ["drop_populated_zeros"]

_HUGE_MAPPED: Final = re.compile(r"^(AnonHugePages|ShmemPmdMapped|FilePmdMapped): +[1-9]", re.MULTILINE)


def drop_populated_zeros(region: Region, pagemap: Pagemap) -> None:
    """Make the pages of a region missing again that the kernel has filled with zeros. Costs microseconds if none are.

    A page of zeros that the program has written itself into a locked mapping, or into a transparent huge page, cannot
    be told from those, and is dropped as well. Other pages that are present stay.

    Raises:
        PopulatedError: the region is shared. Other processes may write these pages at this moment, so none is dropped.
    """
    if not region.never_served:
        return
    start, length = region.address, region.mapped_length
    present = pagemap.present(start, length, region.fd, region.page_size)
    zeros = RangeSet()
    for item in present:
        for suspect in _suspects(region, item, complete=present.total == length):
            view = memoryview(region)[suspect.start - start : suspect.end - start]
            for at in zero_blocks(view, region.page_size):
                zeros.add(suspect.start + at, suspect.start + at + region.page_size)
            view.release()
    if not zeros:
        return
    if region.fd >= 0:
        count = zeros.total // region.page_size
        raise PopulatedError(
            f"mlock, mlockall or a huge page has filled {count} pages of {region!r} with zeros",
            "Lock it with MCL_ONFAULT or MLOCK_ONFAULT, or enter the Monitor first",
        )
    for item in zeros:
        try:
            libc.madvise(item.start, item.length, libc.MADV_DONTNEED_LOCKED)
        except OSError:  # before Linux 5.18
            libc.munlock(item.start, item.length)
            libc.madvise(item.start, item.length, mmap.MADV_DONTNEED)


def _suspects(region: Region, present: Range, *, complete: bool) -> Iterator[Range]:
    """Yield the parts of a present range whose pages the kernel may have filled.

    hugetlb mappings do not show that they are locked: they are suspect if they are complete.
    """
    if region.page_size > mmap.PAGESIZE:
        if complete:
            yield present
        return
    for mapping, flags, description in smaps():
        if ("lo" in flags and "lf" not in flags) or _HUGE_MAPPED.search(description):
            low, high = max(mapping.start, present.start), min(mapping.end, present.end)
            if low < high:
                yield Range.between(low, high)
