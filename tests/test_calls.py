"""`monitor.engines.calls`: neither side waits for a lock that an interrupted thread may hold."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING

import pytest

from aiouffd.errors import BusyError
from aiouffd.monitor.engines.calls import call_in_loop, no_collections, start_in_loop

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def running() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop that runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_a_call_in_the_loop(running: asyncio.AbstractEventLoop) -> None:
    """It is made there; its result or its error comes back."""
    assert call_in_loop(running, threading.get_ident, 5.0) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        call_in_loop(running, lambda: 1 // 0, 5.0)


def test_a_loop_that_does_not_begin(running: asyncio.AbstractEventLoop) -> None:
    """BusyError; and the call is not made later either."""
    made: list[int] = []
    go_on = threading.Event()
    running.call_soon_threadsafe(go_on.wait)
    with pytest.raises(BusyError):
        call_in_loop(running, lambda: made.append(1), 0.05)
    go_on.set()
    assert call_in_loop(running, lambda: 7, 5.0) == 7
    assert not made


def test_a_call_that_has_begun_is_waited_for(running: asyncio.AbstractEventLoop) -> None:
    """However long it takes: half a change cannot be taken back."""

    def slow() -> int:
        time.sleep(0.3)
        return 3

    assert call_in_loop(running, slow, 0.1) == 3


def test_a_closed_loop() -> None:
    """It does not begin."""
    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(BusyError):
        call_in_loop(loop, lambda: 1, 0.05)


def test_a_task(running: asyncio.AbstractEventLoop) -> None:
    """Its result and its error come to the future."""

    async def divide(by: int) -> int:
        await asyncio.sleep(0)
        return 12 // by

    assert start_in_loop(running, lambda: divide(4)).result(60) == 3
    with pytest.raises(ZeroDivisionError):
        start_in_loop(running, lambda: divide(0)).result(60)


def test_a_task_is_canceled_with_its_future(running: asyncio.AbstractEventLoop) -> None:
    """From either side."""
    entered, left = threading.Event(), threading.Event()

    async def wait() -> None:
        entered.set()
        try:
            await asyncio.sleep(1000)
        finally:
            left.set()

    async def give_up() -> None:
        raise asyncio.CancelledError

    future = start_in_loop(running, wait)
    assert entered.wait(60)
    assert future.cancel()
    assert left.wait(60)
    with pytest.raises(CancelledError):
        start_in_loop(running, give_up).result(60)


def test_the_loop_goes_on_while_a_thread_holds_the_lock(running: asyncio.AbstractEventLoop) -> None:
    """A signal handler may have interrupted that thread, and wait for the loop."""
    go_on = threading.Event()

    async def answer() -> int:
        while not go_on.is_set():  # noqa: ASYNC110 - it is set by another thread
            await asyncio.sleep(0.001)
        return 42

    future = start_in_loop(running, answer)
    with future._condition:
        go_on.set()
        for _ in range(3):
            time.sleep(0.005)
            assert call_in_loop(running, lambda: 1, 5.0) == 1
        assert future._state == "PENDING"
    assert future.result(60) == 42


def test_what_was_answered_before_it_was_done(
    running: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    """The first answer counts, and nobody complains about the other."""
    go_on = asyncio.Event()
    future = start_in_loop(running, go_on.wait)
    future.set_exception(BusyError("a prefetch", 0, 0, 16))
    running.call_soon_threadsafe(go_on.set)
    for _ in range(3):
        call_in_loop(running, lambda: 1, 5.0)
    assert isinstance(future.exception(5), BusyError)
    assert not caplog.records


def test_no_garbage_is_collected_in_a_block() -> None:
    """And it is again afterwards, if it was before."""
    assert gc.isenabled()
    with no_collections():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with no_collections():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
