"""`pager.client.client`: what its thread and its callers do at the same time."""

from __future__ import annotations

import errno
import select
import socket
import sys
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, cast

import pytest

from aiouffd.errors import PagerStartError
from aiouffd.pager.client.client import PagerClient
from aiouffd.pager.process import control
from aiouffd.pager.process.child_descriptors import Vault
from aiouffd.pager.process.journal import Journal

if TYPE_CHECKING:
    from aiouffd.pager.client.pair import Pair
    from aiouffd.pager.client.tenant import Tenant


class FakePair:
    """A pair whose processes are dead."""

    worker_lives = False

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.vault = Vault.create()
        self.connection, other = socket.socketpair()
        other.close()

    def close(self) -> None:
        """As a pair does."""
        self.connection.close()
        self.vault.close()


class FakeTenant:
    """Memory that is named, and no more."""

    token = "somebody"


def test_requests_while_others_take_over() -> None:
    """The pager is not given up because somebody asks for something just then."""
    client = PagerClient(on_error=lambda *_: None)
    journal = Journal.create()
    opened = Future[object]()
    client._takeover._reopen = lambda *_: opened
    client._requests.held = True
    tenant = cast("Tenant", FakeTenant())
    for _ in range(10_000):
        client.request("prefetch", tenant, ranges=[])
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            client._requests.held = True
            client.request("prefetch", tenant, ranges=[])
            with client._requests.lock:
                client._requests.forget(client._requests.pending[:1])

    thread = threading.Thread(target=ask)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        for _ in range(100):
            client._takeover.orphans = [cast("Pair", FakePair(journal))]
            client._takeover.begin()
    finally:
        sys.setswitchinterval(interval)
        done.set()
        thread.join()
        client.stop()


class Talking(FakePair):
    """A pair whose worker has sent a message; it lives as long as `other` is open."""

    worker_pid = 7

    def __init__(self, message: dict[str, object]) -> None:
        super().__init__(Journal.create())
        self.connection.close()
        self.connection, self.other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kills = 0
        control.send(self.other, message)

    @property
    def worker_lives(self) -> bool:  # type: ignore[override]
        """Whether the other end is open."""
        return self.other.fileno() >= 0

    def kill_worker(self) -> None:
        """Count."""
        self.kills += 1


_REFUSED = OSError(errno.ENOBUFS, "no room")
_EMPTY: dict[str, object] = {}


@pytest.mark.parametrize(
    ("handled", "received", "lives", "outcome"),
    [
        (_REFUSED, None, True, (True, 0)),  # of what a message is about, or of a program's own callback
        (None, _REFUSED, True, (True, 1)),  # the message is lost, perhaps
        (None, _REFUSED, False, (False, 0)),
        (None, BlockingIOError(), True, (True, 0)),
        (None, control.DescriptorsLostError(_EMPTY), True, (True, 1)),  # its text was lost, too
        (None, control.Closed(), True, (False, 0)),
        (None, None, True, (True, 0)),
    ],
)
def test_an_error_is_no_lost_connection(
    monkeypatch: pytest.MonkeyPatch,
    handled: Exception | None,
    received: Exception | None,
    lives: bool,
    outcome: tuple[bool, int],
) -> None:
    """As long as the other end is open, the pager is heard; where an answer may be lost, another worker is asked."""
    client, heard = PagerClient(on_error=lambda *_: None), list[str]()

    def event(message: dict[str, str]) -> None:
        heard.append(message["event"])
        if handled is not None:
            raise handled

    def refuse(_: socket.socket) -> None:
        assert received is not None
        raise received

    monkeypatch.setattr(client, "_event", event)
    if received is not None:
        monkeypatch.setattr(control, "receive", refuse)
    pair = Talking({"event": "failing"})
    if not lives:
        pair.other.close()
    assert (client._exchange(cast("Pair", pair), select.POLLIN), pair.kills) == outcome
    assert heard == (["failing"] if received is None else [])
    pair.close()
    pair.other.close()
    client.stop()


def test_a_thread_that_can_get_no_answer() -> None:
    """The client's own would hear it; one in the middle of a request has its lock, which whoever hears it needs."""
    client = PagerClient(on_error=lambda *_: None)
    told: list[bool] = [client.may_wait]
    with client._requests.lock:
        told.append(client.may_wait)
        other = threading.Thread(target=lambda: told.append(client.may_wait))
        other.start()
        other.join()
    client._run = lambda: told.append(client.may_wait)  # type: ignore[method-assign]
    client._thread = threading.Thread(target=client._run)
    client._thread.start()
    client._thread.join()
    client.stop()
    assert told == [True, False, True, False]


def test_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the limit."""

    def refused() -> None:
        raise RuntimeError("can't start new thread")

    client = PagerClient(on_error=lambda *_: None)
    pair = FakePair(Journal.create())
    monkeypatch.setattr(client, "_start_pair", lambda _: pair)
    monkeypatch.setattr(client._thread, "start", refused)
    with pytest.raises(PagerStartError, match=r"hears the pager: .*RLIMIT_NPROC is .*pids\.max"):
        client.start()
    pair.close()
    client._waiter.close()
