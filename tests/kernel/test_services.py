"""`server.services`: the source of each client, what clients share, recordings."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fuse
import pytest
from pattern import PAGE, content
from scenario import brought, eventually, play, until
from served import MIB, Serve, client, descriptors, hand_over, on_the_web, touch_all

import aiouffd
from aiouffd.engine.options import Options
from aiouffd.engine.serve.bounds import Limits
from aiouffd.handoff.receive import Peer
from aiouffd.server import services
from aiouffd.server.services import Services, Settings


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
            brought(monitor, 200 * PAGE)
        for page in range(0, 4000, 20):
            assert region[page * PAGE] == (page + 1) & 255
        if kind == "replay":
            assert monitor.statistics().faults == 0
            assert monitor.statistics().bytes_shared == 200 * PAGE  # the recording carries them


def test_record_and_replay(image: Path, tmp_path: Path) -> None:
    """What one client has touched is brought ahead for the next."""
    trace = tmp_path / "trace"
    with Serve(tmp_path, image, "--record", trace, "--record-pages", "16M", "--readahead", "0") as serve:
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
            assert f"{small}/trace: first touches are no longer recorded: No space left" in serve.said
            assert "is replaced" not in serve.said
            assert serve.end() == 1
            assert f"--record {small}/trace: nothing was recorded: No space left on device" in serve.said
        assert [path.name for path in small.iterdir()] == ["filler"]
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def two_sources(path: str) -> None:
    """Scenario: each client touches a page of a source of its own."""
    for page, name in ((5, "a"), (7, "b")):
        with aiouffd.Monitor(region := aiouffd.Region(MIB), engine=aiouffd.ServedBy(path, source=name)):
            assert region[page * PAGE] == page + 1


def test_each_source_has_a_recording(image: Path, tmp_path: Path) -> None:
    """In a directory; a file has that of the first one's, and the others are served, and not recorded."""
    for at, name in enumerate("ab"):  # not alike: a copy of a file is the same source
        (tmp_path / f"{name}.mem").write_bytes(image.read_bytes()[: MIB - 1] + bytes([at]))
    file, folder = tmp_path / "trace", tmp_path / "traces"
    folder.mkdir()
    for place in (file, folder):
        arguments = ("--source-for", f"{tmp_path}/{{name}}.mem", "--readahead", "0")
        with Serve(tmp_path, *arguments, "--record", place) as serve:
            play(two_sources, str(serve.path))
            assert ("is of another source or page size" in serve.said) == (place == file)
            assert serve.end() == 0
    assert list(aiouffd.Trace.load(file, PAGE).offsets) == [5 * PAGE]
    found = {str(path.name): list(aiouffd.Trace.load(path, PAGE).offsets) for path in folder.iterdir()}
    assert sorted(found.values()) == [[5 * PAGE], [7 * PAGE]]
    assert all(name.endswith(f"-{PAGE}.trace") for name in found)
    with Serve(tmp_path, *arguments, "--replay", folder) as serve:
        play(replays, str(serve.path))
        assert "nothing is replayed" not in serve.said


def replays(path: str) -> None:
    """Scenario: what was recorded of its source comes to a client."""
    with aiouffd.Monitor(region := aiouffd.Region(MIB), engine=aiouffd.ServedBy(path, source="b")) as monitor:
        brought(monitor, PAGE)
        assert monitor.statistics().pages_replay == 1
        assert region[7 * PAGE] == 8
        assert monitor.statistics().faults == 0


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
    assert other.process.wait(60) == 1
    assert "it was recorded from another source" in other.said
    with Serve(tmp_path, "--source-for", f"{tmp_path}/{{name}}.mem", "--replay", trace) as serve:
        play(replayed, str(serve.path))
        assert "nothing is replayed" in serve.said


