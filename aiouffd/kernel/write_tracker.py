"""Which pages were written since the last look: WP_ASYNC and PAGEMAP_SCAN (Linux 6.7), with no reader at all."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Self

from aiouffd.errors import ClosedError, UnsupportedError
from aiouffd.kernel import abi, pagemap
from aiouffd.kernel.abi import Feature, RegisterMode
from aiouffd.kernel.userfaultfd import Userfaultfd
from aiouffd.ranges import Range

if TYPE_CHECKING:
    from types import TracebackType

    from aiouffd.kernel.region import Region

__all__ = ["WRITE_TRACKING", "WriteTracker", "collect"]


WRITE_TRACKING = Feature.WP_ASYNC | Feature.WP_HUGETLBFS_SHMEM | Feature.PAGEFAULT_FLAG_WP
"""What a descriptor needs for `collect`. It implies WP_UNPOPULATED: what is not there can be protected as well."""


def collect(region: Region, *, anyof: int = 0) -> list[Range]:
    """Return the offsets of the pages written since they were protected, and protect them again: in one step.

    Args:
        region: registered with `WRITE_TRACKING`, for write-protection.
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

    The kernel itself lifts the protection of a page at its first write, and remembers that: no thread waits for
    anybody, so it is safe within one process. A write costs one minor fault a page and a look.

    Writes through another mapping of a shared region's memfd, and by write(2) to it, are not seen. While it is
    tracked a region cannot be served by a Monitor: a range has one userfaultfd (`BusyError`). A Monitor tracks writes
    itself, with `track_writes=True`.

    Args:
        region: anonymous, shared or of huge pages.

    Raises (on entering):
        UnsupportedError: the kernel lacks Feature.WP_ASYNC or PAGEMAP_SCAN (Linux 6.7).
        BusyError: the region is registered with another userfaultfd.
        AccessError: this user may not open one; user mode is enough for this.
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        self._uffd: Userfaultfd | None = None

    def __enter__(self) -> Self:
        # Faults of system calls are no different here: the kernel resolves all of them by itself.
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

    def collect(self) -> list[Range]:
        """Return the pages written since the last call, or since entering, and begin anew: in one step.

        Offsets in the region, whole pages, in order, neighbours joined; the last may reach behind `len(region)`. The
        cost grows with what was written, and with the size of the page tables.
        """
        if self._uffd is None:
            raise ClosedError("this WriteTracker is not entered: use it inside its `with` block")
        return collect(self.region)
