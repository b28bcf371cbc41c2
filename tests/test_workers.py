"""`store.workers`: threads that do what is most urgent first."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from functools import partial

import pytest

from aiouffd.errors import ClosedError
from aiouffd.store.workers import Job, Workers


def _hold(begun: threading.Event, go: threading.Event) -> None:
    """Keep a thread busy."""
    begun.set()
    go.wait()


async def test_what_is_urgent_goes_first() -> None:
    """Also what has become urgent while it waited; else in the order of the calls."""
    workers, go, done = Workers(1, "test"), threading.Event(), list[int]()
    begun = threading.Event()
    first = workers.submit(partial(_hold, begun, go), urgent=False)
    await asyncio.to_thread(begun.wait)
    jobs = [workers.submit(partial(done.append, n), urgent=n in (3, 4)) for n in range(6)]
    workers.hurry(jobs[5])
    workers.hurry(jobs[3])
    workers.hurry(first)
    go.set()
    for job in jobs:
        await job.result()
    assert done == [3, 4, 5, 0, 1, 2]
    workers.close()


def test_no_thread_finds_nothing_while_a_job_becomes_urgent() -> None:
    """It has been called for that job, and is not called again."""
    workers = Workers(1, "test")

    class Ahead(deque[Job]):
        def remove(self, value: Job, /) -> None:
            super().remove(value)
            thread.start()
            thread.join(0.1)  # it waits for what becomes of the job

    def take() -> None:
        with suppress(IndexError):
            workers._next()

    job = Job(Future(), lambda: 7)
    workers._ahead, thread = Ahead([job]), threading.Thread(target=take)
    workers.hurry(job)
    thread.join()
    assert job.future.done()
    workers.close()


async def test_errors_arrive() -> None:
    """At who waits for the call; the thread goes on."""
    workers = Workers(1, "test")
    failing = workers.submit(lambda: 1 // 0, urgent=True)
    with pytest.raises(ZeroDivisionError):
        await failing.result()
    assert await workers.submit(lambda: 5, urgent=True).result() == 5
    workers.close()


async def test_canceling_one_leaves_the_others() -> None:
    """A call that nobody waits for any more is not made, and takes no other's turn."""
    workers, go, begun = Workers(1, "test"), threading.Event(), threading.Event()
    first = workers.submit(partial(_hold, begun, go), urgent=True)
    await asyncio.to_thread(begun.wait)
    canceled, last = workers.submit(lambda: 1, urgent=True), workers.submit(lambda: 2, urgent=False)
    task = asyncio.ensure_future(canceled.result())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go.set()
    assert await last.result() == 2
    await first.result()
    workers.close()


async def test_what_waits_is_told_of_the_end() -> None:
    """What no thread has begun raises, and is not made; what runs returns."""
    workers, go, begun = Workers(1, "test"), threading.Event(), threading.Event()
    first = workers.submit(partial(_hold, begun, go), urgent=True)
    await asyncio.to_thread(begun.wait)
    waiting = [workers.submit(lambda: 1, urgent=urgent) for urgent in (False, True)]
    workers.close()
    for job in waiting:
        with pytest.raises(ClosedError):
            await asyncio.wait_for(job.result(), 60)
    go.set()
    await first.result()
