"""Pages on their way."""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Any, TypeVar

from aiouffd.ranges import Range, RangeSet

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Iterator

    from aiouffd.engine.runs import Purpose

__all__ = ["Flight", "Flights", "canceled_from_outside", "end_of", "spawn", "tasks_of"]

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
        wanted: addresses of the pages that threads wait for.
        began_ns: when the first of these faults was read.
        purpose: what it is for.
        done: the task that flies it.
        generation: of the mappings, when it was entered in its space.
    """

    __slots__ = ("began_ns", "done", "end", "generation", "length", "offset", "purpose", "start", "wanted")

    def __init__(self, start: int, end: int, offset: int, began_ns: int, purpose: Purpose) -> None:
        self.start: int = start
        self.end: int = end
        self.length: int = end - start
        self.offset: int = offset
        self.wanted: set[int] = set()
        self.began_ns: int = began_ns
        self.purpose: Purpose = purpose
        self.done: asyncio.Task[None] | None = None
        self.generation: int = -1

    def __repr__(self) -> str:
        return f"<Flight [{self.start:#x}, {self.end:#x}) of {self.offset:#x}>"


class Flights:
    """Which flight brings an address. Costs what there are flights, however large they are.

    Ranges are half-open, and whole pages.
    """

    __slots__ = ("_spans", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []  # sorted; spans do not overlap
        self._spans: list[tuple[int, Flight]] = []  # (end, flight) for each start

    def get(self, address: int) -> Flight | None:
        """Return the flight that brings an address, if there is one."""
        index = bisect_right(self._starts, address) - 1
        if index >= 0:
            end, flight = self._spans[index]
            if address < end:
                return flight
        return None

    def touches(self, start: int, end: int) -> bool:
        """Tell whether any flight brings some of [start, end)."""
        index = bisect_left(self._starts, end) - 1
        return index >= 0 and self._spans[index][0] > start

    def gaps(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the parts of [start, end) that no flight brings, as (start, end)."""
        if not self.touches(start, end):
            return [(start, end)] if start < end else []
        found: list[tuple[int, int]] = []
        for low, high, _ in self._within(start, end):
            if start < low:
                found.append((start, low))
            start = high
        if start < end:
            found.append((start, end))
        return found

    def add(self, flight: Flight) -> None:
        """Enter a flight, in place of others that bring the same."""
        if self.touches(flight.start, flight.end):
            self.remove(flight.start, flight.end)
        self._insert(flight.start, flight.end, flight)

    def discard(self, flight: Flight) -> None:
        """Leave out a flight, as far as it is entered still."""
        index = bisect_left(self._starts, flight.start)
        if index < len(self._starts) and self._spans[index] == (flight.end, flight):  # as it was entered
            del self._starts[index], self._spans[index]
            return
        for start, end, other in self.remove(flight.start, flight.end):
            if other is not flight:
                self._insert(start, end, other)

    def remove(self, start: int, end: int) -> list[tuple[int, int, Flight]]:
        """Cut out [start, end), and return what was there as (start, end, flight)."""
        found = self._within(start, end)
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

    def _within(self, start: int, end: int) -> list[tuple[int, int, Flight]]:
        """Return what lies within [start, end), clipped."""
        first = max(bisect_right(self._starts, start) - 1, 0)
        last = bisect_left(self._starts, end)
        spans = zip(self._starts[first:last], self._spans[first:last], strict=True)
        return [(max(low, start), min(high, end), flight) for low, (high, flight) in spans if high > start]

    def _insert(self, start: int, end: int, flight: Flight) -> None:
        index = bisect_left(self._starts, start)
        self._starts.insert(index, start)
        self._spans.insert(index, (end, flight))

    def __contains__(self, address: int) -> bool:
        return self.get(address) is not None

    def __iter__(self) -> Iterator[Flight]:
        """Each flight once."""
        return iter({flight for _, flight in self._spans})

    def __len__(self) -> int:
        """How many ranges are on their way: at least as many as there are flights."""
        return len(self._starts)


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
