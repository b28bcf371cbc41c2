"""What has happened in a server, in order: sessions and clients that come and go, errors, clients turned away."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

__all__ = ["Happening", "Happenings"]

_KEPT = 1000  # of slow faults, and of all others: there may be many of the former


@attrs.frozen
class Happening:
    """Something that has happened.

    Attributes:
        number: from 1 on, without gaps.
        time: seconds since 1970.
        kind: what, as two words: "client.served".
        session: where; empty: in the one without a name.
        details: of it, plain values.
    """

    number: int
    time: float
    kind: str
    session: str
    details: dict[str, Any]


class Happenings:
    """Keeps the last ones, for any number of followers. A slow follower costs nobody else anything: it misses some."""

    def __init__(self) -> None:
        self._slow: deque[Happening] = deque(maxlen=_KEPT)
        self._others: deque[Happening] = deque(maxlen=_KEPT)
        self._number = 0
        self._waiting: set[asyncio.Future[None]] = set()
        self._closed = False

    def tell(self, kind: str, session: str, **details: Any) -> None:
        """Note that something has happened. On the loop of the followers."""
        self._number += 1
        kept = self._slow if kind == "client.slow" else self._others
        kept.append(Happening(self._number, time.time(), kind, session, details))
        self._wake()

    def close(self) -> None:
        """Let the followers end."""
        self._closed = True
        self._wake()

    async def follow(self, after: int | None = None) -> AsyncGenerator[Happening, None]:
        """Yield what happens, until `close`. Canceling is safe.

        Args:
            after: a number: what came behind it is yielded first, as far as it is kept still; None: what is new only.
                A gap in the numbers tells that some was missed.
        """
        seen = self._number if after is None or after > self._number else after
        while True:
            kept = chain(self._slow, self._others)
            fresh = sorted((item for item in kept if item.number > seen), key=attrgetter("number"))
            for item in fresh:
                seen = item.number
                yield item
            if fresh:
                continue
            if self._closed:
                return
            waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.add(waiting)
            try:
                await waiting
            finally:
                self._waiting.discard(waiting)

    def _wake(self) -> None:
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
