"""`handoff.receive`: bytes with descriptors, and who sent them."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest
from scenario import open_descriptors

import aiouffd
from aiouffd.errors import HandoffError
from aiouffd.handoff.receive import MOST_FDS, Peer, is_userfaultfd, receive, require_userfaultfd


def pair() -> tuple[socket.socket, socket.socket]:
    """Return a non-blocking socket and its other end."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    return ours, theirs


async def test_bytes_and_descriptors_arrive_together() -> None:
    """At once, or later; descriptors are close-on-exec."""
    ours, theirs = pair()
    memfd = os.memfd_create("x")
    waiting = asyncio.create_task(receive(ours, 10, 2))
    await asyncio.sleep(0)
    socket.send_fds(theirs, [b"abc"], [memfd, memfd])
    data, fds = await waiting
    assert data == b"abc"
    assert [os.get_inheritable(fd) for fd in fds] == [False, False]
    theirs.close()
    assert await receive(ours, 10) == (b"", [])
    for fd in [*fds, memfd]:
        os.close(fd)
    ours.close()


@pytest.mark.parametrize(("sent", "expected"), [(1, 0), (2, 1), (17, 16), (MOST_FDS, 16)])
async def test_descriptors_that_are_not_expected(sent: int, expected: int) -> None:
    """An error, and none of them is left open: where there is room for one, two may come."""
    ours, theirs = pair()
    memfd = os.memfd_create("x")
    before = open_descriptors()
    socket.send_fds(theirs, [b"abc"], [memfd] * sent)
    with pytest.raises(HandoffError, match=f"sent more than {expected} descriptors"):
        await receive(ours, 10, expected)
    assert open_descriptors() == before
    os.close(memfd)
    ours.close()
    theirs.close()


async def test_canceling_loses_nothing() -> None:
    """The next call receives what has come."""
    ours, theirs = pair()
    task = asyncio.create_task(receive(ours, 10))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    theirs.send(b"abc")
    assert await receive(ours, 10) == (b"abc", [])
    ours.close()
    theirs.close()


def test_who_is_at_the_other_end() -> None:
    """As the kernel knows it."""
    ours, theirs = pair()
    with ours, theirs:
        peer = Peer.of(ours)
    assert peer == Peer(os.getpid(), os.geteuid(), os.getegid())
    assert str(peer) == f"process {os.getpid()} of user {os.geteuid()}"


def test_a_userfaultfd_is_told_from_other_descriptors() -> None:
    """By what the kernel says of it, and not blocking."""
    with aiouffd.Userfaultfd() as uffd:
        assert is_userfaultfd(uffd.fileno())
        require_userfaultfd(uffd.fileno(), "somebody")
        os.set_blocking(uffd.fileno(), True)
        with pytest.raises(HandoffError, match="without O_NONBLOCK"):
            require_userfaultfd(uffd.fileno(), "somebody")
    reading, writing = os.pipe()
    assert not is_userfaultfd(reading)
    with pytest.raises(HandoffError, match="not a userfaultfd"):
        require_userfaultfd(reading, "somebody")
    os.close(reading)
    os.close(writing)
