"""SIGBUS for the pages that are still missing when a Monitor leaves a region."""

from __future__ import annotations

import contextlib
import mmap
from typing import TYPE_CHECKING, Final

from aiouffd.kernel import libc
from aiouffd.kernel.abi import Feature, RegisterMode
from aiouffd.kernel.memory import mapped
from aiouffd.kernel.pagemap import Pagemap
from aiouffd.kernel.userfaultfd import Userfaultfd
from aiouffd.ranges import Range, RangeSet

if TYPE_CHECKING:
    from aiouffd.kernel.region import Region

__all__ = ["Sentinel"]

_MAX_GAPS: Final = 1000
"""More missing ranges than this are treated as one: each splits a mapping, and vm.max_map_count is 65530."""


class Sentinel:
    """A descriptor with Feature.SIGBUS that takes a region over when nobody serves it any more.

    From then on a touch of a missing page is SIGBUS, and a system call on it fails with EFAULT. Present pages stay as
    they are. The cost does not depend on the length of the region, where UFFDIO_POISON would cost page tables.

    `take_over` opens nothing. So the process may drop its privileges, become undumpable or use up its descriptors after
    this object is made.

    Args:
        uffd: the descriptor that serves the region. If it has Feature.SIGBUS itself, there is no second one.
        user_mode_only: open the second one so.

    Raises:
        UnsupportedError, AccessError: as `Userfaultfd`.
    """

    def __init__(self, uffd: Userfaultfd, *, user_mode_only: bool) -> None:
        own = Feature.SIGBUS in uffd.features
        self._uffd = uffd if own else Userfaultfd(Feature.SIGBUS, user_mode_only=user_mode_only)
        self.pagemap = Pagemap.open_if_possible()

    def take_over(self, region: Region, uffd: Userfaultfd) -> None:
        """Register what `uffd` serves of a region with this descriptor, and close `uffd`. The region keeps this object.

        A forked child is registered with nothing, so that missing pages would read as zeros there: it does not get
        them (MADV_DONTFORK: SIGSEGV). It gets the present pages, unless more than 1000 missing ranges lie among them.

        Raises:
            OSError: the kernel refused. A touch of a missing page is SIGSEGV then, or waits; it is never zeros.
        """
        region.keep(self._uffd)
        try:
            gaps = self._hand_over(region, uffd)
        except OSError:
            region.keep(uffd)  # to close it would let a waiting thread go, with zeros
            raise
        if uffd is not self._uffd:
            uffd.close()
        self.pagemap.close()
        _share_present(region, gaps)

    def _hand_over(self, region: Region, uffd: Userfaultfd) -> list[Range]:
        """Register the region with this descriptor in place of `uffd`; return the missing ranges.

        A range can be registered with one userfaultfd at a time, and between the two a missing page would read as
        zeros. So for that moment (0.1 ms) missing pages are made inaccessible: a touch is SIGSEGV. Present pages stay
        accessible.
        """
        start, length = region.address, region.mapped_length
        gaps = self.pagemap.missing(start, length, region.fd, region.page_size)
        if len(gaps) > _MAX_GAPS:
            gaps = [Range.between(gaps[0].start, gaps[-1].end)]
        if uffd is self._uffd:
            return gaps
        gaps = _protect(gaps, start, length)
        uffd.unregister(start, length)
        if gaps:
            self._uffd.register(start, length, RegisterMode.MISSING)
        for gap in gaps:
            libc.mprotect(gap.start, gap.length, mmap.PROT_READ | mmap.PROT_WRITE)
        return gaps

    def close(self) -> None:
        """Close what it has opened. Not after `take_over`."""
        self._uffd.close()
        self.pagemap.close()


def _share_present(region: Region, gaps: list[Range]) -> None:
    """Let forked children have the pages outside of `gaps`, and not those in it."""
    start, length = region.address, region.mapped_length
    with contextlib.suppress(OSError):  # too many mappings: children do not get these pages
        for gap in gaps:
            libc.madvise(gap.start, gap.length, libc.MADV_DONTFORK)
        for present in RangeSet(gaps).gaps(start, start + length):
            libc.madvise(present.start, present.length, libc.MADV_DOFORK)


def _protect(gaps: list[Range], start: int, length: int) -> list[Range]:
    """Make missing ranges inaccessible; return the ranges that are so.

    ENOMEM: each range splits a mapping, and the process has too many already; or a part of the region has been unmapped
    behind our back. Then all that is mapped is made inaccessible, which splits nothing.
    """
    try:
        return _inaccessible(gaps)
    except OSError:
        return _inaccessible(mapped(start, length))


def _inaccessible(ranges: list[Range]) -> list[Range]:
    for item in ranges:
        libc.mprotect(item.start, item.length, libc.PROT_NONE)
    return ranges
