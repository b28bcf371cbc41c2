"""`vault`: descriptors that stay open while nobody has them."""

from __future__ import annotations

import itertools
import os
import socket
from typing import TYPE_CHECKING, Any

from aiouffd.pager.process.child_descriptors import Vault
from aiouffd.pager.process.handles import close_all

if TYPE_CHECKING:
    import pytest


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
    send, receive = socket.send_fds, socket.recv_fds
    steps, received = 0, list[int]()

    def alive() -> None:
        nonlocal steps
        if not steps:
            raise KilledError
        steps -= 1

    def sent(*args: Any) -> Any:
        alive()
        return send(*args)

    def taken_out(*args: Any) -> Any:
        alive()
        result = receive(*args)
        received.extend(result[1])
        return result

    for last in itertools.count(1):
        vault = Vault.create()
        assert vault.renew((number, fd) for number in range(5))
        assert vault.keep(5, fd, living=5)
        received.clear()
        with monkeypatch.context() as patch:
            patch.setattr("socket.send_fds", sent)
            patch.setattr("socket.recv_fds", taken_out)
            steps = last
            try:
                assert vault.renew((number, fd) for number in range(1, 6))
            except KilledError:
                close_all(received)
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
