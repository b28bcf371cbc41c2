"""Brings the chunks of a source into a cache: one fetch of each, however many ask."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any, Final

from aiouffd.engine.flight import spawn
from aiouffd.errors import ShortReadError, SourceError
from aiouffd.store.cache import Found
from aiouffd.store.segments import Place

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiouffd.store.cache import ChunkCache
    from aiouffd.store.chunk_names import ChunkNames

__all__ = ["Fetches"]

_LONGEST: Final = 2 << 20  # bytes of one read of the source
_FIRST_LOOK, _LAST_LOOK = 0.001, 0.05  # seconds between two looks at what another process fetches
_PATIENCE: Final = 20.0  # seconds to wait for it
_LAST_WRITES: Final = 5.0  # seconds to wait for them
_BEHIND: Final = 32 << 20  # bytes that may wait to be written to the cache


class Fetches:
    """What is on its way, for one event loop.

    Args:
        source: is read.
        names: its chunks.
        cache: where they are kept.
        aside: calls a function in a thread.
        came: called with chunks and their places, when they are in the cache and have been checked.
    """

    def __init__(
        self,
        source: Any,
        names: ChunkNames,
        cache: ChunkCache,
        aside: Callable[..., Any],
        came: Callable[[Sequence[tuple[int, Place]]], None],
    ) -> None:
        self._source = source
        self._names = names
        self._cache = cache
        self._aside = aside
        self._came = came
        self._read_ahead = getattr(source, "read_ahead", source.read)
        self._ahead: dict[int, bool] = {}  # chunks that no thread waits for: whether they are read so, by now
        self._flights: dict[int, asyncio.Future[Any]] = {}
        self._mine: set[int] = set()  # chunks that are to be fetched here
        self._tasks: set[asyncio.Task[Any]] = set()
        self._behind = 0
        self._kept: set[asyncio.Future[Any]] = set()  # what is being written
        self._closed = False

    def __contains__(self, number: int) -> bool:
        return number in self._flights

    async def get(self, numbers: list[int], *, urgent: bool) -> dict[int, Any]:
        """Have chunks come; return their bytes, None for zeros. Canceling is safe: they come all the same.

        Args:
            numbers: of the chunks.
            urgent: a thread waits for them.

        Raises:
            SourceError: as the source.
        """
        waiting: dict[int, asyncio.Future[Any]] = {}
        new = []
        for number in numbers:
            flight = self._flights.get(number)
            if flight is None:
                flight = self._flights[number] = asyncio.get_running_loop().create_future()
                new.append(number)
                if not urgent and self._read_ahead != self._source.read:
                    self._ahead[number] = False
            elif urgent and self._ahead.pop(number, False):
                self.spawn(self._hurry(number))
            waiting[number] = flight
        if new:
            self.spawn(self._fly(new))
        if waiting:
            await asyncio.wait(waiting.values())
        found = {}
        for number, flight in waiting.items():
            outcome = flight.result()
            if isinstance(outcome, BaseException):
                raise outcome
            found[number] = outcome
        return found

    async def _hurry(self, number: int) -> None:
        """Ask the source for a chunk that it reads ahead. Whatever comes of that, the chunk is on its way."""
        with contextlib.suppress(Exception):
            length = self._names.length(number)
            data = memoryview(await self._source.read(number * self._names.chunk_size, length)).cast("B")
            if len(data) == length:
                self._give(number, data)

    async def _fly(self, left: list[int]) -> None:
        """Find chunks in the cache, or fetch them, whatever comes of it."""
        pause, until, waits = _FIRST_LOOK, time.monotonic() + _PATIENCE, False
        try:
            while True:
                found, mine, left = await self._aside(self._claim, left, time.monotonic() > until)
                self._came([(number, item.place) for number, item in found.items()])
                for number, item in found.items():
                    self._land(number, item.data)
                for run in self._names.runs(mine, _LONGEST):
                    self.spawn(self._fetch(run))
                if not left:
                    return
                if not waits:
                    waits = True
                    self._cache.count(waits=len(left))
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, _LAST_LOOK)
        except Exception as error:  # noqa: BLE001 - those who wait raise it
            for number in left:
                self._land(number, error)

    def _claim(self, numbers: list[int], force: bool) -> tuple[dict[int, Found], list[int], list[int]]:  # noqa: FBT001
        """Return what the cache has, what this process is to fetch, and what another is fetching. In a thread."""
        found: dict[int, Found] = {}
        mine: list[int] = []
        others: list[int] = []
        try:
            self._claim_each(numbers, found, mine, others, force=force)
        except BaseException:
            for number in mine:
                self._unlock(number)
            raise
        self._cache.count(hits=len(found))
        if self._closed:  # nobody waits for what this returns
            for number in mine:
                self._unlock(number)
        return found, mine, others

    def _claim_each(
        self, numbers: list[int], found: dict[int, Found], mine: list[int], others: list[int], *, force: bool
    ) -> None:
        for number in numbers:
            key = self._names.of(number)
            if key is None:
                found[number] = Found(Place(None, 0, self._names.length(number)), None)
                continue
            item = self._find(number, key)
            if item is None:
                locked = self._cache.try_lock(key)
                if locked is False and not force:
                    others.append(number)
                    continue
                item = self._find(number, key)  # another may have brought it before it was locked
                if item is not None and locked:
                    self._cache.unlock(key)
            if item is None:
                self._mine.add(number)
                mine.append(number)
            else:
                found[number] = item

    def _find(self, number: int, key: bytes) -> Found | None:
        item = self._cache.find(key)
        return item if item is not None and item.place.length == self._names.length(number) else None

    async def _fetch(self, run: list[int]) -> None:
        """Read chunks that this process has locked, and keep them."""
        start, length = run[0] * self._names.chunk_size, sum(map(self._names.length, run))
        read = self._source.read
        try:
            if self._ahead.keys() >= set(run):  # else some have become urgent
                self._ahead.update(dict.fromkeys(run, True))
                read = self._read_ahead
            data = memoryview(await read(start, length)).cast("B")
            self._check(start, length, len(data))
            chunks = {n: data[n * self._names.chunk_size - start :][: self._names.length(n)] for n in run}
            if self._behind < _BEHIND:  # else those who wait do so until it is written
                for number, chunk in chunks.items():
                    self._give(number, chunk)
            self._behind += length
            kept = asyncio.ensure_future(self._aside(self._keep, chunks))
            self._kept.add(kept)
            try:
                self._came(await kept)
            finally:
                self._behind -= length
                self._kept.discard(kept)
            for number, chunk in chunks.items():
                self._land(number, chunk)
        except Exception as error:  # noqa: BLE001 - those who wait raise it
            for number in run:
                self._land(number, error)
        finally:
            for number in run:
                self._land(number, self._ended(number))
                self._unlock(number)

    def _check(self, start: int, length: int, got: int) -> None:
        if got != length:
            raise ShortReadError(repr(self._source), start, length, f"gave {got} bytes of {length}")

    def _keep(self, chunks: dict[int, Any]) -> list[tuple[int, Place]]:
        """Add chunks to the cache; return those that are there now. In a thread."""
        self._cache.count(misses=len(chunks), bytes=sum(map(len, chunks.values())))
        fit = [number for number, data in chunks.items() if self._names.fit(number, data)]
        places = self._cache.add([(self._key(number), chunks[number]) for number in fit])
        return [(number, place) for number, place in zip(fit, places, strict=True) if place is not None]

    def _key(self, number: int) -> bytes:
        """Return what names a chunk that is fetched: none of zeros is."""
        key = self._names.of(number)
        assert key is not None
        return key

    def _unlock(self, number: int) -> None:
        self._mine.discard(number)
        self._cache.unlock(self._key(number))

    def _give(self, number: int, outcome: Any) -> None:
        """Give a chunk, or an error, to those who wait."""
        flight = self._flights.get(number)
        if flight is not None and not flight.done():
            flight.set_result(outcome)

    def _land(self, number: int, outcome: Any) -> None:
        self._give(number, outcome)
        self._flights.pop(number, None)
        self._ahead.pop(number, None)

    def _ended(self, number: int) -> SourceError:
        size = self._names.chunk_size
        return SourceError(repr(self._source), number * size, self._names.length(number), "it was closed meanwhile")

    def spawn(self, work: Any) -> None:
        """Have a coroutine run, until `aclose` at most."""
        spawn(self._tasks, work)

    async def aclose(self) -> None:
        """End what is under way; what has come is still written to the cache, if that takes no longer than 5 s."""
        self._closed = True
        if self._kept:
            await asyncio.wait(self._kept, timeout=_LAST_WRITES)
        while self._tasks:
            tasks = tuple(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        # Of tasks that had not begun, and of what a thread has returned to one that was canceled.
        for number in self._mine.copy():
            self._unlock(number)
        for number in tuple(self._flights):
            self._land(number, self._ended(number))
