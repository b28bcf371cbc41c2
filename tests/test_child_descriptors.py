"""`vault`: descriptors that stay open while nobody has them."""

from __future__ import annotations

import os

from aiouffd.pager.process.child_descriptors import Vault


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
