"""A userfaultfd with Feature.SIGBUS, which has no messages and no sleepers, used like one that has them."""

from __future__ import annotations

import asyncio
import errno
import os
from typing import TYPE_CHECKING, Self

from aiouffd.engine.resolver import DONTWAKE
from aiouffd.kernel import abi
from aiouffd.kernel.pagemap import Pagemap
from aiouffd.kernel.userfaultfd import Userfaultfd
from aiouffd.native import faults

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PipeUserfaultfd"]

_SHORT = 64 << 10  # 20 us: to release the GIL for less costs more than it gives


class PipeUserfaultfd(Userfaultfd):
    """Its messages come through a pipe from signal handlers, and WAKE wakes the futexes on which these wait.

    It is used on one loop. Other threads may `try_copy` with DONTWAKE.
    """

    _pipe: int
    _loop: asyncio.AbstractEventLoop
    _copy: Callable[[int, int, int, int, int], int]
    _later: list[tuple[int, int]]
    _refuse: Callable[[int], None] | None
    _page: int

    @classmethod
    def joined(
        cls,
        uffd: Userfaultfd,
        pipe: int,
        loop: asyncio.AbstractEventLoop,
        refuse: Callable[[int], None] | None = None,
        *,
        page: int = 0,
    ) -> Self:
        """Work on a duplicate of `uffd`.

        Args:
            uffd: stays the caller's.
            pipe: where messages are read; likewise.
            loop: runs in the thread that uses this object.
            refuse: called with a page in place of UFFDIO_POISON, which the kernel lacks; None: it has it.
            page: bytes of a page of shared memory, which may be in the file and not be mapped: no message says so. 0:
                the memory is private.
        """
        self = cls.from_fd(os.dup(uffd.fileno()), uffd.features)
        self._pipe = pipe
        self._loop = loop
        self._copy = faults.copying()
        self._later = []
        self._refuse = refuse
        self._page = page
        return self

    def fileno(self) -> int:
        """Return where messages are read."""
        return self._pipe

    def try_copy(self, dst: int, src: int, length: int, mode: int) -> int:
        """UFFDIO_COPY."""
        if length <= _SHORT:
            result = self._copy(self._fd, dst, src, length, mode | DONTWAKE)
        else:
            result = super().try_copy(dst, src, length, mode | DONTWAKE)
        return self._woken(dst, self._mapped(dst, result, mode), mode)

    def try_move(self, dst: int, src: int, length: int, mode: int) -> int:
        """UFFDIO_MOVE."""
        return self._woken(dst, super().try_move(dst, src, length, mode | DONTWAKE), mode)

    def try_zeropage(self, start: int, length: int, mode: int) -> int:
        """UFFDIO_ZEROPAGE."""
        result = super().try_zeropage(start, length, mode | DONTWAKE)
        return self._woken(start, self._mapped(start, result, mode), mode)

    def try_continue(self, start: int, length: int, mode: int) -> int:
        """UFFDIO_CONTINUE."""
        return self._woken(start, super().try_continue(start, length, mode | DONTWAKE), mode)

    def try_writeprotect(self, start: int, length: int, mode: int) -> int:
        """UFFDIO_WRITEPROTECT. To lift a protection wakes the threads that want to write."""
        result = super().try_writeprotect(start, length, mode)
        return self._woken(start, result, mode & DONTWAKE)

    def try_poison(self, start: int, length: int, mode: int) -> int:
        """UFFDIO_POISON; or the same in the handler, where the kernel lacks it."""
        if self._refuse is not None:
            return self._woken(start, self._refuse_missing(start, length), mode)
        return self._woken(start, super().try_poison(start, length, mode | DONTWAKE), mode)

    def _refuse_missing(self, start: int, length: int) -> int:
        """Refuse a page; return -EEXIST, as UFFDIO_POISON does, if it is present."""
        assert self._refuse is not None
        with Pagemap.open_if_possible() as pagemap:
            if not pagemap.missing(start, length):
                return -errno.EEXIST
        self._refuse(start)
        return length

    def try_wake(self, start: int, length: int) -> int:
        """Wake the threads that wait in their signal handlers.

        A thread that is woken wants the GIL, which the loop has until it sleeps. So threads whose pages have come by a
        task are woken when all tasks of this turn have run, or each would be woken twice.
        """
        if asyncio.current_task(self._loop) is None:
            faults.wake(start, length)
            return length
        if not self._later:
            self._loop.call_soon(self._wake_all)
        self._later.append((start, length))
        return length

    def _wake_all(self) -> None:
        later, self._later = self._later, []
        for start, length in later:
            faults.wake(start, length)

    def _mapped(self, start: int, result: int, mode: int) -> int:
        """Map a page that the file has already, for which a thread may have faulted."""
        if result != -errno.EEXIST or not self._page:
            return result
        done = super().try_continue(start, self._page, DONTWAKE | (mode & abi.COPY_MODE_WP and abi.CONTINUE_MODE_WP))
        return done if done > 0 else result

    def _woken(self, start: int, result: int, mode: int) -> int:
        if result > 0 and not mode & DONTWAKE:
            self.try_wake(start, result)
        return result
