"""Ioctls until a run of pages is resolved: one state machine for everything that the kernel may answer.

What it answers, and what that means here:

- all bytes: done.
- some bytes: a partial copy; go on behind it.
- EEXIST: the first page is there already (a repeated message, a race with another cause): skip it, and WAKE it,
  since EEXIST wakes nobody. Where there is one of a run to be copied, there are more: one call copies what is missing.
- EAGAIN: the target's layout is changing. The run is put off: the events must be read first, and then the thread
  that caused them must have run. Nothing makes the descriptor readable again, so the owner of the run retries on a
  timer.
- ENOENT: no mapping covers the run, or it spans two (any mprotect or madvise may have split it): it is halved down to
  a page. A page that no mapping covers is gone, and its sleepers are woken to find out themselves. The same for
  CONTINUE and EFAULT: the file does not have the page any more.
- ESRCH, ENOSPC: the process is gone.
- anything else (ENOMEM, EFAULT): returned to the owner of the run.
"""

from __future__ import annotations

import errno
import mmap
from typing import TYPE_CHECKING, ClassVar, Protocol

from aiouffd.engine.runs import Given, Op
from aiouffd.engine.statistics import Counter
from aiouffd.engine.two_threads import two_threads
from aiouffd.kernel import abi

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Iterable

    from aiouffd.engine.moving import Moving
    from aiouffd.engine.runs import Run
    from aiouffd.engine.statistics import Counters
    from aiouffd.kernel.userfaultfd import Copied

__all__ = ["DONTWAKE", "Resolver"]

DONTWAKE = 1
"""UFFDIO_*_MODE_DONTWAKE: bit 0 in COPY, ZEROPAGE, CONTINUE and POISON alike."""

_EAGAIN, _EEXIST, _ENOENT, _EFAULT = -errno.EAGAIN, -errno.EEXIST, -errno.ENOENT, -errno.EFAULT
_GONE = (-errno.ESRCH, -errno.ENOSPC)
_EAGAIN_COUNTER, _EEXIST_COUNTER, _ENOENT_COUNTER = int(Counter.EAGAIN), int(Counter.EEXIST), int(Counter.ENOENT)
_LEAST_BITS, _MOST_BITS = 31, 58  # an address has more than the first on any machine, and fewer than the last
_COPIES, _PARTIAL, _WAKES = int(Counter.COPIES), int(Counter.PARTIAL), int(Counter.WAKES)
_OP_COUNTER = tuple(
    int(Counter[name]) for name in ("COPIES", "ZEROPAGES", "CONTINUES", "POISONS", "UNPROTECTS", "PROTECTS")
)


class _Uffd(Protocol):
    def try_copy(self, dst: int, src: int, length: int, mode: int) -> int: ...
    def try_copy_missing(self, dst: int, src: int, length: int, mode: int, page: int) -> Copied: ...
    def try_zeropage(self, start: int, length: int, mode: int) -> int: ...
    def try_continue(self, start: int, length: int, mode: int) -> int: ...
    def try_poison(self, start: int, length: int, mode: int) -> int: ...
    def try_writeprotect(self, start: int, length: int, mode: int) -> int: ...
    def try_writeprotects(self, ranges: array[int]) -> int: ...
    def try_wake(self, start: int, length: int) -> int: ...


