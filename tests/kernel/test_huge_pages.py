"""Huge pages that are moved to a region (UFFDIO_MOVE), with all that may come in between."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import mmap
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from pattern import PAGE, Pattern, Slow, Touchers, content, word
from scenario import play

import aiouffd
from aiouffd.kernel import abi
from aiouffd.kernel.pagemap import Pagemap
from aiouffd.kernel.userfaultfd import kernel_features
from examples.page_server import PageServer

HUGE = 2 << 20
SIZE = 8 * HUGE + 5 * PAGE + 3
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PR_SET_THP_DISABLE = 41

moves = pytest.mark.skipif(
    aiouffd.Feature.MOVE not in kernel_features() or not ENABLED.exists() or "[never]" in ENABLED.read_text(),
    reason="this kernel has no UFFDIO_MOVE, or gives no huge pages",
)


def huge(region: aiouffd.Region) -> int:
    """Return how many of its pages are huge."""
    found = Pagemap().scan(region.address, region.mapped_length, mask=abi.PAGE_IS_HUGE)
    return sum(each.length for each in found) // HUGE


def came(region: aiouffd.Region) -> bool:
    """Tell whether all has come, with the right bytes, and was counted once."""
    counted = region.monitor.statistics().pages
    return region[:] == content(0, len(region)) and counted == region.mapped_length // PAGE


def source(kind: str) -> Any:
    """Return one of the pattern."""
    return aiouffd.BufferSource(content(0, SIZE)) if kind == "memory" else {"far": Slow, "at hand": Pattern}[kind](SIZE)


def prefetched(kind: str) -> None:
    """Scenario."""
    region = aiouffd.Region(SIZE)
    assert region.address % HUGE == 0
    with aiouffd.Monitor(region, source(kind), engine=aiouffd.InThread(), readahead=0) as monitor:
        assert region[HUGE + 8 * PAGE] == word(HUGE // PAGE + 8)[0]
        monitor.prefetch_sync(0, SIZE)
        assert came(region)
        assert monitor.statistics().moves == huge(region) == 7  # one had a page before, of a table of its own
        region[2 * HUGE + 17] = 99
        assert (
            region[2 * HUGE + 16 : 2 * HUGE + 24] == word(2 * HUGE // PAGE)[:1] + b"\143" + word(2 * HUGE // PAGE)[2:]
        )


@moves
@pytest.mark.parametrize("kind", ["far", "at hand", "memory"])
def test_a_prefetch_moves_whole_huge_pages(kind: str) -> None:
    """From each kind of source; what is there already stays, and all is counted once."""
    play(prefetched, kind)


class Giving:
    """Answers with memory of huge pages."""

    def __init__(self, size: int, *, gives: bool) -> None:
        self.size, self.gives = size, gives
        self.given: dict[int, mmap.mmap] = {}
        self.is_moved = False

    def moved(self) -> None:
        """Take note that huge pages are."""
        self.is_moved = True

    async def read(self, offset: int, length: int) -> memoryview:
        """Return the bytes."""
        memory = mmap.mmap(-1, HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory[:length] = content(offset, length)
        self.given[offset] = memory
        return memoryview(memory)[:length]


def given(gives: bool) -> None:
    """Scenario."""
    region, source = aiouffd.Region(SIZE), Giving(SIZE, gives=gives)
    with aiouffd.Monitor(region, source, engine=aiouffd.InThread(), readahead=0) as monitor:
        assert source.is_moved == gives
        monitor.prefetch_sync(0, 3 * PAGE)
        assert source.given.popitem()[1][:PAGE] == content(0, PAGE)  # what is copied stays
        monitor.prefetch_sync(0, SIZE)
        assert came(region)
        assert monitor.statistics().moves == huge(region) == 7
        kept = [offset for offset, memory in source.given.items() if any(memory[:HUGE])]
        assert kept == ([3 * PAGE, 8 * HUGE, 8 * HUGE + 5 * PAGE] if gives else list(source.given))


@moves
@pytest.mark.parametrize("gives", [True, False])
def test_what_a_source_gives_away(gives: bool) -> None:
    """Its huge pages are moved themselves; they have zeros then. What it does not give away stays its own."""
    play(given, gives)


async def from_a_server(folder: str) -> None:
    """Scenario: by HTTP."""
    Path(folder, "file").write_bytes(content(0, SIZE))
    async with await PageServer(Path(folder)).serve("127.0.0.1", 0) as listening:
        source = aiouffd.ObjectSource(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/file")
        region, before = aiouffd.Region(SIZE), set(threading.enumerate())

        def began() -> list[threading.Thread]:
            return [each for each in set(threading.enumerate()) - before if each.name == "aiouffd-receiving"]

        async with aiouffd.Monitor(region, source, engine=aiouffd.InThread()) as monitor:
            await monitor.prefetch(0, SIZE)
            assert monitor.statistics().moves == huge(region) == 8
            assert await asyncio.to_thread(came, region)
            assert len(began()) == 1
        while began():  # noqa: ASYNC110 - a thread that ends tells no loop
            await asyncio.sleep(0.001)


@moves
@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="one processor")
def test_what_a_server_sends_is_received_by_two_threads(tmp_path: Path) -> None:
    """Into memory that is moved; the second one ends with the Monitor."""
    play(from_a_server, str(tmp_path))


async def on_the_callers_loop() -> None:
    """Scenario: without a thread, and in halves of huge pages."""
    region = aiouffd.Region(SIZE)
    async with aiouffd.Monitor(region, Slow(SIZE), engine=aiouffd.InProcess()) as monitor:
        await monitor.prefetch(0, HUGE // 2)
        await monitor.prefetch(HUGE // 2, 5 * HUGE)
        await monitor.prefetch(0, SIZE)
        assert came(region)
        assert monitor.statistics().moves == huge(region) == 6


@moves
@pytest.mark.parametrize("native", ["1", "0"])
def test_in_process(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the same with engine=InProcess(), also without the native part."""
    monkeypatch.setenv("AIOUFFD_NATIVE", native)
    play(on_the_callers_loop, fresh=True)


