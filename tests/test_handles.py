"""`handles`: descriptors that a pager needs, and errors that say why there are none."""

from __future__ import annotations

import errno
import os
import resource
import select

import pytest

from aiouffd import PagerStartError
from aiouffd.pager.client.waiting import Waiter, Watches
from aiouffd.pager.process.handles import explained, open_memfd, open_pidfd


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EMFILE, "RLIMIT_NOFILE"),
        (errno.EAGAIN, "pids.max"),
        (errno.ENOMEM, "RLIMIT_AS"),
        (errno.EFBIG, "RLIMIT_FSIZE"),
        (errno.EPERM, "seccomp"),
        (errno.ENOSYS, "seccomp"),
    ],
)
def test_an_error_names_the_likely_cause(number: int, words: str) -> None:
    """And what was called."""
    error = explained("memfd_create", OSError(number, "why"))
    assert isinstance(error, PagerStartError)
    assert str(error).startswith("memfd_create: why (")
    assert words in str(error)


def test_an_error_of_another_kind_guesses_nothing() -> None:
    """Its own words are enough."""
    assert str(explained("x", OSError(errno.EIO, "why"))) == "x: why"


def test_there_are_no_descriptors_left() -> None:
    """Each of them says so."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        with pytest.raises(PagerStartError, match="RLIMIT_NOFILE"):
            open_pidfd(os.getpid())
        with pytest.raises(PagerStartError, match="RLIMIT_NOFILE"):
            open_memfd("x")
        with pytest.raises(PagerStartError, match="RLIMIT_NOFILE"):
            Waiter(Watches())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_what_is_opened() -> None:
    """A process that runs, and a file in memory; none is inherited."""
    fds = [open_pidfd(os.getpid()), open_memfd("x")]
    assert not select.select([fds[0]], [], [], 0)[0]
    assert os.pwrite(fds[1], b"abc", 0) == 3
    for fd in fds:
        assert not os.get_inheritable(fd)
        os.close(fd)
