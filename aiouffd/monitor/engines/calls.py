"""Work that another thread does, while this one waits and its signal handlers may touch missing pages.

These calls use bare locks. With a Condition (in Future and Event) a signal handler, a finalizer or a callback of the
garbage collector could interrupt the waiting thread while that holds the Condition's lock: if it then touches a missing
page, the loop that should bring the page would wait for the lock, and the handler for the loop.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from aiouffd.errors import BusyError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine, Iterator

__all__ = ["Call", "call_in_loop", "no_collections", "start_in_loop"]

_RETRY = 0.001  # seconds

T = TypeVar("T")


class Call(Generic[T]):
    """A call that another thread makes, once."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._begun = threading.Lock()  # taken by who makes the call, or by the caller who gives up
        self._running = threading.Lock()
        self._running.acquire()
        self._result: T
        self._error: BaseException | None = None

    def __call__(self) -> None:
        """Make the call, unless it was made, or its caller has given up."""
        if not self._begun.acquire(blocking=False):
            return
        try:
            self._result = self._work()
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            self._error = error
        finally:
            self._running.release()

    def wait(self, seconds: float = -1.0) -> T:
        """Return the result, or raise its error. BusyError: it has not begun in time, and never will; -1: no limit."""
        try:
            done = self._running.acquire(timeout=seconds)
        except BaseException:  # a signal handler has raised an exception
            self._cancel()
            raise
        if not done and self._cancel():
            raise BusyError("a change of the layout", 0, 0, errno.EBUSY)
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
            return self._result
        finally:
            del error

    def _cancel(self) -> bool:
        """Give up; or wait until the call has been made, if it has begun."""
        if self._begun.acquire(blocking=False):
            return True
        with self._running:
            return False


def call_in_loop(loop: asyncio.AbstractEventLoop, work: Callable[[], T], patience: float) -> T:
    """Call `work` in the thread of a loop, and wait for its result.

    Raises:
        BusyError: the loop has not begun within `patience` seconds; `work` is not called.
    """
    call = Call(work)
    with contextlib.suppress(RuntimeError):  # the loop is closed: it will not begin
        loop.call_soon_threadsafe(call)
    return call.wait(patience)


class _Outcome(Future[T]):
    """A future that a loop completes without waiting for its lock, which an interrupted thread may hold."""

    def complete(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[T]) -> None:
        """Take over the outcome of a task that is done; later, while the lock is taken."""
        error = None if task.cancelled() else task.exception()  # retrieved, if the loop ends before the lock is free
        if not self._condition.acquire(blocking=False):
            loop.call_later(_RETRY, self.complete, loop, task)
            return
        try:
            if self.done() and not self.cancelled():
                return  # `Local.end` has answered
            if task.cancelled():
                self.cancel()
            if not self.set_running_or_notify_cancel():
                return
            if error is not None:
                self.set_exception(error)
            else:
                self.set_result(task.result())
        finally:
            self._condition.release()


def start_in_loop(loop: asyncio.AbstractEventLoop, work: Callable[[], Coroutine[Any, Any, T] | None]) -> Future[T]:
    """Run what `work` returns as a task of a loop, as `asyncio.run_coroutine_threadsafe` does; None: no task begins.

    The loop never waits for a lock that the caller may hold. Canceling the future cancels the task.
    """
    outcome: _Outcome[T] = _Outcome()

    def start() -> None:
        if (coroutine := work()) is None:
            return
        task = loop.create_task(coroutine)
        task.add_done_callback(lambda done: outcome.complete(loop, done))
        task_of.append(task)

    def cancel(future: Future[T]) -> None:
        if future.cancelled():
            loop.call_soon_threadsafe(lambda: [task.cancel() for task in task_of])

    task_of: list[asyncio.Task[T]] = []
    outcome.add_done_callback(cancel)
    loop.call_soon_threadsafe(start)
    return outcome


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Collect no garbage inside the block: a finalizer that touches a missing page there would wait for this thread."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
