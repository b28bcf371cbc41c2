"""Pages that come before they are touched: recorded and replayed, and filled in the background."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import mmap
import os
import random
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from odd_http import DATA, serving
from pattern import PAGE, Gated, Pattern, Slow, content, peek
from scenario import brought, eventually, play

import aiouffd
from aiouffd.engine.ahead.trace import Recorder
from aiouffd.pager.client import shared
from aiouffd.pager.client.client import PagerClient

SIZE = 2048 * PAGE


def order() -> list[int]:
    """Return the pages of the working set."""
    pages = list(range(0, 2048, 3))
    random.Random(5).shuffle(pages)
    return pages


def record_and_replay(directory: str, kind: str) -> None:
    """Scenario."""
    source = {"near": Pattern, "far": Slow}[kind](SIZE)
    path = Path(directory) / "trace"
    pages = order()
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, source, record=path, readahead=0) as monitor:
        for number, page in enumerate(pages):
            assert region[page * PAGE] == content(page * PAGE, 1)[0]
            if number == 300:  # what was noted survives
                os.kill(monitor.pids[1], signal.SIGKILL)
    assert list(aiouffd.Trace.load(path, PAGE).offsets) == [page * PAGE for page in pages]
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, source, replay=path) as monitor:
        eventually(lambda: monitor.statistics().pages_replay, len(pages))
        brought(monitor, len(pages) * PAGE)
        for page in pages:
            assert region[page * PAGE : (page + 1) * PAGE] == content(page * PAGE, PAGE)
        found = monitor.statistics()
        assert found.faults == 0
        assert found.bytes_fetched == len(pages) * PAGE
        assert region[PAGE] == content(PAGE, 1)[0]


@pytest.mark.parametrize("kind", ["near", "far"])
def test_what_was_recorded_is_replayed(kind: str, tmp_path: Path) -> None:
    """All of it comes with no fault, and nothing else does; a worker's death while recording loses nothing."""
    play(record_and_replay, str(tmp_path), kind)


class Counted(Slow):
    """Far away, with a version; notes what is read of it."""

    identity = ("counted", 1)

    def __init__(self, size: int, log: str) -> None:
        super().__init__(size)
        self.log = log

    async def read(self, offset: int, length: int) -> bytes:
        """Return the bytes, later."""
        file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, b"%d %d\n" % (offset, length))
        os.close(file)
        return await super().read(offset, length)


def replayed(monitor: aiouffd.Monitor, least: int) -> bool:
    """Tell whether a replay has brought more pages than that."""
    return monitor.statistics().pages_replay > least


def bytes_are_replayed(directory: str, engine: str) -> None:
    """Scenario: some pages are written to, which the recording must not have; a replay is cut short by a death."""
    choice = {"pager": aiouffd.Pager, "in_thread": aiouffd.InThread}[engine]
    size, path, log = SIZE - 100, Path(directory) / "trace", Path(directory) / "log"
    source = Counted(size, str(log))
    recording = aiouffd.Recording(path, pages=True)
    pages = order() if engine == "pager" else order()[:50]
    with aiouffd.Monitor(region := aiouffd.Region(size), source, record=recording, readahead=0, engine=choice()):
        for page in [*pages, 2047]:
            assert region[page * PAGE] == content(page * PAGE, 1)[0]
        region[pages[0] * PAGE] = 255
    log.unlink()
    assert path.stat().st_mode & 0o777 == 0o600

    for kills in (False, True) if engine == "pager" else (False,):
        with aiouffd.Monitor(region := aiouffd.Region(size), source, replay=path, engine=choice()) as monitor:
            if kills:
                os.kill(monitor.pids[1], signal.SIGKILL)
            for page in [*pages, 2047]:
                data = content(page * PAGE, min(PAGE, size - page * PAGE))
                assert region[page * PAGE : page * PAGE + len(data)] == data
            if not kills:
                eventually(partial(replayed, monitor, len(pages) - 50), expected=True)
                brought = len(log.read_text().splitlines()) if log.exists() else 0
                assert brought < 50, brought  # those of faults that came before the file was read
                assert monitor.statistics().bytes_shared > (len(pages) - 50) * PAGE

    source.identity = ("counted", 2)
    log.unlink(missing_ok=True)
    with aiouffd.Monitor(region := aiouffd.Region(size), source, replay=path, engine=choice()) as monitor:
        assert region[pages[0] * PAGE] == content(pages[0] * PAGE, 1)[0]
        eventually(lambda: monitor.statistics().pages_replay + monitor.statistics().pages_fault > 40, expected=True)
        assert monitor.statistics().bytes_shared == 0
    for record, unfit in ((recording, aiouffd.ZeroSource(size)), (recording, Pattern(size))):
        monitor = aiouffd.Monitor(aiouffd.Region(size), unfit, record=record, engine=choice())
        with pytest.raises(ValueError, match="carries no bytes of"), monitor:
            pass


