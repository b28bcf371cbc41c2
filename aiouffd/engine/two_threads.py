"""Large steps by two threads: the loop's own, and one that helps it. COPYs are divided; other work is done beside them.

The loop does nothing else until both are done. So no message is read, no layout changes, and no descriptor or buffer
goes while the other thread uses it, and a step that faults wait for takes no longer than one thread takes for half as
much. Small COPYs, and those of bytes that the loop has just received, are not divided: the other processor would have
to fetch them from this one's caches.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from aiouffd.engine.runs import Run

__all__ = ["SHORT_PART", "TwoThreads", "two_threads"]

T = TypeVar("T")

_PART: Final = 512 << 10  # bytes: some 0.1 ms, for which the one that is done first may wait
SHORT_PART: Final = 128 << 10  # some 40 us, for which a fault of others may wait
_IDLE = 1.0  # seconds without work, until the thread ends


@attrs.define(eq=False)
class _Offer:
    """Work that the helper may begin.

    Attributes:
        work: is called by the helper, without arguments.
        accepted: held by the helper from when it begins, or by the loop, which needs none any more.
        ended: what the helper has done is done.
    """

    work: Callable[[], None]
    accepted: threading.Lock = attrs.field(factory=threading.Lock)
    ended: queue.SimpleQueue[None] = attrs.field(factory=queue.SimpleQueue)

    def has_helped(self) -> bool:
        """Wait until the helper is done; False: it has not begun, and does nothing any more."""
        if self.accepted.acquire(blocking=False):
            return False
        interrupted: KeyboardInterrupt | None = None
        while True:
            try:
                self.ended.get()
                break
            except KeyboardInterrupt as error:  # it goes on, with the descriptor and the buffers
                interrupted = error
        if interrupted is not None:
            raise interrupted
        return True


@attrs.define(eq=False)
class _Copies:
    """Parts that the loop takes from the one end, and its helper from the other: two of one page table take longer.

    Attributes:
        copy: UFFDIO_COPY of (target, source, length, mode), as `Userfaultfd.try_copy`.
        mode: of the COPYs.
        parts: that nobody has taken.
    """

    copy: Callable[[int, int, int, int], int]
    mode: int
    parts: deque[Run]

    def work(self, take: Callable[[], Run], ends: Callable[[], bool | None] = lambda: False) -> None:
        """Copy part after part, at least one, until `ends`; what is not all copied keeps the rest."""
        while self.parts:
            try:
                part = take()
            except IndexError:  # the other one was quicker
                return
            done = self.copy(part.dst, part.src, part.left, self.mode)
            if done > 0:
                part.advance(done)
            if ends():
                return


class TwoThreads:
    """Works with a second thread, where there is a processor for it.

    Attributes:
        count: how many threads have copied the last time.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew, as in a forked child, which does not have the thread."""
        self.count: int = 1
        self._offers: queue.SimpleQueue[_Offer] = queue.SimpleQueue()
        self._runs = False

    def copy(
        self,
        copy: Callable[[int, int, int, int], int],
        runs: Iterable[Run],
        mode: int,
        page: int,
        others_wait: Callable[[], bool | None] = lambda: None,
    ) -> tuple[list[tuple[Run, int]], list[Run]]:
        """Copy runs, of which each is divided.

        Args:
            copy: UFFDIO_COPY of (target, source, length, mode): bytes, or a negated errno. From any thread.
            runs: COPYs of whole pages.
            mode: of all of them.
            page: bytes of a page.
            others_wait: asked between parts whether others wait, and the rest is left off; None: nobody can.

        Returns:
            (part, bytes that were copied), in order; a part keeps the rest. And the parts that were left off.
        """
        waited_for = others_wait()
        size = max(_PART if waited_for is None else SHORT_PART, page)
        parts = [run.part(at, min(size, run.left - at)) for run in runs for at in range(0, run.left, size)]
        lengths = [part.left for part in parts]
        copies = _Copies(copy, mode, deque(parts))
        offer = _Offer(partial(copies.work, copies.parts.pop))
        if len(parts) > 1:
            self._offer(offer)
        try:
            copies.work(copies.parts.popleft, (lambda: False) if waited_for is None else others_wait)
            left = list(_emptied(copies.parts))
        finally:
            self.count = 2 if offer.has_helped() else 1
        done = [(part, length - part.left) for part, length in zip(parts, lengths, strict=True) if part not in left]
        return done, left

    def beside(self, work: Callable[[], T]) -> Callable[[], T]:
        """Have the other thread do some work, which raises nothing; return what the loop must call before it goes on.

        That waits until the work is done, or does it where the other thread has not begun, and returns what came of it.
        """
        results: list[T] = []
        offer = _Offer(lambda: results.append(work()))
        self._offer(offer)

        def finish() -> T:
            return results[0] if offer.has_helped() else work()

        return finish

    def _offer(self, offer: _Offer) -> None:
        """Have a thread take part, if there is a processor for it."""
        if self._runs:
            self._offers.put(offer)
        elif len(os.sched_getaffinity(0)) > 1:
            thread = threading.Thread(target=self._help, args=(offer,), name="aiouffd-copies", daemon=True)
            self._runs = True
            try:
                thread.start()
            except RuntimeError:  # the limit of threads
                self._runs = False

    def _help(self, offer: _Offer | None) -> None:
        try:
            while True:
                if offer is not None and offer.accepted.acquire(blocking=False):
                    try:
                        offer.work()
                    finally:
                        offer.ended.put(None)
                offer = None  # it has the descriptor and the buffers
                offer = self._offers.get(timeout=_IDLE)
        except queue.Empty:
            pass
        finally:
            self._runs = False


def _emptied(parts: deque[Run]) -> Iterator[Run]:
    with contextlib.suppress(IndexError):  # the other thread has taken the last one
        while parts:
            yield parts.popleft()


two_threads: Final = TwoThreads()
"""Of this process: whoever finds it at work works alone."""
os.register_at_fork(after_in_child=two_threads.reset)
