"""A region that is registered with a userfaultfd, and what becomes of its missing pages when it is no longer."""

from __future__ import annotations

import contextlib
import mmap
import threading
from typing import TYPE_CHECKING, Final

from aiouffd.errors import ClosedError, UffdError
from aiouffd.kernel import abi, libc
from aiouffd.kernel.abi import Feature, RegisterMode
from aiouffd.kernel.memory import mapped
from aiouffd.kernel.pagemap import Pagemap
from aiouffd.kernel.populated import drop_populated_zeros
from aiouffd.kernel.userfaultfd import Userfaultfd
from aiouffd.kernel.write_tracker import collect
from aiouffd.ranges import Range, RangeSet

if TYPE_CHECKING:
    from aiouffd.kernel.region import Region

__all__ = ["Registration"]

_MAX_GAPS: Final = 1000
"""More missing ranges than this are treated as one: each splits a mapping, and vm.max_map_count is 65530."""


class Registration:
    """A registered region. Everything that `settle` needs is opened here.

    So a process may drop its privileges, become undumpable or use up its descriptors before it settles.

    Args:
        region: registered with no other userfaultfd.
        features: what the descriptor must have.
        modes: which faults are reported.
        user_mode_only: open the descriptor so.
        inherited: forked children have the region, and somebody reads Feature.EVENT_FORK to serve them.

    Raises:
        UnsupportedError, AccessError, BusyError, OperationError: as `Userfaultfd` and its `register`.
        PopulatedError: the kernel has filled the region with zeros.
    """

    def __init__(
        self, region: Region, features: Feature, modes: RegisterMode, *, user_mode_only: bool, inherited: bool
    ) -> None:
        self._region = region
        self._lock = threading.Lock()
        drop_populated_zeros(region)
        region.never_served = False
        self._pagemap = Pagemap.open_if_possible()
        uffd = Userfaultfd(features, user_mode_only=user_mode_only)
        self._uffd: Userfaultfd | None = uffd
        self._sentinel = uffd  # what gives SIGBUS after `settle`
        try:
            if Feature.SIGBUS not in features:
                self._sentinel = Userfaultfd(Feature.SIGBUS, user_mode_only=user_mode_only)
            if not inherited:
                libc.madvise(region.address, region.mapped_length, libc.MADV_DONTFORK)
            uffd.register(region.address, region.mapped_length, modes)
        except BaseException:
            self.undo()
            raise

    @property
    def uffd(self) -> Userfaultfd:
        """The descriptor; it stays this object's. ClosedError once the region is settled."""
        if self._uffd is None:
            raise ClosedError("the region is registered no longer")
        return self._uffd

    def collect(self) -> list[Range]:
        """Return the pages written since the last call; see `aiouffd.kernel.write_tracker.collect`."""
        _ = self.uffd
        # A missing page counts as written for the kernel, since it is not protected; not for us.
        return collect(self._region, self._pagemap, anyof=abi.PAGE_IS_PRESENT | abi.PAGE_IS_SWAPPED)

    def undo(self) -> None:
        """Unregister the region, and close the descriptor: it is as it was before."""
        uffd = self._take()
        if uffd is not None:
            with contextlib.suppress(UffdError):
                uffd.unregister(self._region.address, self._region.mapped_length)
            self._close(uffd)

    def settle(self, *, sigbus: bool) -> None:
        """Decide what a touch of a missing page is from now on: SIGBUS, or zeros. The second call does nothing.

        SIGBUS comes from a descriptor with Feature.SIGBUS that the region keeps; a system call on a missing page fails
        with EFAULT. Present pages stay as they are. The cost does not depend on the length of the region, where
        UFFDIO_POISON would cost page tables.

        A forked child is registered with nothing, so that missing pages would read as zeros there: it does not get
        them (MADV_DONTFORK: SIGSEGV). It gets the present pages, unless more than 1000 missing ranges lie among them.

        Raises:
            OSError: the kernel refused. A touch of a missing page is SIGSEGV then, or waits; it is never zeros.
        """
        uffd = self._take()
        if uffd is None:
            return
        if not sigbus:
            uffd.unregister(self._region.address, self._region.mapped_length)
            self._close(uffd)
            return
        self._region.keep(self._sentinel)
        try:
            gaps = self._hand_over(uffd)
        except OSError:
            self._region.keep(uffd)  # to close it would let a waiting thread go with zeros
            raise
        if self._sentinel is not uffd:
            uffd.close()
        self._pagemap.close()
        self._share_present(gaps)

    def _hand_over(self, uffd: Userfaultfd) -> list[Range]:
        """Register the region with the sentinel in place of `uffd`; return the missing ranges.

        A range can be registered with one userfaultfd at a time, and between the two a missing page would read as
        zeros. So for that moment (0.1 ms) missing pages are made inaccessible: a touch is SIGSEGV. Present pages stay
        accessible.
        """
        region = self._region
        start, length = region.address, region.mapped_length
        gaps = self._pagemap.missing(start, length, region.fd, region.page_size)
        if len(gaps) > _MAX_GAPS:
            gaps = [Range(gaps[0].start, gaps[-1].end - gaps[0].start)]
        if self._sentinel is uffd:
            return gaps
        gaps = _protect(gaps, start, length)
        uffd.unregister(start, length)
        if gaps:
            self._sentinel.register(start, length, RegisterMode.MISSING)
        for gap in gaps:
            libc.mprotect(gap.start, gap.length, mmap.PROT_READ | mmap.PROT_WRITE)
        return gaps

    def _share_present(self, gaps: list[Range]) -> None:
        """Let forked children have the pages outside of `gaps`, and not those in it."""
        start, length = self._region.address, self._region.mapped_length
        with contextlib.suppress(OSError):  # too many mappings: children do not get these pages
            for gap in gaps:
                libc.madvise(gap.start, gap.length, libc.MADV_DONTFORK)
            for present in RangeSet(gaps).gaps(start, start + length):
                libc.madvise(present.start, present.length, libc.MADV_DOFORK)

    def _take(self) -> Userfaultfd | None:
        """Take the descriptor away; a second thread gets None."""
        with self._lock:
            uffd, self._uffd = self._uffd, None
        return uffd

    def _close(self, uffd: Userfaultfd) -> None:
        uffd.close()
        self._sentinel.close()
        self._pagemap.close()
        with contextlib.suppress(OSError):  # a part of the region has been unmapped
            libc.madvise(self._region.address, self._region.mapped_length, libc.MADV_DOFORK)


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
