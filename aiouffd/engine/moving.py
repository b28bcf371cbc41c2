"""Whole huge pages of memory of this process: filled beside it, and then moved there (UFFDIO_MOVE, Linux 6.8).

UFFDIO_COPY allocates, fills and maps one small page after the other, which takes most of its time. A huge page is
allocated at once, and moved by one entry of the page table. That takes less than half as long, and what is there then
is a huge page, which is touched with fewer TLB misses.

It must be private memory of the process that moves it. And it must have come as a huge page: the kernel may have none,
or may not be allowed to, and to move small ones takes longer than a COPY. So that is looked up before.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from typing import TYPE_CHECKING, Final, Protocol

from aiouffd.engine.statistics import Counter
from aiouffd.kernel import abi, files
from aiouffd.kernel.libc import copy_memory
from aiouffd.kernel.memory import address_of
from aiouffd.kernel.region import HUGE_PAGE

if TYPE_CHECKING:
    from aiouffd.engine.statistics import Counters
    from aiouffd.kernel.pagemap import Pagemap

__all__ = ["Moving", "huge_pages_come"]

_ENABLED: Final = "/sys/kernel/mm/transparent_hugepage/enabled"
_LONGEST_PAUSE: Final = 512  # huge pages, 1 GiB


class _Uffd(Protocol):
    def try_copy(self, dst: int, src: int, length: int, mode: int) -> int: ...
    def try_move(self, dst: int, src: int, length: int, mode: int) -> int: ...


class _Page:
    """Memory of this process for one huge page, which is moved away, and comes anew."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.address: int = address_of(self._memory)

    def comes(self, pagemap: Pagemap, source: int) -> bool:
        """Have it come with the bytes at an address; tell whether it is huge, and has them."""
        # The kernel fills the rest with zeros before what is touched. Touched at its end that takes 80 us, from the
        # first page to the last; touched at its beginning twice as long, from the last to the first (Linux 6.18).
        ctypes.memset(self.address + HUGE_PAGE - 1, 0, 1)  # without the GIL
        if not _is_huge(pagemap, self.address):
            return False
        try:
            copy_memory(self.address, source, HUGE_PAGE)  # no signal, where a source's memory is gone
        except OSError:
            return False
        return True


def _new_page() -> _Page | None:
    with contextlib.suppress(OSError):  # no room: RLIMIT_AS, vm.max_map_count
        return _Page()
    return None


def _is_huge(pagemap: Pagemap, address: int) -> bool:
    try:
        found = pagemap.scan(address, HUGE_PAGE, mask=abi.PAGE_IS_HUGE)
    except OSError:  # there is no /proc
        return False
    return [each.length for each in found] == [HUGE_PAGE]


def huge_pages_come() -> bool:
    """Tell whether the kernel gives huge pages to memory that asks for them."""
    try:
        return b"[never]" not in files.read(_ENABLED)
    except OSError:  # a kernel without them
        return False


class Moving:
    """A COPY that moves the huge pages of its target.

    What cannot be moved is copied: where pages are there already, or memory is locked or protected, or where a child
    was forked just now, which has the huge page in common; or where no huge page comes. If nothing was moved, some are
    copied until the next is tried, each time twice as many.

    Args:
        uffd: of private memory of this process, of small pages.
        pagemap: of this process.
        counters: where to count.
    """

    def __init__(self, uffd: _Uffd, pagemap: Pagemap, counters: Counters) -> None:
        self._uffd, self._pagemap, self._words = uffd, pagemap, counters.words
        self._page: _Page | None = None
        self._pause = self._left = 0

    def try_copy(self, dst: int, src: int, length: int, mode: int, *, given: bool = False) -> int:
        """As `Userfaultfd.try_copy`; `given`: nobody else reads the source any more, which may be moved itself."""
        if mode & ~abi.COPY_MODE_DONTWAKE:  # no MOVE comes write-protected
            return self._uffd.try_copy(dst, src, length, mode)
        done = 0
        while done < length:
            at, left = dst + done, length - done
            size = min(left, HUGE_PAGE - at % HUGE_PAGE)
            if size == HUGE_PAGE and (moved := self._move(at, src + done, mode, given=given)):
                done += moved
                continue
            if left - size < HUGE_PAGE:
                size = left
            result = self._uffd.try_copy(at, src + done, size, mode)
            if result < 0:
                return done or result
            done += result
            if result < size:
                break
        return done

    def _move(self, dst: int, src: int, mode: int, *, given: bool) -> int:
        """Move a huge page with the bytes, or fill one and move it; return how many bytes were moved."""
        if self._left:
            self._left -= 1
            return 0
        moved = 0
        if given and src % HUGE_PAGE == 0 and _is_huge(self._pagemap, src):
            moved = max(self._uffd.try_move(dst, src, HUGE_PAGE, mode), 0)
        else:
            page, self._page = self._page or _new_page(), None
            if page is not None and page.comes(self._pagemap, src):
                moved = max(self._uffd.try_move(dst, page.address, HUGE_PAGE, mode), 0)
            if moved == HUGE_PAGE:
                self._page = page  # else that is used no more: no huge page comes where single ones were moved away
        self._words[Counter.MOVES] += moved == HUGE_PAGE
        self._left = self._pause = 0 if moved else min(2 * self._pause + 1, _LONGEST_PAUSE)
        return moved
