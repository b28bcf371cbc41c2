"""`aiouffd serve` as an operator runs it: signals, logs, systemd, options."""

from __future__ import annotations

import contextlib
import mmap
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pattern import PAGE, word
from scenario import ended, eventually, play
from served import MIB, ROOT, Serve, client, hand_over


def test_a_socket_that_is_taken(image: Path, tmp_path: Path) -> None:
    """A second server is refused; a socket that a killed one has left is replaced; another file is not."""
    with Serve(tmp_path, image) as first:
        (tmp_path / "x").mkdir()
        second = subprocess.run(
            [sys.executable, "-m", "aiouffd", "serve", str(image), "--socket", str(first.path)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert second.returncode == 1
        assert "Address already in use" in second.stderr
        first.process.kill()
        first.process.wait()
        assert first.path.exists()
    with Serve(tmp_path, image) as third:
        assert third.end() == 0
    third.path.write_text("precious")
    fourth = Serve(tmp_path, image, wait=False)
    assert fourth.process.wait(60) == 1
    assert third.path.read_text() == "precious"


def waits_for_end(path: str, pid: int, kind: str, number: int) -> None:
    """Scenario: the server is told to end while it serves."""
    region, connection, _uffd = hand_over(path, 16 * MIB)
    assert region[0] == 1
    os.kill(pid, number)
    connection.settimeout(10)
    if kind == "fill":
        assert connection.recv(1) == b""  # served no longer
        assert bytes(region) == b"".join(word(page) * (PAGE // 8) for page in range(16 * MIB // PAGE))
        region.madvise(mmap.MADV_DONTNEED, 0, PAGE)  # and nobody is asked
        assert region[0] == 0
    else:
        eventually(lambda: Path(path).exists(), expected=False)
        for page in range(0, 16 * MIB // PAGE, 5):
            assert region[page * PAGE] == (page + 1) & 255


@pytest.mark.parametrize(
    ("kind", "number"), [("keep", signal.SIGTERM), ("fill", signal.SIGTERM), ("keep", signal.SIGHUP)]
)
def test_signals(image: Path, tmp_path: Path, kind: str, number: signal.Signals) -> None:
    """No new clients; those that are there are served until they go, or get all that they miss."""
    with Serve(tmp_path, image, "--readahead", "0", "--on-term", kind) as serve:
        play(waits_for_end, str(serve.path), serve.process.pid, kind, int(number))
        assert serve.process.wait(60) == 0
        assert f"{number.name}: no new clients" in serve.said
        assert "ended" in serve.said


def told_twice(path: str, pid: int, log: str) -> None:
    """Scenario: the server is told to end twice, while it serves."""
    region, _connection, _uffd = hand_over(path)
    assert region[0] == 1
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: "no new clients" in Path(log).read_text(), expected=True)
    os.kill(pid, signal.SIGTERM)
    assert ended(pid)
    for page in range(0, MIB // PAGE, 3):
        assert region[page * PAGE] == (page + 1) & 255


def test_a_second_signal(image: Path, tmp_path: Path) -> None:
    """The listener ends at once; the pager serves its client on, and ends with it."""
    with Serve(tmp_path, image, "--readahead", "0") as serve:
        play(told_twice, str(serve.path), serve.process.pid, str(serve.log))
        assert serve.process.wait() == 0
        assert "serves 1 client on by itself" in serve.said


def test_logs(image: Path, tmp_path: Path) -> None:
    """Each line is one record of key=value, the pager's too; on a terminal they are for people, beside a status."""
    with Serve(tmp_path, image) as serve:
        os.kill(serve.worker, signal.SIGKILL)
        serve.says("is replaced")
        pattern = r'time=[0-9T:.-]+ level=[a-z]+ logger=[a-z_.]+ msg=".*"'
        assert all(re.fullmatch(pattern, line) for line in serve.said.splitlines()), serve.said
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "aiouffd", "serve", str(image), "--socket", str(tmp_path / "s")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    with subprocess.Popen(command, stdin=theirs, stderr=theirs, stdout=theirs, env=environment) as process:
        os.close(theirs)
        said = ""
        while "0 clients" not in said:
            said += os.read(ours, 4096).decode()
        process.terminate()
        with contextlib.suppress(OSError):  # the terminal's other end is closed
            while data := os.read(ours, 4096):
                said += data.decode()
        os.close(ours)
    assert process.returncode == 0
    assert "listening on" in said
    assert "INFO:aiouffd" not in said
    assert "level=" not in said


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing")
def test_the_unit(tmp_path: Path) -> None:
    """The example's units are what systemd understands, and their command line is what `aiouffd serve` does."""
    for kind in ("service", "socket"):
        text = (ROOT / "examples" / "systemd" / f"aiouffd.{kind}").read_text()
        (tmp_path / f"aiouffd.{kind}").write_text(text.replace("/opt/aiouffd/bin/aiouffd", "/bin/true"))
    units = [str(tmp_path / f"aiouffd.{kind}") for kind in ("service", "socket")]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    command = re.search(r"^ExecStart=\S+ (.*)$", (ROOT / "examples/systemd/aiouffd.service").read_text(), re.MULTILINE)
    assert command is not None
    done = subprocess.run(
        [sys.executable, "-m", "aiouffd", *command[1].split()], capture_output=True, text=True, timeout=60, check=False
    )
    assert "--socket PATH says where to listen" in done.stderr  # all of it was understood


ACTIVATED = (
    "import os, sys; os.environ['LISTEN_PID'] = str(os.getpid()); os.dup2(int(sys.argv[1]), 3);"
    " from aiouffd.cli import main; sys.exit(main(sys.argv[2:]))"
)
"""Runs the command with a descriptor as systemd passes it: number 3."""


@pytest.mark.parametrize("kind", ["two", "internet", "datagram"])
def test_sockets_that_are_not_for_us(image: Path, tmp_path: Path, kind: str) -> None:
    """A socket unit that passes what cannot be served is told so."""
    family, style = {
        "internet": (socket.AF_INET, socket.SOCK_STREAM),
        "datagram": (socket.AF_UNIX, socket.SOCK_DGRAM),
    }.get(kind, (socket.AF_UNIX, socket.SOCK_STREAM))
    with socket.socket(family, style) as given:
        given.bind(("127.0.0.1", 0) if kind == "internet" else str(tmp_path / "s"))
        if kind != "datagram":
            given.listen()
        done = subprocess.run(
            [sys.executable, "-c", ACTIVATED, str(given.fileno()), "serve", str(image)],
            pass_fds=[given.fileno()],
            env={**os.environ, "LISTEN_FDS": "2" if kind == "two" else "1"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert "exactly one ListenStream=" in done.stderr


def test_socket_activation(image: Path, tmp_path: Path) -> None:
    """As systemd does it: the socket is descriptor 3, and readiness is told."""
    path = tmp_path / "given.sock"
    with (
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified,
    ):
        listener.bind(str(path))
        listener.listen()
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(20)
        process = subprocess.Popen(
            [sys.executable, "-c", ACTIVATED, str(listener.fileno()), "serve", str(image)],
            pass_fds=[listener.fileno()],
            env={**os.environ, "LISTEN_FDS": "1", "NOTIFY_SOCKET": str(tmp_path / "notify")},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert notified.recv(100) == b"READY=1"
            play(client, str(path), MIB)
            process.terminate()
            assert notified.recv(100) == b"STOPPING=1"
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.communicate()


def test_wrong_options(image: Path, tmp_path: Path) -> None:
    """Each says what to do, and nothing is left running."""
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    empty = tmp_path / "empty"
    empty.touch()
    for arguments, words in (
        ([str(image)], "Error: --socket PATH says where to listen"),
        ([], "either SOURCE or --source-for"),
        ([str(image), "--source-for", "x"], "either SOURCE or --source-for"),
        ([str(tmp_path / "none"), "--socket", "s"], "No such file"),
        ([str(image), "--socket", "s", "--record", "r", "--replay", "r"], "either --record or --replay"),
        ([str(image), "--socket", "s", "--record-pages", "1M"], "--record-pages: needs --record"),
        ([str(image), "--socket", "s", "--replay", str(image)], "is not a recording"),
        ([str(image), "--socket", "s", "--mode", "888"], "is not a file mode"),
        ([str(image), "--socket", "s", "--metrics", "x"], "is not an address"),
        ([str(image), "--socket", str(tmp_path / "no" / "s")], f"--socket {tmp_path}/no/s: No such file"),
        ([str(image), "--socket", str(tmp_path)], f"--socket {tmp_path}: is in the way: it is not a socket"),
        ([str(image), "--socket", str(tmp_path / ("x" * 200))], "File name too long"),
        (
            [str(image), "--socket", "s", "--record", str(tmp_path / "no" / "r")],
            f"--record {tmp_path}/no/r: No such file",
        ),
        ([str(image), "--socket", "s", "--record", "/dev/null"], "--record /dev/null: is not a regular file"),
        ([str(image), "--socket", "s", "--replay", str(tmp_path / "no")], f"--replay {tmp_path}/no: No such file"),
        ([str(image), "--socket", "s", "--metrics", "no.host.invalid:1"], "--metrics no.host.invalid:1: "),
        ([str(image), "--socket", "s", "--bytes-in-flight", "0"], "is too little"),
        ([str(image), "--socket", "s", "--cache-size", "1G"], "--cache-size: needs --cache"),
        ([str(image), "--socket", "s", "--metrics", str(port)], f"--metrics 127.0.0.1:{port}: Address already in use"),
        ([str(image), "--socket", "s", "--timeout", "nan"], "is not a number of seconds"),
        (["--source-for", "{", "--socket", "s"], "write for example"),
        (["--source-for", "{}", "--socket", "s"], "knows name, number, pid, uid, not nothing"),
        (["--source-for", "/fixed", "--socket", "s"], "that is SOURCE"),
        (["--source-for", "/{number:5d}", "--socket", "s"], "fields take no format"),
        ([str(empty), "--socket", "s"], "has no bytes"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "aiouffd", "serve", *arguments],
            capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == (2 if done.stderr.startswith("Usage: ") else 1), arguments
        assert words in done.stderr, (arguments, done.stderr)
        assert "Traceback" not in done.stderr
    taken.close()
    assert not (tmp_path / "s").exists()
