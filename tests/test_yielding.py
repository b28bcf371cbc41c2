"""`server.yielding`: a server stops for the next one when nothing is half done, and goes on where that has failed."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pytest

from aiouffd.errors import SessionError
from aiouffd.server.yielding import Yielding


class Session:
    """Notes what it is told; `settled`: it may pause."""

    def __init__(self, heard: list[str], name: str) -> None:
        self.heard, self.name = heard, name
        self.settled = asyncio.Event()
        self.settled.set()

    async def pause(self) -> None:
        """Be asked to."""
        self.heard.append(f"pause {self.name}")
        await self.settled.wait()

    async def go_on(self) -> None:
        """Be asked to."""
        await asyncio.sleep(0)
        self.heard.append(f"go on {self.name}")


class World:
    """A server with one session, as far as it is needed."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.sessions = {"a": Session(self.heard, "a")}
        self.noted: Future[Any] = Future()
        holding = SimpleNamespace(yielded=lambda number: self.heard.append(f"yielded {number}"))
        pager: Any = SimpleNamespace(ping=lambda: self.noted, holding=holding)
        self.yielding = Yielding(cast("Any", self.sessions), pager)

    async def hears(self, *expected: str) -> None:
        """Give everything its turns; this was heard then, and nothing else."""
        for _ in range(20):
            await asyncio.sleep(0)
        assert self.heard == list(expected)
        self.heard.clear()


async def test_a_session_that_is_being_made_is_the_next_ones_too() -> None:
    """Nothing is yielded before it is there and paused, and noted by the pager; none is made or removed then."""
    world = World()
    with world.yielding.change("b"):
        world.yielding.begin("1")
        await world.hears("pause a")
        with pytest.raises(SessionError, match="another server takes over"), world.yielding.change("c"):
            pass
        world.sessions["b"] = Session(world.heard, "b")
    await world.hears("pause a", "pause b")
    world.noted.set_result(None)
    await world.hears("yielded 1")
    world.yielding.end()
    await world.hears("go on a", "go on b")
    with world.yielding.change("c"):
        pass


async def test_a_takeover_that_fails_early() -> None:
    """What has not settled is not waited for, and what was about to be yielded is not; the next one is as the first."""
    world = World()
    world.noted.set_result(None)
    world.sessions["a"].settled.clear()
    world.yielding.begin("1")
    await world.hears("pause a")
    world.yielding.end()
    world.sessions["a"].settled.set()
    await world.hears("go on a")
    world.yielding.begin("2")
    world.yielding.end()
    world.yielding.begin("3")
    await world.hears("pause a", "yielded 3")
