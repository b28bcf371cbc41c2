"""Pages on their way."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiouffd.errors import UffdError

__all__ = ["Flight", "canceled_from_outside", "end_of"]

log = logging.getLogger("aiouffd")

_FAREWELL = 2.0


class Flight:
    """Pages on their way: a source read, or a handler, that is not done yet.

    Attributes:
        start: address of the first page.
        end: address behind the last.
        offset: what `start` showed when the flight began.
        wanted: addresses of the pages that threads wait for.
        began_ns: when the first of these faults was read.
        generation: of the mappings, when the flight began.
        done: the task that flies it.
        errors: where to put why it brought nothing, for whoever has asked for it ahead of faults.
    """

    __slots__ = ("began_ns", "done", "end", "errors", "generation", "offset", "start", "wanted")

    def __init__(self, start: int, end: int, offset: int, began_ns: int, generation: int) -> None:
        self.start = start
        self.end = end
        self.offset = offset
        self.wanted: set[int] = set()
        self.began_ns = began_ns
        self.generation = generation
        self.done: asyncio.Task[None] | None = None
        self.errors: list[UffdError] | None = None

    def __repr__(self) -> str:
        return f"<Flight [{self.start:#x}, {self.end:#x}) of {self.offset:#x}>"


def canceled_from_outside(error: BaseException) -> bool:
    """Tell whether this is the cancelation of the task that runs, and none that it has come upon."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and (task is None or task.cancelling() > 0)


async def end_of(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait for their end; for those that do not let themselves be canceled, not for ever."""
    waiting = list(tasks)
    for task in waiting:
        task.cancel()
    if waiting:
        _, left = await asyncio.wait(waiting, timeout=_FAREWELL)
        if left:
            log.error("%d reads or handlers were canceled and go on: they are left alone", len(left))
