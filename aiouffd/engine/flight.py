"""Pages on their way."""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_left, bisect_right
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from aiouffd.ranges import Range, RangeSet

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator

    from aiouffd.engine.runs import Purpose

__all__ = ["Flight", "Flights", "Spans", "canceled_from_outside", "end_of", "spawn", "tasks_of"]

log: logging.Logger = logging.getLogger("aiouffd")

_CANCEL_TIMEOUT = 2.0

_Result = TypeVar("_Result")


class Flight:
    """Pages on their way: a source read, or a handler, that is not done yet.

    Attributes:
        start: address of the first page.
        end: address behind the last.
        length: bytes.
        offset: what `start` showed when the flight began.
        parts: (start, end) of what is placed of it: see `Flights.extend`.
        wanted: addresses of the pages that threads wait for, and since when: see `want`.
        began_ns: when it began; where a fault has begun it, when that was read.
        waited_ns: since when a thread waits.
        faults: those that wait: address of the page, id of the thread (0: unknown), flags, since when.
        purpose: what it is for.
        done: the task that flies it.
        generation: of the mappings, when it was entered in its space.
    """

    __slots__ = (
        *("_hurry", "began_ns", "done", "end", "faults", "generation", "length", "offset", "parts"),
        *("purpose", "start", "waited_ns", "wanted"),
    )

    def __init__(self, start: int, end: int, offset: int, began_ns: int, purpose: Purpose) -> None:
        self.start: int = start
        self.end: int = end
        self.length: int = end - start
        self.offset: int = offset
        self.parts: list[tuple[int, int]] = [(start, end)]
        self.wanted: dict[int, int] = {}
        self.began_ns: int = began_ns
        self.waited_ns: int = began_ns
        self.faults: list[tuple[int, int, int, int]] = []
        self.purpose: Purpose = purpose
        self.done: asyncio.Task[None] | None = None
        self.generation: int = -1
        self._hurry: Callable[[], None] | None = None

    def want(self, page: int, flags: int = 0, thread: int = 0) -> None:
        """Take note that a thread waits for a page."""
        now = perf_counter_ns()
        if not self.wanted:
            self.waited_ns = now
        self.wanted.setdefault(page, now)
        self.faults.append((page, thread, flags, now))
        if self._hurry is not None:
            hurry, self._hurry = self._hurry, None
            hurry()

    def waits(self, hurry: Callable[[], None]) -> None:
        """Have `hurry` called once a thread waits for it: others go first until then."""
        self._hurry = hurry
        if self.wanted:
            hurry()

    def __repr__(self) -> str:
        return f"<Flight [{self.start:#x}, {self.end:#x}) of {self.offset:#x}>"


class _Span(Protocol):
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...


_Item = TypeVar("_Item", bound=_Span)


