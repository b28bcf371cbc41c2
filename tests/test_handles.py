"""`handles`: descriptors that a pager needs, and errors that say why there are none."""

from __future__ import annotations

import errno
import os
import resource
import select
from unittest.mock import Mock

import pytest
from scenario import eventually

from aiouffd import PagerStartError
from aiouffd.pager.client.waiting import Waiter, Watches
from aiouffd.pager.process import handles, worker
from aiouffd.pager.process.handles import close_strays, explained, is_open, open_descriptors, open_memfd, open_pidfd
from aiouffd.pager.process.holder import Holder


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


def test_what_is_left_is_known_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its inode: a number that is another's by then is not closed."""
    known = {fd for fd in open_descriptors() if is_open(fd)}
    files = [os.open(__file__, os.O_RDONLY), os.memfd_create("x")]
    other = os.memfd_create("y")
    monkeypatch.setattr(handles, "link_of", lambda _: "")
    left = dict(close_strays(known | {other}))
    os.dup2(other, files[1])
    for fd in files:
        worker._close_left(fd, left[fd])
    eventually(lambda: is_open(files[0]), expected=False)
    assert is_open(files[1])
    os.close(files[1])
    os.close(other)


def test_a_keeper_of_which_a_thread_waits_uninterruptibly(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs no more: the holder makes another one."""
    pidfd, replace = open_pidfd(os.getpid()), Mock()
    holder = Holder.__new__(Holder)
    holder._channel = None
    holder._journal = Mock(done=False, **{"descriptor.return_value": pidfd})
    monkeypatch.setattr(Holder, "_replace_keeper", replace)
    holder._look()
    replace.assert_not_called()
    monkeypatch.setattr(handles, "_states", lambda _: "ZD")
    holder._look()
    replace.assert_called_once_with()
    os.close(pidfd)
