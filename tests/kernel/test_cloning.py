"""`cloning`: a process that shares the table of descriptors, and that is known from its first moment on."""

from __future__ import annotations

import os
import signal

from scenario import play

from aiouffd.pager.process.cloning import clone
from aiouffd.pager.process.handles import code_of, has_ended, is_pidfd, pid_of, state_of
from aiouffd.pager.process.journal import Journal, Whose


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
