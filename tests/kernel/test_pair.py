"""`pair.Pair`: a keeper and its worker are started, known by pidfd, and ended."""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest
from pairs import Unwatched
from processes import ended, has_ended
from scenario import open_descriptors, play

import aiouffd
from aiouffd.pager.client import launch
from aiouffd.pager.client import pair as pairs
from aiouffd.pager.client.pair import Pair
from aiouffd.pager.client.waiting import StoppedError, Waiter
from aiouffd.pager.process import control
from aiouffd.pager.process.serialization import Pickles

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def waiter() -> Iterator[Waiter]:
    """The client's."""
    watch: Any = Unwatched()
    waiter = Waiter(watch)
    yield waiter
    waiter.close()


def test_a_pair_is_started_and_ended(waiter: Waiter) -> None:
    """The worker says its pid, lives, and ends with the keeper; no descriptor is left."""
    before = open_descriptors()
    pair = Pair.start(waiter, Pickles.NEVER)
    assert pair.worker_fd.closed
    assert waiter.wait(60.0, pair.connection.fileno())
    message, fds = control.receive(pair.connection)
    pair.runs(message["pid"], fds[0] if fds else os.pidfd_open(message["pid"]))
    assert pair.worker_lives
    assert not has_ended(pair.keeper.pid)
    pair.end(leave=False)
    assert ended(message["pid"])
    assert pair.keeper.returncode is not None
    del pair
    assert open_descriptors() == before


def lives(pair: Pair) -> bool:
    """Ask anew."""
    return pair.worker_lives


def test_a_worker_lives_until_it_is_killed(waiter: Waiter) -> None:
    """Also one whose keeper was killed before it could say that it is ready: it may serve already."""
    pair = Pair.start(waiter, Pickles.NEVER)
    assert waiter.wait(60.0, pair.connection.fileno())  # it has just said so; nobody has listened yet
    pair.keeper.kill()
    assert waiter.wait(60.0, pair.keeper_fd.fileno())
    assert lives(pair)
    message, fds = control.receive(pair.connection)
    pair.runs(message["pid"], fds[0])
    assert lives(pair)
    pair.kill_worker()
    assert waiter.wait(60.0, pair.worker_fd.fileno())
    assert not lives(pair)
    pair.kill_worker()
    pair.worker_fd.close()
    pair.kill_worker()
    pair.end(leave=False)


def started_without_standard_descriptors() -> None:
    """Scenario: what is opened next gets their numbers."""
    watch: Any = Unwatched()
    waiter = Waiter(watch)
    os.closerange(0, 3)
    pair = Pair.start(waiter, Pickles.NEVER)
    for fd in range(3):
        assert os.readlink(f"/proc/{pair.keeper.pid}/fd/{fd}") == os.devnull  # noqa: PTH115 - not a path, perhaps
    pair.end(leave=False)


def test_the_connection_is_no_standard_descriptor() -> None:
    """What the pager logs would be sent to its client."""
    play(started_without_standard_descriptors)


def test_processes_that_were_stopped(waiter: Waiter, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go on, and so end by themselves."""
    monkeypatch.setattr(pairs, "_REAP_TIMEOUT", 20_000)
    pair = Pair.start(waiter, Pickles.NEVER)
    assert waiter.wait(60.0, pair.connection.fileno())
    message, fds = control.receive(pair.connection)
    pair.runs(message["pid"], fds[0])
    for pid in (pair.keeper.pid, message["pid"]):
        os.kill(pid, signal.SIGSTOP)
    pair.end(leave=False)
    assert pair.keeper.returncode == 0


def test_whoever_is_about_to_end_does_not_wait_for_the_processes(
    waiter: Waiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have let go of all, and end by themselves; the keeper is reaped if this process lives on."""
    pair = Pair.start(waiter, Pickles.NEVER)
    waited: list[int] = []
    monkeypatch.setattr(pairs, "_readable", lambda _, milliseconds: waited.append(milliseconds))
    pair.end(leave=False, wait=False)
    assert waited == [0]
    assert pair.keeper.wait(60) == 0


def test_processes_that_may_not_be_signaled(waiter: Waiter, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has dropped its privileges: leaving is no error, though keeper and worker take their time to end."""
    pair = Pair.start(waiter, Pickles.NEVER)
    assert waiter.wait(60.0, pair.connection.fileno())
    message, fds = control.receive(pair.connection)
    pair.runs(message["pid"], fds[0])
    pids = pair.keeper.pid, message["pid"]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(pairs, "_END_TIMEOUT", 0.1)
    monkeypatch.setattr(pairs, "_REAP_TIMEOUT", 0.1)
    monkeypatch.setattr(pair.keeper, "kill", refuse)
    monkeypatch.setattr(signal, "pidfd_send_signal", refuse)
    pair.end(leave=False)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    assert ended(pids[1])


def test_what_says_no_hello(waiter: Waiter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the command; nothing is left of it."""
    monkeypatch.setattr(launch, "command", lambda: [sys.executable, "-c", "1"])
    with pytest.raises(aiouffd.PagerStartError, match=r"-c 1 -m aiouffd.pager` ended with status 0 before"):
        Pair.start(waiter, Pickles.NEVER)


def test_no_room_for_the_journal(waiter: Waiter, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is this process whose limit refuses: the pager has no message for it."""

    def refuse(_: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(pairs, "Journal", refuse)
    with pytest.raises(aiouffd.PagerStartError, match=r"the pager's journal: .*RLIMIT_AS is .*`ulimit -v`"):
        Pair.start(waiter, Pickles.NEVER)


def test_a_client_that_is_stopped_meanwhile(waiter: Waiter) -> None:
    """The process that was being started is killed."""
    waiter.stop()
    with pytest.raises(StoppedError):
        Pair.start(waiter, Pickles.NEVER)
