"""`report.perfetto`: faults by time, in the form of Chrome's trace events."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from pattern import PAGE, content, peek, word
from scenario import eventually, play
from served import MIB, Serve, Servers, hand_over

import aiouffd
from aiouffd.report.observers import install
from aiouffd.report.perfetto import FaultLog, events
from examples.page_server import serving

FLIGHT: dict[str, Any] = {
    "offset": 8 * PAGE, "length": 2 * PAGE, "pages": 2, "cause": "queue", "for": "fault", "omitted": 3,
    "began_ns": 1_000, "waited_ns": 1_000, "ended_ns": 9_000, "error": "", "reason": "",
    "faults": [(0x7000, 77, 1, 1_000), (0x8000, 0, 0, 2_000)],
    "steps": [
        ("queue", 1_000, 6_000, {}), ("read", 6_000, 8_000, {"error": ""}), ("chunk", 6_500, 7_000, {"count": 2})
    ],
}  # fmt: skip


def test_the_events_of_a_flight() -> None:
    """A fault is in its thread's row; what may overlap has an identity of its own, and ends as often as it begins."""
    found = list(events(5, 4, FLIGHT))
    known, *others = found
    assert known == {
        "ph": "X", "cat": "fault", "name": "fault", "pid": 5, "tid": 77, "ts": 1.0, "dur": 8.0,
        "args": {
            "offset": "0x8000", "length": 2 * PAGE, "address": "0x7000", "kind": "missing", "access": "write",
            "cause": "queue",
        },
    }  # fmt: skip
    assert [(each["ph"], each["name"], each["id"], each["ts"]) for each in others] == [
        ("b", "fault", "4.1", 2.0), ("e", "fault", "4.1", 9.0),
        ("b", "fetch", "4", 1.0), ("b", "queue", "4", 1.0), ("e", "queue", "4", 6.0),
        ("b", "read", "4", 6.0), ("e", "read", "4", 8.0), ("e", "fetch", "4", 9.0),
        ("b", "chunk", "4.2", 6.5), ("e", "chunk", "4.2", 7.0),
    ]  # fmt: skip
    assert others[0]["args"]["access"] == "read"
    assert others[2]["args"]["left out before"] == 3


class Slow:
    """A source from far."""

    size = MIB

    async def read(self, offset: int, length: int) -> bytes:
        """Take a moment."""
        await asyncio.sleep(0.02)
        return content(offset, length)


def of_a_monitor(path: str) -> None:
    """Scenario: see the test."""
    threads: list[int] = []
    with FaultLog(path) as log, aiouffd.Monitor(aiouffd.Region(MIB), Slow(), readahead=0) as monitor:
        address = monitor.region.address

        def touch(page: int) -> None:
            threads.append(threading.get_native_id())
            assert peek(address + page * PAGE) == word(page)

        for page in (9, 4):
            toucher = threading.Thread(target=touch, args=(page,))
            toucher.start()
            toucher.join()
        assert log is not None
    found = json.loads(Path(path).read_text())
    assert [event["pid"] for event in found if event["name"] == "process_name"] == [os.getpid()]
    faults = [event for event in found if event["name"] == "fault"]
    assert [(event["tid"], event["args"]["address"]) for event in faults] == [
        (threads[0], hex(address + 9 * PAGE)), (threads[1], hex(address + 4 * PAGE))
    ]  # fmt: skip
    assert all(event["dur"] >= 20_000 for event in faults)
    assert faults[0]["ts"] + faults[0]["dur"] <= faults[1]["ts"]


def test_a_monitor(tmp_path: Path) -> None:
    """Which thread has waited where, from when to when, and for what."""
    play(of_a_monitor, str(tmp_path / "faults.json"))


def of_a_client(path: str) -> None:
    """Scenario: a client touches a page."""
    region, _connection, _uffd = hand_over(path)
    assert peek(region.address + 5 * PAGE) == word(5)


