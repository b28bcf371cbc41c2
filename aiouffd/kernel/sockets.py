"""Sockets whose other end takes nothing."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from time import monotonic

__all__ = ["connect_within", "send_within"]

_LEAST = 0.001  # seconds: 0 is no bound


def send_within(connection: socket.socket, seconds: float) -> None:
    """Have connect(2) and send(2) of a blocking socket fail with EAGAIN after a time; 0: never.

    Both wait where the queue of an AF_UNIX socket is full. Python's own timeouts make the socket nonblocking: then
    connect(2) does not wait for room, and poll(2) waits for none in a queue of datagrams.
    """
    whole, part = divmod(round(seconds * 1_000_000), 1_000_000)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", whole, part))


def connect_within(connection: socket.socket, path: str | os.PathLike[str], seconds: float) -> None:
    """Connect a blocking AF_UNIX socket; what is sent then is bounded as by `send_within`.

    Where a signal interrupts connect(2), Python waits until the socket can be written to, and takes it for connected:
    one of AF_UNIX that is not can always be. So it is asked whether it is.

    Raises:
        BlockingIOError: there was no room in the queue of the other end for so many seconds; 0: never.
        OSError: as connect(2).
    """
    until = monotonic() + seconds
    while True:
        send_within(connection, max(until - monotonic(), _LEAST) if seconds else 0)
        connection.connect(os.fspath(path))
        with contextlib.suppress(OSError):  # ENOTCONN
            connection.getpeername()
            break
    send_within(connection, seconds)
