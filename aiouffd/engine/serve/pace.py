"""How many reads ahead of faults are under way at once: as many as make it faster, and no more."""

from __future__ import annotations

import asyncio
from time import perf_counter_ns

__all__ = ["Pace"]

_LEAST = 4  # reads under way, so that a source is never idle while an answer is placed
_LATE = 6  # times as long as the quickest read: the source answers no more of them at once
_RENEWED_NS = 10_000_000_000  # the way to the source may have changed since


class Pace:
    """Counts reads ahead, and finds out how many to have under way, by how long they take.

    A source that is far takes as long for many reads as for a few: they become more. Where they take longer the more
    they are, something on the way is used up: a line, a server, a processor. There they wait in a queue, which makes
    nothing faster, takes memory, and makes faults wait behind them.

    Args:
        most: not more, however far it is.
    """

    def __init__(self, most: int) -> None:
        self._most = max(1, most)
        self._quickest: dict[int, int] = {}  # by the order of size: small reads are quicker
        self._since_ns = 0
        self._room = asyncio.Event()
        self.limit: int = min(_LEAST, self._most)
        self.under_way: int = 0

    @property
    def is_full(self) -> bool:
        """Whether one more should wait."""
        return self.under_way >= self.limit

    async def room(self) -> None:
        """Wait until one of those that are under way has ended. Canceling is safe."""
        self._room.clear()
        await self._room.wait()

    def enter(self) -> None:
        """Count a read that begins."""
        self.under_way += 1

    def leave(self, size: int, began_ns: int) -> None:
        """Count a read of `size` bytes that ends; began_ns: when it was entered, in `perf_counter_ns`."""
        self.under_way -= 1
        self._room.set()
        now = perf_counter_ns()
        if now - self._since_ns > _RENEWED_NS:
            self._since_ns = now
            self._quickest.clear()
            self.limit = min(_LEAST, self._most)
        took, order = now - began_ns, size.bit_length()
        quickest = self._quickest[order] = min(took, self._quickest.get(order, took))
        if took < quickest * _LATE // 2:
            self.limit = min(self.limit + 1, self._most)
        elif took > quickest * _LATE:
            self.limit = max(self.limit - 1, min(_LEAST, self._most))
