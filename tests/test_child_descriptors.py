"""`vault`: descriptors that stay open while nobody has them."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import socket
from typing import Any

import pytest
from scenario import play

from aiouffd.kernel.owned_descriptor import OwnedSocket
from aiouffd.pager.process.child_descriptors import Vault
from aiouffd.pager.process.handles import close_all


def test_what_is_kept_stays_open_when_its_owner_is_gone() -> None:
    """Another process has the outer side only; it gets each descriptor by its number."""
    vault = Vault.create()
    elsewhere = Vault(os.dup(vault.outer.fileno()))
    ends = {}
    for number in (5, 6):
        ends[number], write = os.pipe()
        assert vault.keep(number, write, living=2)
        os.close(write)
    vault.close()
    taken = elsewhere.take()
    assert sorted(taken) == [5, 6]
    for number, read in ends.items():
        os.write(taken[number], b"%d" % number)
        assert os.read(read, 9) == b"%d" % number
        os.close(taken[number])
        assert os.read(read, 9) == b""  # that was the last one
        os.close(read)
    assert elsewhere.take() == {}
    elsewhere.close()


def test_it_is_renewed_before_it_is_full() -> None:
    """What is of no use any more is closed: there is always room for what lives, several hundred to a message."""
    vault = Vault.create()
    fd = os.open(os.devnull, os.O_RDONLY)
    renewed = 0
    for number in range(1000):
        if not vault.keep(number, fd, living=3):
            renewed += 1
            assert vault.renew((at, fd) for at in range(number - 2, number + 1))
    assert 10 < renewed < 100
    assert vault.renew((at, fd) for at in range(600))
    taken = vault.take()
    assert sorted(taken) == list(range(600))
    for one in (*taken.values(), fd):
        os.close(one)
    vault.close()


class KilledError(Exception):
    """Nothing more is done."""


def test_whoever_is_killed_while_it_renews_has_left_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind whichever call to the kernel: the application, which has the outer side only, finds each."""
    monkeypatch.setattr("aiouffd.pager.process.child_descriptors._MOST", 2)
    fd = os.open(os.devnull, os.O_RDONLY)
    send, receive = socket.send_fds, OwnedSocket.recv
    steps = 0

    def alive() -> None:
        nonlocal steps
        if not steps:
            raise KilledError
        steps -= 1

    def sent(*args: Any) -> Any:
        alive()
        return send(*args)

    def taken_out(*args: Any) -> bytes:
        alive()
        return receive(*args)

    for last in itertools.count(1):
        vault = Vault.create()
        assert vault.renew((number, fd) for number in range(5))
        assert vault.keep(5, fd, living=5)
        with monkeypatch.context() as patch:
            patch.setattr("socket.send_fds", sent)
            patch.setattr(OwnedSocket, "recv", taken_out)
            steps = last
            try:
                assert vault.renew((number, fd) for number in range(1, 6))
            except KilledError:
                finished = False
            else:
                finished = True
        taken = vault.take()
        assert {*taken} >= {1, 2, 3, 4, 5}
        assert not finished or len(taken) == 5
        close_all(taken.values())
        vault.close()
        if finished:
            break
    os.close(fd)
    assert last == 1 + 3 + 4 + 1  # the mark; the new ones; the old ones; the mark


def test_the_newest_descriptor_of_a_number_counts() -> None:
    """The older one is closed."""
    vault = Vault.create()
    old, new = (os.open(name, os.O_RDONLY) for name in ("/dev/null", "/dev/zero"))
    assert vault.keep(1, old, living=1)
    assert vault.keep(1, new, living=1)
    (taken,) = vault.take().values()
    assert os.fstat(taken).st_rdev == os.fstat(new).st_rdev
    for fd in (old, new, taken):
        os.close(fd)
    vault.close()


def at_a_limit(room: int) -> None:
    """Scenario: 300 descriptors are kept; this process has all files open that it may, unless it allows itself more."""
    vault, ends = Vault.create(), [os.pipe() for _ in range(300)]
    assert vault.renew((number, write) for number, (_, write) in enumerate(ends))
    for _, write in ends:
        os.close(write)
    outer = Vault(vault.outer.detach())
    vault.close()
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(300)]
    most = max(*files, *(read for read, _ in ends)) + 1
    limits = most, most + room
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    taken = outer.take()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits
    assert not any(os.get_inheritable(fd) for fd in taken.values())
    outer.close()
    for number, (read, _) in enumerate(ends):
        os.set_blocking(read, False)
        with contextlib.suppress(BlockingIOError):
            raise AssertionError(number, os.read(read, 1))  # nobody has the other end
    close_all(taken.values())
    print(len(taken))


@pytest.mark.parametrize(("room", "taken"), [(300, 300), (260, 250), (9, 0)])
def test_what_finds_no_room_is_not_closed(room: int, taken: int) -> None:
    """The soft limit is raised for a moment; where that is not enough, it stays open as long as the process."""
    output, errors = play(at_a_limit, room, fresh=True)
    assert output == f"{taken}\n"
    assert ("forked children wait for ever" in errors) is (taken < 300)
