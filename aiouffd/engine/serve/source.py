"""Brings pages from a `Source`: what is in memory in the same turn of the loop, what must be waited for as a flight."""

from __future__ import annotations

import asyncio
import errno
import logging
from functools import partial
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from aiouffd.engine.allowance import allowed
from aiouffd.engine.flight import Flight, end_of, spawn, tasks_of
from aiouffd.engine.landing import OnLanded, untold
from aiouffd.engine.plain import serve_together
from aiouffd.engine.runs import FOR_FAULT, Op, Purpose, Run
from aiouffd.engine.serve.bulk import MAX_READ, Steps
from aiouffd.engine.serve.common import Common
from aiouffd.engine.serve.extents import Extents
from aiouffd.engine.serve.pace import Pace
from aiouffd.engine.serve.precedence import Precedence
from aiouffd.engine.serve.presence import has_come, look_again, until_present
from aiouffd.engine.serve.reads import Reads
from aiouffd.engine.statistics import Counter
from aiouffd.errors import ShortReadError, SourceError, SourceTimeoutError
from aiouffd.sources import steps

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from aiouffd.engine.bound import Bound
    from aiouffd.engine.one_copy import OneCopy
    from aiouffd.engine.serve.bounds import Limits
    from aiouffd.engine.space import Space
    from aiouffd.engine.statistics import Counters
    from aiouffd.errors import UffdError
    from aiouffd.sources.base import Source

__all__ = ["SourceBackend"]

log: logging.Logger = logging.getLogger("aiouffd")

_PAGES_FAULT, _PAGES_READAHEAD = int(Counter.PAGES_FAULT), int(Counter.PAGES_READAHEAD)
_SEQUENTIAL = int(Counter.SEQUENTIAL)
_GAP = 64 << 10  # bytes between two parts that are read of a far source at once: two reads cost more
_MAX_PARTS = 32  # of such a read: each is placed alone, and takes some us of the loop
_PIECES = 8  # of a background fill from far: so that the way to the source is not waited for once a piece


