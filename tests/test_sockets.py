"""`kernel.sockets`."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from aiouffd.kernel.sockets import send_within

if TYPE_CHECKING:
    from pathlib import Path


def test_a_full_queue(tmp_path: Path) -> None:
    """To connect, and to send, ends after the time; with 0 it is no longer bounded."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        with socket.socket(socket.AF_UNIX) as second:
            send_within(second, 0.01)
            with pytest.raises(BlockingIOError):
                second.connect(path)
            listener.accept()[0].close()
            send_within(second, 0)
            second.connect(path)
    one, other = socket.socketpair()
    with one, other:
        send_within(one, 0.01)
        with pytest.raises(BlockingIOError):
            one.sendall(bytes(64 << 20))  # more than any queue takes
