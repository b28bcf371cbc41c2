"""Messages between the application and its pager: one JSON object and some descriptors a packet.

The socket is SOCK_SEQPACKET: a packet arrives whole or not at all, so that a worker that is killed in the middle
leaves no half message to its successor. What is large travels as a memfd.
"""

from __future__ import annotations

import array
import builtins
import json
import socket
import traceback
from typing import Any

from aiouffd import errors

__all__ = ["Closed", "decode_error", "encode_error", "receive", "send"]

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


def encode_error(error: BaseException) -> dict[str, Any]:
    """Return an exception as JSON: its type's name, its arguments and its causes."""
    reduced = error.__reduce__() if isinstance(error, errors.UffdError) else (type(error), error.args)
    arguments = [item if isinstance(item, str | int | float | None) else repr(item) for item in reduced[1]]
    cause = error.__cause__ or error.__context__
    return {
        "type": type(error).__name__,
        "args": arguments,
        "text": "".join(traceback.format_exception_only(error)).strip(),
        "trace": "".join(traceback.format_exception(error, chain=False)),
        "cause": encode_error(cause) if cause is not None else None,
    }


def decode_error(data: dict[str, Any]) -> BaseException:
    """Return the exception again: of its own type where that is ours or Python's, else a `PagerError` with its text."""
    kind = getattr(errors, data["type"], None) or getattr(builtins, data["type"], None)
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        kind = None
    try:
        error: BaseException = kind(*data["args"]) if kind is not None else errors.PagerError(data["text"])
    except TypeError:
        error = errors.PagerError(data["text"])
    error.add_note("in the pager:\n" + data["trace"].rstrip())
    if data["cause"] is not None:
        error.__cause__ = decode_error(data["cause"])
    return error
