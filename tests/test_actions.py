"""`server.control.actions`: what the API's own tests do not reach: a source that hangs, and the end of a server."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import AsyncMock, Mock

import pytest

import aiouffd
from aiouffd.server import mapped
from aiouffd.server.control import actions as module
from aiouffd.server.control.actions import ACTIONS, Actions
from aiouffd.server.control.values import NewSession, Record
from aiouffd.server.server import Server
from aiouffd.server.services import Settings
from aiouffd.server.yielding import YieldsError

if TYPE_CHECKING:
    from pathlib import Path


def test_each_action_is_done() -> None:
    """By a method of its name."""
    assert all(callable(getattr(Actions, action.name)) for action in ACTIONS)


async def test_a_source_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs this request its timeout. There is no session then, and no socket; nor when the server is ending."""
    answers = threading.Event()
    monkeypatch.setattr(module, "as_layers", lambda *_, **__: answers.wait(60) and aiouffd.ZeroSource(4096))
    server = Server()
    new = NewSession(name="a", socket=str(tmp_path / "s"), source="http://host/x", timeout=0.05)
    with pytest.raises(aiouffd.SourceError, match=r"does not answer within 0.05 s"):
        await Actions(server).create(new)
    answers.set()
    server.stop_listening()
    with pytest.raises(aiouffd.SessionError, match="about to end"):
        await Actions(server).create(new)
    assert not server.sessions
    assert not (tmp_path / "s").exists()


async def test_a_takeover_that_fails_costs_no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was drained ends; none is drained meanwhile."""
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.0)
    outcomes = list[Exception | None]()

    async def attempt(*_: Any) -> None:
        if (error := outcomes.pop(0)) is not None:
            raise error
        server.sessions.clear()

    session: Any = SimpleNamespace(name="a", drained=AsyncMock())
    server: Any = SimpleNamespace(sessions={"a": session}, remove=attempt)
    actions = Actions(server)
    outcomes += [YieldsError("a", "not now"), YieldsError("a", "not now"), None]
    await actions._delete_drained(session)
    assert (outcomes, server.sessions) == ([], {})
    yielding = Server(aiouffd.ZeroSource(4096), "/s")
    yielding.yielding.is_under_way = True
    with pytest.raises(YieldsError):
        yielding.drain(yielding.sessions[""])


async def test_a_session_with_clients_that_map_files_records_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would not see what they touch; the answer says so."""
    server = Server(aiouffd.ZeroSource(4096), "/s")
    (session,) = server.sessions.values()
    server.sessions["a"] = session
    monkeypatch.setattr(session, "mapped", [object()])
    with pytest.raises(aiouffd.SessionError, match="clients that map files: touches are recorded here, and those of"):
        await Actions(server).record("a", Record("/x"))
    assert session.recordings.terms is None


async def test_a_recording_that_begins_while_a_client_wants_to_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is refused: it would be in no recording."""
    services: Any = SimpleNamespace(unmappable="", origin=AsyncMock())

    async def looked_at(_: Any) -> bool:
        services.unmappable = "touches are recorded here"
        return True

    monkeypatch.setattr(mapped, "_is_new", looked_at)
    monkeypatch.setattr(mapped, "_files_of", lambda _: {})
    monkeypatch.setattr(mapped, "enabled_features", lambda _: 0)
    clients = mapped.MappedClients(Settings(), services, {}, "a", lambda _: None, lambda *_, **__: None)
    handoff: Any = SimpleNamespace(nydus=SimpleNamespace(zerocopy=True), uffd=Mock(), peer="a client")
    connection: Any = Mock()
    with pytest.raises(aiouffd.HandoffError, match="touches are recorded here"):
        await clients.takes(handoff, connection, 1)
    assert not clients
