"""The backend that runs the coroutines of a `Handler`."""

from __future__ import annotations

import asyncio
import logging
from contextlib import nullcontext
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from aiouffd.engine.allowance import allowed
from aiouffd.engine.flight import Flight, canceled_from_outside, end_of, spawn
from aiouffd.engine.landing import OnLanded, untold
from aiouffd.engine.runs import FOR_FAULT, Op, Purpose, Run
from aiouffd.engine.serve.deadlines import Deadlines
from aiouffd.engine.serve.handler import Batch, Fault, Handler, wants_writes
from aiouffd.engine.serve.presence import has_come, look_again, until_present
from aiouffd.engine.statistics import Counter
from aiouffd.errors import HandlerError
from aiouffd.kernel import abi
from aiouffd.kernel.abi import FaultFlag
from aiouffd.kernel.events import Remap, Remove, Unmap
from aiouffd.kernel.userfaultfd import Fork
from aiouffd.ranges import Range
from aiouffd.sources import steps

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from aiouffd.engine.bound import Bound
    from aiouffd.engine.one_copy import OneCopy
    from aiouffd.engine.serve.bounds import Limits
    from aiouffd.engine.space import Space
    from aiouffd.engine.statistics import Counters
    from aiouffd.errors import UffdError

__all__ = ["HandlerBackend"]

log: logging.Logger = logging.getLogger("aiouffd")

_LATER = 0.001
_TOGETHER = 64  # pages that are given to the handler ahead of faults at once
_SAID_AGAIN_NS = 60_000_000_000
_MOST_SAID = 100
_said: dict[str, int] = {}  # errors of handlers whose tracebacks were logged, and when: a prefetch has many
_METHODS = {
    abi.EVENT_FORK: "fork",
    abi.EVENT_REMAP: "remap",
    abi.EVENT_REMOVE: "remove",
    abi.EVENT_UNMAP: "unmap",
}


def _raised(error: BaseException) -> str:
    text = f"raised {type(error).__name__}: {error}"
    now = perf_counter_ns()
    if now - _said.get(text, -_SAID_AGAIN_NS) >= _SAID_AGAIN_NS:
        if len(_said) >= _MOST_SAID:
            _said.clear()
        _said[text] = now
        log.warning("the handler raised; the same error has no traceback for a minute", exc_info=error)
    return text


