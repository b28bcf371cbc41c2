"""Serves faults from a `Source`: what is at hand in the same turn of the loop, what must be waited for as a flight."""

from __future__ import annotations

import asyncio
import errno
import logging
import random
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import attrs

from aiouffd.engine.flight import Flight, canceled_from_outside, end_of
from aiouffd.engine.resolver import DONTWAKE, Op, Run
from aiouffd.engine.serve.deadlines import Deadlines
from aiouffd.engine.serve.gate import Gate
from aiouffd.engine.serve.zeros import BLOCK, cut
from aiouffd.engine.statistics import Counter
from aiouffd.errors import LayoutChangingError, ShortReadError, SourceError, SourceTimeoutError, UffdError
from aiouffd.kernel.memory import address_of, zero_blocks
from aiouffd.ranges import pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

    from aiouffd.engine.plain import Way
    from aiouffd.engine.space import Space
    from aiouffd.engine.statistics import Counters
    from aiouffd.sources.base import Source

__all__ = ["Limits", "SourceBackend"]

log = logging.getLogger("aiouffd")

_PAGES_FAULT, _PAGES_READAHEAD, _PAGES_ZERO = (
    int(Counter.PAGES_FAULT),
    int(Counter.PAGES_READAHEAD),
    int(Counter.PAGES_ZERO),
)
_COPIES = int(Counter.COPIES)
_BYTES_FETCHED, _LATENCY = int(Counter.BYTES_FETCHED), int(Counter.LATENCY)
_IN_FLIGHT, _BYTES_IN_FLIGHT = int(Counter.IN_FLIGHT), int(Counter.BYTES_IN_FLIGHT)
_SETTLED_TOGETHER = 64  # runs that are brought ahead, before the loop gets a turn
_RETRIES = 4
_LONGEST_PAUSE = 2.0  # seconds between two tries
_CHUNK = 2 << 20  # one COPY of this size takes 0.4 ms: the longest that the loop is kept


@attrs.frozen
class Limits:
    """Bounds of a backend.

    Attributes:
        concurrent_reads: source reads (or handlers) under way at once.
        bytes_in_flight: bytes of source reads under way at once.
        timeout: seconds for one read of the source, None for no limit.
        retries: further tries after a read that failed, with exponential backoff and jitter; None: 4, and for URLs as
            many as the timeout allows.
        backoff: seconds before the first of them; the longest pause is 2 s.
    """

    concurrent_reads: int = attrs.field(default=128, validator=attrs.validators.ge(1))
    bytes_in_flight: int = attrs.field(default=128 << 20, validator=attrs.validators.ge(1))
    timeout: float | None = attrs.field(default=30.0)
    retries: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(0)))
    backoff: float = 0.05

    @timeout.validator
    def _time_passes(self, _: object, value: float | None) -> None:
        if value is not None and not value > 0:
            raise ValueError(f"'timeout' must be > 0, or None: {value}")