class Resolver:
    """Resolves runs on one descriptor.

    Args:
        uffd: a `Userfaultfd` or anything with its `try_*` methods.
        page_size: of the mapping, in bytes.
        counters: where to count what the kernel answered.
        mode: further mode bits of COPY and CONTINUE (2: write-protected from the start).

    Attributes:
        minor_mode: those of CONTINUE.
        gone: how many pages no mapping covered, or their file had no longer.
        moving: does COPYs; None: the descriptor does.
    """

    __slots__ = ("_counters", "_modes", "_page", "_tries", "_uffd", "_words", "gone", "minor_mode", "mode", "moving")

    _bits: ClassVar[int] = _MOST_BITS - 1  # how far addresses went in the space that was woken last

    def __init__(self, uffd: _Uffd, page_size: int, counters: Counters, mode: int = 0) -> None:
        self._uffd = uffd
        self.moving: Moving | None = None
        self._page = page_size
        self.gone: int = 0
        self._counters = counters
        self._words = counters.words
        self.mode: int = mode
        self._set_modes(mode)
        self._tries = (
            uffd.try_zeropage,  # COPY has a source, and is called by name
            uffd.try_zeropage,
            uffd.try_continue,
            uffd.try_poison,
            uffd.try_writeprotect,
            uffd.try_writeprotect,
        )

    def _set_modes(self, minor: int) -> None:
        mode, silent, lift = self.mode, abi.WRITEPROTECT_MODE_DONTWAKE, abi.WRITEPROTECT_MODE_WP
        self.minor_mode: int = minor
        self._modes = (  # by `wake` and operation; PROTECT wakes nobody
            (DONTWAKE | mode, DONTWAKE, DONTWAKE | minor, DONTWAKE, silent, lift),
            (mode, 0, minor, 0, 0, lift),
        )

    def protect_minor(self) -> None:
        """From now on, what the file has comes write-protected: a page may be protected that is not mapped."""
        self._set_modes(self.mode | abi.COPY_MODE_WP)

    def resolve(self, run: Run, *, wake: bool) -> int:
        """Work a run off until it is resolved or cannot go on now.

        Returns:
            0: resolved: each page is there, or its mapping is gone. A negated errno otherwise: EAGAIN (retry
            later), ESRCH (the process is gone), or what the kernel refused `run.dst` with.
        """
        words, page = self._words, self._page
        mode = self._modes[wake][run.op]
        chunk, has_present = run.left, False
        while run.left > 0:
            chunk = min(chunk, run.left)
            if has_present and chunk > page:
                result = self._copy_missing(run, chunk, mode, wake=wake)
                if result == 0:
                    chunk = run.left
                    continue
                chunk = min(chunk, run.left)
            elif run.op == Op.COPY:
                words[_COPIES] += 1
                result = self._copy(run, chunk, mode)
                has_present = self.moving is None and (result == _EEXIST or 0 < result < chunk)
            else:
                words[_OP_COUNTER[run.op]] += 1
                result = self._tries[run.op](run.dst, chunk, mode)
                if result == _EFAULT and run.op == Op.CONTINUE:
                    result = _ENOENT  # the file has lost the page since: its sleepers shall find out themselves
            if result > 0:
                run.advance(result)
                if result < chunk:
                    words[_PARTIAL] += 1
                else:
                    chunk = run.left
            elif result == _EEXIST:
                words[_EEXIST_COUNTER] += 1
                if wake:
                    self.wake(run.dst, page)
                self.uncount(run, page)
                run.advance(page)
            elif result == _ENOENT:
                words[_ENOENT_COUNTER] += 1
                if chunk > page:
                    chunk = max(page, chunk // 2 & -page)
                    continue
                self.gone += 1
                self.wake(run.dst, page)
                self.uncount(run, page)
                run.advance(page)
            elif result in (_EAGAIN, 0):
                words[_EAGAIN_COUNTER] += 1
                return _EAGAIN
            elif result in _GONE:
                return -errno.ESRCH
            else:
                return result
        return 0

    def _copy(self, run: Run, chunk: int, mode: int) -> int:
        if self.moving is None:
            return self._uffd.try_copy(run.dst, run.src, chunk, mode)
        return self.moving.try_copy(run.dst, run.src, chunk, mode, given=isinstance(run.owner, Given))

    def _copy_missing(self, run: Run, chunk: int, mode: int, *, wake: bool) -> int:
        """COPY what is missing of the next part of a run; return 0, or the negated errno of where the run is then."""
        came, page = self._uffd.try_copy_missing(run.dst, run.src, chunk, mode, self._page), self._page
        self._words[_COPIES] += came.copies
        self._words[_PARTIAL] += came.partial
        self._words[_EEXIST_COUNTER] += came.present
        if wake and came.present:
            self.wake(came.first, came.last + page - came.first)
        self.uncount(run, came.present * page)
        run.advance(came.passed)
        return came.result

    def copy_by_two(
        self, runs: Iterable[Run], *, wake: bool, others_wait: Callable[[], bool | None] = lambda: None
    ) -> tuple[list[tuple[Run, int]], list[Run]]:
        """COPY large runs by two threads: see `TwoThreads.copy`, also for what is returned.

        Their bytes are in memory that is not the loop's own. What the kernel has refused, it is asked for again.
        """
        words, mode = self._words, self._modes[wake][Op.COPY]
        parts, left = two_threads.copy(self._uffd.try_copy, runs, mode, self._page, others_wait)
        words[_OP_COUNTER[Op.COPY]] += sum(done > 0 for _, done in parts)
        words[_PARTIAL] += sum(done > 0 < part.left for part, done in parts)
        return parts, left

    def protect_many(self, ranges: array[int]) -> int:
        """PROTECT several (start, length) of pages; return how many were done, before the first that was not."""
        done = self._uffd.try_writeprotects(ranges)
        self._words[_OP_COUNTER[Op.PROTECT]] += done
        return done

    def uncount(self, run: Run, length: int) -> None:
        """Count `length` bytes of a run as not brought after all: they were counted when it was made."""
        if run.purpose is not None and run.op <= Op.CONTINUE:  # the others fill nothing
            pages = length // self._page
            zeros = pages if run.op == Op.ZEROPAGE else 0
            # Bytes that are copied out of the source's own memory are taken from it only then.
            fetched = length if run.op == Op.COPY and run.owner is None else 0
            self._counters.uncount(run.purpose.cause, pages, zeros, fetched)

    def wake(self, start: int, length: int) -> None:
        """WAKE a range. Never refused by a living process: the layout is not looked at."""
        self._words[_WAKES] += 1
        self._uffd.try_wake(start, length)

    def wake_all(self, lowest: int) -> None:
        """WAKE every sleeper from an address on. How far addresses go depends on the machine: the kernel says it.

        In general that is as far as for the space before: what is refused is asked for once then, and not ten times.
        """
        self._words[_WAKES] += 1
        bits = Resolver._bits + 1
        while bits < _MOST_BITS and self._wakes(lowest, bits):
            bits += 1
        while bits > _LEAST_BITS and not self._wakes(lowest, bits - 1):
            bits -= 1
        Resolver._bits = bits - 1

    def _wakes(self, lowest: int, bits: int) -> bool:
        end = (1 << bits) - mmap.PAGESIZE  # of x86-64's addresses, too: they lack the last page
        return self._uffd.try_wake(lowest, end - lowest) != -errno.EINVAL
