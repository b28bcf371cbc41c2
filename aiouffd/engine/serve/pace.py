"""How many reads ahead of faults are under way at once: as many as make it faster, and no more."""

from __future__ import annotations

import asyncio
from time import perf_counter_ns
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from aiouffd.engine.flight import Flight

__all__ = ["Pace"]

_LEAST = 4  # reads under way, so that a source is never idle while an answer is placed
_FIRST = 8 << 20  # bytes under way before the first answer, where that is more than `_LEAST` reads
_PAYS = 1.25  # times as many answers in a while, of twice as many reads under way: they were worth it
_PATIENCE = 16  # rounds until twice as many are tried again
_LATE = 6  # times as long as the quickest read: the source answers no more of them at once
_RENEWED_NS = 10_000_000_000  # the way to the source may have changed since


@attrs.define
class _Rate:
    """What is known of reads of one order of size. A round is as many answers as reads are under way.

    Attributes:
        limit: how many may be under way.
        quickest: nanoseconds of the quickest read.
        proven: `limit` before it was doubled, until the end of the round that shows whether that pays; 0: it was not.
        speed: answers per nanosecond in the last round that counts.
        rounds: since it was doubled in vain, or made less.
        since_ns: when this round began, but for the time in which nothing was under way.
        answers: of this round.
        peak: how many were under way in this round.
    """

    limit: int
    quickest: int
    since_ns: int
    proven: int = 0
    speed: float = 0.0
    rounds: int = _PATIENCE - 2  # not the first one, which opens connections
    answers: int = 0
    peak: int = 0

    def end_round(self, now: int, most: int) -> None:
        """Take twice as many where that has paid, or was not tried for long; else as many as before."""
        speed = self.answers / max(now - self.since_ns, 1)
        was_full = self.peak >= self.limit
        self.since_ns, self.answers, self.peak = now, 0, 0
        if not was_full:  # there was not enough to ask for: this says nothing
            return
        if self.proven and speed < self.speed * _PAYS:
            self.limit, self.proven, self.rounds = self.proven, 0, 0
            return
        self.speed = speed
        self.rounds += 1
        grows = self.rounds >= _PATIENCE and self.limit < most
        self.proven = self.limit if grows else 0
        self.limit = min(2 * self.limit, most) if grows else self.limit


class Pace:
    """Counts reads ahead, and finds out how many to have under way, by how many answers come in a while.

    Of a source that is far, twice as many reads bring twice as much: they become more. Where they bring no more,
    something on the way is used up: a line, a server, a processor. There they wait in a queue, which makes nothing
    faster, takes memory that is not in the processor's caches any more when it is copied, and makes faults wait behind
    them. Small reads begin with many: they use up little.

    Args:
        most: not more, however far it is.
    """

    def __init__(self, most: int) -> None:
        self._most = max(1, most)
        self._renewed_ns = self._ended_ns = 0
        self._rates: dict[int, _Rate] = {}  # by the order of size: small reads are quicker
        self._room = asyncio.Event()
        self.under_way: int = 0

    def limit(self, size: int) -> int:
        """Return how many may be under way where reads are of so many bytes."""
        order = size.bit_length()
        rate = self._rates.get(order)
        return min(max(_LEAST, _FIRST >> order), self._most) if rate is None else rate.limit

    def is_full(self, size: int) -> bool:
        """Tell whether one more, of so many bytes, should wait."""
        return self.under_way >= self.limit(size)

    async def room(self) -> None:
        """Wait until one of those that are under way has ended. Canceling is safe."""
        self._room.clear()
        await self._room.wait()

    def enter(self) -> None:
        """Count a read that begins."""
        if not self.under_way:
            idle = perf_counter_ns() - self._ended_ns
            for rate in self._rates.values():
                rate.since_ns += idle
        self.under_way += 1

    def leave(self, read: Flight) -> None:
        """Count a read that ends."""
        under_way, self.under_way = self.under_way, self.under_way - 1
        self._room.set()
        now = self._ended_ns = perf_counter_ns()
        if now - self._renewed_ns > _RENEWED_NS:
            self._renewed_ns = now
            self._rates.clear()
        took, order = now - read.began_ns, read.length.bit_length()
        rate = self._rates.get(order)
        if rate is None:
            rate = self._rates[order] = _Rate(self.limit(read.length), took, now)
        rate.quickest = min(took, rate.quickest)
        rate.answers += 1
        rate.peak = max(rate.peak, under_way)
        if took > rate.quickest * _LATE and not rate.proven:
            rate.limit, rate.rounds = max(rate.limit - 1, min(_LEAST, self._most)), 0
        if rate.answers >= rate.limit:
            rate.end_round(now, self._most)
