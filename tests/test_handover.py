"""`handover`: a successor serves when its predecessor is gone, and only then."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from aiouffd.pager.process import control
from aiouffd.pager.process import handover as handovers
from aiouffd.pager.process.handles import close_all
from aiouffd.pager.process.handover import Handover
from aiouffd.pager.process.state import Meta, SpaceState, State


def waiting(written: list[int]) -> tuple[Handover, socket.socket, socket.socket, State, int]:
    """Return a successor that has taken a state over, both ends of its connection, the state and a descriptor in it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    fd = os.memfd_create("space")
    state = State(Meta(owner=-1, awaits=ours.fileno()), spaces={1: SpaceState(1, fd, 4096, 0, 1, "t")})
    served: Any = SimpleNamespace(journal=SimpleNamespace(change=written.append))
    return Handover(served), ours, theirs, state, fd


async def test_the_predecessor_is_gone() -> None:
    """All is the successor's, and stays open."""
    written: list[int] = []
    handover, ours, theirs, state, fd = waiting(written)
    theirs.close()
    assert await handover.is_left_to_us(ours, state)
    assert not written
    os.fstat(fd)
    os.close(fd)
    ours.close()


async def test_the_predecessor_serves_on() -> None:
    """The successor forgets what it was given, in its journal as well; the connection stays until it is closed."""
    written: list[int] = []
    handover, ours, theirs, state, fd = waiting(written)
    theirs.setblocking(False)
    control.send(theirs, {"keep": True})
    assert not await handover.is_left_to_us(ours, state)
    assert written == [0]
    assert not os.path.exists(f"/proc/self/fd/{fd}")  # noqa: PTH110 - it dangles otherwise
    assert ours.fileno() >= 0
    ours.close()
    theirs.close()


async def test_other_messages_decide_nothing() -> None:
    """It goes on waiting."""
    handover, ours, theirs, state, fd = waiting([])
    theirs.setblocking(False)
    control.send(theirs, {"other": True})
    theirs.close()
    assert await handover.is_left_to_us(ours, state)
    os.close(fd)
    ours.close()


def test_a_successor_that_dies_has_a_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same socket, whenever it dies: each is answered, and the predecessor ends for the one that has all.

    Not on the loop of a test: while it waits for "taken" it blocks its own.
    """
    ended: list[int] = []

    def end(status: int) -> None:
        ended.append(status)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", end)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    journal = os.memfd_create("journal")
    emptied: list[int] = []
    words = SimpleNamespace(fd=journal, change=emptied.append, done=False)
    served: Any = SimpleNamespace(is_empty=False, state=State, journal=words)
    for by, built in ((1, False), (2, False), (2, True), (3, False), (3, True)):
        control.send(ours, {"by": by, "built": built})
    control.send(ours, {"taken": True})
    with contextlib.suppress(SystemExit):
        asyncio.run(Handover(served).give(theirs.detach()))
    assert (ended, emptied) == ([0], [0])  # a holder would give once more what it says
    assert words.done  # and make another keeper
    for by in (1, 2, 2, 3, 3):
        message, fds = control.receive(ours)
        assert message == {"to": by, "numbers": []}
        close_all(fds)
    with pytest.raises(control.Closed):
        control.receive(ours)
    ours.close()
    os.close(journal)


async def test_a_worker_that_has_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own predecessor died before it gave anything: who succeeds it must not believe that nothing is served."""
    ended: list[int] = []

    def end(status: int) -> None:
        ended.append(status)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", end)
    served: Any = SimpleNamespace(is_empty=True, journal=SimpleNamespace(done=False))
    handover, gone = Handover(served), asyncio.Event()

    async def take() -> None:
        await gone.wait()
        raise control.Closed

    async def give() -> None:
        with contextlib.suppress(SystemExit):
            await handover.give(os.open(os.devnull, os.O_RDONLY))

    handover._task = asyncio.ensure_future(take())
    giving = asyncio.ensure_future(give())
    for _ in range(3):
        await asyncio.sleep(0)
    assert not ended  # it may still take something over
    gone.set()
    await giving
    assert (ended, served.journal.done) == ([0], True)
    assert isinstance(handover._task.exception(), control.Closed)


def test_a_slow_successor_gets_more_time_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that is short of processor time, it would never have all else."""
    monkeypatch.setattr(handovers, "_TIMEOUT", 0.01)
    patience: list[float] = []
    journal = os.memfd_create("journal")
    served: Any = SimpleNamespace(is_empty=False, state=State, journal=SimpleNamespace(fd=journal))
    handover = Handover(served)

    def receive(connection: socket.socket) -> Any:
        if heard.pop(0):
            patience.append(connection.gettimeout() or 0.0)
            raise errors.pop(0)
        return {"by": 1, "built": True}, []

    monkeypatch.setattr(control, "receive", receive)
    errors = [TimeoutError(), TimeoutError(), control.Closed(), TimeoutError()]
    while errors:
        heard = [False, True]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            ours.send(b".")  # there is something to be heard
            asyncio.run(handover.give(theirs.detach()))
    assert patience == [0.01, 0.02, 0.04, 0.04]
    os.close(journal)
