"""Bytes and descriptors from a Unix socket, and the question whether a descriptor is a userfaultfd."""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct

import attrs

from aiouffd.errors import HandoffError

__all__ = ["Peer", "is_userfaultfd", "receive", "require_userfaultfd"]

_CREDENTIALS = struct.Struct("=iII")
_LINK = "anon_inode:[userfaultfd]"


@attrs.frozen
class Peer:
    """Who is at the other end of a connection, as the kernel knows it (SO_PEERCRED): when it connected."""

    pid: int
    """0: of another pid namespace."""
    uid: int
    gid: int

    @classmethod
    def of(cls, connection: socket.socket) -> Peer:
        """Ask the kernel."""
        data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return cls(*_CREDENTIALS.unpack(data))

    def __str__(self) -> str:
        return f"process {self.pid} of user {self.uid}"


async def receive(connection: socket.socket, size: int, descriptors: int = 0) -> tuple[bytes, list[int]]:
    """Receive at most `size` bytes, and the descriptors that came with them, as soon as there are some.

    The descriptors are close-on-exec and belong to the caller. Canceling is safe: nothing is lost that was received.

    Args:
        connection: a non-blocking Unix socket.
        size: where a message of a known length is wanted, that length: behind it may be the next, with descriptors.
        descriptors: how many there is room for; more than that are an error.

    Returns:
        No bytes: the peer has closed.

    Raises:
        HandoffError: there were descriptors for which there was no room: not expected ones, or no free number.
        OSError: the connection is broken.
    """
    loop = asyncio.get_running_loop()
    while True:
        try:
            data, ancillary, flags, _ = connection.recvmsg(
                size, socket.CMSG_SPACE(4 * descriptors) if descriptors else 0, socket.MSG_CMSG_CLOEXEC
            )
            break
        except BlockingIOError:
            ready = loop.create_future()
            loop.add_reader(connection, _settle, ready)
            try:
                await ready
            finally:
                loop.remove_reader(connection)
    found = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(payload[: len(payload) - len(payload) % found.itemsize])
    # CMSG_SPACE rounds up to 8 bytes: where there is room for one, two may come.
    if flags & socket.MSG_CTRUNC or len(found) > descriptors:
        for fd in found:
            os.close(fd)
        raise HandoffError(
            str(Peer.of(connection)), f"has sent more than {descriptors} descriptors, or this process has too many open"
        )
    return data, list(found)


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def is_userfaultfd(fd: int) -> bool:
    """Tell whether a descriptor is a userfaultfd."""
    return _kind(fd) == _LINK


def _kind(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - no path


def require_userfaultfd(fd: int, peer: str) -> None:
    """See that a descriptor is a userfaultfd, and not blocking.

    Whether its handshake is done, and with which features, the kernel does not tell.

    Raises:
        HandoffError: it is something else. It is not closed.
    """
    if not is_userfaultfd(fd):
        raise HandoffError(peer, f"has sent a descriptor of {_kind(fd)}, not a userfaultfd")
    if os.get_blocking(fd):
        raise HandoffError(peer, "has sent a userfaultfd without O_NONBLOCK, which poll(2) does not work on")
