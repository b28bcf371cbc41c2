"""`handoff.own_threads`: calls that may block for ever cost their caller only."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from scenario import eventually

from aiouffd.handoff.own_threads import Unneeded, close_foreign, detach, in_own_thread, kind_of

if TYPE_CHECKING:
    from collections.abc import Iterator

LINGER = 60  # seconds


@pytest.fixture
def lingering() -> Iterator[int]:
    """Return a TCP socket whose close(2) waits for data that nobody reads; it is the test's to close."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as sender:
        sender.connect(listener.getsockname())
        receiver, _ = listener.accept()
        sender.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                sender.send(bytes(1 << 16))
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER))
        sender.setblocking(True)  # a non-blocking socket does not linger
        with receiver:
            yield sender.detach()
        # Here the connection is reset, which ends the wait.


async def test_what_a_function_returns_and_raises() -> None:
    """It runs in another thread; its exception is the caller's, StopIteration too, which a future refuses."""

    def fail(error: BaseException) -> None:
        raise error

    assert await in_own_thread(threading.get_ident) != threading.get_ident()
    assert await in_own_thread(divmod, 7, 2) == (3, 1)
    with pytest.raises(KeyError, match="x"):
        await in_own_thread(fail, KeyError("x"))
    with pytest.raises(RuntimeError, match="StopIteration"):
        await in_own_thread(fail, StopIteration())


async def test_calls_that_hang_do_not_stop_others() -> None:
    """More of them than asyncio's pool has threads; canceling leaves them, and what they return is dropped."""
    go = threading.Event()
    hanging = [asyncio.create_task(in_own_thread(go.wait, 60)) for _ in range(50)]
    await asyncio.sleep(0)
    async with asyncio.timeout(60):
        assert await in_own_thread(lambda: 5) == 5
    for task in hanging:
        task.cancel()
    go.set()
    results = await asyncio.gather(*hanging, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)


def test_a_loop_that_is_closed_meanwhile() -> None:
    """The thread ends without a word."""
    go, ended = threading.Event(), threading.Event()

    def late() -> None:
        go.wait(60)
        ended.set()

    async def main() -> None:
        asyncio.get_running_loop().create_task(in_own_thread(late))
        await asyncio.sleep(0)

    asyncio.run(main())
    go.set()
    assert ended.wait(60)


def test_descriptors_whose_close_does_not_block_are_closed_at_once() -> None:
    """Pipes and memory: no thread is needed."""
    fds = [*os.pipe(), os.memfd_create("x")]
    close_foreign(fds)
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_descriptor_whose_close_blocks(lingering: int) -> None:
    """The caller goes on, and the descriptors beside it are closed."""
    held = os.dup(lingering)
    os.close(held)  # not the last: does not block
    pipe = os.pipe()
    began = time.monotonic()
    close_foreign([lingering, *pipe])
    assert time.monotonic() - began < LINGER / 2
    eventually(lambda: [os.path.exists(f"/proc/self/fd/{fd}") for fd in pipe], [False, False])  # noqa: PTH110


def test_a_connection_in_whose_queue_such_a_descriptor_is(lingering: int) -> None:
    """Its close(2) closes what is in the queue, and blocks as well."""
    ours, theirs = socket.socketpair()
    socket.send_fds(theirs, [b"x"], [lingering])
    began = time.monotonic()
    detach(os.close, lingering)
    close_foreign([ours.detach()])
    theirs.close()
    assert time.monotonic() - began < LINGER / 2


def test_what_a_descriptor_is_of() -> None:
    """As /proc says it."""
    reading, writing = os.pipe()
    assert kind_of(reading).startswith("pipe:[")
    os.close(reading)
    os.close(writing)


async def test_what_is_not_needed_is_closed_together(monkeypatch: pytest.MonkeyPatch, lingering: int) -> None:
    """Soon, in one thread for all; in another where a close(2) does not return; and again what comes then."""
    begun: list[list[int]] = []

    def noted(function: Any, fds: Any) -> None:
        begun.append(list(fds))
        detach(function, fds)

    monkeypatch.setattr("aiouffd.handoff.own_threads.detach", noted)
    unneeded = Unneeded(asyncio.get_running_loop())
    pipes = [os.pipe() for _ in range(5)]
    writing = [pipe[1] for pipe in pipes]
    unneeded.add(*writing[:2])
    unneeded.add(lingering, *writing[2:4])
    assert not begun
    async with asyncio.timeout(LINGER / 2):
        for reading, _ in pipes[:4]:
            assert await asyncio.to_thread(os.read, reading, 1) == b""
        unneeded.add(writing[4])
        assert await asyncio.to_thread(os.read, pipes[4][0], 1) == b""
    assert begun[0] == [*writing[:2], lingering, *writing[2:4]]
    for reading, _ in pipes:
        os.close(reading)
