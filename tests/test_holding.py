"""`client.holding`: notes are kept in each pager after the other, and the holder is heard."""

from __future__ import annotations

import contextlib
import socket
import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from aiouffd.pager.client.holding import Holding
from aiouffd.pager.client.waiting import StoppedError
from aiouffd.pager.process.journal import Journal


class Requests:
    """Notes what is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.lock = threading.RLock()
        self.pending: list[Any] = []
        self.pair: Any = SimpleNamespace(tell_holder=lambda op: self.asked.append(("holder", op)))

    def __call__(self, op: str, fds: Any = (), **arguments: Any) -> Future[Any]:
        """Be asked."""
        self.asked.append((op, arguments.get("name")))
        done: Future[Any] = Future()
        done.set_result(None)
        return done

    def release(self, counts: Future[Any]) -> None:
        """Count from now on."""


class Pair:
    """A pair whose holder says what it is told to."""

    def __init__(self, *events: str) -> None:
        self.events = list(events)
        self.channel = SimpleNamespace(fileno=lambda: 3)

    def hear_holder(self) -> str:
        """Return the next."""
        return self.events.pop(0)


def holding(requests: Requests) -> Holding:
    """Return one without tenants, and a waiter that has always something to hear."""
    waiter: Any = SimpleNamespace(stopped=False, wait=lambda *_: True)
    waiter.stop = lambda: setattr(waiter, "stopped", True)
    found: Any = requests
    return Holding(found, waiter, {}, lambda *_, **__: Future())


def test_notes_outlive_a_pager() -> None:
    """Without a holder none is kept. The next pager is told all, and its holder listens once that has everything."""
    requests = Requests()
    holds = holding(requests)
    holds.keep("session a", {})
    assert requests.asked == []
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        holds.listener = listener
        for name in ("session a", "session b"):
            holds.keep(name, {})
        holds.forget("session a")
        holds.forget("session a")
        holds.listen()
        before = [("keep", "session a"), ("keep", "session b"), ("forget", "session a"), ("holder", "listen")]
        assert requests.asked == before
        done = holds.reopen(Journal.create(), None, {})
        holds.succeeded(done)
        late = Future[Any]()
        holds.succeeded(late)
        requests.pair = SimpleNamespace(tell_holder=requests.asked.append)  # which is not told: it has nothing yet
        late.set_result(None)
    assert requests.asked[len(before) :] == [("resume", None), ("keep", "session b"), ("holder", "listen")]


def test_the_holder_is_heard() -> None:
    """Nobody is replaced before it is known what becomes of a takeover; a holder that is lost takes nothing."""
    heard: list[str] = []

    def hears(*events: str) -> None:
        holds = holding(Requests())
        for name in ("yield", "kept", "taken"):
            setattr(holds, f"on_{name}", lambda name=name: heard.append(name))
        pair: Any = Pair(*events)
        assert holds.hear(pair)
        holds.outcome(pair)
        assert not pair.events

    hears("yield", "kept")
    hears("yield", "lost")
    assert heard == ["yield", "kept", "yield", "kept"]
    with pytest.raises(StoppedError):
        hears("yield", "taken")
    assert heard[-1] == "taken"
