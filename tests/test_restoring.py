"""`server.control.restoring`: sessions of the server before this one, whose sources come later, or never."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

from scenario import until

from aiouffd.errors import SourceError
from aiouffd.server.control import restoring as module
from aiouffd.server.control.restoring import Restoring, note_of
from aiouffd.server.control.values import NewSession
from aiouffd.server.yielding import YieldsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest


class Session:
    """As much of one as is needed."""

    def __init__(self, name: str, *, draining: bool = False) -> None:
        self.name, self.settings = name, SimpleNamespace(record=None)
        self.state = "draining" if draining else "restoring"
        self.source = ""
        self.recordings = Mock()
        self.entrance = Mock()
        self.stop_listening = Mock()
        self.serve = Mock()

    def adopt(self, left: Any) -> None:
        """Go on with what is left."""
        assert left.text

    def open(self) -> None:
        """Take clients."""
        self.state = "listening"


class World:
    """A server with such sessions; `outcomes` of the looks for their sources: none is left, none answers."""

    def __init__(self, *names: str) -> None:
        self.sessions = {name: Session(name, draining=name == "drained") for name in names}
        texts = {name: note_of(NewSession(name=name, socket="/s", source="/x")) for name in names}
        self.left = {name: SimpleNamespace(text=text) for name, text in texts.items()}
        self.outcomes: list[Any] = []
        self.refused = 0
        self.tried: list[str] = []
        server: Any = SimpleNamespace(left=self.left, add=lambda name, *_: self.sessions[name], yielding=self)
        self.restoring = Restoring(server, self.find)

    @contextlib.contextmanager
    def change(self, name: str) -> Iterator[None]:
        """Refuse a change, as long as another server takes over."""
        if self.refused:
            self.refused -= 1
            raise YieldsError(name, "not now")
        yield

    async def find(self, new: NewSession) -> Any:
        """Look for a source."""
        self.tried.append(new.name)
        if not self.outcomes:
            await asyncio.Event().wait()
        if isinstance(outcome := self.outcomes.pop(0), Exception):
            raise outcome
        return outcome


async def turns() -> None:
    """Let all others do what they can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_no_source_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    """Each is tried by itself; what no session can be made of is left, and what was drained is not tried."""
    world = World("a", "b", "drained")
    world.left["later"] = SimpleNamespace(text={"created": {"name": "later", "what": 1}})
    world.left["other"] = SimpleNamespace(text={})
    assert [session.name for session in await world.restoring.begin()] == ["a", "b", "drained"]
    assert list(world.left) == ["later", "other"]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "session later takes no clients any more"
    ]
    await until(lambda: len(world.tried) == 2)
    assert sorted(world.tried) == ["a", "b"]
    await world.restoring.aclose()
    assert not world.restoring._tasks


async def test_it_is_tried_until_it_can_be(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Also while another server takes over, which fails; the same reason is told once."""
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.0)
    world = World("a")
    world.refused = 1
    session = world.sessions["a"]
    world.outcomes += [SourceError("/x", 0, 0, "is gone"), SourceError("/x", 0, 0, "is gone"), "source"]
    await world.restoring.begin()
    await asyncio.gather(*world.restoring._tasks)
    assert (session.state, world.tried) == ("listening", ["a"] * 3)
    session.serve.assert_called_once_with("source")
    assert session.source.startswith("not open: ")
    assert [record.getMessage() for record in caplog.records if "tried again" in record.getMessage()] == [
        "session a takes no clients yet, and is tried again: the session 'a' not now",
        f"session a takes no clients yet, and is tried again: {SourceError('/x', 0, 0, 'is gone')}",
    ]


async def test_one_that_is_changed_is_not_tried_meanwhile() -> None:
    """After that it is, unless it was drained."""
    world = World("a")
    session: Any = world.sessions["a"]
    await world.restoring.begin()
    await until(lambda: len(world.tried) == 1)
    with contextlib.suppress(YieldsError):
        async with world.restoring.paused(session):
            assert not world.restoring._tasks
            raise YieldsError("a", "not now")
    await until(lambda: len(world.tried) == 2)
    async with world.restoring.paused(session):
        session.state = "draining"
    await turns()
    assert not world.restoring._tasks
    async with world.restoring.paused(session):
        pass
    assert not world.restoring._tasks


async def test_a_server_that_is_about_to_end_opens_nothing() -> None:
    """What was just made for the session is closed."""
    world = World("a")
    session = world.sessions["a"]
    session.serve.side_effect = lambda _: setattr(session, "state", "draining")
    world.outcomes.append("source")
    await world.restoring.begin()
    await asyncio.gather(*world.restoring._tasks)
    assert session.state == "draining"
    session.stop_listening.assert_called_once_with()


async def test_a_recording_that_cannot_go_on(caplog: pytest.LogCaptureFixture) -> None:
    """It costs its session nothing else."""
    world = World("a")
    world.sessions["a"].recordings.prepare.side_effect = OSError("no room")
    await world.restoring.begin()
    assert "session a does not record: no room" in caplog.text
    assert world.restoring._tasks
    await world.restoring.aclose()
