"""Which pages were written since the last call: WP_ASYNC and PAGEMAP_SCAN (Linux 6.7). Nobody reads the descriptor."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Self

from aiouffd.errors import ClosedError, UnsupportedError
from aiouffd.kernel import abi
from aiouffd.kernel.abi import Feature, RegisterMode
from aiouffd.kernel.pagemap import Pagemap
from aiouffd.kernel.userfaultfd import Userfaultfd
from aiouffd.ranges import Range

if TYPE_CHECKING:
    from types import TracebackType

    from aiouffd.kernel.region import Region

__all__ = ["WRITE_TRACKING", "WriteTracker", "collect"]


WRITE_TRACKING = Feature.WP_ASYNC | Feature.WP_HUGETLBFS_SHMEM | Feature.PAGEFAULT_FLAG_WP
"""What a descriptor needs for `collect`. It implies WP_UNPOPULATED: missing pages can be protected as well."""


def collect(region: Region, pagemap: Pagemap, *, anyof: int = 0) -> list[Range]:
    """Return the offsets of the pages written since they were protected, and protect them again: in one step.

    Args:
        region: registered with `WRITE_TRACKING`, for write-protection.
        pagemap: of this process.
        anyof: PAGE_IS_*: only pages in one of these categories.

    Raises:
        UnsupportedError: the kernel lacks PAGEMAP_SCAN.
    """
    flags = abi.PM_SCAN_WP_MATCHING | abi.PM_SCAN_CHECK_WPASYNC
    start = region.address
    try:
        found = pagemap.scan(start, region.mapped_length, mask=abi.PAGE_IS_WRITTEN, anyof=anyof, flags=flags)
    except OSError as error:
        if error.errno == errno.ENOTTY:
            raise UnsupportedError("PAGEMAP_SCAN (Linux 6.7)", "an older /proc/self/pagemap") from error
        raise
    return [Range(item.start - start, item.length) for item in found]


class WriteTracker:
    """Tells which pages of a region were written. A context manager; tracking begins when it is entered.

    The kernel itself lifts the protection of a page at its first write, and remembers that. No thread waits for
    another, so it is safe within one process. The first write to a page after each `collect` costs one minor fault.

    Three kinds of writes are not seen: through another mapping of a shared region's memfd, by write(2) to the memfd,
    and by a device (DMA) into pinned memory, such as io_uring's registered buffers and VFIO. While a region is tracked
    a Monitor cannot serve it: a range has one userfaultfd (`BusyError`). A Monitor tracks writes itself, with
    `track_writes=True`.

    Args:
        region: anonymous, shared or of huge pages.

    Raises on entering:
        UnsupportedError: the kernel lacks Feature.WP_ASYNC or PAGEMAP_SCAN (Linux 6.7).
        BusyError: the region is registered with another userfaultfd.
        AccessError: this user may not open one; user mode is enough for this.
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        self._uffd: Userfaultfd | None = None
        self._pagemap: Pagemap

    def __enter__(self) -> Self:
        # User mode is enough: the kernel resolves the faults of system calls, as all others, by itself.
        self._pagemap = Pagemap()
        uffd = Userfaultfd(WRITE_TRACKING, user_mode_only=True)
        try:
            uffd.register(self.region.address, self.region.mapped_length, RegisterMode.WP)
            uffd.writeprotect(self.region.address, self.region.mapped_length, protect=True)
        except BaseException:
            uffd.close()
            raise
        self._uffd = uffd
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        uffd, self._uffd = self._uffd, None
        if uffd is not None:
            uffd.unregister(self.region.address, self.region.mapped_length)
            uffd.close()
            self._pagemap.close()

    def collect(self) -> list[Range]:
        """Return the pages written since the last call, or since entering, and protect them again, in one step.

        The ranges are offsets in the region, of whole pages, in order; neighbours are joined, and the last may reach
        behind `len(region)`. The cost grows with what was written, and with the size of the page tables.
        """
        if self._uffd is None:
            raise ClosedError("this WriteTracker is not entered: use it inside its `with` block")
        return collect(self.region, self._pagemap)
