"""What blocks a worker's loop, and how that is ended. Called from signal handlers, when the keeper asks."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from aiouffd.engine.serve.handler import Handler
from aiouffd.errors import SourceError

if TYPE_CHECKING:
    from aiouffd.engine.flight import Flight
    from aiouffd.pager.process.served import Served

__all__ = ["Blocked"]

log: logging.Logger = logging.getLogger("aiouffd.pager")


class Blocked:
    """Signal handlers of Python run also where time.sleep() blocks."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def _find(self) -> tuple[Any, Flight] | None:
        """Return the source or handler that runs just now, and what it was given."""
        task = asyncio.current_task()
        for space in self._served.dispatcher.spaces.values() if task is not None else ():
            for flight in space.flights:
                if flight.done is task:
                    return self._served.tenancies[space.identity].origin.service.origin, flight
        return None

    def say(self, *_: object) -> None:
        """Signal handler: log what blocks."""
        if (found := self._find()) is not None:
            log.error("%r blocks the event loop; it was given %r", *found)

    def interrupt(self, *_: object) -> None:
        """Signal handler: raise where the source or handler is, so that its page fails, and no other."""
        if (found := self._find()) is not None:
            origin, flight = found
            reason = "it has blocked the event loop, and was interrupted"
            if isinstance(origin, Handler):
                raise RuntimeError(reason)
            raise SourceError(repr(origin), flight.offset, flight.end - flight.start, reason)
