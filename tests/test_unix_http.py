"""`cli.unix_http`: an error says what to do."""

from __future__ import annotations

import os
import socket
import threading
from typing import TYPE_CHECKING

import click
import pytest

from aiouffd.cli.unix_http import ControlClient

if TYPE_CHECKING:
    from pathlib import Path


def test_no_server(tmp_path: Path) -> None:
    """None that has been, and none that is."""
    with pytest.raises(click.ClickException, match="start `aiouffd serve --control"):
        ControlClient(tmp_path / "none").ask("GET", "/")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "stale"))
    with pytest.raises(click.ClickException, match="nobody listens there any more"):
        ControlClient(tmp_path / "stale").ask("GET", "/")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "has ended the connection"),
        (b"SSH-2.0\r\n", "has ended the connection"),
        (b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\nno", "is this the control socket"),
        (
            b'HTTP/1.1 422 No\r\nContent-Length: 48\r\n\r\n{"detail": "bad", "field": "$.x", "advice": "y"}',
            r"\$\.x: bad \(y\)",
        ),
    ],
)
def test_strange_servers(tmp_path: Path, answer: bytes, words: str) -> None:
    """Whatever it answers, it is no traceback."""
    path = os.fspath(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(click.ClickException, match=words):
            ControlClient(path).ask("GET", "/")
        thread.join()
