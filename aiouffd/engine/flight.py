"""Pages on their way."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from aiouffd.ranges import Range, RangeSet

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiouffd.engine.runs import Purpose

__all__ = ["Flight", "canceled_from_outside", "end_of", "tasks_of"]

log = logging.getLogger("aiouffd")

_CANCEL_TIMEOUT = 2.0


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
        self.start = start
        self.end = end
        self.length = end - start
        self.offset = offset
        self.wanted: set[int] = set()
        self.began_ns = began_ns
        self.purpose = purpose
        self.done: asyncio.Task[None] | None = None
        self.generation = -1

    def __repr__(self) -> str:
        return f"<Flight [{self.start:#x}, {self.end:#x}) of {self.offset:#x}>"


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


async def end_of(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait for their end, for 2 s at most: some may suppress the cancelation."""
    waiting = list(tasks)
    for task in waiting:
        task.cancel()
    if waiting:
        _, left = await asyncio.wait(waiting, timeout=_CANCEL_TIMEOUT)
        if left:
            log.error("%d reads or handlers were canceled and go on: they are left alone", len(left))