@pytest.mark.parametrize("engine", ["pager", "in_thread"])
def test_bytes_that_a_recording_carries_are_replayed(engine: str, tmp_path: Path) -> None:
    """They are the source's, and are not asked of it again while it has the same version."""
    play(bytes_are_replayed, str(tmp_path), engine)


def replayed_from_url(directory: str, url: str, engine: str) -> None:
    """Scenario: a replay of the same object, in a pager that runs or does not yet, and of one that has changed."""
    choice = {"shared": None, "pager": aiouffd.Pager(), "in_thread": aiouffd.InThread()}[engine]
    path, pages = Path(directory) / "trace", [40, 3, 17, 18, 30]
    recording = aiouffd.Recording(path, pages=True)
    with aiouffd.open(url, record=recording, readahead=0, engine=choice) as region:
        for page in pages:
            assert region[page * PAGE : page * PAGE + 9] == DATA[page * PAGE :][:9]
    asked = mock.patch.object(PagerClient, "expect", autospec=True, side_effect=PagerClient.expect)
    for kept in (False, True):
        with (
            asked as expected,
            aiouffd.open(url, engine=choice) if kept else contextlib.nullcontext(),
            aiouffd.open(url, replay=path, readahead=0, engine=choice) as region,
        ):
            monitor = region.monitor
            brought(monitor, len(pages) * PAGE)
            eventually(partial(replayed, monitor, len(pages) - 1), expected=True)  # placed before they are counted
            for page in pages:
                assert region[page * PAGE : (page + 1) * PAGE] == DATA[page * PAGE :][:PAGE]
            found = monitor.statistics()
            assert (found.bytes_fetched, found.faults, found.pages_replay) == (0, 0, len(pages))
            assert expected.call_count == (engine != "in_thread")
    with pytest.raises(FileNotFoundError), aiouffd.open(url, replay=path.with_name("none"), engine=choice):
        pass
    with (
        pytest.raises(aiouffd.SourceError),
        aiouffd.open("http://127.0.0.1:1/x", retries=0, replay=path, engine=choice),
    ):
        pass
    with pytest.raises(ValueError, match="either record"), aiouffd.open(url, replay=path, record=path, engine=choice):
        pass
    Path(directory, "change").touch()
    eventually(Path(directory, "changed").exists, expected=True)
    with pytest.raises(aiouffd.TraceError, match="another source"), aiouffd.open(url, replay=path, engine=choice):
        pass
    del region, monitor
    gc.collect()
    links = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert [link for link in links if link.is_relative_to(directory)] == []
    assert [client for pagers in list(shared._all) for client in pagers.used] == []


@pytest.mark.parametrize("engine", ["shared", "pager", "in_thread"])
def test_a_recording_is_read_while_a_server_is_asked_for_the_size(engine: str, tmp_path: Path) -> None:
    """Its pages are replayed, of the same version only; nothing stays open, whatever comes of it."""
    with serving() as odd:

        def change() -> None:
            eventually(Path(tmp_path, "change").exists, expected=True, seconds=60)
            odd.change()
            Path(tmp_path, "changed").touch()

        changing = threading.Thread(target=change)
        changing.start()
        try:
            play(replayed_from_url, str(tmp_path), odd.url, engine)
        finally:  # else the thread would fail a test that comes later
            Path(tmp_path, "change").touch()
            changing.join()


def recorded_with_readahead(directory: str) -> None:
    """Scenario: first a stream, then pages at random, which the native part serves; a worker dies between."""
    path = Path(directory) / "trace"
    pages = [*range(300), *order()]
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, aiouffd.BufferSource(content(0, SIZE)), record=path) as monitor:
        for number, page in enumerate(pages):
            assert region[page * PAGE] == content(page * PAGE, 1)[0]
            if number == 600:
                os.kill(monitor.pids[1], signal.SIGKILL)
        faults, came = monitor.statistics().faults, monitor.statistics().pages
    trace = aiouffd.Trace.load(path, PAGE)
    touched = len(trace.offsets) - len(trace.along)
    assert faults - 32 <= touched <= faults, (faults, touched)  # what was on its way when the worker died
    assert came - 64 <= len(trace.offsets) <= came, (came, len(trace.offsets))
    assert [offset // PAGE for offset in trace.offsets[:300]] == list(range(300))
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Slow(SIZE), replay=path) as monitor:
        eventually(lambda: monitor.statistics().pages_replay, len(trace.offsets))
        assert all(region[page * PAGE] == content(page * PAGE, 1)[0] for page in pages)
        assert monitor.statistics().faults <= 32


