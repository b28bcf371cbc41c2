"""Bounds on what is under way at once, in reads and in bytes. Faults go first, prefetches are not starved."""

from __future__ import annotations

import asyncio
from collections import deque

__all__ = ["Gate"]

_PATIENT_SHARE = 8  # of so many that are let in from the queues, one is patient


class Gate:
    """Lets work in as long as both bounds hold. A piece that is larger than the bound on bytes is let in alone.

    Args:
        reads: at most so many pieces at once.
        size: at most so many bytes at once.
    """

    def __init__(self, reads: int, size: int) -> None:
        self._reads = reads
        self._size = size
        self.reads: int = 0
        self.size: int = 0
        self._urgent: deque[tuple[asyncio.Future[None], int]] = deque()
        self._patient: deque[tuple[asyncio.Future[None], int]] = deque()
        self._turn = 0

    def try_enter(self, size: int) -> bool:
        """Enter if there is room and no other waits; tell whether that was so."""
        if self._urgent or self._patient or not self._fits(size):
            return False
        self.reads += 1
        self.size += size
        return True

    async def enter(self, size: int, *, urgent: bool) -> None:
        """Wait until there is room, and enter. Canceling is safe: the place in the queue is given up.

        Args:
            size: bytes.
            urgent: pass those that are not, but for one of eight.
        """
        if self.try_enter(size):
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        (self._urgent if urgent else self._patient).append((future, size))
        self._admit()  # an urgent one may pass the patient ones that wait
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.leave(size)
            raise

    def leave(self, size: int) -> None:
        """Leave, and let in those that wait and fit now."""
        self.reads -= 1
        self.size -= size
        if self._urgent or self._patient:
            self._admit()

    def _fits(self, size: int) -> bool:
        return self.reads < self._reads and (self.size + size <= self._size or self.size == 0)

    def _admit(self) -> None:
        while queue := self._next():
            future, size = queue[0]
            if future.cancelled():
                queue.popleft()
                continue
            if not self._fits(size):
                return
            queue.popleft()
            self._turn += 1
            self.reads += 1
            self.size += size
            future.set_result(None)

    def _next(self) -> deque[tuple[asyncio.Future[None], int]] | None:
        if self._urgent and self._patient:
            return self._patient if self._turn % _PATIENT_SHARE == 0 else self._urgent
        return self._urgent or self._patient or None
