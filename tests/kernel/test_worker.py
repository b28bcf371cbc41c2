"""`worker`: answers each request once, goes on behind messages that it cannot understand, and ends when it is left."""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
from pathlib import Path

from pairs import running
from processes import ended, kill, slice_of
from scenario import play

import aiouffd
from aiouffd.errors import decode_error
from aiouffd.pager.process import control
from aiouffd.pager.process.journal import Journal
from aiouffd.pager.process.replay import survey
from aiouffd.pager.process.state import State


def test_a_request_that_fails_is_answered() -> None:
    """With the error, typed; the next one is answered, too."""
    with running() as pager:
        error = decode_error(pager.ask("close", token="nobody's", poison=False)["error"])
        assert isinstance(error, aiouffd.UffdError)
        assert "error" in pager.ask("nonsense")
        assert pager.ask("resume", counters=[])["ok"] is None


def test_a_message_that_is_none_is_dropped() -> None:
    """The worker goes on, and is not replaced."""
    with running() as pager:
        worker = pager.pair.worker_pid
        pager.pair.connection.send(b"{no json")
        assert pager.ask("resume", counters=[])["ok"] is None
        assert pager.pair.worker_pid == worker


def test_it_ends_when_nobody_is_left() -> None:
    """It has nothing to serve, and the client has closed its side."""
    with running() as pager:
        worker = pager.pair.worker_pid
        pager.pair.connection.shutdown(socket.SHUT_WR)
        assert ended(worker)
        assert pager.pair.keeper.wait(60) == 0


def test_it_ends_when_its_client_was_killed_before_it_had_read() -> None:
    """That is an error of the connection, behind which libuv watches it no longer."""
    with running() as pager:
        control.send(pager.pair.connection, {"id": 1, "op": "nonsense"})
        assert select.select([pager.pair.connection], [], [], 60)[0]
        os.kill(pager.pair.worker_pid, signal.SIGSTOP)
        control.send(pager.pair.connection, {"id": 2, "op": "nonsense"})
        with socket.socket(socket.AF_UNIX) as other:
            os.dup2(other.fileno(), pager.pair.connection.fileno())
        os.kill(pager.pair.worker_pid, signal.SIGCONT)
        assert pager.pair.keeper.wait(60) == 0


def test_a_worker_has_one_thread_while_nothing_is_asked() -> None:
    """A fork of the keeper's is all that it is. Where it has a choice (Linux 6.12), it runs for short times."""
    with running() as pager:
        place = Path(f"/proc/{pager.pair.worker_pid}")
        assert len(list((place / "task").iterdir())) == 1
        if slice_of(os.getpid()) is not None:
            assert slice_of(pager.pair.worker_pid) == 100_000


class Collects:
    """A source of ones, where garbage is collected."""

    size = 1 << 16

    async def read(self, _: int, length: int) -> bytes:
        """Return ones, or zeros."""
        return bytes([gc.isenabled()]) * length


def garbage() -> None:
    """Scenario."""
    with aiouffd.Monitor(aiouffd.Region(Collects.size), Collects()) as monitor:
        assert monitor.region[0] == 1
        kill(monitor.pids[1])
        assert monitor.region[Collects.size - 1] == 1


def test_garbage_is_collected() -> None:
    """Though it is not while the program of the pager starts; in successors, too."""
    play(garbage)


def test_an_empty_journal_speaks_of_no_descriptors() -> None:
    """The keeper closes whatever else is open."""
    assert survey(Journal.create()) is None
    assert State().numbers == set()