def test_a_server(image: Path, tmp_path: Path) -> None:
    """`--perfetto`; not together with OpenTelemetry."""
    log = tmp_path / "faults.json"
    with serving(image.parent) as far:
        with Serve(tmp_path, f"{far}/{image.name}", "--perfetto", log) as serve:
            play(of_a_client, str(serve.path))
            serve.says("0 left")
            assert serve.end() == 0
        with Serve(tmp_path, image, "--perfetto", log, "--otel", wait=False) as serve:
            assert serve.process.wait(60) == 2
        assert "either --otel or --perfetto" in serve.said
    found = json.loads(log.read_text())
    (fault,) = [event for event in found if event["name"] == "fault" and event["ph"] in "Xb"]
    assert int(fault["args"]["offset"], 16) <= 5 * PAGE
    (name,) = [event["args"]["name"] for event in found if event["name"] == "process_name"]
    assert str(fault["pid"]) in name


def test_one_at_a_time_and_no_more_than_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one is refused; a file that is full ends in good order."""
    path = tmp_path / "faults.json"
    monkeypatch.setattr("aiouffd.report.perfetto._MOST", 100)
    try:
        with FaultLog(path) as log:
            with pytest.raises(RuntimeError, match="told of faults already"):
                FaultLog(tmp_path / "other")
            watch: Any = log.monitor({"source": "it"})
            for _ in range(3):
                watch.flight({"flight": FLIGHT})
            watch.flight({"slow": {}})
        watch.flight({"flight": FLIGHT})  # after its end
    finally:
        install(None)
    found = json.loads(path.read_text())
    assert [event["name"] for event in found if event["ph"] in "XM"] == ["process_name", "fault", "end"]
    assert not (tmp_path / "other").exists()


def on_a_full_disk(path: str) -> None:
    """Scenario: the pager is heard further on."""
    with FaultLog(path) as faults, aiouffd.Monitor(aiouffd.Region(MIB), Slow(), readahead=0) as monitor:
        faults._file.close()
        faults._file = open("/dev/full", "w", buffering=1)  # noqa: PTH123, SIM115 - closed by the log
        for page in range(3):
            monitor.prefetch_sync(page * PAGE, PAGE, timeout=60)
            assert peek(monitor.region.address + page * PAGE) == word(page)


def test_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing more is written, which is said once; what serves goes on, and is left in order."""
    play(on_a_full_disk, str(tmp_path / "f"))
    with FaultLog(tmp_path / "faults.json") as faults:
        faults._file.close()
        faults._file = open("/dev/full", "w", buffering=1)  # noqa: PTH123, SIM115 - as above
        for _ in range(2):
            faults.write(os.getpid(), "x", {"flight": FLIGHT})
    assert caplog.messages == [f"{tmp_path}/faults.json: faults are written no longer: No space left on device"]


def restarted(directory: str, image: str) -> None:
    """Scenario: a server is taken over from with the same options, its file included, and serves on until then."""
    log = Path(directory) / "faults.json"

    def has_told() -> bool:  # the pager tells its server behind the fault
        return '"name":"fault"' in log.read_text()

    servers = Servers(directory, image, "--perfetto", log)
    servers.start("first")
    region, _connection, _uffd = hand_over(servers.path)
    assert peek(region.address + 5 * PAGE) == word(5)
    eventually(has_told, expected=True)
    before = servers.last
    servers.start("second", "--takeover")
    assert before.process.wait(60) == 0
    assert peek(region.address + 200 * PAGE) == word(200)
    eventually(has_told, expected=True)
    servers.last.process.terminate()
    servers.last.says("no new clients")
    assert servers.last.end() == 0


def test_a_server_that_takes_over(image: Path, tmp_path: Path) -> None:
    """Each has a file of its own, and both are whole."""
    with serving(image.parent) as far:
        play(restarted, str(tmp_path), f"{far}/{image.name}")
    for name, page in (("faults.before.json", 5), ("faults.json", 200)):
        found = json.loads((tmp_path / name).read_text())
        faults = [event for event in found if event["name"] == "fault" and event["ph"] in "Xb"]
        (told,) = (fault["args"] for fault in faults)
        assert 0 <= page * PAGE - int(told["offset"], 16) < told["length"]


def test_where_it_is_written(tmp_path: Path) -> None:
    """What is no file is written to, and not moved; a file that nobody writes any more is replaced."""
    with FaultLog("/dev/null"), Path("/dev/null").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    path = tmp_path / "faults"
    path.write_text("x" * 1000)
    with FaultLog(path):
        pass
    assert json.loads(path.read_text())
    assert list(tmp_path.iterdir()) == [path]
