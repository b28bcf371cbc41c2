"""Ioctls until a run of pages is resolved: one state machine for everything that the kernel may answer.

What it answers, and what that means here:

- all bytes: done.
- some bytes: a partial copy; go on behind it.
- EEXIST: the first page is there already (a repeated message, a race with another cause): skip it, and WAKE it,
  since EEXIST wakes nobody.
- EAGAIN: the target's layout is changing. Put off: the events must be read first, and then the thread that
  caused them must have run. Nothing will make the descriptor readable again, so whoever owns the run retries
  on a timer.
- ENOENT: no mapping covers the run, or it spans two (any mprotect or madvise may have split it): halve it down to
  a page; a page that is covered by nothing is gone, and its sleepers are woken to find out themselves. The same for
  CONTINUE and EFAULT: the file does not have the page any more.
- ESRCH, ENOSPC: the process is gone, and with it all need.
- anything else (ENOMEM, EFAULT): reported to the owner of the run.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Protocol

from aiouffd.engine.statistics import Counter
from aiouffd.kernel import abi

if TYPE_CHECKING:
    from aiouffd.engine.statistics import Counters

__all__ = ["DONTWAKE", "Op", "Resolver", "Run", "merge"]

DONTWAKE = 1
"""UFFDIO_*_MODE_DONTWAKE: bit 0 in COPY, ZEROPAGE, CONTINUE and POISON alike."""

_EAGAIN, _EEXIST, _ENOENT, _EFAULT = -errno.EAGAIN, -errno.EEXIST, -errno.ENOENT, -errno.EFAULT
_GONE = (-errno.ESRCH, -errno.ENOSPC)
_EAGAIN_COUNTER, _EEXIST_COUNTER, _ENOENT_COUNTER = int(Counter.EAGAIN), int(Counter.EEXIST), int(Counter.ENOENT)
_PARTIAL, _WAKES = int(Counter.PARTIAL), int(Counter.WAKES)


class Op:
    """What is done to a run; the values index `Resolver`'s tables."""

    COPY = 0
    ZEROPAGE = 1
    CONTINUE = 2
    POISON = 3
    UNPROTECT = 4
    PROTECT = 5


_OP_COUNTER = tuple(
    int(Counter[name]) for name in ("COPIES", "ZEROPAGES", "CONTINUES", "POISONS", "UNPROTECTS", "PROTECTS")
)
_NAMES = ("COPY", "ZEROPAGE", "CONTINUE", "POISON", "WRITEPROTECT", "WRITEPROTECT")


class _Uffd(Protocol):
    def try_copy(self, dst: int, src: int, length: int, mode: int) -> int: ...
    def try_zeropage(self, start: int, length: int, mode: int) -> int: ...
    def try_continue(self, start: int, length: int, mode: int) -> int: ...
    def try_poison(self, start: int, length: int, mode: int) -> int: ...
    def try_writeprotect(self, start: int, length: int, mode: int) -> int: ...
    def try_wake(self, start: int, length: int) -> int: ...


class Run:
    """Contiguous pages that one operation fills. Moves forward as it is worked off.

    Attributes:
        op: one of `Op`.
        dst: address of the next page.
        offset: what `dst` showed when the run was made, or ZEROS: if it shows another offset when the run can go
            on, the run is out of date.
        src: address of its bytes in this process (COPY only).
        left: bytes still to do, a multiple of the page size.
        owner: kept alive as long as the run is: the buffer that `src` points into.
    """

    __slots__ = ("dst", "left", "offset", "op", "owner", "src")

    def __init__(self, op: int, dst: int, offset: int, length: int, src: int = 0, owner: object = None) -> None:
        self.op = op
        self.dst = dst
        self.offset = offset
        self.src = src
        self.left = length
        self.owner = owner

    def advance(self, length: int) -> None:
        """Take `length` bytes as done."""
        self.dst += length
        self.src += length
        if self.offset >= 0:
            self.offset += length
        self.left -= length

    def part(self, begin: int, length: int) -> Run:
        """Return a run of the bytes [begin, begin + length) of this one."""
        offset = self.offset if self.offset < 0 else self.offset + begin
        return Run(self.op, self.dst + begin, offset, length, self.src + begin, self.owner)

    @property
    def name(self) -> str:
        """The operation, as the kernel calls it."""
        return f"UFFDIO_{_NAMES[self.op]}"

    def __repr__(self) -> str:
        return f"<Run {self.name} [{self.dst:#x}, {self.dst + self.left:#x})>"


