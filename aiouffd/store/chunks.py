"""The chunks of a snapshot: fetched once, decompressed off the loop, checked, and kept for a while."""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from functools import lru_cache, partial
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs

from aiouffd.engine.flight import spawn
from aiouffd.errors import SourceError, SourceTimeoutError, StoreError
from aiouffd.sources.steps import current, noted
from aiouffd.store.workers import Job, Workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from aiouffd.sources.steps import Steps
    from aiouffd.store.index import Index, Record
    from aiouffd.store.seek_table import SeekTable

__all__ = ["Chunks", "Framed", "blamed", "expanded", "runs_of", "span"]

_GAP: Final = 32 << 10  # bytes between two frames that are fetched along: a request costs more
_LONGEST: Final = 4 << 20  # bytes of one request
_BATCH: Final = 512 << 10  # bytes of the image that a thread decompresses before it looks for what is more urgent
_PARTS: Final = 256  # packs whose sources are kept
_PAUSES: Final = (0.05, 0.2, 0.8)  # seconds between tries
_AT_ONCE: Final = 64 << 10  # one chunk of this size is decompressed on the loop, if nothing else is under way: 80 us
_THREADS: Final = max(4, os.cpu_count() or 1)

Outcome = Any
"""Bytes of a chunk, or the StoreError that says why there are none."""


class Framed(Protocol):
    """An image in chunks that are compressed one by one."""

    @property
    def index(self) -> Index | SeekTable:
        """Its chunks."""

    @property
    def store(self) -> Any:
        """Where they are: a `Folder` or a `Bucket`, for example."""


def runs_of(records: Iterable[Record]) -> list[list[Record]]:
    """Return records in groups that lie close together, each group in one pack: one request fetches it."""
    runs: list[list[Record]] = []
    for record in sorted(records, key=lambda record: (record.pack, record.offset)):
        last = runs[-1] if runs else None
        if (
            last is not None
            and last[-1].pack == record.pack
            and record.offset - last[-1].offset - last[-1].length <= _GAP
            and record.offset + record.length - last[0].offset <= _LONGEST
        ):
            last.append(record)
        else:
            runs.append([record])
    return runs


def span(run: Sequence[Record]) -> tuple[int, int]:
    """Return where the bytes of a run begin and end in their pack."""
    return run[0].offset, max(record.offset + record.length for record in run)


def blamed(index: Index | SeekTable, record: Record, name: str, reason: str) -> StoreError:
    """Return the error about one chunk; name: of the object that is to blame."""
    return StoreError(name, index.start_of(record.chunk), index.length_of(record.chunk), reason, record.chunk)


def expanded(index: Index | SeekTable, record: Record, frame: Any, name: str) -> Outcome:
    """Return the bytes of a chunk, checked, or the error; name: of its pack."""
    if len(frame) != record.length:
        return blamed(index, record, name, f"the object ends {record.length - len(frame)} bytes too early")
    try:
        return index.expand(record, frame)
    except ValueError as error:
        return blamed(index, record, name, f"it is damaged: {error}")


@attrs.define(eq=False, repr=False)
class _Flight:
    """A chunk that is on its way.

    Attributes:
        urgent: whether a fault waits for it.
        job: what decompresses it, once it has come.
        outcome: None until it has landed.
    """

    urgent: bool
    job: Job | None = None
    outcome: Outcome = None
    _waiters: list[asyncio.Future[None]] = attrs.field(factory=list, init=False)

    async def landing(self) -> Outcome:
        """Wait for the outcome. Canceling is safe: others wait for a future of their own."""
        if self.outcome is None:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        return self.outcome

    def land(self, outcome: Outcome) -> None:
        """Tell those who wait what has come."""
        self.outcome = outcome
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


