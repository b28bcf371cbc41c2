"""`server.control.api`: sessions of a running `aiouffd serve`, with real handoffs, as who manages virtual machines."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import click
import pytest
from pattern import PAGE, peek, word
from scenario import eventually, play
from served import MIB, Serve, client, hand_over

from aiouffd.cli.unix_http import ControlClient

JAILED = 12345
"""A user that is nobody else's."""


@contextlib.contextmanager
def controlled(directory: Path, *arguments: str) -> Any:
    """Start a server that has no session; yield it and its control."""
    path = directory / "control.sock"
    with Serve(directory, "--control", path, *arguments, socket="") as serve:
        yield serve, ControlClient(path)


def create(control: ControlClient, name: str, image: Path, directory: Path, **options: Any) -> str:
    """Create a session; return its socket."""
    path = str(directory / f"{name}.sock")
    answer = control.ask("POST", "/v1/sessions", {"name": name, "socket": path, "source": str(image), **options})
    assert (answer["name"], answer["state"], answer["settings"]["socket"]) == (name, "listening", path)
    return path


def completed(path: str, control: str) -> None:
    """Scenario: a virtual machine gets all its pages, and needs no server any more."""
    region, connection, _uffd = hand_over(path)
    assert region[3 * PAGE : 3 * PAGE + 8] == word(3)
    ctl = ControlClient(control)
    before = ctl.ask("GET", "/v1/sessions/a")["statistics"]["pages_prefetch"]
    answer = ctl.ask("POST", "/v1/sessions/a/prefetch", {"offset": 10 * PAGE, "length": 20 * PAGE})
    (seen,) = answer["clients"]
    assert (seen["number"], seen["pid"], seen["uid"], seen["bytes"]) == (2, os.getpid(), os.geteuid(), MIB)
    assert ctl.ask("GET", "/v1/sessions/a")["statistics"]["pages_prefetch"] == before + 20
    with pytest.raises(click.ClickException, match="serves 1 client,"):
        ctl.ask("DELETE", "/v1/sessions/a")
    assert ctl.ask("POST", "/v1/sessions/a/complete") == {"failed": {}, "clients": 0}
    connection.settimeout(10)
    assert connection.recv(1) == b""
    assert bytes(region) == b"".join(word(page) * (PAGE // 8) for page in range(MIB // PAGE))
    region.madvise(mmap.MADV_DONTNEED, 0, PAGE)  # and nobody is asked
    assert region[0] == 0


def test_sessions_come_serve_and_go(image: Path, tmp_path: Path) -> None:
    """Each has its own socket and settings; they outlive the pager's processes; what happens is told."""
    with controlled(tmp_path) as (serve, control):
        path = create(control, "a", image, tmp_path, readahead=0, mode="660")
        other = create(control, "b", image, tmp_path)
        assert os.stat(path).st_mode & 0o777 == 0o660  # noqa: PTH116 - a literal is passed on
        for pid in (serve.worker, serve.pager):
            os.kill(pid, signal.SIGKILL)
            while pid in control.ask("GET", "/v1/server")["pager"]:
                pass
        play(client, path, MIB)
        play(completed, path, str(tmp_path / "control.sock"))
        play(client, other, 4 * MIB)
        sessions = {item["name"]: item for item in control.ask("GET", "/v1/sessions")}
        assert sessions["a"]["statistics"]["pages"] >= MIB // PAGE
        assert "pages_readahead" not in sessions["a"]["statistics"]
        assert sessions["b"]["statistics"]["pages_readahead"] > 0
        whole = control.ask("GET", "/v1/server")
        assert whole["statistics"]["pages"] == sum(item["statistics"]["pages"] for item in sessions.values())
        assert (whole["sessions"], whole["clients"]) == (2, 0)
        control.ask("DELETE", "/v1/sessions/a")
        assert not Path(path).exists()
        assert control.ask("GET", "/v1/server")["statistics"]["pages"] == whole["statistics"]["pages"]
        events = control.events(0)
        seen: list[dict[str, Any]] = []
        while "session.deleted" not in [event["kind"] for event in seen]:
            seen.append(next(events))
        assert [event["number"] for event in seen] == list(range(1, len(seen) + 1))
        assert [event["kind"] for event in seen if event["session"] == "a"] == [
            "session.created", "client.served", "client.gone", "client.served", "client.gone",
            "session.draining", "session.deleted",
        ]  # fmt: skip
        assert next(control.events(len(seen) - 1)) == seen[-1]
        assert create(control, "a", image, tmp_path) == path
        assert serve.end() == 0
        assert [event["kind"] for event in events] == ["session.created", "session.draining", "session.draining"]
        assert not (tmp_path / "control.sock").exists()


def waits_and_drains(path: str, control: str, worker: int) -> None:
    """Scenario: a session is drained while a thread waits for a page."""
    region, _connection, _uffd = hand_over(path)
    assert region[0] == 1
    os.kill(worker, signal.SIGSTOP)
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(peek(region.address + 9 * PAGE)))
    thread.start()
    ctl = ControlClient(control)
    answer = ctl.ask("POST", "/v1/sessions/a/drain")
    assert (answer["state"], len(answer["clients"])) == ("draining", 1)
    assert not Path(path).exists()
    with pytest.raises(click.ClickException, match="is there already"):
        ctl.ask("POST", "/v1/sessions", {"name": "a", "socket": path, "source": "/dev/null"})
    os.kill(worker, signal.SIGCONT)
    thread.join()
    assert found == [word(9)]
    assert ctl.ask("POST", "/v1/sessions/a/drain", {"wait": 0.01})["state"] == "draining"  # again
    assert region[200 * PAGE] == 201


def test_draining_while_a_fault_waits(image: Path, tmp_path: Path) -> None:
    """No new client comes; the old one is served until it leaves. Then the session is no more."""
    with controlled(tmp_path) as (serve, control):
        path = create(control, "a", image, tmp_path, readahead=0)
        play(waits_and_drains, path, str(tmp_path / "control.sock"), serve.worker)
        eventually(lambda: control.ask("GET", "/v1/sessions"), [])
        serve.says("session a has ended: Statistics(faults=")
        create(control, "a", image, tmp_path)
        control.ask("POST", "/v1/sessions/a/drain", {"wait": 60})
        eventually(lambda: control.ask("GET", "/v1/sessions"), [])


def as_another_user(path: str) -> None:
    """Scenario: a virtual machine whose process has given up its privileges."""
    import aiouffd
    from aiouffd.engine.mappings import Mapping
    from aiouffd.handoff import firecracker

    region = aiouffd.Region(MIB)
    uffd = aiouffd.Userfaultfd(aiouffd.Feature.EVENT_REMOVE)
    uffd.register(region.address, region.mapped_length, aiouffd.RegisterMode.MISSING)
    os.setresuid(JAILED, JAILED, JAILED)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        mapping = Mapping(region.address, region.address + region.mapped_length, 0)
        socket.send_fds(connection, [firecracker.encode([mapping], PAGE)], [uffd.fileno()])
        assert region[5 * PAGE] == 6


@pytest.mark.skipif(os.geteuid() != 0, reason="acts as two users: needs root")
def test_the_user_of_a_jail(image: Path, open_to_all: Path) -> None:
    """It gets its socket, whatever it has put there; and it cannot use the control."""
    root = open_to_all / "jail"
    (root / "run").mkdir(parents=True)
    os.chown(root / "run", JAILED, JAILED)
    (root / "run" / "link").symlink_to("/etc")
    with controlled(open_to_all) as (_, control):
        wanted = {"name": "a", "source": str(image), "jail": str(root), "owner": {"uid": JAILED}, "readahead": 0}
        with pytest.raises(click.ClickException, match="symbolic links"):
            control.ask("POST", "/v1/sessions", {**wanted, "socket": "/run/link/s"})
        with pytest.raises(click.ClickException, match="cross-device"):
            control.ask("POST", "/v1/sessions", {**wanted, "socket": "../s"})
        control.ask("POST", "/v1/sessions", {**wanted, "socket": "/run/s"})
        assert (root / "run" / "s").stat().st_uid == JAILED
        play(as_another_user, str(root / "run" / "s"))
        counted = control.ask("GET", "/v1/sessions/a")["statistics"]
        assert counted["pages"] == 1
        (open_to_all / "control.sock").chmod(0o666)
        code = (
            "import os, sys; from aiouffd.cli.unix_http import ControlClient as C; os.setuid(int(sys.argv[2]));"
            " C(sys.argv[1]).ask('GET', '/v1/server')"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(open_to_all / "control.sock"), str(JAILED)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert f"of user {JAILED} may not use this socket" in done.stderr


def raw(path: Path, request: bytes) -> bytes:
    """Send bytes to a control; return what comes back."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_what_is_refused(image: Path, tmp_path: Path) -> None:
    """Each with what is wrong and where; and the server goes on."""
    empty = tmp_path / "empty"
    empty.touch()
    with controlled(tmp_path) as (serve, control):
        create(control, "a", image, tmp_path)
        good = {"name": "b", "socket": str(tmp_path / "b"), "source": str(image)}
        for change, status, field, words in (
            ({"name": "a"}, 409, "", "is there already"),
            ({"readhead": 1}, 422, "$.readhead", "unknown field"),
            ({"owner": {"uid": 1, "group": 1}}, 422, "$.owner.group", "unknown field"),
            ({"name": "vm 3"}, 422, "$.name", "at most 64 letters, digits, `_`, `.` and `-`"),
            ({"readahead": "2M"}, 422, "$.readahead", "Expected `int`"),
            ({"readahead": -1}, 422, "$.readahead", ">= 0"),
            ({"mode": "999"}, 422, "$.mode", "three octal digits"),
            ({"socket": "b"}, 422, "$.socket", "no absolute path"),
            ({"socket": "/x\0"}, 422, "$.socket", "has a NUL"),
            ({"source": [str(image), "diff"]}, 422, "$.source[1]", "no absolute path"),
            ({"record": "/r", "replay": "/r"}, 422, "$.record", "either record or replay"),
            ({"record": "/r", "max_resident": 1 << 20}, 422, "$.record", "either record or max_resident"),
            ({"source": str(tmp_path / "none")}, 502, "", "No such file"),
            ({"source": str(empty)}, 502, "", "has no bytes"),
            ({"socket": str(tmp_path / "a.sock")}, 409, "", "another server listens there"),
            ({"socket": str(image)}, 409, "", "not a socket"),
            ({"socket": str(tmp_path / "no" / "s")}, 409, "", "No such file"),
            ({"replay": str(image)}, 500, "", "is not a recording"),
        ):
            body = json.dumps({**good, **change})
            head = f"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            answer = raw(tmp_path / "control.sock", (head + body).encode())
            problem = json.loads(answer.partition(b"\r\n\r\n")[2])
            assert b"Content-Type: application/problem+json" in answer, answer
            assert (problem["status"], problem.get("field", "")) == (status, field), problem
            assert words in problem["detail"], problem
            assert problem["advice"], problem
        for request, said in (
            (b"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1\r\n\r\n{", b"truncated"),
            (
                b"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 99999\r\n\r\n"
                + bytes(99999),
                b"65536 bytes",
            ),
            (b"GET /v1/sessions/none HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"'none' is not there"),
            (b"GET /v1/sessions/%2e HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"404"),
            (b"PUT /v1/sessions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"405"),
            (
                b"GET /v1/events HTTP/1.1\r\nHost: x\r\nConnection: close\r\nLast-Event-ID: x\r\n\r\n",
                b"not the number of an event",
            ),
            (b"nonsense\r\n\r\n", b"400"),
        ):
            assert said in raw(tmp_path / "control.sock", request), request
        assert [item["name"] for item in control.ask("GET", "/v1/sessions")] == ["a"]
        assert not (tmp_path / "b").exists()
        assert "Traceback" not in serve.said
        path = tmp_path / "layers.sock"
        diff = tmp_path / "diff"
        with diff.open("wb") as file:
            file.truncate(image.stat().st_size)
            file.seek(PAGE)
            file.write(b"d" * PAGE)
        control.ask("POST", "/v1/sessions", {**good, "socket": str(path), "source": [str(image), str(diff)]})
        play(of_layers, str(path))


def of_layers(path: str) -> None:
    """Scenario: what the diff has hides the base."""
    region, _connection, _uffd = hand_over(path)
    assert [region[at * PAGE] for at in range(3)] == [1, ord("d"), 3]
