"""Bytes and descriptors from a Unix socket, and who sent them."""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from typing import Final

import attrs

from aiouffd.errors import HandoffError
from aiouffd.handoff.own_threads import close_foreign, kind_of
from aiouffd.kernel import files
from aiouffd.kernel.abi import Feature

__all__ = ["MOST_FDS", "Peer", "enabled_features", "is_userfaultfd", "receive", "require_userfaultfd"]

MOST_FDS: Final = 253
"""What one message can carry (the kernel's SCM_MAX_FD)."""

_CREDENTIALS = struct.Struct("=iII")
_INITIALIZED: Final = 1 << 31  # the kernel's own note that UFFDIO_API was there
_USERFAULTFD = "anon_inode:[userfaultfd]"


@attrs.frozen
class Peer:
    """The process at the other end of a connection, as it was when it connected (SO_PEERCRED).

    Attributes:
        pid: 0 if the process is in a pid namespace that this process does not see.
        uid: effective user.
        gid: effective group.
    """

    pid: int
    uid: int
    gid: int

    @classmethod
    def of(cls, connection: socket.socket) -> Peer:
        """Ask the kernel."""
        data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return cls(*_CREDENTIALS.unpack(data))

    def __str__(self) -> str:
        return f"process {self.pid} of user {self.uid}"


def enabled_features(fd: int) -> Feature:
    """Return the features of a userfaultfd that whoever has made it has enabled, as /proc tells them."""
    told = files.read(f"/proc/self/fdinfo/{fd}").decode()
    return Feature(int(told.partition("API:")[2].split(":")[1], 16) & ~_INITIALIZED)


async def receive(
    connection: socket.socket, size: int, descriptors: int = 0, *, sender: Peer | None = None
) -> tuple[bytes, list[int]]:
    """Receive at most `size` bytes, and the descriptors that came with them, as soon as there are some.

    The descriptors are close-on-exec and belong to the caller. Canceling is safe: nothing is lost that was received.

    Args:
        connection: a non-blocking Unix socket.
        size: for a message of a known length, that length: the next message, with descriptors, may follow it.
        descriptors: how many are expected at most; more are an error.
        sender: the only process whose bytes are taken: a forked child has the connection, too, and may have dropped its
            parent's privileges. Needs SO_PASSCRED, set before they were sent. None: any.

    Returns:
        No bytes: the peer has closed.

    Raises:
        HandoffError: there were unexpected descriptors, or no free descriptor number for them.
        OSError: the connection is broken.
    """
    loop = asyncio.get_running_loop()
    # The kernel closes descriptors for which there is no room, in this thread: close(2) may block.
    room = socket.CMSG_SPACE(4 * MOST_FDS) + socket.CMSG_SPACE(_CREDENTIALS.size)
    while True:
        try:
            data, ancillary, flags, _ = connection.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            ready = loop.create_future()
            loop.add_reader(connection, _set_ready, ready)
            try:
                await ready
            finally:
                loop.remove_reader(connection)
            continue
        found, by = _unpacked(ancillary)
        # The user is compared only where the process cannot be, in a pid namespace outside of this one.
        if not data or sender is None or (by.pid == sender.pid and (by.pid or by.uid == sender.uid)):
            break
        close_foreign(found)
    if flags & socket.MSG_CTRUNC or len(found) > descriptors:
        close_foreign(found)
        raise HandoffError(
            str(Peer.of(connection)),
            f"sent more than {descriptors} descriptors, or this process has too many open (RLIMIT_NOFILE)",
        )
    return data, list(found)


def _unpacked(ancillary: list[tuple[int, int, bytes]]) -> tuple[array.array[int], Peer]:
    found, by = array.array("i"), Peer(0, -1, -1)
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(payload[: len(payload) - len(payload) % found.itemsize])
        elif level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            by = Peer(*_CREDENTIALS.unpack_from(payload))
    return found, by


def _set_ready(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def is_userfaultfd(fd: int) -> bool:
    """Tell whether a descriptor is a userfaultfd."""
    return kind_of(fd) == _USERFAULTFD


def require_userfaultfd(fd: int, peer: str) -> None:
    """Check that a descriptor is a userfaultfd, and not blocking.

    The kernel does not tell whether its UFFDIO_API handshake is done, and with which features.

    Raises:
        HandoffError: it is something else. It is not closed.
    """
    if not is_userfaultfd(fd):
        raise HandoffError(peer, f"sent a descriptor of {kind_of(fd)}, not a userfaultfd")
    if os.get_blocking(fd):
        raise HandoffError(peer, "sent a userfaultfd without O_NONBLOCK: poll(2) reports an error for it")
