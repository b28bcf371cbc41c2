"""Errors that an engine has reported and that nobody has raised yet."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import TYPE_CHECKING

from aiouffd.errors import PagerDiedError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ErrorQueue"]

_MAX_KEPT = 1000


class ErrorQueue:
    """Keeps the first thousand errors, in order, and a PagerDiedError in any case. Thread-safe."""

    def __init__(self) -> None:
        self._errors: deque[BaseException] = deque()
        self._lock = threading.RLock()
        self._waiters: list[Callable[[], object]] = []

    def put(self, error: BaseException) -> None:
        """Add an error, and wake those who wait."""
        with self._lock:
            if len(self._errors) < _MAX_KEPT or isinstance(error, PagerDiedError):
                self._errors.append(error)
            self.wake()

    def raise_next(self) -> None:
        """Raise the next error, if there is one."""
        with self._lock:
            if self._errors:
                raise self._errors.popleft()

    def wake(self) -> None:
        """Wake those who wait, so that they look again."""
        with self._lock:
            for waiter in self._waiters:
                waiter()

    async def wait(self, check: Callable[[], None]) -> None:
        """Wait for the next error and raise it. Canceling is safe.

        Args:
            check: called each time before waiting; raises where no more errors can come.
        """
        import asyncio  # noqa: PLC0415 - 20 ms, that a program with a loop has spent already

        loop = asyncio.get_running_loop()
        event = asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # that loop is closed
                loop.call_soon_threadsafe(event.set)

        with self._lock:
            self._waiters.append(wake)
        try:
            while True:
                event.clear()
                self.raise_next()
                check()
                await event.wait()
        finally:
            with self._lock:
                self._waiters.remove(wake)