class Chunks:
    """The chunks of one image, for one event loop.

    Args:
        image: a snapshot, for example. It is read from its store.
        kept: limit of the bytes of decompressed chunks that are kept. The least recently used goes first.
        part: returns what reads a pack of a store that is not local: an object with a coroutine `read(offset, length)`.
    """

    def __init__(self, image: Framed, kept: int, part: Callable[[str], Any]) -> None:
        self._store = image.store
        self._index = image.index
        self._part = lru_cache(_PARTS)(part)
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._room = kept
        self._flights: dict[int, _Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._workers = Workers(_THREADS, "aiouffd-chunks")

    def at_hand(self, chunk: int) -> Any:
        """Return the bytes of a chunk that is kept, else None."""
        data = self._kept.get(chunk)
        if data is not None:
            self._kept.move_to_end(chunk)
        return data

    def cut_at_hand(self, offset: int, length: int) -> Any:
        """Return bytes of the image if their chunks are kept, else None."""
        within = self._index.within(offset, length)
        found = [self.at_hand(chunk) for chunk in within]
        return None if None in found else self._cut(within.start, found, offset, length)

    async def cut(self, offset: int, length: int, *, urgent: bool) -> Any:
        """Return bytes of the image. As `get`."""
        within = self._index.within(offset, length)
        found = await self.get(within.start, within.stop, urgent=urgent)
        return self._cut(within.start, found, offset, length)

    def _cut(self, low: int, found: list[Any], offset: int, length: int) -> Any:
        """Return [offset, offset + length) out of the chunks from number `low` on; None is one of zeros."""
        pieces = []
        for chunk, data in enumerate(found, low):
            begin = self._index.start_of(chunk)
            start = max(offset - begin, 0)
            stop = min(offset + length - begin, self._index.length_of(chunk))
            pieces.append(bytes(stop - start) if data is None else memoryview(data)[start:stop])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def get(self, low: int, high: int, *, urgent: bool) -> list[Any]:
        """Return the bytes of the chunks [low, high), None for one that is zeros.

        Canceling is safe: what is on its way comes all the same, for those who ask next.

        Raises:
            SourceError: a chunk cannot be had. StoreError: it is damaged or missing.
        """
        found: dict[int, Any] = {}
        waiting: dict[int, _Flight] = {}
        records = []
        for chunk in range(low, high):
            data = self.at_hand(chunk)
            if data is not None:
                found[chunk] = data
            elif (flight := self._flights.get(chunk)) is not None:
                waiting[chunk] = flight
                if urgent and not flight.urgent:
                    self._hurry(flight)
            elif (record := self._index.find(chunk)) is not None:
                records.append(record)
        for run in runs_of(records):
            waiting.update(self._begin(run, urgent=urgent))
        for chunk, flight in waiting.items():
            outcome = await flight.landing()
            if isinstance(outcome, BaseException):
                raise outcome
            found[chunk] = outcome
        return [found.get(chunk) for chunk in range(low, high)]

    def _hurry(self, flight: _Flight) -> None:
        flight.urgent = True
        if flight.job is not None:
            self._workers.hurry(flight.job)

    def _begin(self, run: list[Record], *, urgent: bool) -> dict[int, _Flight]:
        """Begin to fetch a run; return the flights of its chunks."""
        flights = {record.chunk: _Flight(urgent=urgent) for record in run}
        self._flights.update(flights)
        spawn(self._tasks, self._fly(run))
        return flights

    async def _fly(self, run: list[Record]) -> None:
        """Bring a run, whatever comes of it. What is damaged is fetched once more: it may have been on its way."""
        try:
            for record in await self._bring_at_last(run):
                await self._bring([record], last=True)
        except BaseException as error:
            for record in run:
                self._land(record, self._failure(record, error))
            if not isinstance(error, Exception):
                raise

    async def _bring_at_last(self, run: list[Record]) -> list[Record]:
        """As `_bring`; a local file system that fails is asked again, as the sources of other stores ask."""
        for pause in _PAUSES:
            try:
                return await self._bring(run, last=False)
            except StoreError as error:
                if not isinstance(error.__cause__, OSError) or isinstance(error.__cause__, FileNotFoundError):
                    raise
            await asyncio.sleep(pause)
            run = [record for record in run if record.chunk in self._flights]  # the others have landed
        return await self._bring(run, last=False)

    async def _bring(self, run: list[Record], *, last: bool) -> list[Record]:
        """Fetch and decompress a run; return those that are damaged, unless this is their last try."""
        start, stop = span(run)
        path = self._index.path(run[0])
        began = perf_counter_ns()
        data = None if self._store.is_local else memoryview(await self._part(path).read(start, stop - start))
        alone = data is not None and len(run) == 1 and len(self._flights) == 1
        if alone and self._index.length_of(run[0].chunk) <= _AT_ONCE:
            outcomes = self._expand(run, path, data, start, current())
            noted("chunk", began, first=run[0].chunk, count=1)
            return self._landed(run, outcomes, last=last)
        jobs = []
        for batch in self._batches(run):
            flights = [self._flights[record.chunk] for record in batch]
            call = partial(self._expand, batch, path, data, start, current())
            job = self._workers.submit(call, urgent=any(flight.urgent for flight in flights))
            for flight in flights:
                flight.job = job
            jobs.append((batch, job))
        damaged = []
        for batch, job in jobs:
            damaged += self._landed(batch, await job.result(), last=last)
        noted("chunk", began, first=run[0].chunk, count=len(run))
        return damaged

    def _landed(self, batch: list[Record], outcomes: list[Outcome], *, last: bool) -> list[Record]:
        """Tell those who wait for some chunks what has come; return those that are worth another try."""
        damaged = []
        for record, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, StoreError) and not last:
                damaged.append(record)
            else:
                self._land(record, outcome)
        return damaged

    def _batches(self, run: list[Record]) -> list[list[Record]]:
        batches: list[list[Record]] = []
        room = 0
        for record in run:
            length = self._index.length_of(record.chunk)
            if length > room:
                batches.append([])
                room = _BATCH
            batches[-1].append(record)
            room -= length
        return batches

    def _expand(
        self, batch: list[Record], path: str, data: memoryview | None, start: int, steps: Steps | None
    ) -> list[Outcome]:
        """Return the outcomes of some chunks of a pack; in a thread.

        Args:
            batch: their records.
            path: of the pack.
            data: bytes of the pack; None: they are read from a local store.
            start: where these begin in the pack.
            steps: of those who wait for them.
        """
        if data is None:
            start, stop = span(batch)
            data = memoryview(self._store.read(path, start, stop))
        name, began = self._store.name(path), perf_counter_ns()
        outcomes = []
        for record in batch:
            frame = data[record.offset - start : record.offset - start + record.length]
            outcome = expanded(self._index, record, frame, name)
            # A view of what was fetched for many chunks would keep all of that.
            outcomes.append(bytes(outcome) if isinstance(outcome, memoryview) else outcome)
        if steps is not None:
            noted("decompress", began, steps, count=len(batch))
        return outcomes

    def _failure(self, record: Record, error: BaseException) -> BaseException:
        """Return what those who wait for a chunk are told of a failed request."""
        if isinstance(error, SourceTimeoutError):
            return error
        reason = error.reason if isinstance(error, SourceError) else f"{type(error).__name__}: {error}"
        failure = blamed(self._index, record, self._store.name(self._index.path(record)), reason)
        failure.__cause__ = error
        return failure

    def _land(self, record: Record, outcome: Outcome) -> None:
        """Tell those who wait for a chunk what has come of it, and keep it."""
        flight = self._flights.pop(record.chunk, None)
        if flight is None:
            return
        flight.land(outcome)
        if not isinstance(outcome, BaseException):
            self._keep(record.chunk, outcome)

    def _keep(self, chunk: int, data: Any) -> None:
        self._kept[chunk] = data
        self._room -= len(data)
        while self._room < 0:
            _, oldest = self._kept.popitem(last=False)
            self._room += len(oldest)

    async def aclose(self) -> None:
        """Cancel what is under way, and let the threads end."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for record in filter(None, map(self._index.find, tuple(self._flights))):  # of tasks that had not begun
            self._land(record, self._failure(record, asyncio.CancelledError()))
        self._workers.close()
        self._kept.clear()
