"""Messages between the application and its pager: one JSON object and some descriptors a packet.

The socket is SOCK_SEQPACKET: a packet arrives whole or not at all, so that a worker that is killed in the middle
leaves no half message to its successor. What is large (a process of thousands of mappings) travels as a memfd, which
is the last of the descriptors then: a packet is bounded by the socket's buffer, some 200 KiB.
"""

from __future__ import annotations

import array
import json
import os
import socket
from typing import Any

__all__ = ["Closed", "receive", "send"]

_MAX_PACKET = 64 << 10
_MAX_FDS = 250  # SCM_MAX_FD is 253
_IN_MEMORY = b"@"  # in place of the JSON object: it is in the memfd


class Closed(Exception):  # noqa: N818 - a state of the connection, no error
    """The other side has closed the connection."""


def send(connection: socket.socket, message: dict[str, Any], fds: list[int] | None = None) -> None:
    """Send a message; the descriptors stay the caller's. Raises `Closed`."""
    data = json.dumps(message).encode()
    memory = -1
    try:
        if len(data) > _MAX_PACKET:
            memory = os.memfd_create("aiouffd-message", os.MFD_CLOEXEC)
            with os.fdopen(os.dup(memory), "wb") as file:
                file.write(data)
            data, fds = _IN_MEMORY, [*(fds or []), memory]
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        connection.sendmsg([data], ancillary)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise Closed from error
    finally:
        if memory >= 0:
            os.close(memory)


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Return one message and the descriptors that came with it, which are the caller's (close-on-exec).

    Raises:
        Closed: at the end.
        BlockingIOError: nothing is there, on a non-blocking socket.
    """
    space = socket.CMSG_SPACE(_MAX_FDS * 4)
    try:
        data, ancillary, _, _ = connection.recvmsg(_MAX_PACKET, space, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError as error:
        raise Closed from error
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if not data:
        raise Closed
    if data == _IN_MEMORY:
        with os.fdopen(fds.pop(), "rb") as file:
            file.seek(0)  # it is the sender's place in the file, behind the end
            data = file.read()
    return json.loads(data), list(fds)
