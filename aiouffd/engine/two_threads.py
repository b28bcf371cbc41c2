"""Large COPYs by two threads: the loop's own, and one that helps it.

The loop does nothing else until all is copied. So no message is read, no layout changes, and no descriptor or buffer
goes while the other thread uses it, and a step that faults wait for takes no longer than one thread takes for half as
much. Small COPYs, and those of bytes that the loop has just received, are not divided: the other processor would have
to fetch them from this one's caches.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aiouffd.engine.runs import Run

__all__ = ["TwoThreads", "two_threads"]

_PART: Final = 512 << 10  # bytes: some 0.1 ms, for which the one that is done first may wait
_IDLE = 1.0  # seconds without work, until the thread ends


@attrs.define(eq=False)
class _Work:
    """Parts that the loop takes from the one end, and its helper from the other: two of one page table take longer.

    Attributes:
        copy: UFFDIO_COPY of (target, source, length, mode), as `Userfaultfd.try_copy`.
        mode: of the COPYs.
        parts: that nobody has taken.
        accepted: held by the helper from when it begins, or by the loop, which needs none any more.
        ended: what the helper has done is done.
    """

    copy: Callable[[int, int, int, int], int]
    mode: int
    parts: deque[Run]
    accepted: threading.Lock = attrs.field(factory=threading.Lock)
    ended: queue.SimpleQueue[None] = attrs.field(factory=queue.SimpleQueue)

    def work(self, take: Callable[[], Run]) -> None:
        """Copy part after part; what is not all copied keeps the rest."""
        while self.parts:
            try:
                part = take()
            except IndexError:  # the other one was quicker
                return
            done = self.copy(part.dst, part.src, part.left, self.mode)
            if done > 0:
                part.advance(done)


class TwoThreads:
    """Copies runs with a second thread, where there is a processor for it.

    Attributes:
        count: how many threads have copied the last time.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew, as in a forked child, which does not have the thread."""
        self.count: int = 1
        self._offers: queue.SimpleQueue[_Work] = queue.SimpleQueue()
        self._runs = False

    def copy(
        self, copy: Callable[[int, int, int, int], int], runs: Iterable[Run], mode: int, page: int
    ) -> list[tuple[Run, int]]:
        """Copy runs, of which each is divided; return (part, bytes that were copied), in order; a part keeps the rest.

        Args:
            copy: UFFDIO_COPY of (target, source, length, mode): bytes, or a negated errno. From any thread.
            runs: COPYs of whole pages.
            mode: of all of them.
            page: bytes of a page.
        """
        size = max(_PART, page)
        parts = [run.part(at, min(size, run.left - at)) for run in runs for at in range(0, run.left, size)]
        lengths = [part.left for part in parts]
        work = _Work(copy, mode, deque(parts))
        if len(parts) > 1:
            self._offer(work)
        work.work(work.parts.popleft)
        alone = work.accepted.acquire(blocking=False)
        if not alone:
            work.ended.get()
        self.count = 1 if alone else 2
        return [(part, length - part.left) for part, length in zip(parts, lengths, strict=True)]

    def _offer(self, work: _Work) -> None:
        """Have a thread take part, if there is a processor for it."""
        if self._runs:
            self._offers.put(work)
        elif len(os.sched_getaffinity(0)) > 1:
            thread = threading.Thread(target=self._help, args=(work,), name="aiouffd-copies", daemon=True)
            self._runs = True
            try:
                thread.start()
            except RuntimeError:  # the limit of threads
                self._runs = False

    def _help(self, work: _Work | None) -> None:
        try:
            while True:
                if work is not None and work.accepted.acquire(blocking=False):
                    try:
                        work.work(work.parts.pop)
                    finally:
                        work.ended.put(None)
                work = None  # it has the descriptor and the buffers
                work = self._offers.get(timeout=_IDLE)
        except queue.Empty:
            pass
        finally:
            self._runs = False


two_threads: Final = TwoThreads()
"""Of this process: whoever finds it at work copies alone."""
os.register_at_fork(after_in_child=two_threads.reset)
