"""The userfaultfd of a region, from entering a Monitor until what is missing has been settled."""

from __future__ import annotations

import contextlib
import errno
import mmap
import threading
from typing import TYPE_CHECKING

from aiouffd.errors import AccessError, BusyError, ClosedError, PopulatedError, UffdError
from aiouffd.kernel import abi, libc
from aiouffd.kernel.abi import Feature, RegisterMode
from aiouffd.kernel.pagemap import Pagemap
from aiouffd.kernel.populated import drop_populated_zeros
from aiouffd.kernel.sigbus import Sentinel
from aiouffd.kernel.unserved import unserved_mappings
from aiouffd.kernel.userfaultfd import Userfaultfd, kernel_features
from aiouffd.kernel.write_tracker import WRITE_TRACKING, collect
from aiouffd.lifetime import close_in_children
from aiouffd.monitor.memfd_lock import MemfdLock

if TYPE_CHECKING:
    from aiouffd.engine.protect import WrittenPages
    from aiouffd.kernel.region import Region
    from aiouffd.monitor.held import Held
    from aiouffd.ranges import Range

__all__ = ["Registration"]


class Registration:
    """Registers a region with a userfaultfd of its own.

    Args:
        held: the region, which must not be registered yet.
        features: that the engine needs.
        shared: private memory becomes shared, where pages are dropped: they are by another process.
        writes: which writes are told: "tracked" (WP_ASYNC), "served", "noted" and "saved" (a message each), or "" for
            none.
        children: forked children have the region from `is_served` on; else it is not theirs (MADV_DONTFORK). None:
            where this user may (CAP_SYS_PTRACE).
        user_mode_only: the caller agrees that system calls on missing pages fail.
        serves_system_calls: the engine would serve them; else a descriptor for user mode only will do.

    Raises:
        BusyError, ClosedError: the region is served already, or closed; or its memfd is another Monitor's.
        UnsupportedError, AccessError: as `Userfaultfd`.
        PopulatedError: the kernel has filled the region with zeros; or pages are there that would be saved.
    """

    def __init__(
        self,
        held: Held,
        features: Feature,
        *,
        writes: str,
        children: bool | None,
        user_mode_only: bool,
        serves_system_calls: bool,
        shared: bool = False,
    ) -> None:
        region = held.region
        if region.monitor is not None:
            raise BusyError("UFFDIO_REGISTER", region.address, region.mapped_length, errno.EBUSY)
        if region.closed:
            raise ClosedError("the region is closed")
        available = kernel_features()
        self._held = held
        self.can_poison: bool = Feature.POISON in available
        self.modes: RegisterMode = RegisterMode.MISSING
        self._lock = threading.RLock()  # a signal handler may fork anywhere, and that may settle the memory
        self._warned: set[int] = set()
        self.written: WrittenPages | None = None
        self._memfd: MemfdLock | None = None
        if writes:
            self.modes |= RegisterMode.WP
            features |= WRITE_TRACKING if writes == "tracked" else Feature.PAGEFAULT_FLAG_WP
        features |= (Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM) & available  # for snapshots
        pagemap = Pagemap.open_if_possible()  # now: privileges may be dropped later
        drop_populated_zeros(region, pagemap)
        if writes in ("noted", "saved") and region.fd < 0:
            # Unless they are wanted: they have no thread that drops private pages, and would write into shared ones.
            children = children is True
            if shared:
                _share(region, pagemap)
        if region.fd >= 0 and (minor := _minor(region) & available):
            # What another process has brought into the file is mapped by CONTINUE, and not fetched again.
            features |= minor
            self.modes |= RegisterMode.MINOR
        region.never_served = False
        try:
            uffd = _open(features, children=children, user_mode_only=user_mode_only)
        except AccessError:
            if serves_system_calls or user_mode_only:
                raise
            user_mode_only = True
            uffd = _open(features, children=children, user_mode_only=user_mode_only)
        close_in_children(uffd)
        self.children: bool = Feature.EVENT_FORK in uffd.features
        self._sentinel = Sentinel(uffd, pagemap, user_mode_only=user_mode_only)
        self._uffd: Userfaultfd | None = uffd
        try:
            self._register(uffd, pagemap, writes)
        except BaseException:
            self.abandon()
            raise

    def _register(self, uffd: Userfaultfd, pagemap: Pagemap, writes: str) -> None:
        region, drops = self.region, writes in ("noted", "saved")
        if region.fd >= 0:
            self._memfd = MemfdLock(region, alone=drops)
        # No child's until `is_served`: a finalizer or signal handler may fork here, and would wait for a reader.
        region.withheld = True
        libc.madvise(region.address, region.mapped_length, libc.MADV_DONTFORK)
        uffd.register(region.address, region.mapped_length, self.modes)
        if drops:
            self.written = self._notes(pagemap, saved=writes == "saved")

    def _notes(self, pagemap: Pagemap, *, saved: bool) -> WrittenPages:
        """Return notes of what was written, in which all is that was there before: the source does not have it."""
        from aiouffd.engine.protect import WrittenPages  # noqa: PLC0415 - few Monitors drop pages

        region = self.region
        written = WrittenPages.create(region.mapped_length, region.page_size)
        for run in pagemap.present(region.address, region.mapped_length, region.fd, region.page_size):
            written.note(run.start - region.address, run.length)
            if saved:
                why = "pages of the region are there already, and would overwrite the source's"
                raise PopulatedError(why, "Touch it after the Monitor was entered")
        return written

    @property
    def region(self) -> Region:
        """The region; raises ClosedError where it is gone."""
        return self._held.region

    @property
    def uffd(self) -> Userfaultfd:
        """The descriptor; it stays this object's.

        Raises:
            ClosedError: the memory has been settled.
        """
        if self._uffd is None:
            raise ClosedError("the Monitor was left")
        return self._uffd

    def collect(self) -> list[Range]:
        """Return the offsets of the pages written since the last call, and protect them again."""
        _ = self.uffd
        # A page that is missing counts as written for the kernel, since it is not protected; not for us.
        present = abi.PAGE_IS_PRESENT | abi.PAGE_IS_SWAPPED
        return collect(self.region, self._sentinel.pagemap, anyof=present)

    def warn_of_unserved(self, found: int) -> None:
        """Warn once of each of the other mappings of the region's memory in this process: they can put zeros there.

        Args:
            found: how many pages were in the file before they were touched in the region.
        """
        if not found:
            return
        for mapping in unserved_mappings(self.region.fd):
            if mapping.start in self._warned:
                continue
            self._warned.add(mapping.start)
            import logging  # noqa: PLC0415 - 3 ms of a program's start, and few hear of this

            logging.getLogger("aiouffd").warning(
                "the memfd of %r is mapped at %#x without a Monitor. A missing page that was touched there is a page of"
                " zeros now, for every process. Pages in the file before they were touched here: %d. Give each"
                " mapping a Monitor (Region.from_fd), or touch only pages that are present",
                *(self.region, mapping.start, found),
            )

    def settle(self, *, sigbus: bool) -> None:
        """Decide what a touch of a missing page is from now on: SIGBUS, or zeros. The first call counts.

        Thread-safe: the engine may lose its pager while the Monitor is being left.
        """
        region = self.region
        if (uffd := self._take()) is None:
            return
        region.listen(None)
        if sigbus or not uffd.intact:  # what cannot be given back is no zeros
            self._sentinel.take_over(region, uffd)
        else:
            with uffd:
                self._give_back(uffd)
            self._sentinel.close()

    def abandon(self) -> None:
        """Undo the registration: nothing has been served."""
        if (uffd := self._take()) is not None:
            with uffd, contextlib.suppress(UffdError):
                self._give_back(uffd)
            self._sentinel.close()

    def _give_back(self, uffd: Userfaultfd) -> None:
        region = self.region
        try:
            uffd.unregister(region.address, region.mapped_length)
        finally:
            self._let_children_have_it()

    def is_served(self) -> None:
        """Note that somebody reads the descriptor: from now on children have the region, if they are served."""
        with self._lock:
            if self.children and self._uffd is not None:  # not settled meanwhile
                self._let_children_have_it()

    def _let_children_have_it(self) -> None:
        region = self.region
        libc.madvise(region.address, region.mapped_length, libc.MADV_DOFORK)
        region.withheld = False

    def _take(self) -> Userfaultfd | None:
        with self._lock:
            uffd, self._uffd = self._uffd, None
            memfd, self._memfd = self._memfd, None
        if memfd is not None:
            memfd.close()
        return uffd


def _share(region: Region, pagemap: Pagemap) -> None:
    from aiouffd.kernel.sharing import share  # noqa: PLC0415 - few Monitors drop pages

    share(region, pagemap)


def _open(features: Feature, *, children: bool | None, user_mode_only: bool) -> Userfaultfd:
    if children is not False:
        try:
            return Userfaultfd(features | Feature.EVENT_FORK, user_mode_only=user_mode_only)
        except AccessError:
            if children:
                raise
    return Userfaultfd(features, user_mode_only=user_mode_only)


def _minor(region: Region) -> Feature:
    return Feature.MINOR_SHMEM if region.page_size == mmap.PAGESIZE else Feature.MINOR_HUGETLBFS
