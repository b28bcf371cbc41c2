"""Threads that decompress: what a fault waits for goes before what is brought ahead."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple

from aiouffd.sources.daemon_threads import DaemonThreads, fail_waiting

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Job", "Workers"]


class Job(NamedTuple):
    """A call that waits for a thread, or has one.

    Attributes:
        future: what it returns.
        call: what is called.
    """

    future: Future[Any]
    call: Callable[[], Any]

    async def result(self) -> Any:
        """Wait for what it returns. Canceling is safe; a call that has begun ends."""
        return await asyncio.wrap_future(self.future)


class Workers:
    """Calls functions in threads.

    Args:
        most: limit of the threads.
        name: of the threads.
    """

    def __init__(self, most: int, name: str) -> None:
        self._threads = DaemonThreads(most, name)
        self._urgent: deque[Job] = deque()
        self._ahead: deque[Job] = deque()
        self._moving = threading.Lock()  # no thread finds both empty while a job goes from one to the other

    def submit(self, call: Callable[[], Any], *, urgent: bool) -> Job:
        """Have a thread call a function. Raises RuntimeError if none can be started."""
        job = Job(Future(), call)
        (self._urgent if urgent else self._ahead).append(job)
        self._threads.submit(self._next)
        return job

    def hurry(self, job: Job) -> None:
        """Let a job that still waits go before those that are not urgent."""
        with self._moving, contextlib.suppress(ValueError):  # it has a thread by now, or is urgent
            self._ahead.remove(job)
            self._urgent.append(job)

    def _next(self) -> None:
        """Do the job that is most urgent; there are as many calls of this as jobs."""
        with self._moving:
            job = (self._urgent or self._ahead).popleft()
        if job.future.set_running_or_notify_cancel():
            try:
                job.future.set_result(job.call())
            except BaseException as error:  # noqa: BLE001 - whoever waits for the future raises it
                job.future.set_exception(error)

    def close(self) -> None:
        """Let the threads end; what waits for one is not called, and raises ClosedError. Does not wait."""
        self._threads.close()
        for waiting in (self._urgent, self._ahead):
            with contextlib.suppress(IndexError):
                while True:
                    fail_waiting(waiting.popleft().future)
