"""Private memory that becomes shared where it lies, so that another process can drop its pages.

The kernel lets no process drop private pages of another (process_madvise(2) refuses MADV_DONTNEED). The process may do
it on demand (`native/dropper.c`), but not for the memory of its forked children, nor after it was killed. Pages of a
memfd are dropped by who has its descriptor, wherever they are mapped.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

from aiouffd.errors import PopulatedError
from aiouffd.kernel import files, libc
from aiouffd.kernel.locked import new_mappings_are_populated
from aiouffd.kernel.memory import MAP_NORESERVE

if TYPE_CHECKING:
    from aiouffd.kernel.pagemap import Pagemap
    from aiouffd.kernel.region import Region

__all__ = ["share"]


def share(region: Region, pagemap: Pagemap) -> None:
    """Replace the private memory of a region by a memfd with the same bytes, at the same address. Small pages only.

    No other thread may write to it meanwhile.

    Raises:
        PopulatedError: this process locks its memory (mlockall): the kernel would fill the mapping with zeros.
        OSError: as memfd_create(2), mmap(2): the region is private still.
    """
    if new_mappings_are_populated():
        raise PopulatedError(
            "this process locks its memory (mlockall), and private memory cannot become shared then",
            "Make the region with shared=True",
        )
    fd = os.memfd_create("aiouffd-region", os.MFD_CLOEXEC)
    length = region.mapped_length
    try:
        os.ftruncate(fd, length)
        with memoryview(region) as view:
            for start, end in pagemap.spans(region.address, length, -1, region.page_size):
                low, high = start - region.address, min(end - region.address, len(region))
                files.write_at(fd, view[low:high], low)
        libc.mmap_fixed(region.address, length, flags=mmap.MAP_SHARED | MAP_NORESERVE, fd=fd)
    except BaseException:
        os.close(fd)
        raise
    region.adopt(fd)
