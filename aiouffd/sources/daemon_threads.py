"""Threads for calls that may never return: a read of a file system or a server that does not answer."""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
from collections import deque
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any

from aiouffd.errors import ClosedError
from aiouffd.lifetime import until_exit

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DaemonThreads", "fail_waiting"]


class DaemonThreads(Executor):
    """As `ThreadPoolExecutor`, but an interpreter that ends does not wait for its threads.

    Args:
        most: limit of the threads, which are started as they are needed.
        name: of the threads.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._idle: deque[None] = deque()  # a token for each thread that waits; taken without a lock
        self._threads: list[threading.Thread] = []
        self._closed = False

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Have a thread call a function.

        Raises:
            RuntimeError: no thread can be started, or after `shutdown`.
        """
        if self._closed:
            raise RuntimeError("no calls after shutdown")
        if self._idle:
            self._idle.pop()
        elif len(self._threads) < self._most:
            thread = threading.Thread(target=_work, args=(self._calls, self._idle), name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                if not self._threads:
                    raise
            else:
                self._threads.append(thread)
        future: Future[Any] = Future()
        self._calls.put((future, functools.partial(function, *args, **kwargs)))
        return future

    def close(self) -> None:
        """Let the threads end. What waits for one raises ClosedError; what has begun goes on, and is not waited for."""
        self.shutdown(wait=False, cancel_futures=True)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002 - Executor's
        """Take no further calls, and let the threads end; wait for them if asked to."""
        self._closed = True
        with contextlib.suppress(queue.Empty):
            while cancel_futures:
                call = self._calls.get_nowait()
                if call is not None:
                    fail_waiting(call[0])
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads if wait else ():
            thread.join()

    @until_exit
    def __del__(self) -> None:
        self.shutdown(wait=False)


def fail_waiting(future: Future[Any]) -> None:
    """Have a call that no thread has begun raise. To cancel it would look like a cancel of the task that waits."""
    if future.set_running_or_notify_cancel():
        future.set_exception(ClosedError("it was closed before this call was made"))


def _work(calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None], idle: deque[None]) -> None:
    while (call := calls.get()) is not None:
        future, function = call
        if future.set_running_or_notify_cancel():
            try:
                result = function()
            except BaseException as error:  # noqa: BLE001 - whoever waits for the future raises it
                future.set_exception(error)
            else:
                future.set_result(result)
        del call, future, function  # not kept while waiting for the next
        idle.append(None)
