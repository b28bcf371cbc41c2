"""`kernel.sockets`."""

from __future__ import annotations

import signal
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from aiouffd.kernel.sockets import connect_within, send_within

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
            with pytest.raises(BlockingIOError):
                connect_within(second, path, 0.01)
            listener.accept()[0].close()
            send_within(second, 0)
            second.connect(path)
    one, other = socket.socketpair()
    with one, other:
        send_within(one, 0.01)
        with pytest.raises(BlockingIOError):
            one.sendall(bytes(64 << 20))  # more than any queue takes


def test_a_signal_while_the_queue_is_full(tmp_path: Path) -> None:
    """It is waited on, and what is called connected is."""
    path, rung, accepted = tmp_path / "s", threading.Event(), list[socket.socket]()
    calls, main = list[int](), threading.get_ident()

    def told(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            rung.set()

    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(path))
        listener.listen(0)
        first.connect(str(path))

        def disturb() -> None:
            while not rung.wait(0.01):  # each interrupts connect(2)
                signal.pthread_kill(main, signal.SIGUSR1)
            accepted.extend(listener.accept()[0] for _ in range(2))

        thread = threading.Thread(target=disturb)
        before = signal.signal(signal.SIGUSR1, told)
        thread.start()
        try:
            with socket.socket(socket.AF_UNIX) as second:
                connect_within(second, path, 20)
                second.sendall(b"x")
                thread.join()
                assert accepted[1].recv(1) == b"x"
        finally:
            rung.set()
            listener.close()
            thread.join()
            signal.signal(signal.SIGUSR1, before)
            for connection in accepted:
                connection.close()
