"""How many reads ahead of faults are under way at once: as many as make it faster, and no more."""

from __future__ import annotations

import asyncio
from time import perf_counter_ns

__all__ = ["Pace"]

_LEAST = 4  # reads under way, so that a source is never idle while an answer is placed
_FIRST = 8 << 20  # bytes under way before the first answer, where that is more than `_LEAST` reads
_LATE = 6  # times as long as the quickest read: the source answers no more of them at once
_RENEWED_NS = 10_000_000_000  # the way to the source may have changed since


class Pace:
    """Counts reads ahead, and finds out how many to have under way, by how long they take.

    A source that is far takes as long for many reads as for a few: they become more. Where they take longer the more
    they are, something on the way is used up: a line, a server, a processor. There they wait in a queue, which makes
    nothing faster, takes memory, and makes faults wait behind them. Small reads begin with many: they use up little.

    Args:
        most: not more, however far it is.
    """

    def __init__(self, most: int) -> None:
        self._most = max(1, most)
        self._quickest: dict[int, int] = {}  # by the order of size: small reads are quicker
        self._since_ns = 0
        self._limits: dict[int, int] = {}
        self._room = asyncio.Event()
        self.under_way: int = 0

    def limit(self, size: int) -> int:
        """Return how many may be under way where reads are of so many bytes."""
        order = size.bit_length()
        return self._limits.get(order, min(max(_LEAST, _FIRST >> order), self._most))

    def is_full(self, size: int) -> bool:
        """Tell whether one more, of so many bytes, should wait."""
        return self.under_way >= self.limit(size)

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
            self._limits.clear()
        took, order = now - began_ns, size.bit_length()
        quickest = self._quickest[order] = min(took, self._quickest.get(order, took))
        if took < quickest * _LATE // 2:
            self._limits[order] = min(self.limit(size) + 1, self._most)
        elif took > quickest * _LATE:
            self._limits[order] = max(self.limit(size) - 1, min(_LEAST, self._most))
