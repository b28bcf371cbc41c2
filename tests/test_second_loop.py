"""`sources.second_loop`: a loop in a thread of its own, as long as somebody uses it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from typing import Any

import pytest

from aiouffd.sources import second_loop
from aiouffd.sources.second_loop import SecondLoop


def threads() -> list[threading.Thread]:
    """Return those of second loops."""
    return [each for each in threading.enumerate() if each.name == "aiouffd-receiving"]


async def gone() -> None:
    """Wait until there are none."""
    while threads():  # noqa: ASYNC110 - a thread that ends tells no loop
        await asyncio.sleep(0.001)


async def ident() -> int:
    """Return the thread that runs this."""
    return threading.get_ident()


class Held:
    """What belongs to a place."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.closed_in = 0

    def close(self) -> None:
        """Note in which thread."""
        self.closed_in = threading.get_ident()


async def test_it_is_shared_and_ends_with_the_last() -> None:
    """What it runs runs in its thread; another begins when it is needed again."""
    for _ in range(2):
        one, other = SecondLoop(Held), SecondLoop(Held)
        (thread,) = threads()
        assert one.held.loop is other.held.loop
        assert await one.call(ident()) == await other.call(ident()) == thread.ident
        one.leave()
        assert await other.call(ident()) == thread.ident
        assert (one.held.closed_in, other.held.closed_in) == (thread.ident, 0)
        other.leave()
        await gone()
        assert other.held.loop.is_closed()
        assert other.held.closed_in == thread.ident


async def test_what_is_under_way_is_waited_for() -> None:
    """Before it ends; what it raises is raised."""
    place, ends = SecondLoop(Held), asyncio.Event()

    async def wait() -> None:
        await ends.wait()
        raise ValueError("at last")

    running = asyncio.create_task(place.call(wait()))
    while not place.under_way:  # noqa: ASYNC110 - no event
        await asyncio.sleep(0)
    place.leave()
    await asyncio.sleep(0.01)
    assert threads()
    place.held.loop.call_soon_threadsafe(ends.set)
    with pytest.raises(ValueError, match="at last"):
        await running
    assert place.under_way == 0
    await gone()


async def test_one_that_is_garbage() -> None:
    """It has left."""
    place = SecondLoop(Held)
    held = place.held
    del place
    await gone()
    assert held.closed_in


async def test_canceling() -> None:
    """It cancels what runs there."""
    place, began, ended = SecondLoop(Held), threading.Event(), threading.Event()

    async def wait() -> None:
        began.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.set()
            raise

    running = asyncio.create_task(place.call(wait()))
    while not began.is_set():  # noqa: ASYNC110 - no event of this loop
        await asyncio.sleep(0.001)
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()
    while not ended.is_set():  # noqa: ASYNC110 - as above
        await asyncio.sleep(0.001)
    place.leave()
    await gone()


def test_one_processor_is_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """For two loops."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    with pytest.raises(OSError, match="one processor"):
        SecondLoop(Held)
    assert not threads()


@pytest.mark.parametrize("lacking", ["threads", "descriptors"])
async def test_where_none_can_be_had(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error, nothing is left behind, and the next one may have it."""

    def fail(*_: Any) -> Any:
        raise RuntimeError("can't start new thread") if lacking == "threads" else OSError("too many open files")

    with monkeypatch.context() as patch:
        if lacking == "threads":
            patch.setattr(threading.Thread, "start", fail)
        else:
            patch.setattr(second_loop, "new_event_loop", fail)
        with pytest.raises((RuntimeError, OSError), match=r"can't start|too many"):
            SecondLoop(Held)
    place = SecondLoop(Held)
    assert await place.call(ident()) != threading.get_ident()
    place.leave()
    await gone()


FORKED = """
import asyncio, os, threading
from aiouffd.sources.second_loop import SecondLoop

async def ident():
    return threading.get_ident()

async def used(place):
    return await asyncio.wait_for(place.call(ident()), 20)

class Held:
    def __init__(self, loop):
        self.loop = loop

    def close(self):
        pass

place = SecondLoop(Held)
asyncio.run(used(place))
child = os.fork()
if not child:
    other = SecondLoop(Held)
    assert other.held.loop is not place.held.loop
    asyncio.run(used(other))
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
asyncio.run(used(place))
"""


def test_a_forked_child_has_its_own() -> None:
    """The thread of its parent is not in it."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], check=True, timeout=60)
