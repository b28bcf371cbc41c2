"""`server.services`: the source of each client, what clients share, recordings."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pattern import PAGE
from scenario import eventually, play
from served import MIB, Serve, client, descriptors, on_the_web, touch_all

import aiouffd


def test_a_source_that_is_unplugged(image: Path, tmp_path: Path) -> None:
    """The timeout that was asked for is the web's, too; then the page is an error, in the log as at its toucher."""
    with contextlib.ExitStack() as stack:
        with on_the_web(image) as url:
            serve = stack.enter_context(Serve(tmp_path, url, "--readahead", "0", "--timeout", "1"))
            play(client, str(serve.path), MIB)
        play(touch_all, str(serve.path), MIB, status=-signal.SIGBUS)
        assert "the server refuses connections" in serve.said


def test_many_sources(tmp_path: Path) -> None:
    """--source-for finds each client's by the name that it asks for; a name cannot leave its directory."""
    for number, name in enumerate(("a", "b")):
        (tmp_path / f"{name}.mem").write_bytes(bytes([number + 1]) * MIB)
    with Serve(tmp_path, "--source-for", f"{tmp_path}/{{name}}.mem") as serve:
        play(named, str(serve.path))
    done = subprocess.run(
        [sys.executable, "-m", "aiouffd", "serve", "--source-for", "{nonsense}", "--socket", "x"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "knows name, number, pid, uid, not nonsense" in done.stderr


def named(path: str) -> None:
    """Scenario."""
    for name, byte in (("a", 1), ("b", 2)):
        region = aiouffd.Region(MIB)
        with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path, source=name)):
            assert region[5000] == byte
    for name in ("../a", "", ".hidden", "a?b", "%2e%2e", "a\0b", "a/b", "\ud800", "a" * 300, "a\n"):
        with pytest.raises(aiouffd.HandoffError, match="which is no name"):
            aiouffd.Monitor(aiouffd.Region(MIB), engine=aiouffd.ServedBy(path, source=name)).__enter__()
    with pytest.raises(aiouffd.UffdError, match=r"c\.mem"):
        aiouffd.Monitor(aiouffd.Region(MIB), engine=aiouffd.ServedBy(path, source="c")).__enter__()


def newest(path: str, expected: int) -> None:
    """Scenario: which snapshot is it?"""
    region = aiouffd.Region(MIB)
    with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path, source="a")):
        assert region[5 * PAGE] == expected
        if expected == 1:
            file = Path(path).parent / "a.mem"
            (file.parent / "new").write_bytes(bytes([2]) * MIB)
            (file.parent / "new").rename(file)
            play(newest, path, 2)  # another client gets what lies there now
            assert region[100 * PAGE] == 1  # and this one what it has begun with


def test_a_snapshot_that_is_replaced(tmp_path: Path) -> None:
    """With --source-for, each client gets the file that has the name when it comes."""
    (tmp_path / "a.mem").write_bytes(bytes([1]) * MIB)
    with Serve(tmp_path, "--readahead", "0", "--source-for", f"{tmp_path}/{{name}}.mem") as serve:
        play(newest, str(serve.path), 1)
        before = descriptors(serve)
        for _ in range(3):
            play(newest, str(serve.path), 2)
        eventually(lambda: descriptors(serve) <= before, expected=True)


def working_set(path: str, kind: str) -> None:
    """Scenario: touch, or find the pages there."""
    region = aiouffd.Region(16 * MIB)
    with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path)) as monitor:
        if kind == "replay":
            eventually(lambda: monitor.statistics().pages_replay, 200)
        for page in range(0, 4000, 20):
            assert region[page * PAGE] == (page + 1) & 255
        if kind == "replay":
            assert monitor.statistics().faults == 0


def test_record_and_replay(image: Path, tmp_path: Path) -> None:
    """What one client has touched is brought ahead for the next."""
    trace = tmp_path / "trace"
    with Serve(tmp_path, image, "--record", trace) as serve:
        play(working_set, str(serve.path), "record")
        assert serve.end() == 0
    assert list(aiouffd.Trace.load(trace, PAGE).offsets) == [page * PAGE for page in range(0, 4000, 20)]
    with Serve(tmp_path, image, "--replay", trace) as serve:
        play(working_set, str(serve.path), "replay")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_recording_for_which_there_is_no_room(image: Path, tmp_path: Path) -> None:
    """The disk is full: that is said, no empty recording takes the name, and the client is served on."""
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", small], check=True)
    try:
        with Serve(tmp_path, image, "--record", small / "trace") as serve:
            (small / "filler").write_bytes(bytes(900 << 10))
            play(touch_all, str(serve.path), 16 * MIB)
            assert "no longer recorded" in serve.said
            assert "is replaced" not in serve.said
            assert serve.end() == 1
            assert f"--record {small}/trace: nothing was recorded: No space left on device" in serve.said
        assert [path.name for path in small.iterdir()] == ["filler"]
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def another_source(path: str) -> None:
    """Scenario: the first client says what is recorded."""
    for name in ("a", "b"):
        region = aiouffd.Region(MIB)
        monitor = aiouffd.Monitor(region, engine=aiouffd.ServedBy(path, source=name))
        if name == "a":
            with monitor:
                assert region[5 * PAGE] == 6
        else:
            with pytest.raises(aiouffd.HandoffError, match="a recording is of one source"):
                monitor.__enter__()


def test_a_recording_is_of_one_source(image: Path, tmp_path: Path) -> None:
    """Offsets of two files in one recording would mean nothing."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.mem").write_bytes(image.read_bytes()[:MIB])
    trace = tmp_path / "trace"
    with Serve(tmp_path, "--source-for", f"{tmp_path}/{{name}}.mem", "--record", trace) as serve:
        play(another_source, str(serve.path))
        assert serve.end() == 0
    assert list(aiouffd.Trace.load(trace, PAGE).offsets) == [5 * PAGE]


def replayed(path: str) -> None:
    """Scenario: touch two pages."""
    region = aiouffd.Region(MIB)
    with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path, source="b")) as monitor:
        assert region[5 * PAGE] == 2
        assert monitor.statistics().pages_replay == 0


def test_a_recording_of_another_snapshot(image: Path, tmp_path: Path) -> None:
    """It is not replayed: one source is told when the server starts; of many, that is logged, and it is served."""
    trace = tmp_path / "trace"
    with Serve(tmp_path, image, "--record", trace) as serve:
        play(working_set, str(serve.path), "record")
        assert serve.end() == 0
    for name in ("b", "c"):
        (tmp_path / f"{name}.mem").write_bytes(bytes([2]) * MIB)
    other = Serve(tmp_path, tmp_path / "c.mem", "--replay", trace, wait=False)
    assert other.process.wait(20) == 1
    assert "it was recorded from another source" in other.said
    with Serve(tmp_path, "--source-for", f"{tmp_path}/{{name}}.mem", "--replay", trace) as serve:
        play(replayed, str(serve.path))
        assert "nothing is replayed" in serve.said