class SourceBackend:
    """One source for any number of spaces.

    Args:
        source: see `aiouffd.sources.base.Source`.
        counters: where to count.
        limits: see `Limits`; a source's own attributes `timeout` and `retries` come first.
        bound: drops pages again; None: they stay.
        one_copy: the file that all spaces map privately; None: they map none in common.
        common: has the source, where others read it, too.
        precedence: of other backends of this loop; None: there are none.

    Attributes:
        on_landed: called with each flight when it has landed, its space, its steps, and why it failed, if it has.
    """

    def __init__(
        self,
        source: Source,
        counters: Counters,
        limits: Limits,
        *,
        bound: Bound | None = None,
        one_copy: OneCopy | None = None,
        common: Common | None = None,
        precedence: Precedence | None = None,
    ) -> None:
        self._gives = common is None and getattr(source, "gives", False)  # else others may read it, too
        common = common or Common(source)
        self.source: Source = source
        self.limits: Limits = limits
        self.bound: Bound | None = bound
        self.one_copy: OneCopy | None = one_copy
        self._counters, self._words = counters, counters.words
        self.on_landed: OnLanded = untold
        self._precedence = precedence or Precedence()
        self.fills: Callable[[Space], AbstractContextManager[None]] = self._precedence.brings
        self._reads = Reads(common, counters, limits, self._precedence)
        self._extents = Extents(source, counters, common.at_hand, one_copy)
        self.has: Callable[[Callable[[int, int], Any]], AbstractContextManager[None]] = self._extents.has
        self.fetch: Callable[[int, int], Awaitable[Any]] = self._reads.fetch
        self.data: Callable[[int, int], Iterator[tuple[int, int]]] = self._extents.data
        self._expect: Callable[[int, int], None] | None = getattr(source, "expect", None)
        self._may_be_plain = self._extents.may_be_plain
        self._max_read = min(MAX_READ, limits.bytes_in_flight // 4)  # so that the bound on bytes can hold
        self._pace = Pace(limits.concurrent_reads * 3 // 4)  # the others are for threads that wait
        self._reach = 0 if self._extents.local else limits.bytes_in_flight // 4
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def local(self) -> bool:
        """Whether bytes may be had without waiting."""
        return self._extents.local

    @property
    def pieces(self) -> int:
        """How many pieces of a background fill may be under way at once: the pace bounds their reads."""
        return 1 if self.local else _PIECES

    # Faults

    def opened(self, space: Space) -> None:
        """Serve plain faults on the fast path, from the first fault on."""
        if self._is_plain(space):
            largest = max(space.mappings, key=lambda mapping: mapping.end - mapping.start, default=None)
            if largest is not None and largest.offset >= 0:
                space.open_fast_path(self._extents.plain_source(space), largest.start, largest.end, largest.offset)

    def _is_plain(self, space: Space) -> bool:
        """Tell whether plain faults need not come here: a recording without readahead is told of each before."""
        return self._may_be_plain and (space.readahead.note is None or space.readahead.limit > 0)

    def serve(self, space: Space, faults: list[tuple[int, int, int]], began_ns: int) -> None:
        """Resolve what is in memory as one batch; begin flights for the rest."""
        if self._is_plain(space) and self.bound is None and not (space.readahead.limit and space.is_bringing):
            source = self._extents.plain_source(space)
            left = serve_together(space, source, self._counters, faults, began_ns)
            if len(faults) == 1 and space.fast_path is not None and (self.one_copy is not None or not left):
                space.open_fast_path(source, *space.mappings.locate(faults[0][0]))
            if not left:
                return
            faults = left
        if self.bound is not None and self.bound.keeps_waiting(space, faults):
            return
        runs: list[Run] = []
        zeros = 0
        outdated: list[int] = []
        asked: list[tuple[int, int]] = []  # the windows of this wake-up, so that its faults do not bring one page twice
        for page, _, thread in faults:
            asked = [window for window in asked if window[1] > page]  # faults come in order of address
            if asked and any(low <= page for low, _ in asked):
                continue
            start, end, first = space.mappings.locate(page)
            if first < 0:
                self._extents.add_zeros(space, page, first, space.page_size, runs, FOR_FAULT)
                zeros += 1
                continue
            offset = first + page - start
            if has_come(space, page, offset, thread):
                outdated.append(page)
                continue
            for low, length in self._windows(space, offset, first, first + end - start):
                address = start + low - first
                asked.append((address, address + length))
                wanted = page if low <= offset < low + length else None
                self._bring(space, address, low, length, runs, wanted, began_ns, FOR_FAULT)
            self._follow(space, start - first, offset, first, first + end - start, began_ns)
        self._finish(space, [fault for fault in faults if fault[0] not in outdated], runs, zeros, began_ns)
        look_again(space, outdated, began_ns)

    def _finish(
        self, space: Space, faults: list[tuple[int, int, int]], runs: list[Run], zeros: int, began_ns: int
    ) -> None:
        """Count the faults of one wake-up, join those that wait for flights, and resolve the runs of the others."""
        waiting = 0
        for fault in faults:
            if (flight := space.flights.get(fault[0])) is not None:
                flight.want(*fault)
                waiting += 1
        served = len(faults) - waiting
        # Counted first: the toucher may kill this process before it goes on, and that is no vain life.
        self._words[_PAGES_FAULT] += served
        self._words[_PAGES_READAHEAD] -= served - zeros  # they were counted with their windows
        if runs and space.filling and len(faults) == 1:  # in pieces it takes twice as long
            space.resolve(runs)
        elif runs:
            space.resolve_windows(runs, [page for page, *_ in faults])
        if served:
            space.record_latency(began_ns, served)

    def _windows(self, space: Space, offset: int, low: int, high: int) -> list[tuple[int, int]]:
        """Choose what comes with a fault within [low, high)."""
        if space.filling and self._extents.locate is not None:
            start, length = space.readahead.block(offset, space.filling, low, high)
            if start + length <= self._extents.size and self._extents.locate(start, length) is not None:
                space.readahead.brought(start, length)
                return [(start, length)]
        windows = space.readahead.windows(offset, low, high)
        self._words[_SEQUENTIAL] += space.readahead.follows
        if self.one_copy is not None:
            return self.one_copy.widened(windows, offset, low, min(high, self._extents.size), space.readahead)
        return windows

    def follow(self, space: Space, page: int) -> None:
        """A toucher has come upon a window that is being brought: bring the one behind it as well."""
        start, end, first = space.mappings.locate(page)
        if first >= 0:
            self._follow(space, start - first, first + page - start, first, first + end - start, perf_counter_ns())

    def _follow(self, space: Space, skew: int, offset: int, low: int, high: int, began_ns: int) -> None:
        """Bring what is behind the window that `offset` is in; `skew`: from an offset to its address.

        One window, and of a far source as many more as the pace allows: each takes a way there and back. A client with
        a limit gets one: it pays afterwards for what was placed.
        """
        most = self._reach if space.allowance is None else 0
        while (windows := space.readahead.follow(offset, low, high, most)) is not None:
            (at, length), (behind, size) = windows
            runs: list[Run] = []
            try:
                if self._expect is not None and size:
                    self._expect(behind, size)
                self._pursue(self._bring(space, at + skew, at, length, runs, None, began_ns, FOR_FAULT), set())
            except Exception:  # a defect of the source: it costs none of the faults that are being served
                log.exception("what was to be brought ahead, %d bytes at %#x, comes with its faults", length, at)
                space.readahead.forget(at, at + length)
                return
            space.resolve_later(runs)
            if self._pace.is_full(length):
                return

    def _bring(
        self,
        space: Space,
        address: int,
        offset: int,
        length: int,
        runs: list[Run],
        wanted: int | None,
        began_ns: int,
        purpose: Purpose,
        flights: list[Flight] | None = None,
    ) -> list[Flight]:
        """Add runs for what is in memory of a window, and begin flights for the rest, or extend the last of these."""
        page, joins = space.page_size, purpose.cause == Counter.PAGES_BACKGROUND and not self.local
        flights = [] if flights is None else flights
        for low, end in space.flights.gaps(address, address + length):  # the rest is on its way
            while low < end:
                at = offset + low - address
                kind, part = self._extents.split(at, end - low, page)
                if kind == "zeros":
                    self._extents.add_zeros(space, low, at, part, runs, purpose)
                    self._words[purpose.cause] += part // page
                elif self._extents.add_at_hand(space, low, at, part, runs, purpose):
                    self._words[purpose.cause] += part // page
                else:
                    part = min(part, max(page, self._max_read & -page))
                    if not (joins and flights and _extends(space, flights[-1], low, at, part, self._max_read)):
                        flights.append(self._begin(space, low, at, part, wanted, began_ns, purpose))
                low += part  # noqa: PLW2901 - walks through the window
        return flights

    # Flights

    def _begin(
        self, space: Space, address: int, offset: int, length: int, wanted: int | None, began_ns: int, purpose: Purpose
    ) -> Flight:
        flight = Flight(address, address + length, offset, began_ns, purpose)
        if wanted is not None and address <= wanted < address + length:
            flight.wanted[wanted] = began_ns
        space.take_off(flight)
        flight.done = spawn(self._tasks, self._fly(space, flight))
        return flight

    async def _fly(self, space: Space, flight: Flight) -> None:
        """Bring what a flight is for; if that fails, ask again for the pages that threads wait for.

        Before that, the flight has landed, whatever came of it. Those for which a caller waits let the others pass.
        """
        at, length = flight.offset, min(flight.length, self._extents.size - flight.offset)
        urgent, noted = flight.purpose.errors is None, steps.begin()
        failure: SourceError | None = None
        try:
            retries = flight.purpose.retries
            data = await self._reads.read(at, length, urgent=urgent, retries=retries, waits=flight.waits)
            if not (urgent or flight.wanted or self._precedence.may_step(space, length)):
                await self._precedence.turn(flight.waits, length)
            if not space.is_gone and not space.closing:
                self._place(space, flight, data)
        except SourceError as error:
            failure = error
        except Exception as error:
            log.exception("%r could not be placed", flight)
            failure = SourceError(repr(self.source), at, flight.length, f"{type(error).__name__}: {error}")
        finally:
            space.flights.discard(flight)
            self.on_landed(space, flight, noted, failure)
        if failure is None:
            return
        try:
            await self._failed(space, flight, failure)
        finally:
            del failure  # this frame is in its traceback: a cycle would keep the source

    async def _failed(self, space: Space, flight: Flight, failure: SourceError) -> None:
        """A read failed for good, and its flight has landed."""
        _forget(space, flight)
        if flight.purpose.errors is not None:
            flight.purpose.errors.append(failure)
        if not space.is_gone and not space.closing:
            await self._rescue(space, flight, failure)

    def _place(self, space: Space, flight: Flight, data: Any) -> None:
        """Resolve what has come, as far as its addresses still show it: the layout may have changed meanwhile."""
        runs: list[Run] = []
        self._extents.add_parts(space, flight, data, runs, given=self._gives)
        placed = sum(high - low for low, high in flight.parts)
        wanted = set(flight.wanted)
        if flight.generation != space.mappings.generation:
            runs = [piece for run in runs for piece in space.valid(run)]
            placed = sum(piece.left for piece in runs)
            # Also what is still valid may have been forgotten: its layout has changed, and changed back.
            _forget(space, flight)
            for piece in runs:
                space.readahead.brought(piece.offset, piece.left)
            wanted = {page for page in wanted if any(run.dst <= page < run.dst + run.left for run in runs)}
        elif flight.purpose.errors is None:  # also without readahead; what a caller asked for was noted then
            space.readahead.brought(flight.offset, flight.length)
        pages = placed // space.page_size
        _resolve(space, runs, self._words, flight.purpose.cause, pages, [flight.wanted[page] for page in wanted])

    async def _rescue(self, space: Space, flight: Flight, error: SourceError) -> None:
        """A read failed for good: ask for the awaited pages alone, since another part may be to blame; else poison.

        All at once, as far as the gate allows, and without further tries where the source does not answer at all: so
        that the last of many threads that wait does not wait for as many timeouts.
        """
        page = space.page_size
        if flight.length == page:
            if flight.wanted:
                _fail(space, flight.start, flight.offset, error)
            return
        cause = flight.purpose.cause
        purpose = Purpose(cause, retries=0 if isinstance(error, SourceTimeoutError) else None)
        singles, runs, served = list[Flight](), list[Run](), list[int]()
        for address, began_ns in sorted(flight.wanted.items()):
            offset = flight.offset + address - flight.start
            if not space.valid(Run(Op.COPY, address, offset, page)):
                continue  # its thread was woken then; a thread that waits for what is there now must not join this
            try:  # the window was not in memory as a whole: this page may be
                begun = self._bring(space, address, offset, page, runs, address, began_ns, purpose)
            except Exception:
                log.exception("the page at %#x could not be looked for", address)
                _fail(space, address, offset, error)
                continue
            singles += begun
            served += [] if begun else [began_ns]
        _resolve(space, runs, self._words, cause, 0, served)
        if singles:
            await asyncio.wait(tasks_of(singles))

    # Ahead of faults

    async def bring(self, space: Space, ranges: Iterable[tuple[int, int]], cause: Counter) -> None:
        """Bring (offset, length) ranges of whole pages, in this order, wherever they are shown.

        Returns when all are present. Canceling is safe: what is under way comes all the same.

        Raises:
            SourceError: the source failed, or the kernel refused its bytes. Nothing is poisoned; what came is kept.
            ClosedError: the space was dropped meanwhile.
        """
        with self._precedence.brings(space):
            await until_present(space, ranges, lambda missing: self._bring_once(space, missing, cause), forgets=True)

    async def _bring_once(self, space: Space, ranges: Sequence[tuple[int, int]], cause: Counter) -> None:
        """Bring what is missing of some ranges and is not on its way already."""
        errors: list[UffdError] = []
        purpose = Purpose(cause, errors)
        todo, pending = Steps(space, ranges, self._precedence, local=self.local), set[asyncio.Task[None]]()
        # Not undone by canceling: threads may have joined what is under way.
        try:
            while todo:
                if todo.wait():
                    await self._precedence.turn()
                offset, length, is_last = todo.take()
                # Who waits for these has one read under way, however slow those of others are.
                while self._pace.is_full(length) and (pending or cause == Counter.PAGES_BACKGROUND):
                    todo.place()
                    await self._pace.room()
                if space.is_gone or space.closing:  # the source may be closed, too
                    break
                begun = self._approach(space, offset, length, todo.runs, purpose)
                self._pursue(begun, pending)
                todo.count(length, begun=bool(begun))
                if errors and is_last:
                    break
                if todo.end():
                    await self._precedence.turn()
                    if todo:
                        await allowed(space)
        finally:
            todo.place()  # however this ends: it counts as present
        while pending:
            await asyncio.wait(pending)
        if not errors:
            await space.quiet(ranges)  # the kernel may refuse what it has put off
        if errors:
            raise errors.pop(0)  # as in `_fly`

    def _pursue(self, flights: list[Flight], pending: set[asyncio.Task[None]]) -> None:
        """Count flights ahead of faults until they have landed; their tasks are `pending` until then."""
        for flight in flights:
            assert flight.done is not None
            self._pace.enter()
            pending.add(flight.done)
            flight.done.add_done_callback(partial(self._landed, flight, pending))

    def _landed(self, flight: Flight, pending: set[asyncio.Task[None]], task: asyncio.Task[None]) -> None:
        pending.discard(task)
        self._pace.leave(flight)

    def _approach(self, space: Space, offset: int, length: int, runs: list[Run], purpose: Purpose) -> list[Flight]:
        """Add runs for what is in memory of a range, wherever it is shown, and begin flights for the rest."""
        flights: list[Flight] = []
        for shown in space.mappings.addresses(offset, offset + length):
            for begin, size in space.readahead.missing(shown.offset, shown.offset + shown.end - shown.start):
                address = shown.start + begin - shown.offset
                try:
                    self._bring(space, address, begin, size, runs, None, perf_counter_ns(), purpose, flights)
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}"
                    raise SourceError(repr(self.source), begin, size, reason) from error
                space.readahead.brought(begin, size)
        return flights

    # What the space tells

    def written(self, space: Space, page: int, flags: int, thread: int) -> None:
        """Lift the protection. A bounded space's resolver notes before that the page is not the source's any more."""
        space.resolve([space.run(Op.UNPROTECT, page)])

    def layout(self, space: Space, code: int, message: bytes, child: Space | None) -> None:
        """It was applied to the space already. The fast path of a bounded space is opened anew."""
        if self.bound is not None:
            self.opened(space)

    def refusal(self, run: Run, number: int) -> SourceError:
        """Return the error that says why: EFAULT, of a truncated file behind a mapping; ENOMEM."""
        self._words[Counter.SOURCE_ERRORS] += 1
        return _refused(repr(self.source), run, number)

    async def aclose(self) -> None:
        """Cancel what is under way and close the source."""
        await end_of(self._tasks)
        if self.bound is not None:
            await self.bound.aclose()
        await self._reads.aclose()


def _resolve(
    space: Space, runs: list[Run], words: memoryview[int], cause: Counter, pages: int, began: list[int]
) -> None:
    """Resolve what was waited for, and count it.

    Args:
        space: where.
        runs: what.
        words: where to count.
        cause: why they were brought.
        pages: how many are not counted yet.
        began: when each of the threads has begun to wait whose pages they are; most have joined later than the others.
    """
    # Counted first: the toucher may kill this process before it goes on, and that is no vain life.
    words[_PAGES_FAULT] += len(began)
    words[cause] += pages - len(began)
    if runs:
        space.resolve(runs)
    for began_ns in began:
        space.record_latency(began_ns)


def _extends(space: Space, flight: Flight, address: int, offset: int, length: int, most: int) -> bool:
    """Have a flight that has just begun bring what lies behind it as well, if one read may be for both; tell whether.

    Each page is read once, but for a background fill from far: what little lies between two parts is read with them.
    Beside a program that touches pages at random there would be a read for each page that is missing.
    """
    if offset - address != flight.offset - flight.start or len(flight.parts) == _MAX_PARTS:
        return False
    near = flight.end <= address <= flight.end + _GAP and address + length - flight.start <= most
    if near:
        space.flights.extend(flight, address, address + length)
    return near


def _forget(space: Space, flight: Flight) -> None:
    """What a flight was to bring has not come."""
    skew = flight.offset - flight.start
    for low, high in flight.parts:
        space.readahead.forget(low + skew, high + skew)


def _fail(space: Space, address: int, offset: int, failure: SourceError) -> None:
    """A page cannot be had."""
    if not space.is_gone and not space.closing:
        space.counters.words[Counter.SOURCE_ERRORS] += 1
        space.give_up([piece.dst for piece in space.valid(Run(Op.POISON, address, offset, space.page_size))], failure)


def _refused(name: str, run: Run, number: int) -> SourceError:
    if number == errno.EFAULT:
        return ShortReadError(name, run.offset, run.left, "its bytes are there no longer: was the file truncated?")
    return SourceError(name, run.offset, run.left, f"{run!r}: {errno.errorcode.get(number)}")
