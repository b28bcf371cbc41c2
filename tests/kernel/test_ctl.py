"""`cli.ctl`: the commands, as an operator runs them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pattern import PAGE, peek
from scenario import eventually, play
from served import Serve, client, hand_over

from aiouffd.cli import ctl, main

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def run(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    """Run a command; return what it prints."""
    capsys.readouterr()
    assert main(["ctl", *arguments]) == status, capsys.readouterr()
    captured = capsys.readouterr()
    return captured.out + captured.err


def waits(path: str, worker: int) -> None:
    """Scenario: a client whose session cannot be drained, and not be completed, before the worker goes on."""
    region, _connection, _uffd = hand_over(path)
    assert region[0] == 1
    os.kill(worker, signal.SIGSTOP)
    toucher = threading.Thread(target=peek, args=(region.address + 9 * PAGE,))
    toucher.start()
    arguments = [sys.executable, "-m", "aiouffd", "ctl", "drain", "vm-1", "--wait", "0.01"]
    drained = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (drained.returncode, drained.stdout) == (1, "vm-1: 1 client left\n")
    os.kill(worker, signal.SIGCONT)
    toucher.join()


def test_the_commands(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other; relative paths are those of the operator."""
    control = tmp_path / "control.sock"
    monkeypatch.setenv("AIOUFFD_CONTROL", str(control))
    monkeypatch.chdir(image.parent)
    with Serve(tmp_path, "--control", control, socket="") as serve:
        path = str(tmp_path / "a.sock")
        created = run(
            capsys, "create", "vm-1", image.name, "--socket", path, "--readahead", "0", "--events-per-second",
            "100000", "--owner", f"{os.geteuid()}:{os.getegid()}",
        )  # fmt: skip
        assert created == f"vm-1: listening on {path}\n"
        settings = json.loads(run(capsys, "show", "vm-1"))["settings"]
        assert settings["source"] == str(image)
        assert settings["events_per_second"] == 100000
        assert settings["owner"] == {"uid": os.geteuid(), "gid": os.getegid()}
        there = "'vm-1' is there already: delete it first, or use another name (`aiouffd ctl show`"
        assert there in run(capsys, "create", "vm-1", image.name, "--socket", path, status=1)
        assert "is no owner" in run(capsys, "create", "b", "c", "--socket", path, "--owner", "root", status=2)
        play(client, path, 1 << 20)
        with socket.socket(socket.AF_UNIX) as nobody:
            nobody.connect(path)
        serve.says("session vm-1: turned away: ")
        head, row = run(capsys, "list").splitlines()
        assert head.split()[-3:] == ["source", "errors", "socket"]
        assert row.split()[-2:] == ["0", path]
        assert json.loads(run(capsys, "list", "--json"))[0]["statistics"]["faults"] > 0
        assert json.loads(run(capsys, "server"))["sessions"] == 1
        assert run(capsys, "prefetch", "vm-1", "--length", "1M") == "vm-1: brought to 0 clients\n"
        assert run(capsys, "record", "vm-1", "t", "--limit", "1G") == f"vm-1: recording to {image.parent}/t\n"
        play(client, path, 2 << 20)  # it prefetches what is not touched then
        assert f"{image.parent}/t: 128 pages, 128 touched\n" in run(capsys, "record", "vm-1", "--stop")
        assert "does not serve a snapshot" in run(capsys, "attach", "vm-1", "t", "--limit", "1G", status=1)
        assert "vm-1: recording" in run(capsys, "record", "vm-1", "t", "--merge", "union")
        assert run(capsys, "record", "vm-1", "--stop") == "vm-1: no client has come\n"
        for wrong in ((), ("t", "--stop"), ("--stop", "--merge", "last")):
            assert "either PATH" in run(capsys, "record", "vm-1", *wrong, status=2)
        assert run(capsys, "complete", "vm-1") == "vm-1: complete\n"
        assert "'no/no' is not there" in run(capsys, "show", "no/no", status=1)
        play(waits, path, serve.worker)
        eventually(lambda: json.loads(run(capsys, "list", "--json")), [])
        more = run(
            capsys, "create", "vm-2", image.name, image.name, "--socket", "/s", "--jail", ".", "--background", "max",
            "--json",
        )  # fmt: skip
        settings = json.loads(more)["settings"]
        assert settings["source"] == [str(image)] * 2
        assert (settings["socket"], settings["jail"], settings["background"]) == ("/s", str(image.parent), "max")
        assert f" {image.parent}/s " in run(capsys, "list")
        assert run(capsys, "delete", "vm-2") == "vm-2: deleted\n"
        assert serve.end() == 0
        assert "start `aiouffd serve --control" in run(capsys, "list", status=1)


def test_events(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Until the server ends; those of one session, if so asked."""
    control = tmp_path / "control.sock"
    with Serve(tmp_path, "--control", control, socket="") as serve:
        for name in ("a", "b"):
            run(capsys, "--control", str(control), "create", name, str(image), "--socket", str(tmp_path / name))
        command = [sys.executable, "-m", "aiouffd", "ctl", "--control", str(control), "events", "--after", "0"]
        with subprocess.Popen([*command, "--session", "b"], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            assert first.startswith("2 20")
            assert first.endswith(" session.created b\n")
            serve.end()
            assert process.wait(60) == 0
            assert "session.draining b clients=0" in process.stdout.read()


def test_how_far_a_snapshot_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal only; before its moment, and when it has ended just now, nothing is known."""
    asked = threading.Event()

    def ask(method: str, path: str) -> dict[str, int]:
        asked.set()
        assert (method, path) == ("GET", "/v1/sessions/vm/snapshot")
        return {"bytes": 1, "total": 0}

    control: Any = SimpleNamespace(ask=ask)
    with ctl._progress(control, "vm"):
        assert not asked.is_set()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with ctl._progress(control, "vm"):
        assert asked.wait(60)
    assert "vm" in capsys.readouterr().err