class SourceBackend:
    """One source for any number of spaces.

    Args:
        source: see `aiouffd.sources.base.Source`.
        counters: where to count.
        limits: see `Limits`; a source's own attributes `timeout` and `retries` come first.
        on_touch: told of each page that was asked for by a fault, in order: its offset.
    """

    def __init__(
        self,
        source: Source,
        counters: Counters,
        limits: Limits,
        *,
        on_touch: Callable[[int], None] | None = None,
    ) -> None:
        self.source = source
        self.limits = limits
        self.gate = Gate(limits.concurrent_reads, limits.bytes_in_flight)
        self._words = counters.words
        begin = getattr(source, "begin", None)
        if begin is not None:
            begin(limits.timeout, limits.retries, self._count_retry)
        self._size = source.size
        self._locate: Callable[[int, int], int | None] | None = getattr(source, "locate", None)
        self._page: Callable[[int, int], int | None] | None = getattr(source, "page", self._locate)
        self._read_nowait: Callable[[int, int], Any] | None = getattr(source, "read_nowait", None)
        self._expect: Callable[[int, int], None] | None = getattr(source, "expect", None)
        self._hole: Callable[[int, int], int] | None = getattr(source, "hole", None)
        self._blank: Callable[[int, int, int], list[int]] | None = getattr(source, "blank", None)
        if not getattr(source, "sparse", True):
            self._hole = None
        self._direct = self._locate is not None and self._hole is None and on_touch is None
        self._ways: dict[tuple[int, int], Way] = {}  # by page size and mode of COPY
        self._deadlines = Deadlines(getattr(source, "timeout", limits.timeout))
        self._retries: int = getattr(source, "retries", _RETRIES if limits.retries is None else limits.retries)
        self._on_touch = on_touch
        self._largest = min(_CHUNK, limits.bytes_in_flight // 4)  # of one read, so that the bound on bytes can hold
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def local(self) -> bool:
        """Whether bytes may be at hand without waiting."""
        at_hand = self._locate is not None or self._read_nowait is not None
        return at_hand and getattr(self.source, "local", True)

    # Faults

    def opened(self, space: Space) -> None:
        """Serve what is plain on the fast path, from the first fault on."""
        if self._direct and not space.readahead.limit:
            largest = max(space.mappings, key=lambda mapping: mapping.end - mapping.start, default=None)
            if largest is not None and largest.offset >= 0:
                space.open_fast_path(self._way(space), largest.start, largest.end, largest.offset)

    def serve(self, space: Space, faults: list[tuple[int, int, int]], began_ns: int) -> None:
        """Resolve what is at hand as one batch; begin flights for the rest."""
        readahead = space.readahead
        if self._direct and not readahead.limit:
            faults = self._serve_directly(space, faults, began_ns)
            if not faults:
                return
        words = self._words
        runs: list[Run] = []
        waiting = zeros = 0
        asked: list[tuple[int, int]] = []  # the windows of this wake-up, so that its faults do not bring one page twice
        for page, _flags, _thread in faults:
            asked = [window for window in asked if window[1] > page]  # faults come in order of address
            if asked and any(low <= page for low, _ in asked):
                continue
            start, end, first = space.mappings.locate(page)
            if first < 0:
                self._zero(space, page, first, space.page_size, runs)
                zeros += 1
                continue
            offset = first + page - start
            if self._on_touch is not None:
                self._on_touch(offset)
            for low, length in self._windows(space, offset, first, first + end - start):
                address = start + low - first
                asked.append((address, address + length))
                wanted = page if low <= offset < low + length else None
                self._bring(space, address, low, length, runs, wanted, began_ns, Counter.PAGES_READAHEAD)
            self._follow(space, start - first, offset, first, first + end - start, began_ns)
        for page, _flags, _thread in faults:
            flight = space.flights.get(page)
            if flight is not None:
                flight.wanted.add(page)
                waiting += 1
        if runs and space.filling and len(faults) == 1:  # in pieces it takes twice as long
            space.resolve(runs)
        elif runs:
            space.resolve_window(runs, [page for page, _, _ in faults])
        served = len(faults) - waiting
        if served:
            words[_PAGES_FAULT] += served
            words[_PAGES_READAHEAD] -= served - zeros  # they were counted with their windows
            space.record_latency(began_ns, served)

    def _windows(self, space: Space, offset: int, low: int, high: int) -> list[tuple[int, int]]:
        """Choose what comes with a fault within [low, high)."""
        if space.filling and self._locate is not None:
            start, length = space.readahead.block(offset, space.filling, low, high)
            if start + length <= self._size and self._locate(start, length) is not None:
                space.readahead.brought(start, length)
                return [(start, length)]
        return space.readahead.windows(offset, low, high)

    def follow(self, space: Space, page: int) -> None:
        """A toucher has come upon a window that is being brought: bring the one behind it as well."""
        start, end, first = space.mappings.locate(page)
        if first >= 0:
            self._follow(space, start - first, first + page - start, first, first + end - start, perf_counter_ns())

    def _follow(self, space: Space, skew: int, offset: int, low: int, high: int, began_ns: int) -> None:
        """Bring the window behind the one that `offset` is in; `skew`: from an offset to its address."""
        windows = space.readahead.follow(offset, low, high)
        if windows is not None:
            (at, length), (behind, size) = windows
            runs: list[Run] = []
            try:
                if self._expect is not None and size:
                    self._expect(behind, size)
                self._bring(space, at + skew, at, length, runs, None, began_ns, Counter.PAGES_READAHEAD)
            except Exception:  # a defect of the source: it costs none of the faults that are being served
                log.exception("what was to be brought ahead, %d bytes at %#x, comes with its faults", length, at)
                space.readahead.forget(at, at + length)
            space.resolve_later(runs)

    def _serve_directly(
        self, space: Space, faults: list[tuple[int, int, int]], began_ns: int
    ) -> list[tuple[int, int, int]]:
        """Copy single pages out of memory, with no list, window or run; return the faults that need more than that.

        Several pages are copied without waking anybody, and then share one WAKE.
        """
        size = space.page_size
        locate_page, locate, copy, end = space.mappings.locate, self._page, space.uffd.try_copy, self._size
        assert locate is not None
        single = len(faults) == 1
        mode = space.resolver.mode if single else space.resolver.mode | DONTWAKE
        left = []
        words = self._words
        start = stop = first = 0
        for fault in faults:
            page = fault[0]
            if not start <= page < stop:
                start, stop, first = locate_page(page)
            offset = first + page - start
            if first < 0 or offset + size > end or (source := locate(offset, size)) is None:
                left.append(fault)
                continue
            # Counted first: whoever has the page may kill this process before it goes on, and that is no vain life.
            words[_PAGES_FAULT] += 1
            if copy(page, source, size, mode) != size:
                words[_PAGES_FAULT] -= 1
                left.append(fault)
        done = len(faults) - len(left)
        if done:
            words[_COPIES] += done
            words[_BYTES_FETCHED] += done * size
            if single:
                space.open_fast_path(self._way(space), start, stop, first)
            else:
                space.wake(faults)
            words[_LATENCY + (perf_counter_ns() - began_ns).bit_length()] += done
        return left

    def _way(self, space: Space) -> Way:
        key = space.page_size, space.resolver.mode
        way = self._ways.get(key)
        if way is None:
            assert self._page is not None
            way = self._ways[key] = (self._page, self._size, *key)
        return way

    def _bring(
        self,
        space: Space,
        address: int,
        offset: int,
        length: int,
        runs: list[Run],
        wanted: int | None,
        began_ns: int,
        cause: Counter,
    ) -> list[Flight]:
        """Add runs for what is at hand of a window, and begin flights for the rest."""
        page = space.page_size
        flights: list[Flight] = []
        for low, size in _spared(space, address, length):
            at = offset + low - address
            while size > 0:
                kind, part = self._extent(at, size, page)
                if kind == "zeros":
                    self._zero(space, low, at, part, runs)
                    self._words[cause] += part // page
                elif self._at_hand(space, low, at, part, runs):
                    self._words[cause] += part // page
                else:
                    part = min(part, max(page, self._largest & -page))
                    flights.append(self._begin(space, low, at, part, wanted, began_ns, cause))
                low, at, size = low + part, at + part, size - part  # noqa: PLW2901 - walks through the window
        return flights

    def _extent(self, offset: int, length: int, page: int) -> tuple[str, int]:
        """Split a window where it changes: ("zeros", "data" or "tail": the source's last, partial page; bytes)."""
        if offset >= self._size:
            return "zeros", length
        if self._hole is not None and (hole := self._hole(offset, min(length, self._size - offset)) & -page):
            return "zeros", hole
        if offset + length <= self._size:
            return "data", length
        whole = (self._size - offset) & -page
        return ("data", whole) if whole else ("tail", page)

    def _at_hand(self, space: Space, address: int, offset: int, length: int, runs: list[Run]) -> bool:
        """Add runs for bytes that need no waiting; tell whether they did not."""
        available = min(length, self._size - offset)
        source: int | None = None
        if available == length and self._locate is not None:
            source = self._locate(offset, length)
        if source is not None:
            zeros = self._blank(offset, length, BLOCK) if self._blank is not None and space.maps_zeros else []
            self._add(space, Run(Op.COPY, address, offset, length, source), zeros, runs)
        else:
            data = None if self._read_nowait is None else self._read_nowait(offset, available)
            if data is None or not _holds(data, available):  # too little: `read` is asked, whose faults are told
                return False
            self._add_data(space, Run(Op.COPY, address, offset, length), data, runs)
        self._words[_BYTES_FETCHED] += available
        return True

    def _add_data(self, space: Space, run: Run, data: Any, runs: list[Run]) -> None:
        """Add runs for bytes that are ours."""
        available = min(run.left, self._size - run.offset)
        zeros = zero_blocks(memoryview(data).cast("B"), BLOCK) if space.maps_zeros and available == run.left else []
        run.owner, run.src = _whole_pages(data, available, run.left)
        self._add(space, run, zeros, runs)

    def _add(self, space: Space, run: Run, zeros: list[int], runs: list[Run]) -> None:
        """Add a run, in parts where it has blocks of zeros."""
        if not zeros:
            runs.append(run)
            return
        for begin, length, blank in cut(run.left, zeros):
            if blank:
                self._zero(space, run.dst + begin, run.offset + begin, length, runs)
            else:
                runs.append(run.part(begin, length))

    def _zero(self, space: Space, address: int, offset: int, length: int, runs: list[Run]) -> None:
        self._words[_PAGES_ZERO] += length // space.page_size
        runs.extend(space.zeros(address, offset, length))

    # Flights

    def _begin(
        self, space: Space, address: int, offset: int, length: int, wanted: int | None, began_ns: int, cause: Counter
    ) -> Flight:
        flight = Flight(address, address + length, offset, began_ns, space.mappings.generation)
        if wanted is not None and address <= wanted < address + length:
            flight.wanted.add(wanted)
        space.take_off(flight)
        flight.done = self._spawn(self._fly(space, flight, cause))
        return flight

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _fly(self, space: Space, flight: Flight, cause: Counter) -> None:
        """Bring what a flight is for; on failure ask again for the pages that threads wait for."""
        failure = await self._carry(space, flight, cause, urgent=cause == Counter.PAGES_READAHEAD)
        if failure is None:
            return
        space.readahead.forget(flight.offset, flight.offset + flight.end - flight.start)
        if flight.errors is not None:
            flight.errors.append(failure)
        if not space.is_gone and not space.closing:
            await self._rescue(space, flight, failure, cause)

    async def _carry(
        self, space: Space, flight: Flight, cause: Counter, *, urgent: bool, retries: int | None = None
    ) -> SourceError | None:
        """Read, and place what has come; return why that failed. The flight has landed then, in any case."""
        try:
            data = await self._read(flight.offset, flight.end - flight.start, urgent=urgent, retries=retries)
            if not space.is_gone and not space.closing:
                self._place(space, flight, data, cause)
        except SourceError as error:
            return error
        except Exception as error:
            log.exception("%r could not be placed", flight)
            reason = f"{type(error).__name__}: {error}"
            return SourceError(repr(self.source), flight.offset, flight.end - flight.start, reason)
        finally:
            space.land(flight)
        return None

    def _place(self, space: Space, flight: Flight, data: Any, cause: Counter) -> None:
        length = flight.end - flight.start
        runs: list[Run] = []
        self._add_data(space, Run(Op.COPY, flight.start, flight.offset, length), data, runs)
        if flight.generation != space.mappings.generation:
            shown = [piece for run in runs for piece in space.valid(run)]
            if sum(piece.left for piece in shown) < length:  # the layout has changed meanwhile
                space.readahead.forget(flight.offset, flight.offset + length)
            runs = shown
        # Counted first: whoever has the page may kill this process before it goes on, and that is no vain life.
        count = len(flight.wanted)
        self._words[_PAGES_FAULT] += count
        self._words[cause] += length // space.page_size - count
        if runs:
            space.resolve(runs)
        if count:
            space.record_latency(flight.began_ns, count)

    async def _rescue(self, space: Space, flight: Flight, error: SourceError, cause: Counter) -> None:
        """A read failed for good: ask for the awaited pages alone, since another part may be to blame; else poison.

        All at once, as far as the gate allows, and without further tries where the source does not answer at all: so
        that the last of many who wait does not wait for as many timeouts.
        """
        page = space.page_size
        retries = 0 if isinstance(error, SourceTimeoutError) else None
        if flight.end - flight.start == page:
            if flight.wanted:
                self._fail(space, flight.start, flight.offset, error)
            return
        singles = []
        for address in sorted(flight.wanted):
            offset = flight.offset + address - flight.start
            if not space.valid(Run(Op.COPY, address, offset, page)):
                continue  # who waited was woken then; whoever waits for what is there now must not join this
            single = Flight(address, address + page, offset, flight.began_ns, flight.generation)
            single.wanted.add(address)
            space.take_off(single)
            single.done = self._spawn(self._fly_alone(space, single, cause, retries))
            singles.append(single.done)
        if singles:
            await asyncio.wait(singles)

    async def _fly_alone(self, space: Space, flight: Flight, cause: Counter, retries: int | None) -> None:
        failure = await self._carry(space, flight, cause, urgent=True, retries=retries)
        if failure is not None:
            self._fail(space, flight.start, flight.offset, failure)

    def _fail(self, space: Space, address: int, offset: int, failure: SourceError) -> None:
        """A page cannot be had."""
        if space.is_gone or space.closing:
            return
        self._words[Counter.SOURCE_ERRORS] += 1
        space.report(failure)  # said before the poison, which may end the toucher's process at once
        for piece in space.valid(Run(Op.POISON, address, offset, space.page_size)):
            space.poison([piece.dst])

    async def _read(self, offset: int, length: int, *, urgent: bool, retries: int | None = None) -> Any:
        """Read from the source: bounded, timed, retried. Raises SourceError when all that is used up."""
        length = min(length, self._size - offset)
        words = self._words
        if not self.gate.try_enter(length):
            await self.gate.enter(length, urgent=urgent)
        words[_IN_FLIGHT] += 1
        words[_BYTES_IN_FLIGHT] += length
        try:
            return await self._persist(offset, length, self._retries if retries is None else retries)
        finally:
            words[_IN_FLIGHT] -= 1
            words[_BYTES_IN_FLIGHT] -= length
            self.gate.leave(length)

    async def _persist(self, offset: int, length: int, retries: int) -> Any:
        tries = 0
        while True:
            try:
                with self._deadlines:
                    data = await self.source.read(offset, length)
                view = memoryview(data)
                got = view.nbytes
                if not view.c_contiguous:
                    raise TypeError("what it gave does not lie in one piece")  # noqa: TRY301 - as if it had raised
            except SourceTimeoutError as error:
                failure: SourceError = error
            except SourceError:
                raise  # the source itself says that it is for good
            except TimeoutError as error:
                reason = f"no answer in {self._deadlines.seconds} s"
                failure = SourceTimeoutError(repr(self.source), offset, length, reason)
                failure.__cause__ = error
            except (Exception, asyncio.CancelledError, SystemExit) as error:
                # Whatever a source raises fails the pages, not the pager: also the cancelation of something that it
                # has waited for, as long as nobody has canceled us.
                if canceled_from_outside(error):
                    raise
                failure = SourceError(repr(self.source), offset, length, f"{type(error).__name__}: {error}")
                failure.__cause__ = error
            else:
                self._words[_BYTES_FETCHED] += got
                if got == length:
                    return data
                raise ShortReadError(
                    repr(self.source), offset, length, f"gave {got} bytes of {length}; it says that it has {self._size}"
                )
            tries += 1
            if tries > retries:
                raise failure
            self._count_retry()
            # Full jitter: clients that failed together do not come back together.
            pause = min(_LONGEST_PAUSE, self.limits.backoff * 2 ** min(tries - 1, 10))
            await asyncio.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - spreads load, keeps no secret

    def _count_retry(self) -> None:
        self._words[Counter.SOURCE_RETRIES] += 1

    # Ahead of faults

    async def prefetch(self, space: Space, offset: int, length: int) -> None:
        """Bring the offsets [offset, offset + length), wherever they are shown. Faults go first.

        Raises:
            SourceError: the source failed. Nothing is poisoned; what came is kept.
            ClosedError: the space was dropped meanwhile.
        """
        await self.bring(space, pieces(offset, offset + length, space.page_size, _CHUNK), Counter.PAGES_PREFETCH)

    async def bring(self, space: Space, ranges: Iterable[tuple[int, int]], cause: Counter) -> None:
        """Bring (offset, length) ranges of whole pages, in this order; errors as for `prefetch`. Canceling is safe."""
        bound = asyncio.Semaphore(max(1, self.limits.concurrent_reads // 2))
        errors: list[UffdError] = []
        pending: set[asyncio.Task[None]] = set()

        def landed(task: asyncio.Task[None]) -> None:
            pending.discard(task)
            bound.release()

        runs: list[Run] = []
        size = 0

        def place() -> None:
            nonlocal runs, size
            if runs and not space.is_gone and not space.closing:
                space.resolve(runs)
            runs, size = [], 0

        # Not undone by canceling: threads may have joined what is under way.
        try:
            for offset, length in ranges:
                for flight in self._approach(space, offset, length, runs, cause):
                    flight.errors = errors
                    if bound.locked():
                        place()
                    await bound.acquire()
                    assert flight.done is not None
                    pending.add(flight.done)
                    flight.done.add_done_callback(landed)
                size += length
                if errors or space.is_gone or space.closing:
                    break
                if len(runs) >= _SETTLED_TOGETHER or size >= _CHUNK:
                    place()
                    await asyncio.sleep(0)  # faults first
            if size:
                place()
                await asyncio.sleep(0)
        finally:
            place()  # however this ends: it counts as present
        while pending:
            await asyncio.wait(pending)
        if not errors:
            await space.quiet()
        if errors:
            raise errors[0]
        space.require_served()

    def _approach(self, space: Space, offset: int, length: int, runs: list[Run], cause: Counter) -> list[Flight]:
        """Add runs for what is at hand of a range, wherever it is shown, and begin flights for the rest."""
        flights: list[Flight] = []
        for shown in list(space.mappings.addresses(offset, offset + length)):
            for begin, size in space.readahead.missing(shown.offset, shown.offset + shown.end - shown.start):
                address = shown.start + begin - shown.offset
                try:
                    flights += self._bring(space, address, begin, size, runs, None, perf_counter_ns(), cause)
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}"
                    raise SourceError(repr(self.source), begin, size, reason) from error
                space.readahead.brought(begin, size)
        return flights

    # What the space tells

    def written(self, space: Space, page: int, flags: int, thread: int) -> None:
        """Lift the protection: nobody asked to be told of writes."""
        space.resolve([space.run(Op.UNPROTECT, page)])

    def layout(self, space: Space, code: int, message: bytes, child: Space | None) -> None:
        """Nothing: the space has applied it."""

    def failed(self, space: Space, run: Run, number: int) -> None:
        """The kernel refused a run: a truncated file behind a mapping (EFAULT), no memory (ENOMEM)."""
        if number == errno.EFAULT:
            error: SourceError = ShortReadError(
                repr(self.source), run.offset, run.left, "its bytes are there no longer: was the file truncated?"
            )
        else:
            error = SourceError(repr(self.source), run.offset, run.left, f"{run!r}: {errno.errorcode.get(number)}")
        self._words[Counter.SOURCE_ERRORS] += 1
        space.report(error)
        space.poison(range(run.dst, run.dst + run.left, space.page_size))

    def stalled(self, space: Space, run: Run) -> None:
        """The kernel says EAGAIN without end: the page goes on waiting, since POISON is refused as well."""
        space.report(LayoutChangingError(run.name, run.dst, run.left, errno.EAGAIN))

    async def aclose(self) -> None:
        """Cancel what is under way and close the source."""
        await end_of(self._tasks)
        self._deadlines.close()
        close = getattr(self.source, "aclose", None)
        if close is not None:
            await close()


def _spared(space: Space, address: int, length: int) -> list[tuple[int, int]]:
    """Cut what is already on its way out of a window."""
    if not space.flights:
        return [(address, length)]
    page = space.page_size
    parts: list[tuple[int, int]] = []
    begin = None
    for at in range(address, address + length, page):
        if at in space.flights:
            if begin is not None:
                parts.append((begin, at - begin))
                begin = None
        elif begin is None:
            begin = at
    if begin is not None:
        parts.append((begin, address + length - begin))
    return parts


def _holds(data: Any, length: int) -> bool:
    """Tell whether a buffer is of this length, and in one piece: its address is what is copied from."""
    view = memoryview(data)
    return view.nbytes == length and view.c_contiguous


def _whole_pages(data: Any, available: int, length: int) -> tuple[Any, int]:
    """Return (owner, address) of `length` bytes that begin with `data`: the tail of the last page is zeros."""
    if available < length:
        padded = bytearray(length)
        padded[:available] = memoryview(data).cast("B")[:available]
        data = padded
    return data, address_of(data)