def on_a_silent_file_system(directory: str) -> None:
    """Scenario: one snapshot of many lies on a file system that stops answering; clients of the others go on."""
    (Path(directory) / "far").mkdir()
    (Path(directory) / "near").mkdir()
    (Path(directory) / "near" / "file").write_bytes(content(0, MIB))
    with fuse.mounted(f"{directory}/far", content(0, MIB)) as (_, server):
        arguments = ("--source-for", f"{directory}/{{name}}/file", "--readahead", "0", "--timeout", "2")
        serve = Serve(Path(directory), *arguments)
        served = [aiouffd.Region(MIB), aiouffd.Region(MIB)]
        far, near = (
            aiouffd.Monitor(region, engine=aiouffd.ServedBy(str(serve.path), source=name), on_exit="zeros")
            for region, name in zip(served, ("far", "near"), strict=True)
        )
        far.__enter__()
        near.__enter__()
        assert served[0][:PAGE] == served[1][:PAGE] == content(0, PAGE)
        fuse.silence(server)
        # More than there are threads for blocking calls: none of them may hold up the next client.
        opening = [threading.Thread(target=late, args=(str(serve.path),), daemon=True) for _ in range(20)]
        for thread in opening:
            thread.start()
        touch(served[0].address + 5 * PAGE)
        for page in range(1, MIB // PAGE, 5):
            assert served[1][page * PAGE : page * PAGE + 8] == content(page * PAGE, 8)
            if page % 50 == 1:
                with aiouffd.Monitor(
                    aiouffd.Region(MIB), engine=aiouffd.ServedBy(str(serve.path), source="near")
                ) as third:
                    assert third.region[7 * PAGE : 7 * PAGE + 8] == content(7 * PAGE, 8)
        for thread in opening:
            thread.join(60)
            assert not thread.is_alive()
        print(serve.said.count("could not be opened within"), "openings gave up", flush=True)
        near.check()
        serve.process.kill()
        os.kill(serve.pager, signal.SIGKILL)
        os.kill(server, signal.SIGKILL)
        os._exit(0)


def late(path: str) -> None:
    """Ask for a snapshot that cannot be opened: refused after the timeout."""
    with pytest.raises(aiouffd.UffdError):
        aiouffd.Monitor(aiouffd.Region(MIB), engine=aiouffd.ServedBy(path, source="far")).__enter__()


def touch(address: int) -> None:
    """Touch a byte in a thread, without the GIL."""
    arguments = (ctypes.c_void_p(address), 0, ctypes.c_size_t(1))
    threading.Thread(target=ctypes.CDLL(None).memchr, args=arguments, daemon=True).start()


@pytest.mark.skipif(fuse.possible() is not None, reason=str(fuse.possible()))
def test_a_file_system_that_does_not_answer(tmp_path: Path) -> None:
    """What lies there costs its own clients only: opening it, reading it, and closing it."""
    output, _ = play(on_a_silent_file_system, str(tmp_path), deadline=100)
    assert "openings gave up" in output


class Squares(aiouffd.Handler):
    """Fills each page with the square of its number."""

    async def pagefault(self, fault: aiouffd.Fault, batch: aiouffd.Batch) -> None:
        """Compute the page."""
        number = fault.offset // PAGE
        batch.copy(fault.page, (number * number).to_bytes(8, "little") * (PAGE // 8))


def of_a_handler(path: str) -> None:
    """Scenario: a client as Firecracker is one, and a Monitor, whose pages are computed."""
    region, _connection, _uffd = hand_over(path)
    for page in range(0, MIB // PAGE, 9):
        assert region[page * PAGE : page * PAGE + 8] == (page * page).to_bytes(8, "little")
    other = aiouffd.Region(16 * MIB)
    with aiouffd.Monitor(other, engine=aiouffd.ServedBy(path)) as monitor:
        monitor.prefetch_sync(0, MIB)
        for page in (200, 300, 4000):
            assert other[page * PAGE : page * PAGE + 8] == (page * page).to_bytes(8, "little")
        other.madvise(mmap.MADV_DONTNEED, 0, 9 * PAGE)
        assert other[8 * PAGE : 9 * PAGE] == bytes(PAGE)
        monitor.check()


async def by_a_handler(directory: str) -> None:
    """Scenario: a Server takes a handler."""
    path = f"{directory}/s"
    async with aiouffd.Server(Squares(), path) as server:
        await asyncio.to_thread(play, of_a_handler, path)
        await server.wait_clients()
        region, _connection, _uffd = await asyncio.to_thread(hand_over, path)
        while not server.clients:  # noqa: ASYNC110 - it is being taken
            await asyncio.sleep(0.01)
        await server.fill()
        assert not server.clients
        assert region[255 * PAGE : 255 * PAGE + 8] == (255 * 255).to_bytes(8, "little")


def test_a_handler_serves_other_processes(tmp_path: Path, loop: str) -> None:
    """Microvms and Monitors alike: faults, prefetch and fill."""
    play(by_a_handler, str(tmp_path), loop=loop)


@pytest.mark.parametrize("thing", [5, "a path", aiouffd.ZeroSource, aiouffd.Handler])
def test_what_is_no_origin_is_refused(thing: Any, tmp_path: Path) -> None:
    """At once, and not by the first client."""
    with pytest.raises(TypeError, match="Source"):
        aiouffd.Server(thing, tmp_path / "s")


class Writes(aiouffd.Handler):
    """Wants to be told of writes."""

    async def write(self, fault: aiouffd.Fault, batch: aiouffd.Batch) -> None:
        """Let it go on."""
        batch.unprotect(fault.page)


def test_a_handler_that_wants_writes_is_refused(tmp_path: Path) -> None:
    """Clients register their memory without write protection."""
    with pytest.raises(ValueError, match="write"):
        aiouffd.Server(Writes(), tmp_path / "s")


async def test_openings_that_hang_are_bounded_for_each_name_and_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a thread. Other processes are not concerned, and other names; what answers is forgotten."""
    monkeypatch.setattr(services, "_MAX_HANGING", 2)
    monkeypatch.setattr(services, "_MAX_HANGING_OF_PROCESS", 3)
    answer = threading.Event()

    def find(_peer: Peer, _number: int, name: str) -> Any:
        if name != "there":
            answer.wait()
        raise FileNotFoundError(name)

    taken = Services(find, Settings(options=Options(limits=Limits(timeout=0.05))))

    async def asked(pid: int, name: str) -> str:
        handoff: Any = SimpleNamespace(peer=Peer(pid, 0, 0))
        with pytest.raises((aiouffd.HandoffError, FileNotFoundError)) as caught:
            await taken.take(handoff, 0, name)
        return str(caught.value)

    try:
        for name in ("a", "a", "b"):
            assert "could not be opened within" in await asked(1, name)
        monkeypatch.setattr(taken, "_options", Options(limits=Limits(timeout=30.0)))  # for what answers
        assert "3 sources that it has asked for do not answer" in await asked(1, "there")
        assert await asked(2, "there") == "there"
        assert "2 openings of it hang" in await asked(2, "a")
    finally:
        answer.set()
    await until(lambda: not taken._hanging)
    assert await asked(1, "a") == "a"
