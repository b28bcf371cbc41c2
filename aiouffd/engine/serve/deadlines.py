"""One timeout for many waits at once, with one timer: a timer for each wait (asyncio.timeout) costs 6 us a fault."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Deadlines"]


class Deadlines:
    """A context manager like `asyncio.timeout(seconds)` that any number of tasks may enter, each once at a time.

    A wait raises TimeoutError when its time is up, as precisely as the loop's timers are.

    Args:
        seconds: the same for all waits, so that they expire in the order in which they began; None: no limit.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._waiting: dict[asyncio.Task[object], tuple[float, int]] = {}  # when it is up; cancel requests before
        self._expired: set[asyncio.Task[object]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> None:
        if self.seconds is None:
            return
        task = asyncio.current_task()
        assert task is not None
        self._waiting[task] = (monotonic() + self.seconds, task.cancelling())
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.seconds, self._expire)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.seconds is None or kind is GeneratorExit:  # its loop is gone: it is being destroyed, by no task
            return
        task = asyncio.current_task()
        assert task is not None
        _, before = self._waiting.pop(task)
        if task in self._expired:
            self._expired.remove(task)
            # It may have been canceled from outside as well: that comes first.
            if task.uncancel() <= before and kind is asyncio.CancelledError:
                raise TimeoutError from value

    def _expire(self) -> None:
        """Cancel the tasks whose time is up, and set the timer for the next."""
        self._timer = None
        now = monotonic()
        for task, (due, _) in self._waiting.items():
            if task in self._expired:
                continue
            if due > now:
                self._timer = asyncio.get_running_loop().call_later(due - now, self._expire)
                return
            self._expired.add(task)
            task.cancel()

    def close(self) -> None:
        """Stop the timer. Tasks that still wait have no limit from now on."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