def in_the_midst(kind: str, disturbance: str) -> None:
    """Scenario: again and again, until something was moved in the midst of it."""
    for number in range(4):
        region = aiouffd.Region(SIZE)
        with aiouffd.Monitor(region, source(kind), engine=aiouffd.InThread(), readahead=16 * PAGE) as monitor:
            coming = monitor.ask_for(0, SIZE)
            if disturbance == "touches":
                shares = [range(first, SIZE // PAGE, 3 + number) for first in range(4)]
                touchers = Touchers(region.address, shares)
                touchers.join()
                assert not touchers.wrong
            elif disturbance == "forks":
                while not coming.done():
                    if (child := os.fork()) == 0:
                        os._exit(0)
                    os.waitpid(child, 0)
            elif disturbance == "resizes":
                for step in itertools.count(1):
                    region.resize(SIZE + step * 3 * HUGE)
                    if coming.done() or step == 50:
                        break
                region.resize(SIZE)
            coming.result()
            monitor.prefetch_sync(0, SIZE)
            assert region[:] == content(0, SIZE)


@moves
@pytest.mark.parametrize("disturbance", ["touches", "forks", "resizes"])
@pytest.mark.parametrize("kind", ["far", "memory"])
def test_no_byte_is_wrong(kind: str, disturbance: str) -> None:
    """While threads touch, the process forks, or the memory moves."""
    play(in_the_midst, kind, disturbance)


def emptied() -> None:
    """Scenario."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Slow(SIZE, 0.01), engine=aiouffd.InThread(), readahead=0) as monitor:
        coming = monitor.ask_for(0, SIZE)
        with pytest.warns(RuntimeWarning, match="zeros"):
            region.madvise(mmap.MADV_DONTNEED, 3 * HUGE, HUGE)  # whose bytes are on their way
        coming.result()
        assert region[3 * HUGE : 4 * HUGE] == bytes(HUGE)
        assert region[: 3 * HUGE] == content(0, 3 * HUGE)
        with pytest.warns(RuntimeWarning, match="zeros"):
            region.madvise(mmap.MADV_DONTNEED, HUGE + PAGE, PAGE)  # a part of a huge page
        assert region[HUGE + PAGE : HUGE + 2 * PAGE] == bytes(PAGE)
        assert region[HUGE + 2 * PAGE : 2 * HUGE] == content(HUGE + 2 * PAGE, HUGE - 2 * PAGE)


@moves
def test_what_is_emptied_is_zeros() -> None:
    """Also while its bytes are on their way, and where it is a part of a huge page."""
    play(emptied)


def tracked() -> None:
    """Scenario."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Slow(SIZE), engine=aiouffd.InThread(), track_writes=True) as monitor:
        monitor.prefetch_sync(0, SIZE)
        assert came(region)
        assert monitor.statistics().moves == 0
        assert monitor.collect() == []
        region[5 * PAGE] = 1
        assert monitor.collect() == [aiouffd.Range(5 * PAGE, PAGE)]


def test_what_comes_write_protected_is_copied() -> None:
    """No MOVE comes so: what is loaded would count as written."""
    play(tracked)


def captured(folder: str) -> None:
    """Scenario: a snapshot is taken, then a layer over it, while a thread writes to huge pages."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Slow(SIZE), engine=aiouffd.InThread()) as monitor:
        monitor.prefetch_sync(0, SIZE)
        ends = threading.Event()

        def write() -> None:
            for step in itertools.count(1):
                for page in range(0, SIZE // PAGE, 37):
                    region[page * PAGE + 9] = step % 200
                if ends.is_set():
                    return

        thread = threading.Thread(target=write)
        thread.start()
        base = monitor.snapshot_sync(Path(folder, "base.snap"))
        layer = monitor.snapshot_sync(Path(folder, "layer.snap"), Path(folder, "base.snap"))
        ends.set()
        thread.join()
        assert base is not None
        assert layer is not None
        assert monitor.snapshot_sync(Path(folder, "last.snap"), Path(folder, "layer.snap")) is not None
        for name in ("base", "layer", "last"):
            with aiouffd.open(Path(folder, f"{name}.snap")) as image:
                seen = [image[page * PAGE + 9] for page in range(0, SIZE // PAGE, 37)]
                assert all(image[page * PAGE : page * PAGE + 8] == word(page) for page in range(SIZE // PAGE))
                if name == "last":
                    assert image[:] == region[:]
                else:  # one step was under way: what is behind it is of the step before
                    first = next((at for at, value in enumerate(seen) if value != seen[0]), len(seen))
                    assert len(set(seen[first:])) <= 1


@moves
def test_snapshots_of_huge_pages(tmp_path: Path) -> None:
    """Each is of one moment; single pages of a huge one are protected and written."""
    play(captured, str(tmp_path))


def without_huge_pages() -> None:
    """Scenario."""
    assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Slow(SIZE), engine=aiouffd.InThread()) as monitor:
        monitor.prefetch_sync(0, SIZE)
        assert came(region)
        assert monitor.statistics().moves == huge(region) == 0


def test_without_huge_pages_all_is_copied() -> None:
    """To move small pages would take longer."""
    play(without_huge_pages)