class HandlerBackend:
    """Runs a `Handler`: a task for each fault, checked for having resolved it.

    Args:
        handler: the application's.
        counters: where to count.
        limits: `concurrent_reads` bounds the handlers under way, `timeout` the time that one may take.

    Attributes:
        on_landed: as that of `SourceBackend`.
    """

    bound: Bound | None = None
    one_copy: OneCopy | None = None

    def __init__(self, handler: Handler, counters: Counters, limits: Limits) -> None:
        self.handler = handler
        self._words = counters.words
        self._counters = counters
        self._bound = asyncio.Semaphore(limits.concurrent_reads)
        self._deadlines = Deadlines(limits.timeout)
        self._tasks: set[asyncio.Task[None]] = set()
        self._overridden = {
            code: getattr(handler, name)
            for code, name in _METHODS.items()
            if getattr(type(handler), name, None) is not getattr(Handler, name)
        }
        self._events: asyncio.Queue[Any] | None = None
        self.on_landed: OnLanded = untold

    @property
    def local(self) -> bool:
        """Whether bytes may be had without waiting: only the handler knows."""
        return False

    @property
    def pieces(self) -> int:
        """How many pieces of a background fill may be under way at once: a piece has many calls of the handler."""
        return 1

    def serve(self, space: Space, faults: list[tuple[int, int, int]], began_ns: int) -> None:
        """Begin a flight for each fault; removed pages and memory that grew are zeros."""
        zeros: list[Run] = []
        outdated: list[int] = []
        for page, flags, thread in faults:
            start, _, first = space.mappings.locate(page)
            if first < 0:
                zeros.extend(space.zeros(page, first, space.page_size, FOR_FAULT))
                continue
            offset = first + page - start
            if has_come(space, page, offset, thread):
                outdated.append(page)
                continue
            if space.readahead.note is not None:
                space.readahead.note(offset, offset, space.page_size)
            fault = Fault(page, FaultFlag(flags), thread, Range(page, space.page_size), offset)
            self._begin(space, fault, began_ns, FOR_FAULT).want(page, flags, thread)
        if zeros:
            self._words[Counter.PAGES_ZERO] += len(zeros)
            self._words[Counter.PAGES_FAULT] += len(zeros)
            space.resolve(zeros)
        look_again(space, outdated, began_ns)

    def _begin(self, space: Space, fault: Fault, began_ns: int, purpose: Purpose) -> Flight:
        flight = Flight(fault.page.start, fault.page.end, fault.offset, began_ns, purpose)
        space.take_off(flight)
        batch = Batch(space, purpose)
        space.on_changed.add(batch.changed)  # now: the layout may change before the task runs
        flight.done = spawn(self._tasks, self._fly(space, flight, fault, batch))
        return flight

    async def _fly(self, space: Space, flight: Flight, fault: Fault, batch: Batch) -> None:
        reason = ""
        noted = steps.begin()
        self._words[Counter.IN_FLIGHT] += 1
        try:
            began, waits = perf_counter_ns(), self._bound.locked()
            async with self._bound:
                if waits:
                    steps.noted("queue", began)
                await self._call(fault, batch)
            if space.is_gone or space.closing:
                return
            reason = await self._unresolved(space, fault, batch)
            if batch.poisons(fault.page.start) and flight.purpose.errors is not None:
                flight.purpose.errors.append(HandlerError(repr(self.handler), str(fault), "poisoned it"))
            batch.flush()
            if not reason and flight.wanted:
                self._counters.asked_for()
                space.record_latency(min(flight.wanted.values()))
        except TimeoutError:
            reason = f"has not returned in {self._deadlines.seconds} s"
        except (Exception, asyncio.CancelledError, SystemExit) as error:
            if canceled_from_outside(error):
                raise
            reason = _raised(error)
        finally:
            self._words[Counter.IN_FLIGHT] -= 1
            space.on_changed.discard(batch.changed)
            space.flights.discard(flight)
            failure = HandlerError(repr(self.handler), str(fault), reason) if reason else None
            self.on_landed(space, flight, noted, failure)
        if failure is not None and not space.is_gone and not space.closing:
            self._fail(space, flight, failure)

    async def _call(self, fault: Fault, batch: Batch) -> None:
        self._words[Counter.SOURCE_READS] += 1
        began = perf_counter_ns()
        try:
            with self._deadlines:
                await self.handler.pagefault(fault, batch)
        finally:
            self._words[Counter.SOURCE_NS] += perf_counter_ns() - began
            steps.noted("handler", began)

    def _fail(self, space: Space, flight: Flight, failure: HandlerError) -> None:
        """A page cannot be had: a caller that prefetches gets the error, threads that wait for it get SIGBUS."""
        self._words[Counter.HANDLER_ERRORS] += 1
        if flight.purpose.errors is not None:
            flight.purpose.errors.append(failure)
        if flight.wanted:
            run = Run(Op.POISON, flight.start, flight.offset, space.page_size)
            space.give_up([piece.dst for piece in space.valid(run)], failure)

    async def _unresolved(self, space: Space, fault: Fault, batch: Batch) -> str:
        """Return what is wrong with a batch whose handler has returned, or nothing."""
        if batch.covers(fault.page.start) or batch.has_left_out(fault.page.start):
            return ""
        # It may have been flushed before, or filled with another page's batch. The kernel does not tell while an event
        # is unread.
        while (present := space.poison_if_missing(fault.page.start)) is None:
            await asyncio.sleep(_LATER)
            if space.closing or batch.has_left_out(fault.page.start):  # what is there now has not failed
                return ""
        if present:
            space.readahead.brought(fault.offset, space.page_size)
        return "" if present else "returned without resolving it"

    def fills(self, space: Space) -> AbstractContextManager[None]:
        """Do nothing: handlers have no order among spaces."""
        return nullcontext()

    async def bring(self, space: Space, ranges: Iterable[tuple[int, int]], cause: Counter) -> None:
        """Give the handler the missing pages of (offset, length) ranges, in this order, as if they were touched.

        Returns when all are present. Canceling is safe: handlers that run go on.

        Raises:
            HandlerError: it failed for one of them, or poisoned it. Nothing else is poisoned.
            ClosedError: the space was dropped meanwhile.
        """
        await until_present(space, ranges, lambda missing: self._bring_once(space, missing, cause))

    async def _bring_once(self, space: Space, ranges: Sequence[tuple[int, int]], cause: Counter) -> None:
        errors: list[UffdError] = []
        purpose = Purpose(cause, errors)
        tasks: list[asyncio.Task[None]] = []
        for fault in self._missing(space, ranges):
            flight = self._begin(space, fault, perf_counter_ns(), purpose)
            assert flight.done is not None
            tasks.append(flight.done)
            if len(tasks) == _TOGETHER:
                await asyncio.wait(tasks)
                tasks.clear()
                await allowed(space)
            if errors or space.is_gone or space.closing:
                break
        if tasks:
            await asyncio.wait(tasks)
        if not errors:
            await space.quiet(ranges)  # the kernel may refuse what it has put off
        if errors:
            raise errors[0]

    def _missing(self, space: Space, ranges: Iterable[tuple[int, int]]) -> Iterator[Fault]:
        """Yield the pages of some ranges that are neither present nor on their way when it is their turn."""
        size = space.page_size
        for offset, length in ranges:
            for shown in space.mappings.addresses(offset, offset + length):
                for begin, part in space.readahead.missing(shown.offset, shown.offset + shown.end - shown.start):
                    for at in range(begin, begin + part, size):
                        page = shown.start + at - shown.offset
                        if page not in space.flights:
                            yield Fault(page, FaultFlag(0), 0, Range(page, size), at)

    def follow(self, space: Space, page: int) -> None:
        """Nothing: a handler brings no windows."""

    # Writes

    def written(self, space: Space, page: int, flags: int, thread: int) -> None:
        """Give it to the handler, if that wants to know; then let the writer go."""
        run = space.run(Op.UNPROTECT, page)
        if not wants_writes(self.handler):
            space.resolve([run])
            return
        fault = Fault(page, FaultFlag(flags), thread, Range(page, space.page_size), run.offset)
        flight = Flight(page, page + space.page_size, run.offset, perf_counter_ns(), FOR_FAULT)
        space.take_off(flight)
        spawn(self._tasks, self._tell_write(space, flight, fault))

    async def _tell_write(self, space: Space, flight: Flight, fault: Fault) -> None:
        batch = Batch(space)
        self._words[Counter.IN_FLIGHT] += 1
        try:
            async with self._bound:
                with self._deadlines:
                    await self.handler.write(fault, batch)
        except TimeoutError:
            self._write_failed(space, fault, f"has not returned in {self._deadlines.seconds} s")
        except (Exception, asyncio.CancelledError, SystemExit) as error:
            if canceled_from_outside(error):
                raise
            self._write_failed(space, fault, _raised(error))
        finally:
            self._words[Counter.IN_FLIGHT] -= 1
            space.flights.discard(flight)
        if space.is_gone or space.closing:
            return
        if not batch.covers(fault.page.start):
            batch.unprotect(fault.page)
        batch.flush()

    def _write_failed(self, space: Space, fault: Fault, reason: str) -> None:
        self._words[Counter.HANDLER_ERRORS] += 1
        space.report(HandlerError(repr(self.handler), str(fault), reason))

    # Layout events

    def layout(self, space: Space, code: int, message: bytes, child: Space | None) -> None:
        """Queue the event for the handler's coroutine, if it has one."""
        if code not in self._overridden:
            return
        if code == abi.EVENT_FORK:
            assert child is not None
            event: Any = Fork(child.uffd)
        elif code == abi.EVENT_REMAP:
            event = Remap(*abi.REMAP_MESSAGE.unpack(message))
        else:
            event = (Remove if code == abi.EVENT_REMOVE else Unmap)(*abi.RANGE_MESSAGE.unpack(message))
        if self._events is None:
            self._events = asyncio.Queue()
            task = asyncio.get_running_loop().create_task(self._run_events(self._events))
            self._tasks.add(task)
        self._events.put_nowait((space, code, event))

    async def _run_events(self, queue: asyncio.Queue[Any]) -> None:
        while True:
            space, code, event = await queue.get()
            try:
                with self._deadlines:
                    await self._overridden[code](event)
            except (Exception, asyncio.CancelledError, SystemExit) as error:
                if canceled_from_outside(error):
                    raise
                self._words[Counter.HANDLER_ERRORS] += 1
                space.report(HandlerError(repr(self.handler), repr(event), _raised(error)))

    def refusal(self, run: Run, number: int) -> HandlerError:
        """Return the error that says that the kernel refused a run for good."""
        self._words[Counter.HANDLER_ERRORS] += 1
        return HandlerError(repr(self.handler), repr(run), f"the kernel refused it: errno {number}")

    def opened(self, space: Space) -> None:
        """Nothing: every fault goes to the handler."""

    async def aclose(self) -> None:
        """Cancel what is under way, and close the handler."""
        await end_of(self._tasks)
        try:
            with self._deadlines:
                await self.handler.aclose()
        except (Exception, asyncio.CancelledError, SystemExit) as error:
            if canceled_from_outside(error):
                raise
            _raised(error)
        finally:
            self._deadlines.close()
