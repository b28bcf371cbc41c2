"""Messages between the application and its pager: one JSON object and some descriptors a packet.

The socket is SOCK_SEQPACKET: a packet arrives whole or not at all, so that a worker that is killed in the middle
leaves no half message to its successor. What is large travels as a memfd.
"""

from __future__ import annotations

import array
import json
import socket
from typing import Any

__all__ = ["Closed", "receive", "send"]

_MAX_PACKET = 128 << 10
_MAX_FDS = 250  # SCM_MAX_FD is 253


class Closed(Exception):  # noqa: N818 - a state of the connection, no error
    """The other side has closed the connection."""


def send(connection: socket.socket, message: dict[str, Any], fds: list[int] | None = None) -> None:
    """Send a message; the descriptors stay the caller's. Raises `Closed`."""
    data = json.dumps(message).encode()
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        connection.sendmsg([data], ancillary)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise Closed from error


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
    return json.loads(data), list(fds)
