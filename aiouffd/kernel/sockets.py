"""Sockets whose other end takes nothing."""

from __future__ import annotations

import socket
import struct

__all__ = ["send_within"]


def send_within(connection: socket.socket, seconds: float) -> None:
    """Have connect(2) and send(2) of a blocking socket fail with EAGAIN after a time; 0: never.

    Both wait where the queue of an AF_UNIX socket is full. Python's own timeouts make the socket nonblocking: then
    connect(2) does not wait for room, and poll(2) waits for none in a queue of datagrams.
    """
    whole, part = divmod(round(seconds * 1_000_000), 1_000_000)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", whole, part))
