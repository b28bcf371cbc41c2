"""Bounds on what is under way at once, in reads and in bytes. Faults go first, prefetches are not starved."""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

import attrs

from aiouffd.engine.serve.precedence import Precedence

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Gate"]

_BYTES_PER_NS = 0.2  # of reads ahead, where they are few: a quarter of what a busy machine can receive and place
_PATIENT_SHARE = 8  # of so many that are let in from the queues, one is patient


@attrs.define(eq=False)
class _Waiting:
    future: asyncio.Future[None]
    size: int
    urgent: bool


class Gate:
    """Lets work in as long as both bounds hold. A piece that is larger than the bound on bytes is let in alone.

    Args:
        reads: at most so many pieces at once.
        size: at most so many bytes at once.
        precedence: of other gates; None: there are none.

    Attributes:
        reads: pieces inside.
        size: their bytes.
    """

    def __init__(self, reads: int, size: int, precedence: Precedence | None = None) -> None:
        self._reads = reads
        self._size = size
        self._precedence = precedence or Precedence()
        self.reads: int = 0
        self.size: int = 0
        self._way_ns = 0
        self._urgent: deque[_Waiting] = deque()
        self._patient: deque[_Waiting] = deque()
        self._turn = 0

    def try_enter(self, size: int, *, urgent: bool = True) -> bool:
        """Enter if there is room and no other waits; tell whether that was so."""
        if self._urgent or self._patient or not self._fits(size):
            return False
        if urgent:  # not `_hurries`: this is the way of each page
            self._precedence.urgent += 1
        elif not self._precedence.allows(self, size):
            return False
        self._let_in(size, urgent=urgent)
        return True

    async def enter(
        self, size: int, *, urgent: bool, waits: Callable[[Callable[[], None]], None] = lambda _: None
    ) -> bool:
        """Wait until there is room, and enter. Canceling is safe: the place in the queue is given up.

        Args:
            size: bytes.
            urgent: pass those that are not, but for one of eight.
            waits: called with a function that makes it urgent, if it has to wait and is not.

        Returns:
            whether it is urgent now.
        """
        if self.try_enter(size, urgent=urgent):
            return urgent
        waiting = _Waiting(asyncio.get_running_loop().create_future(), size, urgent)
        if urgent:
            self._urgent.append(waiting)
            self._hurries(1)
        else:
            self._patient.append(waiting)
            waits(partial(self._hurry, waiting))
        self.admit()  # an urgent one may pass the patient ones that wait
        try:
            await waiting.future
        except asyncio.CancelledError:
            if waiting.future.done() and not waiting.future.cancelled():
                self.leave(size, urgent=waiting.urgent)
            elif waiting.urgent:
                self._hurries(-1)
            raise
        return waiting.urgent

    def _hurry(self, waiting: _Waiting) -> None:
        if waiting.future.done():
            return
        self._patient.remove(waiting)
        waiting.urgent = True
        self._urgent.append(waiting)
        self._hurries(1)
        self.admit()

    def leave(self, size: int, *, urgent: bool = True) -> None:
        """Leave, and let in those that wait and fit now; `urgent`: as on entering."""
        self.reads -= 1
        self.size -= size
        if urgent:
            self._hurries(-1)
        else:
            self._precedence.reads_ahead(self, -size)
        if self._urgent or self._patient:
            self.admit()

    def took(self, spent_ns: int) -> None:
        """Take note how long a read ahead has taken: a third of them is quicker than what is kept, of those that count.

        It is that of the first one, and of those while reads are few: else they wait for each other. It is not that of
        the quickest: where a source has a part of its bytes here, that is no way to the others.
        """
        if not self._way_ns:
            self._way_ns = spent_ns
        elif spent_ns != self._way_ns and self._precedence.others_fault():
            self._way_ns += (self._way_ns >> 6) + 1 if spent_ns > self._way_ns else -(self._way_ns >> 5)

    @property
    def share(self) -> int:
        """Bytes of reads ahead that may be under way where they are few: what comes in while one is read."""
        return max(1, int(self._way_ns * _BYTES_PER_NS))

    def _hurries(self, count: int) -> None:
        self._precedence.urgent += count

    def _fits(self, size: int) -> bool:
        return self.reads < self._reads and (self.size + size <= self._size or self.size == 0)

    def _let_in(self, size: int, *, urgent: bool) -> None:
        self.reads += 1
        self.size += size
        if not urgent:
            self._precedence.reads_ahead(self, size)

    def admit(self) -> None:
        """Let in those that wait and fit now."""
        while queue := self._next():
            waiting = queue[0]
            if waiting.future.cancelled():
                queue.popleft()
                continue
            if not self._fits(waiting.size):
                return
            queue.popleft()
            self._turn += 1
            self._let_in(waiting.size, urgent=waiting.urgent)
            waiting.future.set_result(None)

    def _next(self) -> deque[_Waiting] | None:
        is_patients = self._patient and (not self._urgent or self._turn % _PATIENT_SHARE == 0)
        if is_patients and self._precedence.allows(self, self._patient[0].size):
            return self._patient
        return self._urgent or None
