"""`cli.top`: what sessions do between two looks."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
import urllib.request
from typing import TYPE_CHECKING, Any

from rich.console import Console
from scenario import play
from served import MIB, Serve, client, free_port

from aiouffd.cli import main
from aiouffd.cli.top import table
from aiouffd.cli.unix_http import ControlClient

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def session(name: str, **counted: int) -> dict[str, Any]:
    """Return a session as the server tells of it."""
    return {
        "name": name, "state": "listening", "clients": [{}, {}], "rejected": 3,
        "source": f"source of {name}", "slow": {},
        "statistics": {"latency_p99_ns": 1 << 20, **counted},
    }  # fmt: skip


def test_rates() -> None:
    """Who is in trouble comes first, then the busiest; one that is new, or has begun anew, has no rate yet."""
    before = {"a": session("a", faults=10), "b": session("b", faults=100, pages=10), "c": session("c", faults=9)}
    now = {
        "a": session("a", faults=30, pages=400, bytes_fetched=4 << 20),
        "b": session("b", faults=2100, pages=10, pages_poisoned=7),
        "c": session("c", faults=1),
        "d": session("d", faults=5),
    }
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table([before], now, 2.0))
    rows = [line.split() for line in capture.get().splitlines()[1:]]
    assert rows[0] == ["b", "listening", "2", "1,000", "0", "0.0", "1.05", "ms", "7", "0", "3", "source", "of", "b"]
    assert rows[1][:11] == ["a", "listening", "2", "10", "200", "2.0", "1.05", "ms", "0", "0", "3"]
    assert [(row[0], row[3]) for row in rows[2:]] == [("c", "0"), ("d", "0")]


def test_why_a_session_waits() -> None:
    """Its source, its limits, or what its last slow fault has waited for; who is worst off is first."""
    before = {name: session(name, in_flight=1) for name in ("fails", "again", "silent", "limited", "slow", "was slow")}
    now = {
        "slow": session("slow", in_flight=1, source_reads=1) | {"slow": slow(1.0)},
        "was slow": session("was slow", faults=9) | {"slow": slow(60.0)},
        "limited": session("limited", slowed=1),
        "silent": session("silent", in_flight=2),
        "again": session("again", in_flight=1, source_retries=1),
        "fails": session("fails", source_errors=1, source_retries=1),
    }
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table([before], now, 2.0))
    lines = capture.get().splitlines()[1:]
    whys = {line[: line.index("  ")].strip(): line[10:45].partition("   ")[0].strip() for line in lines}
    assert whys == {
        "silent": "its source does not answer", "again": "its source is asked again", "fails": "its source fails",
        "slow": "slow: waited 404 ms (queue)", "limited": "slowed by its limits", "was slow": "listening",
    }  # fmt: skip
    assert [sorted(list(whys)[part]) for part in (slice(3), slice(3, 5), slice(5, 6))] == [
        ["again", "fails", "silent"], ["limited", "slow"], ["was slow"]
    ]  # fmt: skip


def test_what_was_wrong_is_told_for_a_while() -> None:
    """A limit slows a session now and then: who looks between two of these times sees it, also in a narrow terminal."""
    past = [{"limited": session("limited", slowed=slowed)} for slowed in (1, 2, 2)]
    console = Console(width=130)
    with console.capture() as capture:
        console.print(table(past, {"limited": session("limited", slowed=2)}, 2.0))
    head, row = capture.get().splitlines()
    assert "slowed by its limits" in row
    assert head.split()[-4:] == ["poisoned", "slowed", "rejected", "source"]


def slow(ago: float) -> dict[str, Any]:
    """Return what is told of a fault that took long."""
    return {"time": time.time() - ago, "took_ns": 404_000_000, "cause": "queue"}


def test_a_running_server(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command, and what Prometheus reads of the same sessions."""
    control, port = tmp_path / "control.sock", free_port()
    with Serve(tmp_path, "--control", control, "--metrics", port, socket=""):
        for name in ("a", "b"):
            new = {"name": name, "socket": str(tmp_path / name), "source": str(image), "readahead": 0}
            ControlClient(control).ask("POST", "/v1/sessions", new)
        play(client, str(tmp_path / "a"), MIB)
        assert main(["top", "--control", str(control), "--once", "--interval", "0.1"]) == 0
        said, _, shown = capsys.readouterr().out.partition("\n\n")
        assert "pager" in said
        assert said.endswith("Sessions that serve nobody, and may be deleted: a, b.")
        assert [line.split()[:3] for line in shown.splitlines()[1:]] == [
            ["a", "listening", "0"], ["b", "listening", "0"]
        ]  # fmt: skip
        many = [sys.executable, "-m", "aiouffd", "top", "--control", str(control), "--interval"]
        for seconds, tables in (("3600", 1), ("0.1", 3)):  # the first at once
            with subprocess.Popen([*many, seconds], stdout=subprocess.PIPE, text=True) as top:
                assert top.stdout is not None
                heads = (line for line in top.stdout if "MiB/s" in line)  # in a pipe, before it ends
                assert len(list(itertools.islice(heads, tables))) == tables
                top.kill()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        found = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}
        counted = ControlClient(control).ask("GET", "/v1/sessions/a")["statistics"]
        assert found['aiouffd_session_faults_total{session="a"}'] == counted["faults"] > 0
        assert found['aiouffd_session_pages_total{session="a"}'] == counted["pages"] == found_pages(found)
        assert found['aiouffd_session_pages_total{session="b"}'] == 0
        assert found['aiouffd_session_clients{session="a"}'] == 0
        assert json.dumps(counted)


def found_pages(found: dict[str, float]) -> float:
    """Return the pages of all sessions."""
    return sum(value for name, value in found.items() if name.startswith("aiouffd_pages_total"))
