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
from aiouffd.lifetime import close_in_children
from aiouffd.ranges import Range, RangeSet, align_up

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.kernel.region import LayoutChange, Region

__all__ = ["Sentinel"]

_MAX_GAPS: Final = 1000
"""More missing ranges than this are treated as one: each splits a mapping, and vm.max_map_count is 65530."""


class Sentinel:
    """A descriptor with Feature.SIGBUS that takes a region over when nobody serves it any more.

    From then on a touch of a missing page is SIGBUS, and a system call on it fails with EFAULT. Present pages stay as
    they are. The cost does not depend on the length of the region, where UFFDIO_POISON would cost page tables.

    `take_over` opens nothing. So the process may drop its privileges, become undumpable or use up its descriptors after
    this object is made.

    From then on it makes the region's layout changes (`LayoutListener`). Without Feature.EVENT_REMAP the kernel
    unregisters memory that moves, and what grows where it lies is registered, too.

    Args:
        uffd: the descriptor that serves the region. If it has Feature.SIGBUS itself, there is no second one.
        pagemap: of this process; belongs to this object from now on.
        user_mode_only: open the second one so.

    Raises:
        UnsupportedError, AccessError: as `Userfaultfd`.
    """

    def __init__(self, uffd: Userfaultfd, pagemap: Pagemap, *, user_mode_only: bool) -> None:
        own = Feature.SIGBUS in uffd.features
        self._uffd = uffd if own else close_in_children(Userfaultfd(Feature.SIGBUS, user_mode_only=user_mode_only))
        self.pagemap = pagemap
        self._pid = os.getpid()
        self._registered = self._mapped = Range(0, 0)
        self._fd = -1
        self._page_size = mmap.PAGESIZE

    def take_over(self, region: Region, uffd: Userfaultfd) -> None:
        """Register what `uffd` serves of a region with this descriptor, and close `uffd`. The region keeps this object.

        If this process has closed one of them, the missing pages are made inaccessible: a touch is SIGSEGV. The kernel
        gives a region back by the descriptor only that serves it.

        A forked child is registered with nothing, so that missing pages would read as zeros there: it does not get
        them (MADV_DONTFORK: SIGSEGV). It gets the present pages, unless more than 1000 missing ranges lie among them.

        Raises:
            OSError: the kernel refused. A touch of a missing page is SIGSEGV then, or waits; it is never zeros.
        """
        region.keep(self._uffd)
        region.withheld = True
        if not (uffd.intact and self._uffd.intact):
            self._shut(region)
            region.keep(uffd)
            return
        try:
            gaps = self._hand_over(region, uffd)
        except OSError:
            region.keep(uffd)  # to close it would let a waiting thread go, with zeros
            raise
        if uffd is not self._uffd:
            uffd.close()
        self._mapped = Range(region.address, region.mapped_length)
        self._registered = self._mapped if gaps else Range(region.address, 0)
        self._fd, self._page_size = region.fd, region.page_size
        _share_present(self._mapped, gaps)
        self.pagemap.close()
        region.listen(self)

    def _shut(self, region: Region) -> None:
        """Make the missing pages of a region inaccessible, in forked children, too."""
        self.pagemap.close()
        with Pagemap.open_if_possible() as pagemap:
            gaps = pagemap.missing(region.address, region.mapped_length, -1, region.page_size)
        _protect(_bounded(gaps), region.address, region.mapped_length)
        _share_present(Range(region.address, region.mapped_length), [])

    def _hand_over(self, region: Region, uffd: Userfaultfd) -> list[Range]:
        """Register the region with this descriptor in place of `uffd`; return the missing ranges.

        A range can be registered with one userfaultfd at a time, and between the two a missing page would read as
        zeros. So for that moment (0.1 ms) missing pages are made inaccessible: a touch is SIGSEGV. Present pages stay
        accessible.
        """
        start, length = region.address, region.mapped_length
        gaps = _bounded(self.pagemap.missing(start, length, region.fd, region.page_size))
        if uffd is self._uffd:
            return gaps
        gaps = _protect(gaps, start, length)
        uffd.unregister(start, length)
        if gaps:
            self._uffd.register(start, length, RegisterMode.MISSING)
        for gap in gaps:
            libc.mprotect(gap.start, gap.length, mmap.PROT_READ | mmap.PROT_WRITE)
        return gaps

    @property
    def may_wait(self) -> bool:
        """Whether a thread may touch a missing page: it would get SIGBUS."""
        return False

    def change(self, work: Callable[[LayoutChange], None]) -> None:
        """Call `work`, which changes the region's layout."""
        if os.getpid() != self._pid:  # a forked child has the present pages, and nothing is registered there
            work(self)
            return
        # mremap(2) takes one mapping only (EFAULT). What forked children get and what they do not are two, as are what
        # is registered and what is not.
        libc.madvise(self._mapped.start, self._mapped.length, libc.MADV_DONTFORK)
        if self._registered.length:
            self._uffd.register(self._mapped.start, self._mapped.length, RegisterMode.MISSING)
        try:
            work(self)
        finally:
            self._register()
            start, length = self._registered.start, self._registered.length
            with Pagemap.open_if_possible() as pagemap:
                _share_present(self._mapped, pagemap.missing(start, length, self._fd, self._page_size))

    def removed(self, start: int, length: int) -> None:
        """Nothing: what is emptied is missing, and a touch of it SIGBUS."""

    def moved(self, address: int, length: int) -> None:
        """Take note that the region lies at `address` now, and has `length` bytes. What was added is zeros."""
        if os.getpid() == self._pid:
            self._mapped = Range(address, align_up(length, self._page_size))
            self._registered = Range(address, min(self._registered.length, self._mapped.length))
            self._register()

    def _register(self) -> None:
        kept, mapped = self._registered, self._mapped
        if kept.length:
            self._uffd.register(kept.start, kept.length, RegisterMode.MISSING)
        if kept.end < mapped.end:
            self._uffd.unregister(kept.end, mapped.end - kept.end)

    def close(self) -> None:
        """Close what it has opened. Not after `take_over`."""
        self._uffd.close()
        self.pagemap.close()


def _bounded(gaps: list[Range]) -> list[Range]:
    return gaps if len(gaps) <= _MAX_GAPS else [Range.between(gaps[0].start, gaps[-1].end)]


def _share_present(region: Range, gaps: list[Range]) -> None:
    """Let forked children have the pages of a region outside of `gaps`, and not those in it."""
    with contextlib.suppress(OSError):  # too many mappings: children do not get these pages
        for gap in gaps:
            libc.madvise(gap.start, gap.length, libc.MADV_DONTFORK)
        for present in RangeSet(gaps).gaps(region.start, region.end):
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
