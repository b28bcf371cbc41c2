"""A source that several backends have in common: what one of them has read, or is reading, the others do not ask for.

Each read of a source that is far is entered as a piece. Who wants bytes of a piece waits for it, or takes them: pieces
are kept for a while, up to a bound that all sources share. What is asked for is what no piece has.

To wait for a piece is no promise. Whoever reads it may be canceled, or have less patience. Then each of the others asks
by itself. So what becomes of one client costs the others no page.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, Protocol

from aiouffd.engine.flight import Spans

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from aiouffd.engine.serve.bounds import Limits
    from aiouffd.sources.base import Source

__all__ = ["Asker", "Common", "Shelf", "is_far"]

_GAP: Final = 64 << 10  # bytes between two parts that are asked for along: a request of its own costs more


def is_far(source: Any) -> bool:
    """Tell whether the bytes of a source must be waited for."""
    at_once = getattr(source, "locate", None) is not None or getattr(source, "read_nowait", None) is not None
    return not (at_once and getattr(source, "local", True))


class Asker(Protocol):
    """One of those who have a source in common."""

    def ask(self, offset: int, length: int, *, urgent: bool) -> Coroutine[Any, Any, Any]:
        """Return what returns bytes of the source itself, as many as that."""

    def took(self, size: int) -> None:
        """Take note that so many bytes were had without asking."""

    def count_retry(self) -> None:
        """Take note that the source has tried again."""


class _Piece:
    """Bytes of a source that were read together, or are on their way."""

    __slots__ = ("_waiting", "common", "data", "end", "patient", "start")

    def __init__(self, common: Common, start: int, end: int, *, patient: bool) -> None:
        self.common: Common = common
        self.start: int = start
        self.end: int = end
        self.patient: bool = patient  # the source lets others go first
        self.data: memoryview | None = None
        self._waiting: asyncio.Future[None] | None = None

    def landing(self) -> asyncio.Future[None]:
        """Return what is done when it has come, or does not come."""
        if self._waiting is None:
            self._waiting = asyncio.get_running_loop().create_future()
        return self._waiting

    def land(self) -> None:
        """Let those go on who wait for it."""
        if self._waiting is not None:
            self._waiting.set_result(None)


class Shelf:
    """Keeps the pieces that were used last, of all sources together.

    Attributes:
        room: the most bytes that are kept; 0: only what is on its way is shared.
    """

    def __init__(self, room: int = 0) -> None:
        self.room: int = room
        self._size = 0
        self._pieces: OrderedDict[_Piece, None] = OrderedDict()  # the least recently used first

    def keep(self, piece: _Piece) -> None:
        """Keep a piece that has come, in place of those that have not been used for longest."""
        self._pieces[piece] = None
        self._size += piece.end - piece.start
        while self._size > self.room:
            oldest = next(iter(self._pieces))
            self._remove(oldest)
            oldest.common.forget(oldest)

    def used(self, piece: _Piece) -> None:
        """Take note that a piece was used."""
        if piece in self._pieces:
            self._pieces.move_to_end(piece)

    def clear(self, common: Common) -> None:
        """Keep nothing of a source any more."""
        for piece in [piece for piece in self._pieces if piece.common is common]:
            self._remove(piece)

    def _remove(self, piece: _Piece) -> None:
        del self._pieces[piece]
        self._size -= piece.end - piece.start


class Common:
    """One source for any number of backends of one loop; it is closed with the last of them.

    A source with an attribute `keeps` that is true sees to itself that nothing is asked for twice. What can be written
    to is not kept: it may be another by the next read.

    Args:
        source: see `aiouffd.sources.base.Source`.
        shelf: where what was read is kept.
    """

    def __init__(self, source: Source, shelf: Shelf | None = None) -> None:
        self.source: Any = source
        self._shelf = shelf or Shelf()
        self._shares = is_far(source) and not getattr(source, "keeps", False) and not hasattr(source, "write")
        self._read_ahead = hasattr(source, "read_ahead")
        self._pieces: Spans[_Piece] = Spans()
        self._askers: list[Asker] = []

    @property
    def is_used(self) -> bool:
        """Whether it is anybody's; else it is closed, or about to be."""
        return bool(self._askers)

    def enter(self, asker: Asker, limits: Limits) -> None:
        """Have one more who reads; the first one's limits are told to the source."""
        self._askers.append(asker)
        begin = getattr(self.source, "begin", None)
        if begin is not None and len(self._askers) == 1:
            begin(limits.timeout, limits.retries, self._count_retry)

    async def leave(self, asker: Asker) -> None:
        """Have one less; the last one closes the source."""
        self._askers.remove(asker)
        if self._askers:
            return
        self._shelf.clear(self)
        self._pieces.clear()
        close = getattr(self.source, "aclose", None)
        if close is not None:
            await close()

    def _count_retry(self) -> None:
        for asker in self._askers:  # all of them wait for it
            asker.count_retry()

    def forget(self, piece: _Piece) -> None:
        """Have a piece no longer."""
        self._pieces.discard(piece)

    # Reading

    def at_hand(self, offset: int, length: int) -> Any:
        """Return bytes if all of them are kept, else None. Does not wait."""
        if not self._shelf.room:
            return None
        found = self._pieces.within(offset, offset + length)
        parts = [self._cut(piece, low, high) for low, high, piece in found if piece.data is not None]
        if not parts or sum(map(len, parts)) < length:
            return None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read(
        self, asker: Asker, offset: int, length: int, *, urgent: bool, alone: bool = False
    ) -> Coroutine[Any, Any, Any]:
        """Return what returns bytes: those of pieces, and for the rest what `asker.ask` returns. Canceling it is safe.

        Args:
            asker: who wants them.
            offset: where they begin.
            length: how many.
            urgent: a thread waits for them.
            alone: ask for all of them, whatever there is: what others do has just failed.
        """
        if alone or not self._shares or (not self._shelf.room and len(self._askers) < 2):
            return asker.ask(offset, length, urgent=urgent)
        if self._pieces.touches(offset, offset + length):
            return self._read(asker, offset, length, urgent=urgent)
        return self._read_new(asker, offset, length, urgent=urgent)

    async def _read_new(self, asker: Asker, offset: int, length: int, *, urgent: bool) -> Any:
        piece = self._begin(offset, offset + length, urgent=urgent)
        try:
            return await self._bring(asker, piece, urgent=urgent)
        finally:
            if piece.data is None:
                self._fail(piece)

    async def _read(self, asker: Asker, offset: int, length: int, *, urgent: bool) -> Any:
        found = [part for part in self._pieces.within(offset, offset + length) if _serves(part[2], urgent=urgent)]
        parts = _parts(found, offset, offset + length)
        begun = [self._begin(low, high, urgent=urgent) for low, high, piece in parts if piece is None]
        pieces = iter(begun)
        works = [
            self._bring(asker, next(pieces), urgent=urgent)
            if piece is None
            else self._take(asker, piece, low, high, urgent=urgent)
            for low, high, piece in parts
        ]
        try:
            return await works[0] if len(works) == 1 else await _joined(works)
        finally:
            for piece in begun:
                if piece.data is None:
                    self._fail(piece)

    def _begin(self, start: int, end: int, *, urgent: bool) -> _Piece:
        piece = _Piece(self, start, end, patient=self._read_ahead and not urgent)
        self._pieces.add(piece)
        return piece

    async def _bring(self, asker: Asker, piece: _Piece, *, urgent: bool) -> Any:
        data = await asker.ask(piece.start, piece.end - piece.start, urgent=urgent)
        piece.data = memoryview(data).cast("B")
        piece.land()
        if self._shelf.room and self.is_used:
            self._shelf.keep(piece)
        else:
            self.forget(piece)
        return data

    def _fail(self, piece: _Piece) -> None:
        self.forget(piece)
        piece.land()

    async def _take(self, asker: Asker, piece: _Piece, low: int, high: int, *, urgent: bool) -> Any:
        if piece.data is None:
            await asyncio.wait([piece.landing()])  # and not the future itself: it would be canceled with who waits
        if piece.data is None:
            return await asker.ask(low, high - low, urgent=urgent)
        asker.took(high - low)
        return self._cut(piece, low, high)

    def _cut(self, piece: _Piece, low: int, high: int) -> memoryview:
        assert piece.data is not None
        self._shelf.used(piece)
        return piece.data[low - piece.start : high - piece.start]


def _serves(piece: _Piece, *, urgent: bool) -> bool:
    """Tell whether a piece is worth waiting for: not where its source lets others go first, and this is urgent."""
    return piece.data is not None or not (urgent and piece.patient)


def _parts(found: list[tuple[int, int, _Piece]], start: int, stop: int) -> list[tuple[int, int, _Piece | None]]:
    """Cut [start, stop) into what pieces have, and what has to be asked for: there the piece is None.

    What little lies between two parts that have to be asked for is asked for along.
    """
    parts: list[tuple[int, int, _Piece | None]] = []
    asked = -1  # which of them is the last to be asked for
    at = start
    for low, high, piece in [*found, (stop, stop, None)]:
        if at < low:
            if asked >= 0 and at - parts[asked][1] <= _GAP:
                parts[asked:] = [(parts[asked][0], low, None)]
            else:
                asked = len(parts)
                parts.append((at, low, None))
        if piece is not None:
            parts.append((low, high, piece))
        at = high
    return parts


async def _joined(works: list[Any]) -> bytes:
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return b"".join(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