def test_what_was_recorded_with_readahead_is_replayed(tmp_path: Path) -> None:
    """All that came, and the touches are told from what came along."""
    play(recorded_with_readahead, str(tmp_path))


def recorded_nowhere(path: Path, error: type[Exception] | None) -> None:
    """The directory is gone when the block is left."""
    path.parent.mkdir()
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Pattern(SIZE), record=path):
        assert region[0] == content(0, 1)[0]
        shutil.rmtree(path.parent)
        if error is not None:
            raise error


def raises_where_no_recording_can_be_written(directory: str) -> None:
    """Scenario."""
    for raised, error in ((None, FileNotFoundError), (ZeroDivisionError, ZeroDivisionError)):
        with pytest.raises(error):
            recorded_nowhere(Path(directory) / "gone" / "trace", raised)


def test_an_error_of_the_program_is_not_hidden_by_its_recording(tmp_path: Path) -> None:
    """That there is no recording is raised only where nothing else is."""
    play(raises_where_no_recording_can_be_written, str(tmp_path))


def layout_changes_beside_a_prefetch(engine: str) -> None:
    """Scenario."""
    size = 16 << 20
    data = content(0, size)
    choice = {"pager": aiouffd.Pager, "in_thread": aiouffd.InThread}[engine]()
    for seed in range(3):
        region, began = aiouffd.Region(size), threading.Event()
        pages = random.Random(seed).sample(range(0, size // PAGE, 8), 24)

        def empty(region: aiouffd.Region = region, began: threading.Event = began, pages: list[int] = pages) -> None:
            for page in pages:
                region.madvise(mmap.MADV_DONTNEED, page * PAGE, 8 * PAGE)
                began.set()

        with aiouffd.Monitor(region, aiouffd.BufferSource(data), engine=choice) as monitor:
            thread = threading.Thread(target=empty)
            thread.start()
            began.wait()
            monitor.prefetch_sync(0, size)
            thread.join()
            expected = bytearray(data)
            for page in pages:
                expected[page * PAGE : (page + 8) * PAGE] = bytes(8 * PAGE)
            assert [at for at in range(0, size, PAGE) if region[at : at + PAGE] != expected[at : at + PAGE]] == []


@pytest.mark.parametrize("engine", ["pager", "in_thread"])
def test_a_layout_that_changes_while_much_is_copied(engine: str) -> None:
    """Two threads of the engine copy. What is emptied meanwhile is empty, all else is there, and nobody hangs."""
    play(layout_changes_beside_a_prefetch, engine)


def faults_pass_a_replay(directory: str) -> None:
    """Scenario."""
    path = Path(directory) / "trace"
    size = 4000 * PAGE
    with aiouffd.Monitor(region := aiouffd.Region(size), Pattern(size), record=path, readahead=0):
        for page in range(0, 4000, 2):
            assert region[page * PAGE] == content(page * PAGE, 1)[0]
    region = aiouffd.Region(size)
    with aiouffd.Monitor(region, Slow(size, 0.05), replay=path, concurrent_reads=16, readahead=0) as monitor:
        for page in (3999, 3997, 2001):  # in no recording
            assert region[page * PAGE] == content(page * PAGE, 1)[0]
        replayed = monitor.statistics().pages_replay
    assert replayed < 1000, replayed  # three reads are done while the replay has not done a half of its 2,000


def test_faults_pass_a_replay(tmp_path: Path) -> None:
    """A page that is touched does not wait for those that are brought ahead."""
    play(faults_pass_a_replay, str(tmp_path))


def a_replay_goes_on(directory: str) -> None:
    """Scenario."""
    path = Path(directory) / "trace"
    size = 20_000 * PAGE
    with aiouffd.Monitor(region := aiouffd.Region(size), Pattern(size), record=path, readahead=0):
        for page in range(0, 20_000, 2):
            assert region[page * PAGE] == content(page * PAGE, 1)[0]
    region = aiouffd.Region(size)
    with aiouffd.Monitor(region, Slow(size, 0.001), replay=path) as monitor:
        eventually(lambda: monitor.statistics().pages_replay > 5000, expected=True)
        os.kill(monitor.pids[1], signal.SIGKILL)
        eventually(lambda: monitor.statistics().restarts, 1)
        eventually(lambda: monitor.statistics().pages_replay >= 10_000, expected=True)
        assert monitor.statistics().pages_replay < 10_000 + 4096 + 1  # one batch at most came twice
        for page in range(0, 20_000, 2):
            assert region[page * PAGE : page * PAGE + 8] == content(page * PAGE, 8)
        assert monitor.statistics().faults < 1000


def test_a_replay_goes_on_after_the_workers_death(tmp_path: Path) -> None:
    """Where it was, not from the start."""
    play(a_replay_goes_on, str(tmp_path))


def a_source_fails_ahead() -> None:
    """Scenario."""

    class Broken(Slow):
        async def read(self, offset: int, length: int) -> bytes:
            if offset <= 1000 * PAGE < offset + length:
                raise aiouffd.SourceError(repr(self), offset, length, "not there")
            return await super().read(offset, length)

    with aiouffd.Monitor(region := aiouffd.Region(SIZE), Broken(SIZE), background=True) as monitor:
        eventually(lambda: monitor.statistics().pages_background, SIZE // PAGE - 512)  # all reads but one
        assert region[3 * PAGE] == content(3 * PAGE, 1)[0]
        assert monitor.statistics().source_errors == 0  # nobody has needed it
        monitor.check()
        monitor.prefetch_sync(0, PAGE)  # the loop has turned


def test_what_cannot_be_brought_ahead_harms_nobody() -> None:
    """It is logged; nothing is poisoned."""
    _, errors = play(a_source_fails_ahead)
    assert "not there; what was not brought ahead comes with its fault" in errors


def fill(kind: str) -> None:
    """Scenario."""
    source = {"near": Pattern, "far": Slow}[kind](SIZE - 100 * PAGE)
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, source, background=True) as monitor:
        eventually(lambda: monitor.statistics().pages_background, SIZE // PAGE)
        brought(monitor, SIZE)
        assert region[:] == content(0, SIZE - 100 * PAGE) + bytes(100 * PAGE)
        assert monitor.statistics().faults == 0
        assert monitor.statistics().bytes_fetched == SIZE - 100 * PAGE


@pytest.mark.parametrize("kind", ["near", "far"])
def test_the_background_fill_brings_all(kind: str) -> None:
    """Each page once, the part behind the source's end as zeros; then it stops."""
    play(fill, kind)


def paced() -> None:
    """Scenario."""
    region = aiouffd.Region(SIZE)
    began = time.monotonic()
    with aiouffd.Monitor(region, Pattern(SIZE), background=16 << 20) as monitor:
        eventually(lambda: monitor.statistics().pages_background, SIZE // PAGE)
        assert time.monotonic() - began > 0.4  # 8 MiB; the last half MiB is not waited for


def test_the_background_fill_is_paced() -> None:
    """So many bytes per second at most."""
    play(paced)


def fill_after_removal() -> None:
    """Scenario."""
    size = 64 << 20
    region = aiouffd.Region(size)
    with aiouffd.Monitor(region, Slow(size, 0.02), background=True) as monitor:
        region.madvise(mmap.MADV_DONTNEED, 32 << 20, 1 << 20)
        eventually(lambda: monitor.statistics().pages_background >= (size - (1 << 20)) // PAGE, expected=True)
        assert region[32 << 20 : 33 << 20] == bytes(1 << 20)
        assert region[31 << 20 : 32 << 20] == content(31 << 20, 1 << 20)
        assert region[33 << 20 : 34 << 20] == content(33 << 20, 1 << 20)


def test_the_background_fill_leaves_out_what_was_removed() -> None:
    """Removed pages stay zeros."""
    play(fill_after_removal)


async def in_process(directory: str) -> None:
    """Scenario: the same on the caller's own loop."""
    path = Path(directory) / "trace"

    region = aiouffd.Region(SIZE)
    async with aiouffd.Monitor(region, Pattern(SIZE), engine=aiouffd.InProcess(), record=path, readahead=0):
        for page in (5, 3, 900):
            await asyncio.to_thread(peek, region.address + page * PAGE)
    assert list(aiouffd.Trace.load(path, PAGE).offsets) == [5 * PAGE, 3 * PAGE, 900 * PAGE]
    region = aiouffd.Region(SIZE)
    async with aiouffd.Monitor(
        region, Pattern(SIZE), engine=aiouffd.InProcess(), replay=path, background=True
    ) as monitor:
        await asyncio.to_thread(eventually, lambda: monitor.statistics().pages, SIZE // PAGE)
        found = monitor.statistics()
        assert (found.pages_replay, found.pages_background) == (3, SIZE // PAGE - 3)
        assert region[:] == content(0, SIZE)


def test_in_the_callers_process(tmp_path: Path, loop: str) -> None:
    """Recorded, replayed and filled there as well."""
    play(in_process, str(tmp_path), loop=loop)


def test_wrong_use(tmp_path: Path) -> None:
    """A clear error, and nothing is left behind."""
    region = aiouffd.Region(SIZE)
    with pytest.raises(ValueError, match="either record or replay"):
        aiouffd.Monitor(region, record="a", replay="b")
    (tmp_path / "no").write_bytes(b"no")
    with pytest.raises(aiouffd.TraceError, match="too few"), aiouffd.Monitor(region, replay=tmp_path / "no"):
        pass
    with pytest.raises(FileNotFoundError), aiouffd.Monitor(region, replay=tmp_path / "nothing"):
        pass
    with pytest.raises(FileNotFoundError), aiouffd.Monitor(region, record=tmp_path / "nowhere" / "trace"):
        pass
    assert region.monitor is None
    region.close()


def test_a_recording_of_another_size(tmp_path: Path) -> None:
    """It is refused, also where the fingerprints are of different kinds; a region may be longer than its source."""
    for name, size in (("same", 2 * PAGE), ("large", SIZE)):
        recorder = Recorder.create(tmp_path / name, PAGE, size, b"\2" * 32)
        recorder.note(0)
        recorder.complete()
    source = aiouffd.BufferSource(bytes(2 * PAGE))
    with (
        pytest.raises(aiouffd.TraceError, match="large: it was recorded from another source"),
        aiouffd.open(source, replay=tmp_path / "large"),
    ):
        pass
    for length, name in ((2, "same"), (3, "same"), (2048, "large")):
        monitor = aiouffd.Monitor(aiouffd.Region(length * PAGE), source, replay=tmp_path / name)
        assert monitor._service().trace is not None


class FailsOnce(Gated):
    """Far away; its first read fails, when the gate is open; the others do not wait for that."""

    retries = 0
    reads = 0

    async def read(self, offset: int, length: int) -> bytes:
        """Fail, or return the bytes."""
        self.reads += 1
        if self.reads > 1:
            return content(offset, length)
        await super().read(offset, length)
        raise OSError("the first read fails")


ENGINES: dict[str, Any] = {"pager": aiouffd.Pager, "in_thread": aiouffd.InThread}


def left_while_a_read_fails(engine: str, gate: str) -> None:
    """Scenario: the background fill has a read under way when everything is asked for, on leaving."""
    region = aiouffd.Region(SIZE)
    chosen = ENGINES[engine]()
    with aiouffd.Monitor(region, FailsOnce(SIZE, gate), engine=chosen, background=True, on_exit="populate") as monitor:
        eventually(lambda: monitor.statistics().in_flight, 1)
        served: Any = monitor._engine
        prefetch = served.prefetch

        def asked(ranges: Any) -> Any:
            future = prefetch(ranges)
            Path(gate).touch()
            return future

        served.prefetch = asked
    assert region[:] == content(0, SIZE)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_read_that_fails_while_everything_is_brought(engine: str, tmp_path: Path) -> None:
    """What it was to bring is brought by another: no page is left to read as zeros."""
    play(left_while_a_read_fails, engine, str(tmp_path / "gate"), deadline=60)


def counted(engine: str, readahead: int, far: bool) -> None:
    """Scenario: touched by several threads in random order, and then prefetched."""
    count = 512
    size = count * PAGE
    region = aiouffd.Region(size)
    source = Slow(size) if far else aiouffd.BufferSource(content(0, size))
    with aiouffd.Monitor(region, source, engine=ENGINES[engine](), readahead=readahead) as monitor:

        def touch(seed: int) -> None:
            order = random.Random(seed)
            for _ in range(count):
                peek(region.address + order.randrange(count) * PAGE)

        threads = [threading.Thread(target=touch, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        monitor.prefetch_sync(0, size)
        found = monitor.statistics()
        assert found.pages == count, found
        assert found.bytes_fetched == size, found
        assert (found.in_flight, found.bytes_in_flight) == (0, 0)
        assert sum(found.latency) <= found.faults
    assert region[:] == content(0, size)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("readahead", [0, 2 << 20])
@pytest.mark.parametrize("far", [False, True])
def test_each_page_is_fetched_and_counted_once(engine: str, readahead: int, far: bool) -> None:
    """Whatever brought it: a fault, what came along, or the prefetch of all."""
    play(counted, engine, readahead, far, deadline=60)
