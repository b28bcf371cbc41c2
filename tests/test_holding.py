"""`client.holding`: notes are kept in each pager after the other, and the holder is heard."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.pager.client.holding import Holding
from aiouffd.pager.client.waiting import StoppedError
from aiouffd.pager.process import control
from aiouffd.pager.process.journal import Journal
from aiouffd.pager.process.state import SpaceState, State

if TYPE_CHECKING:
    from collections.abc import Callable


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
    """A pair whose holder says what it is told to, and is lost then.

    Attributes:
        successor: the other end of the connection that comes with "yield".
        journal: the successor's.
    """

    def __init__(self, *events: str) -> None:
        self.events = [*events, "lost"]
        self.channel: Any = SimpleNamespace(fileno=lambda: -1)
        self.journal = Journal.create()
        self.journal.provisional = True
        self.successor, self._ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def hear_holder(self) -> tuple[str, list[OwnedDescriptor]]:
        """Return the next."""
        event = self.events.pop(0)
        fds = [os.dup(self.journal.fd), os.dup(self._ours.fileno())] if event.startswith("yield") else []
        return event, [OwnedDescriptor(fd) for fd in fds]

    def close_channel(self) -> None:
        """Hear no more."""
        self.channel = None

    def close(self) -> None:
        """Be done with it."""
        os.close(self.journal.fd)
        self.successor.close()
        self._ours.close()


def holding(requests: Requests) -> Holding:
    """Return one without tenants, and a waiter that has always something to hear."""

    def wait(seconds: float, fd: int) -> bool:
        return fd < 0 or bool(select.select([fd], [], [], seconds)[0])

    waiter: Any = SimpleNamespace(stopped=False, wait=wait)
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


def test_all_that_map_one_file_are_opened_before_any_is_read() -> None:
    """The next pager hears the names before, and the tokens behind; of a file that one maps there is nothing to say.

    Whoever counts where others do does not begin where these had been when it was asked for.
    """
    requests = Requests()
    tenants: dict[str, Any] = {}
    asked: list[tuple[str, Any]] = []
    for token, file in (("a", "one"), ("b", "two"), ("c", "one"), ("d", ""), ("e", "")):
        shown = SimpleNamespace(shown=lambda _: [], children=lambda *_: [], leaving=False, slot=0)
        tenants[token] = SimpleNamespace(token=token, file=file, **vars(shown))

    def ask(op: str, fds: Any = (), **arguments: Any) -> Future[Any]:
        asked.append((op, arguments))
        return Requests()(op, fds)

    def opened(tenant: Any, *_: Any, **__: Any) -> Future[Any]:
        return ask("open", name=tenant.token)

    # Two that were asked for, and are not open yet: others count in the slot of the one, and nobody in the other's.
    waiting = [
        SimpleNamespace(message={"op": "open", "token": token, "space": {}, "service": {"slot": slot}, "counts": [7]})
        for token, slot in (("f", 0), ("g", 1))
    ]
    for token, slot in (("f", 0), ("g", 1)):
        tenants[token] = SimpleNamespace(token=token, file="", **{**vars(shown), "slot": slot})
    asking: Any = SimpleNamespace(__call__=ask, lock=requests.lock, pending=waiting)
    holds = Holding(asking, cast("Any", None), tenants, opened)
    holds._requests = cast("Any", type("Asking", (), {"__call__": staticmethod(ask), **vars(asking)})())
    holds.reopen(Journal.create(), None, {})
    assert asked[0][1]["files"] == ["one"]
    assert [arguments["name"] for _, arguments in asked[1:]] == ["a", "b", "c", "d", "e", "one"]
    assert asked[-1][1]["tokens"] == ["a", "c"]
    assert [request.message["counts"] for request in waiting] == [None, [7]]


def test_children_whose_descriptor_nobody_has_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """They read zeros: of the others there is nothing to say."""
    holds = holding(Requests())
    fds = dict(enumerate(os.pipe(), 5))
    spaces = {at: SpaceState(at, at, 4096, 0, 1, "gone", is_child=at > 4) for at in range(4, 7)}
    holds.reopen(Journal.create(), State(spaces=spaces), {**fds})
    assert caplog.text == ""
    spaces[7] = SpaceState(7, 7, 4096, 0, 1, "gone", is_child=True)
    holds.reopen(Journal.create(), State(spaces=spaces), {})
    assert "3 forked children are served no longer" in caplog.text


def test_the_holder_is_heard() -> None:
    """Nobody is replaced before it is known what becomes of a takeover; without one, nobody waits for anything."""
    heard: list[str] = []

    def hears(*events: str) -> None:
        holds, pair = holding(Requests()), Pair(*events)
        for name in ("yield", "kept", "taken"):
            setattr(holds, f"on_{name}", lambda *said, name=name: heard.append(" ".join((name, *said))))
        with contextlib.closing(pair):
            holds.outcome(cast("Any", pair))
        assert not pair.events

    hears()
    hears("kept")  # nobody was about to take anything
    assert not heard
    hears("yield 1", "kept")
    assert heard == ["yield 1", "kept"]
    with pytest.raises(StoppedError):
        hears("yield 2", "taken")
    assert heard[2:] == ["yield 2", "taken"]


def test_a_holder_is_killed_while_it_gives() -> None:
    """What it has looked at is looked at here: the successor's journal, and whether it lives."""
    heard: list[str] = []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def full(then: Callable[[Pair], None]) -> Callable[[Pair], None]:
        """Return the same for when this process can open no file any more."""

        def do(pair: Pair) -> None:
            then(pair)
            os.close(free := os.dup(0))
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))

        return do

    def hears(then: Callable[[Pair], None]) -> None:
        holds, pair = holding(Requests()), Pair("yield")
        for name in ("kept", "taken"):
            setattr(holds, f"on_{name}", lambda name=name: heard.append(name))
        holds.on_yield = lambda _: then(pair)
        with contextlib.closing(pair):
            try:
                holds.outcome(cast("Any", pair))
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    def serves(pair: Pair) -> None:
        control.send(pair.successor, {"op": "serving"})
        pair.journal.provisional = False

    def ends(pair: Pair) -> None:
        pair.successor.close()

    hears(full(ends))
    assert heard == ["kept"]
    with pytest.raises(StoppedError):
        hears(serves)
    assert heard == ["kept", "taken"]

    def waits(pair: Pair) -> None:
        """Be a successor that has been given nothing: it hears that, and ends."""

        def end() -> None:
            pair.successor.recv(1)
            pair.successor.close()

        threading.Thread(target=end).start()

    hears(full(waits))
    assert heard == ["kept", "taken", "kept"]
