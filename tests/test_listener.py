"""`server.listener`: the socket's file, and who else may be at its name."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from scenario import open_descriptors

from aiouffd.server.listener import SocketFile

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def umask() -> Iterator[None]:
    """Take all bits of groups and others away from new files."""
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_the_mode_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    """Whatever the umask."""
    for mode in (0o600, 0o660, 0o666):
        with SocketFile(tmp_path / "s", mode=mode) as file:
            assert stat.S_IMODE(file.path.stat().st_mode) == mode
    assert not list(tmp_path.iterdir())


def stale(path: Path) -> None:
    """Leave a socket that nobody listens on."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))


def test_what_is_stale_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    """Not a file, not a link (also to a stale socket), not a socket that somebody listens on."""
    path = tmp_path / "s"
    stale(path)
    with SocketFile(path) as file, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        file.listener.accept()[0].close()
        with pytest.raises(OSError, match="another server listens there") as caught:
            SocketFile(path)
        assert caught.value.errno == errno.EADDRINUSE
        assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []
    stale(tmp_path / "target")
    for target in ("target", "nowhere"):
        path.symlink_to(tmp_path / target)
        with pytest.raises(FileExistsError, match="not a socket"):
            SocketFile(path)
        assert path.is_symlink()
        path.unlink()
    path.mkdir()
    with pytest.raises(FileExistsError, match="not a socket"):
        SocketFile(path)


def test_a_name_that_is_there_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client may wait for the name and connect at once."""
    path = tmp_path / "s"
    seen = []

    def listen(listener: socket.socket, backlog: int) -> None:
        seen.append(path.exists())
        super(socket.socket, listener).listen(backlog)

    monkeypatch.setattr(socket.socket, "listen", listen)
    with SocketFile(path):
        assert seen == [False]
        assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_was_bound_to_is_removed(tmp_path: Path) -> None:
    """It has no name of its own yet. One that listens, and a file, have such a name and stay."""
    killed = "import os, socket, sys; from aiouffd.server import listener\n"
    killed += "socket.socket.listen = lambda *_: os.kill(os.getpid(), 9)\nlistener.SocketFile(sys.argv[1])"
    assert subprocess.run([sys.executable, "-c", killed, tmp_path / "s"], check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    kept = [left.with_name(left.name + "-listens"), left.with_name(left.name + "-file")]
    kept[1].touch()
    with SocketFile(kept[0]):
        assert sorted(tmp_path.iterdir()) == sorted(kept)
        with SocketFile(tmp_path / "s") as file:
            assert sorted(tmp_path.iterdir()) == sorted([*kept, file.path])


def test_a_listener_that_is_busy_is_not_waited_for(tmp_path: Path) -> None:
    """Its backlog is full: another one would wait in connect(2)."""
    path = tmp_path / "s"
    with SocketFile(path, backlog=0):
        waiting = []
        while True:
            client = socket.socket(socket.AF_UNIX)
            waiting.append(client)
            client.setblocking(False)
            try:
                client.connect(str(path))
            except BlockingIOError:
                break
        with pytest.raises(OSError, match="another server listens there"):
            SocketFile(path)
        for client in waiting:
            client.close()


def test_what_another_has_made_is_not_removed(tmp_path: Path) -> None:
    """Somebody has removed ours, and listens there now."""
    path = tmp_path / "s"
    ours = SocketFile(path)
    path.unlink()
    with SocketFile(path) as theirs:
        ours.close()
        assert theirs.path.exists()
    assert not path.exists()


def test_several_at_a_stale_socket(tmp_path: Path) -> None:
    """Exactly one of them gets it, and its file is the one that is there."""
    path = tmp_path / "s"
    for _ in range(50):
        stale(path)
        files: list[SocketFile] = []
        start = threading.Barrier(4)

        def attempt(start: threading.Barrier = start, files: list[SocketFile] = files) -> None:
            start.wait()
            try:
                files.append(SocketFile(path))
            except OSError as error:
                assert error.errno == errno.EADDRINUSE, error  # noqa: PT017 - in a thread

        threads = [threading.Thread(target=attempt) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(files) == 1
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            files[0].listener.setblocking(True)
            files[0].listener.accept()[0].close()
        files[0].close()
        assert list(tmp_path.iterdir()) == []


def test_a_long_path(tmp_path: Path) -> None:
    """Longer than an address holds: by its directory; a name that is too long by itself is refused, with the path."""
    deep = tmp_path / ("x" * 100) / ("y" * 100)
    deep.mkdir(parents=True)
    before = open_descriptors()
    stale_path = deep / "s"
    with SocketFile(stale_path) as file:
        assert stat.S_ISSOCK(file.path.stat().st_mode)
        with pytest.raises(OSError, match="another server listens there"):
            SocketFile(stale_path)
    with pytest.raises(OSError, match="too long") as caught:
        SocketFile(deep / ("z" * 100))
    assert str(deep) in caught.value.filename
    assert open_descriptors() == before
    assert list(deep.iterdir()) == []
