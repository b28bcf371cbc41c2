"""`cli.unix_http`: an error says what to do."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click
import pytest

from aiouffd.cli import unix_http
from aiouffd.cli.unix_http import ControlClient

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def answering_once(path: Path, answer: bytes) -> Iterator[None]:
    """Have a server there that reads one request, answers it, and takes no further connection."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


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
    path = tmp_path / "s"
    with answering_once(path, answer), pytest.raises(click.ClickException, match=words):
        ControlClient(os.fspath(path)).ask("GET", "/")


def test_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for an answer hears why, but where a server is there, and takes its time."""
    said, told = list[str](), threading.Event()
    monkeypatch.setattr(unix_http, "_SILENCE", 0.01)

    def echo(text: str, *, err: bool) -> None:
        assert err
        said.append(text)
        told.set()

    monkeypatch.setattr(click, "echo", echo)
    path = os.fspath(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            never = threading.Event()
            for waits in ([(told, 20.0)], [(never, 0.0), (never, 0.3)]):
                connection, _ = listener.accept()
                with connection:
                    for event, seconds in waits:
                        connection.recv(1 << 16)
                        event.wait(seconds)
                        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

        thread = threading.Thread(target=serve)
        thread.start()
        assert ControlClient(path).ask("GET", "/v1/sessions") == {}
        # The answer to the question before is there at once; that to the request itself takes longer than the timeout.
        monkeypatch.setattr(unix_http, "_SILENCE", 20.0)
        assert ControlClient(path, timeout=0.2).ask("POST", "/v1/sessions/a/snapshot") == {}
        thread.join()
    assert len(said) == 1
    assert said[0].startswith(f"{path}: no answer yet, still waiting. If no server runs, start")


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_only_a_holder(tmp_path: Path, method: str, *, full: bool) -> None:
    """It takes connections until its queue is full, and answers none: that ends, and says what to do."""
    path = os.fspath(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as other:
        listener.bind(path)
        listener.listen(0 if full else 8)
        if full:
            other.connect(path)
        with pytest.raises(click.ClickException, match=r"no answer in 0\.1 s\. .* start `aiouffd serve` with the same"):
            ControlClient(path, timeout=0.1).ask(method, "/v1/sessions")
        with pytest.raises(click.ClickException, match="no answer in"):
            list(ControlClient(path, timeout=0.1).events())


def test_a_server_that_ends_between_two_answers(tmp_path: Path) -> None:
    """No new connection is made for the second: it could be one that nobody answers."""
    path = tmp_path / "s"
    answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"
    with answering_once(path, answer), pytest.raises(click.ClickException, match="has ended the connection"):
        ControlClient(os.fspath(path), timeout=20).ask("POST", "/v1/sessions/a/drain")
