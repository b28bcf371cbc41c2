"""`sources.daemon_threads`: calls in daemon threads."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import TYPE_CHECKING

import pytest
from scenario import eventually, play

from aiouffd.errors import ClosedError
from aiouffd.sources.daemon_threads import DaemonThreads

if TYPE_CHECKING:
    from concurrent.futures import Future


async def test_calls_and_their_errors() -> None:
    """They return, or raise, in the coroutine that waits; as many at once as there may be threads."""
    threads = DaemonThreads(4, "test")
    loop = asyncio.get_running_loop()
    together = threading.Barrier(4)
    calls = (loop.run_in_executor(threads, together.wait, 20) for _ in range(4))
    assert sorted(await asyncio.gather(*calls)) == [0, 1, 2, 3]
    with pytest.raises(ZeroDivisionError):
        await loop.run_in_executor(threads, divmod, 1, 0)
    assert await asyncio.wrap_future(threads.submit(int, "11", base=2)) == 3
    assert len(threads._threads) <= 4
    await asyncio.to_thread(threads.shutdown)
    assert not any(thread.is_alive() for thread in threads._threads)
    with pytest.raises(RuntimeError, match="after shutdown"):
        threads.submit(int)


def test_what_waits_for_a_thread_is_told_of_the_end() -> None:
    """By an error, and not by a cancel, which would be taken for one of the task that waits. What runs goes on."""
    threads = DaemonThreads(1, "test")
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> bool:
        begun.set()
        return go_on.wait(60)

    running = threads.submit(wait)
    assert begun.wait(60)
    waiting: Future[int] = threads.submit(int)
    threads.close()
    with pytest.raises(ClosedError):
        waiting.result(60)
    go_on.set()
    assert running.result(60) is True
    threads.shutdown()


def test_threads_end_with_what_owns_them() -> None:
    """Also if nobody shuts it down."""
    threads = DaemonThreads(2, "test")
    threads.submit(int).result(60)
    (thread,) = threads._threads
    del threads
    gc.collect()
    eventually(thread.is_alive, expected=False)


def test_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one is an error; later the others do the work."""

    def refused(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    threads = DaemonThreads(2, "test")
    go_on = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        with pytest.raises(RuntimeError, match="can't start"):
            threads.submit(int)
    running = threads.submit(go_on.wait, 20)
    monkeypatch.setattr(threading.Thread, "start", refused)
    second = threads.submit(int)
    go_on.set()
    assert (running.result(60), second.result(60)) == (True, 0)
    threads.shutdown()


def never_returns() -> None:
    """Scenario: a call waits without end while the interpreter ends."""
    begun = threading.Event()

    def wait() -> None:
        begun.set()
        threading.Event().wait()

    threads = DaemonThreads(2, "test")
    threads.submit(wait)
    assert begun.wait(60)


def test_the_interpreter_does_not_wait() -> None:
    """It ends while a call has not returned."""
    play(never_returns, deadline=60)