class Spans(Generic[_Item]):
    """Which item covers an address. Costs what there are items, however large they are. Ranges are half-open."""

    __slots__ = ("_spans", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []  # sorted; spans do not overlap
        self._spans: list[tuple[int, _Item]] = []  # (end, item) for each start

    def get(self, address: int) -> _Item | None:
        """Return the item that covers an address, if there is one."""
        index = bisect_right(self._starts, address) - 1
        if index >= 0:
            end, item = self._spans[index]
            if address < end:
                return item
        return None

    def touches(self, start: int, end: int) -> bool:
        """Tell whether any item covers some of [start, end)."""
        index = bisect_left(self._starts, end) - 1
        return index >= 0 and self._spans[index][0] > start

    def gaps(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the parts of [start, end) that no item covers, as (start, end)."""
        if not self.touches(start, end):
            return [(start, end)] if start < end else []
        found: list[tuple[int, int]] = []
        for low, high, _ in self.within(start, end):
            if start < low:
                found.append((start, low))
            start = high
        if start < end:
            found.append((start, end))
        return found

    def add(self, item: _Item) -> None:
        """Enter an item, in place of others that cover the same."""
        if self.touches(item.start, item.end):
            self.remove(item.start, item.end)
        self._insert(item.start, item.end, item)

    def discard(self, item: _Item) -> None:
        """Leave out an item, as far as it is entered still."""
        index = bisect_left(self._starts, item.start)
        if index < len(self._starts) and self._spans[index] == (item.end, item):  # as it was entered
            del self._starts[index], self._spans[index]
            return
        for start, end, other in self.remove(item.start, item.end):
            if other is not item:
                self._insert(start, end, other)

    def remove(self, start: int, end: int) -> list[tuple[int, int, _Item]]:
        """Cut out [start, end), and return what was there as (start, end, item)."""
        found = self.within(start, end)
        if found:
            first = bisect_right(self._starts, found[0][0]) - 1
            low, (high, last) = self._starts[first], self._spans[first + len(found) - 1]
            del self._starts[first : first + len(found)], self._spans[first : first + len(found)]
            if low < start:
                self._insert(low, start, found[0][2])
            if end < high:
                self._insert(end, high, last)
        return found

    def clear(self) -> None:
        """Forget all."""
        self._starts.clear()
        self._spans.clear()

    def within(self, start: int, end: int) -> list[tuple[int, int, _Item]]:
        """Return what lies within [start, end), clipped, as (start, end, item), in order."""
        first = max(bisect_right(self._starts, start) - 1, 0)
        last = bisect_left(self._starts, end)
        spans = zip(self._starts[first:last], self._spans[first:last], strict=True)
        return [(max(low, start), min(high, end), item) for low, (high, item) in spans if high > start]

    def _insert(self, start: int, end: int, item: _Item) -> None:
        index = bisect_left(self._starts, start)
        self._starts.insert(index, start)
        self._spans.insert(index, (end, item))

    def __contains__(self, address: int) -> bool:
        return self.get(address) is not None

    def __iter__(self) -> Iterator[_Item]:
        """Each item once."""
        return iter({item for _, item in self._spans})

    def __len__(self) -> int:
        """How many ranges are covered: at least as many as there are items."""
        return len(self._starts)


class Flights(Spans[Flight]):
    """Which flight brings an address. Its ranges are whole pages."""

    __slots__ = ()

    def extend(self, flight: Flight, start: int, end: int) -> None:
        """Have a flight that was entered just now bring [start, end), which lies behind it, as well.

        What lies between is read with it, and not placed: it is there, on its way, or not the source's. A fault there
        does not wait for this flight.
        """
        flight.end, flight.length = end, end - flight.start
        flight.parts.append((start, end))
        self._insert(start, end, flight)


def tasks_of(flights: Iterable[Flight], ranges: Iterable[tuple[int, int]] | None = None) -> list[asyncio.Task[None]]:
    """Return the tasks of flights; of those only that bring any of some ranges (offset, length), if these are given."""
    found = {flight for flight in flights if flight.done is not None}
    if found and ranges is not None:
        wanted = RangeSet(Range(*item) for item in ranges)
        found = {flight for flight in found if wanted.touches(flight.offset, flight.offset + flight.length)}
    return [flight.done for flight in found if flight.done is not None]


def canceled_from_outside(error: BaseException) -> bool:
    """Tell whether this is the cancelation of the running task, not of something that it has waited for."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and (task is None or task.cancelling() > 0)


def spawn(tasks: set[asyncio.Task[_Result]], work: Coroutine[Any, Any, _Result]) -> asyncio.Task[_Result]:
    """Run a coroutine as a task of this loop, which is one of `tasks` until it ends: a loop holds its tasks weakly."""
    task = asyncio.get_running_loop().create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task


async def end_of(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait for their end, for 2 s at most: some may suppress the cancelation."""
    waiting = list(tasks)
    for task in waiting:
        task.cancel()
    if waiting:
        _, left = await asyncio.wait(waiting, timeout=_CANCEL_TIMEOUT)
        if left:
            log.error("%d reads or handlers were canceled and go on: they are left alone", len(left))
