"""`cloning`: a process that shares the table of descriptors, and that is known from its first moment on."""

from __future__ import annotations

import os
import resource
import signal
import socket
from pathlib import Path

from pairs import running
from scenario import eventually, play

from aiouffd.pager.process import worker
from aiouffd.pager.process.child_descriptors import Vault
from aiouffd.pager.process.cloning import clone
from aiouffd.pager.process.handles import (
    close_strays,
    code_of,
    grow_table,
    has_ended,
    is_open,
    is_pidfd,
    open_descriptors,
    pid_of,
    state_of,
)
from aiouffd.pager.process.journal import Journal, Whose
from aiouffd.pager.process.serialization import Pickles


def shares() -> None:
    """Scenario: the child looks for itself before anything else; the parent need not have run."""
    journal = Journal.create()
    place = journal.place(Whose.WORKER)
    free = os.dup(0)
    os.close(free)
    pid = clone(place)
    if pid == 0:
        known = pid_of(journal.descriptor(Whose.WORKER)) == os.getpid()
        os.memfd_create("found")
        os._exit(0 if known else 1)
    pidfd = journal.descriptor(Whose.WORKER)
    assert journal.descriptors == {pidfd} == {free}
    assert has_ended(pidfd, 60.0)
    assert os.waitpid(pid, 0)[1] == 0
    assert pid_of(pidfd) == 0
    assert "found" in os.readlink(f"/proc/self/fd/{free + 1}")  # noqa: PTH115 - no path


def test_a_clone_shares_the_table_of_descriptors() -> None:
    """What it opens stays open when it has ended. Its pidfd is written by the kernel, before it runs."""
    play(shares)


def is_killed() -> None:
    """Scenario: the pidfd of a process that was killed, and what is none."""
    place = Journal.create().place(Whose.KEEPER)
    pid = clone(place)
    if pid == 0:
        signal.pause()
    assert not has_ended(place.value)
    assert code_of(place.value) is None
    assert state_of(place.value) in "RS"
    os.kill(pid, signal.SIGKILL)
    assert has_ended(place.value, 60.0)
    assert pid_of(place.value) == pid  # until it is waited for
    assert state_of(place.value) == "Z"
    assert code_of(place.value) == -signal.SIGKILL
    assert code_of(place.value) is None  # it was waited for
    assert [pid_of(number) for number in (place.value, 0, 999)] == [0, 0, 0]
    assert [is_pidfd(number) for number in (place.value, 0, 999)] == [True, False, False]
    if clone(place) == 0:
        os._exit(7)
    assert has_ended(place.value, 60.0)
    assert code_of(place.value) == 7


def test_a_clone_that_is_killed() -> None:
    """The pidfd tells, whoever has it."""
    play(is_killed)


def leaves() -> None:
    """Scenario: a worker has left descriptors, and a holder has some open for a moment."""
    journal = Journal.create()
    known = {fd for fd in open_descriptors() if is_open(fd)}
    left, holders = socket.socketpair()
    file = os.open(__file__, os.O_RDONLY)
    pipe, message = os.pipe(), os.memfd_create("aiouffd-message")
    slow = dict(close_strays(known))
    assert slow.keys() == {left.fileno(), holders.fileno(), file}
    assert [is_open(fd) for fd in (*pipe, message)] == [False, False, True]
    os.dup2(message, holders.fileno())  # the holder has closed it, and another has the number
    connection, _owners = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if clone(journal.place(Whose.WORKER)) == 0:
        worker.run(journal, Vault.create(), connection, Pickles.NEVER, list(slow.items()))
        os._exit(0)
    eventually(lambda: is_open(file) or is_open(left.fileno()), expected=False)
    assert is_open(holders.fileno())
    signal.pidfd_send_signal(journal.descriptor(Whose.WORKER), signal.SIGKILL)
    os._exit(0)  # nothing is finalized: some numbers are closed


def test_what_a_dead_worker_has_left() -> None:
    """The next worker closes what may take long, unless the number is another's by then."""
    play(leaves)


def grows() -> None:
    """Scenario."""
    grow_table()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert int(status["FDSize"]) >= min(1 << 14, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
    assert not is_open(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 1)


def test_the_table_of_descriptors_grows_before_it_is_shared() -> None:
    """Later, each doubling would stop the worker for an RCU grace period."""
    play(grows)
    with running() as pager:
        status = Path(f"/proc/{pager.pair.worker_pid}/status").read_text()
        assert int(status.split("FDSize:")[1].split()[0]) > 256
