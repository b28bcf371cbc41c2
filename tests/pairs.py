"""A pager without a client: what a test asks it, and what it answers, message by message."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from aiouffd.pager.client.pair import Pair
from aiouffd.pager.client.waiting import Waiter
from aiouffd.pager.process import control
from aiouffd.pager.process.serialization import Pickles

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Running", "Unwatched", "running"]


class Unwatched:
    """In place of a watch: watches over nothing."""

    beat = 1.0

    def alive(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Running:
    """A pair whose worker is ready."""

    def __init__(self, pair: Pair, waiter: Waiter) -> None:
        self.pair = pair
        self._waiter = waiter
        self.ready()

    def ready(self) -> int:
        """Wait until a worker says that it is ready; return its pid."""
        message = self.hear()
        assert message["event"] == "ready"
        return self.pair.worker_pid

    def hear(self) -> dict[str, Any]:
        """Return the next message."""
        assert self._waiter.wait(60.0, self.pair.connection.fileno())
        message, fds = control.receive(self.pair.connection)
        if message.get("event") == "ready":
            self.pair.runs(message["pid"], fds.pop())
        for fd in fds:
            os.close(fd)
        return message

    def ask(self, op: str, fds: Sequence[int] = (), **arguments: Any) -> dict[str, Any]:
        """Send a request; return its answer."""
        control.send(self.pair.connection, {"op": op, "id": 7, **arguments}, list(fds))
        answer = self.hear()
        assert answer["id"] == 7
        return answer


@contextlib.contextmanager
def running(pickles: Pickles = Pickles.NEVER) -> Iterator[Running]:
    """Start a pair, and end it."""
    watch: Any = Unwatched()
    waiter = Waiter(watch)
    pair = Pair.start(waiter, pickles)
    try:
        yield Running(pair, waiter)
    finally:
        pair.end(leave=False)
        waiter.close()
