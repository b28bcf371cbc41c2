"""Messages between the application and its pager: one JSON object and some descriptors a packet.

The socket is SOCK_SEQPACKET: a packet arrives whole or not at all, so that a worker that is killed in the middle
leaves no half message to its successor. What does not fit travels as a descriptor: a text that is longer than a packet
in a memfd, and more descriptors than the kernel takes at once (SCM_MAX_FD) inside a socket of their own.

A forked child of the application inherits the socket, and may have dropped the privileges that the pager has. So the
pager takes messages from the application's own process only: the kernel says of each which process has sent it
(SCM_CREDENTIALS).
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
from collections import deque
from typing import Any, Final

from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.pager.process.handles import close_all
from aiouffd.ranges import batched

__all__ = ["Closed", "DescriptorsLostError", "Outbox", "Sender", "StrangerError", "receive", "send"]

_HEADER: Final = struct.Struct("=BI")  # how it is packed, how many descriptors there are
_IN_MEMFD: Final = 1
_IN_PARCEL: Final = 2
_MAX_TEXT: Final = 64 << 10
_MAX_PACKET: Final = _HEADER.size + _MAX_TEXT
_MAX_FDS: Final = 200  # SCM_MAX_FD is 253
_CREDENTIALS: Final = struct.Struct("=iII")  # pid, uid, gid


class Closed(Exception):  # noqa: N818 - a state of the connection, no error
    """The other side has closed the connection."""


class DescriptorsLostError(OSError):
    """Descriptors have not arrived, for this process has too many open; those that have are closed.

    Attributes:
        message: the message that they came with; empty where that was lost as well.
    """

    def __init__(self, message: dict[str, Any]) -> None:
        super().__init__("descriptors were lost on the way: the limit of open files (RLIMIT_NOFILE) is reached")
        self.message = message


class StrangerError(OSError):
    """A message came from a process that may not send any; it was dropped, and its descriptors were closed."""

    def __init__(self, sender: tuple[int, int]) -> None:
        super().__init__(
            "a message of process {} of user {} was dropped: only the pager's owner may send".format(*sender)
        )


class Sender:
    """The only process whose messages are taken from a connection: the one that made it.

    Args:
        connection: one end of a socketpair, with SO_PASSCRED set since it was made.
    """

    def __init__(self, connection: socket.socket) -> None:
        found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.pid: int
        self.uid: int
        self.pid, self.uid, _ = _CREDENTIALS.unpack(found)

    def check(self, pid: int, uid: int) -> None:
        """Raise StrangerError for any other process.

        The user is compared only where the process cannot be, in a pid namespace outside of this one (0): the owner may
        drop its privileges, too.
        """
        if pid != self.pid or (pid == 0 and uid != self.uid):
            raise StrangerError((pid, uid))


def send(
    connection: socket.socket, message: dict[str, Any], fds: list[int] | None = None, *, wait: bool = True
) -> None:
    """Send a message; the descriptors stay the caller's.

    Raises:
        Closed: nobody will read it.
        BlockingIOError: there is no room now, and the socket does not block or `wait` is false. Nothing was sent.
        OSError: it cannot be sent at all.
    """
    text, packing, attached = json.dumps(message).encode(), 0, list(fds or [])
    with contextlib.ExitStack() as stack:
        if len(attached) > _MAX_FDS:
            packing |= _IN_PARCEL
            attached = [_parcel(attached, stack)]
        if len(text) > _MAX_TEXT:
            packing |= _IN_MEMFD
            attached.append(_memfd(text, stack))
            text = b""
        header = _HEADER.pack(packing, len(fds or []))
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", attached))] if attached else []
        try:
            connection.sendmsg([header, text], ancillary, 0 if wait else socket.MSG_DONTWAIT)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed from error


def receive(connection: socket.socket, sender: Sender | None = None) -> tuple[dict[str, Any], list[int]]:
    """Return one message and the descriptors that came with it, which are the caller's (close-on-exec).

    Args:
        connection: the socket.
        sender: the only process whose messages are taken; None: any.

    Raises:
        Closed: at the end.
        BlockingIOError: nothing is there, on a non-blocking socket.
        DescriptorsLostError: not all of it has arrived.
        ValueError: it is no message. Its descriptors are closed.
        StrangerError: another process has sent it.
    """
    data, fds = _packet(connection, sender)
    try:
        message, fds, complete = _unpack(data, fds)
    except BaseException:
        close_all(fds)
        raise
    if not complete:
        close_all(fds)
        raise DescriptorsLostError(message)
    return message, fds


def _unpack(data: bytes, fds: list[int]) -> tuple[dict[str, Any], list[int], bool]:
    """Return the message, its descriptors, and whether all of it has arrived; what is unpacked is taken from `fds`."""
    if len(data) < _HEADER.size:
        raise ValueError(f"a packet of {len(data)} bytes is no message")
    packing, count = _HEADER.unpack_from(data)
    text: bytes | None = data[_HEADER.size :]
    if packing & _IN_MEMFD:
        text = _content(fds.pop()) if len(fds) == (1 if packing & _IN_PARCEL else count) + 1 else None
    message = json.loads(text) if text is not None else {}
    if not isinstance(message, dict):
        raise ValueError(f"{text!r:.50} is no JSON object")  # noqa: TRY004 - no argument has a wrong type
    if packing & _IN_PARCEL and len(fds) == 1:
        fds = _unparcel(fds.pop())
    return message, fds, len(fds) == count and text is not None


def _packet(connection: socket.socket, sender: Sender | None = None) -> tuple[bytes, list[int]]:
    space = socket.CMSG_SPACE((_MAX_FDS + 1) * 4) + socket.CMSG_SPACE(_CREDENTIALS.size)
    try:
        data, ancillary, _, _ = connection.recvmsg(_MAX_PACKET, space, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        # The other side closed without having read everything. The kernel says so once, ahead of what that side sent.
        data, ancillary, _, _ = connection.recvmsg(_MAX_PACKET, space, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    pid, uid = 0, -1
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        elif level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            pid, uid, _ = _CREDENTIALS.unpack_from(payload)
    if not data and not fds and uid < 0:  # a message without a byte has a sender all the same
        raise Closed
    try:
        if sender is not None:
            sender.check(pid, uid)
    except StrangerError:
        close_all(list(fds))
        raise
    return data, list(fds)


def _memfd(text: bytes, stack: contextlib.ExitStack) -> int:
    fd = os.memfd_create("aiouffd-message", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    view = memoryview(text)
    while view:
        view = view[os.write(fd, view) :]
    return fd


def _content(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        return os.pread(fd, os.fstat(file.fileno()).st_size, 0)


def _parcel(fds: list[int], stack: contextlib.ExitStack) -> int:
    """Put descriptors into a socket, which keeps them until it is read or closed."""
    inner, outer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stack.enter_context(outer)
    with inner:
        for some in batched(fds, _MAX_FDS):
            part = array.array("i", some)
            inner.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, part)], socket.MSG_DONTWAIT)
    return outer.fileno()


def _unparcel(parcel: int) -> list[int]:
    fds: list[int] = []
    with socket.socket(fileno=parcel) as inner, contextlib.suppress(Closed):
        while True:
            fds += _packet(inner)[1]
    return fds


class Outbox:
    """Sends without waiting: what the other side has no room for yet is kept, in order.

    Args:
        connection: stays the caller's.

    Attributes:
        lost: how many messages were dropped since it was set to 0.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.lost: int = 0
        self._kept: deque[tuple[dict[str, Any], list[OwnedDescriptor]]] = deque()

    def __bool__(self) -> bool:
        """Whether anything is kept: `flush` when the connection is writable."""
        return bool(self._kept)

    def put(self, message: dict[str, Any], fds: list[int] | None = None, *, most: int | None = None) -> bool:
        """Send a message now, or keep it; its descriptors stay the caller's, who may close them.

        Args:
            message: what is sent.
            fds: go along.
            most: it is dropped where so many are kept already; None: it is never.

        Returns:
            Whether it was not dropped.

        Raises:
            Closed: nobody will read it.
            OSError: it cannot be sent at all.
        """
        if self._kept:
            if most is not None and len(self._kept) >= most:
                self.lost += 1
                return False
            self._keep(message, fds or [])
            return True
        try:
            send(self._connection, message, fds, wait=False)
        except BlockingIOError:
            self._keep(message, fds or [])
        return True

    def _keep(self, message: dict[str, Any], fds: list[int]) -> None:
        self._kept.append((message, [OwnedDescriptor(os.dup(fd)) for fd in fds]))

    def flush(self) -> list[tuple[dict[str, Any], OSError]]:
        """Send what is kept, as far as there is room; return what cannot be sent at all, which is dropped, and why.

        Raises:
            Closed: nobody will read it. Nothing is kept any more.
        """
        failed: list[tuple[dict[str, Any], OSError]] = []
        while self._kept:
            message, fds = self._kept[0]
            try:
                send(self._connection, message, [fd.fileno() for fd in fds], wait=False)
            except BlockingIOError:
                break
            except Closed:
                self._kept.clear()
                raise
            except OSError as error:
                failed.append((message, error))
            self._kept.popleft()
            for fd in fds:
                fd.close()
        return failed