def merge(runs: list[Run]) -> list[Run]:
    """Sort runs by address and join those that continue each other, target and source alike."""
    runs.sort(key=_by_address)
    merged = runs[:1]
    for run in runs[1:]:
        last = merged[-1]
        shown = last.offset if last.offset < 0 else last.offset + last.left
        joins = run.op == last.op and run.dst == last.dst + last.left and run.offset == shown
        if joins and (run.op != Op.COPY or (run.src == last.src + last.left and run.owner is last.owner)):
            last.left += run.left
        else:
            merged.append(run)
    return merged


def _by_address(run: Run) -> int:
    return run.dst


class Resolver:
    """Settles runs on one descriptor.

    Args:
        uffd: a `Userfaultfd` or anything with its `try_*` methods.
        page_size: of the mapping, in bytes.
        counters: where to count what the kernel answered.
        mode: further mode bits of COPY and CONTINUE (2: write-protected from the start).
    """

    __slots__ = ("_page", "_tries", "_uffd", "_words", "mode")

    def __init__(self, uffd: _Uffd, page_size: int, counters: Counters, mode: int = 0) -> None:
        self._uffd = uffd
        self._page = page_size
        self._words = counters.words
        self.mode = mode
        self._tries = (
            uffd.try_zeropage,  # COPY has a source, and is called by name
            uffd.try_zeropage,
            uffd.try_continue,
            uffd.try_poison,
            uffd.try_writeprotect,
            uffd.try_writeprotect,
        )

    def resolve(self, run: Run, *, wake: bool) -> int:
        """Work a run off until it is resolved or cannot go on now.

        Returns:
            0: resolved: each page is there, or its mapping is gone. A negated errno otherwise: EAGAIN (retry
            later), ESRCH (the process is gone), or what the kernel refused `run.dst` with.
        """
        words, page = self._words, self._page
        if run.op < Op.UNPROTECT:
            mode = (0 if wake else DONTWAKE) | (self.mode if run.op in (Op.COPY, Op.CONTINUE) else 0)
        else:  # its bits are others; protecting wakes nobody
            mode = abi.WRITEPROTECT_MODE_WP if run.op == Op.PROTECT else 0 if wake else abi.WRITEPROTECT_MODE_DONTWAKE
        chunk = run.left
        while run.left > 0:
            chunk = min(chunk, run.left)
            words[_OP_COUNTER[run.op]] += 1
            if run.op == Op.COPY:
                result = self._uffd.try_copy(run.dst, run.src, chunk, mode)
            else:
                result = self._tries[run.op](run.dst, chunk, mode)
                if result == _EFAULT and run.op == Op.CONTINUE:
                    result = _ENOENT  # the file has lost the page since: its sleepers shall find out themselves
            if result > 0:
                if result < chunk:
                    words[_PARTIAL] += 1
                run.advance(result)
                chunk = max(chunk, page) if result < chunk else max(run.left, page)
            elif result == _EEXIST:
                words[_EEXIST_COUNTER] += 1
                if wake:
                    self.wake(run.dst, page)
                run.advance(page)
            elif result == _ENOENT:
                words[_ENOENT_COUNTER] += 1
                if chunk > page:
                    chunk = max(page, chunk // 2 & -page)
                    continue
                self.wake(run.dst, page)
                run.advance(page)
            elif result in (_EAGAIN, 0):
                words[_EAGAIN_COUNTER] += 1
                return _EAGAIN
            elif result in _GONE:
                return -errno.ESRCH
            else:
                return result
        return 0

    def wake(self, start: int, length: int) -> None:
        """WAKE a range. Never refused by a living process: the layout is not looked at."""
        self._words[_WAKES] += 1
        self._uffd.try_wake(start, length)
