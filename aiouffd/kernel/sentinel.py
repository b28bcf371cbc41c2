"""SIGBUS for the pages that are still missing when a Monitor leaves a region."""

from __future__ import annotations

import contextlib
import mmap
import os
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

    `take_over` opens nothing, so that it works after the process has dropped its privileges, or has used up its
    descriptors: make the object before.

    Args:
        user_mode_only: how the descriptor is opened: as the one that serves the region.

    Raises:
        UnsupportedError, AccessError: as `Userfaultfd`.
    """

    def __init__(self, *, user_mode_only: bool) -> None:
        self._uffd = Userfaultfd(Feature.SIGBUS, user_mode_only=user_mode_only)
        self._pagemap = Pagemap.open_if_possible()

    def take_over(self, region: Region, uffd: Userfaultfd) -> None:
        """Register what `uffd` has registered of a region with this descriptor, which the region keeps from now on.

        A range can be registered with one userfaultfd at a time, and between the two a missing page would read as
        zeros. So for that moment (0.1 ms) missing pages are made inaccessible: a touch is SIGSEGV. Present pages stay
        accessible.

        A forked child is not registered with anything, so that its missing pages would read as zeros: it does not get
        them (MADV_DONTFORK: SIGSEGV). It gets the present pages, unless more than 1000 missing ranges lie among them.

        Raises:
            OSError: the kernel refused. Missing pages are inaccessible then (SIGSEGV), or a touch waits; none is zeros.
        """
        start, length = region.address, region.mapped_length
        try:
            gaps = self._pagemap.missing(start, length, region.fd, region.page_size)
            if len(gaps) > _MAX_GAPS:
                gaps = [Range(gaps[0].start, gaps[-1].end - gaps[0].start)]
            gaps = _protect(gaps, start, length)
            uffd.unregister(start, length)
        except OSError:
            region.keep(Userfaultfd.from_fd(os.dup(uffd.fileno()), uffd.features))
            raise
        if gaps:
            region.keep(self)
            self._uffd.register(start, length, RegisterMode.MISSING)
            for gap in gaps:
                libc.mprotect(gap.start, gap.length, mmap.PROT_READ | mmap.PROT_WRITE)
        for present in RangeSet(gaps).gaps(start, start + length):
            with contextlib.suppress(OSError):  # too many mappings: forked children do not get these pages either
                libc.madvise(present.start, present.length, libc.MADV_DOFORK)

    def close(self) -> None:
        """Close the descriptor. Not after `take_over`: missing pages would read as zeros."""
        self._uffd.close()
        self._pagemap.close()


def _protect(gaps: list[Range], start: int, length: int) -> list[Range]:
    """Make missing ranges inaccessible, also to forked children; return the ranges that are so.

    ENOMEM: each range splits a mapping, and the process has too many already; or a part of the region has been unmapped
    behind our back. Then all that is mapped is made inaccessible, which splits nothing.
    """
    try:
        return _inaccessible(gaps)
    except OSError:
        return _inaccessible(mapped(start, length))


def _inaccessible(ranges: list[Range]) -> list[Range]:
    for item in ranges:
        libc.madvise(item.start, item.length, libc.MADV_DONTFORK)
        libc.mprotect(item.start, item.length, libc.PROT_NONE)
    return ranges
