"""Region's own madvise and resize, where no events tell: in_process and in_thread. Nobody sees anything in between."""

from __future__ import annotations

import asyncio
import gc
import mmap
import random
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pattern import PAGE, Gated, Pattern, Slow, Touchers, content, peek, word
from scenario import eventually, play

import aiouffd
from aiouffd.monitor.engines import layout

if TYPE_CHECKING:
    from collections.abc import Callable

PAGES = 512
SIZE = PAGES * PAGE
MODES: dict[str, aiouffd.InProcess | aiouffd.InThread] = {
    "in_process": aiouffd.InProcess(stuck_limit=None),
    "in_thread": aiouffd.InThread(stuck_limit=None),
}


def monitored(mode: str, region: aiouffd.Region, source: Any, **options: Any) -> aiouffd.Monitor:
    """Return a Monitor; `mode` may be "pager" as well."""
    return aiouffd.Monitor(region, source, engine=MODES.get(mode), readahead=0, **options)


async def beside_the_loop(mode: str, source: Any, work: Callable[[aiouffd.Region, aiouffd.Monitor], None]) -> None:
    """Do something in another thread than the loop's."""
    region = aiouffd.Region(SIZE)
    async with monitored(mode, region, source) as monitor:
        await asyncio.to_thread(work, region, monitor)


async def emptied(mode: str, far: bool) -> None:
    """Scenario: pages are emptied while others touch them."""

    def work(region: aiouffd.Region, _: aiouffd.Monitor) -> None:
        stop = threading.Event()

        def shown(page: int) -> bytes:
            return peek(region.address + page * PAGE)

        def again_and_again() -> None:
            while not stop.is_set():
                wrong.extend(page for page in range(PAGES) if shown(page) not in (word(page), bytes(8)))

        wrong: list[int] = []
        threads = [threading.Thread(target=again_and_again) for _ in range(2)]
        for thread in threads:
            thread.start()
        for page in range(PAGES):
            region.madvise(mmap.MADV_DONTNEED, page * PAGE, PAGE)
            if shown(page) != bytes(8):
                wrong.append(page)
        wrong.extend(page for page in range(PAGES) if shown(page) != bytes(8))
        stop.set()
        for thread in threads:
            thread.join()
        assert not wrong

    await beside_the_loop(mode, Slow(SIZE, 0.0003) if far else Pattern(SIZE), work)


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_page_that_is_emptied_while_it_is_touched(mode: str, far: bool, loop: str) -> None:
    """From madvise's return on it is zeros: what was on its way for it has been forgotten."""
    play(emptied, mode, far, loop=loop)


async def in_between(mode: str, kind: str, gate: str) -> None:
    """Scenario: a page is touched, or comes, just when the system call is done and the engine does not know yet."""

    def work(region: aiouffd.Region, monitor: aiouffd.Monitor) -> None:
        applied: Any = monitor._engine.layout  # type: ignore[union-attr]
        real, touching = applied.removed, []

        def touch() -> None:
            touching.append(Touchers(region.address, [[3]], may_be_zero=True))

        def removed(start: int, length: int) -> None:
            if kind != "under way":
                touch()
            Path(gate).touch()
            time.sleep(0.3)  # as long as it may take until the engine has heard of it
            assert touching[0].alive
            real(start, length)

        applied.removed = removed
        if kind == "under way":
            touch()
            eventually(lambda: monitor.statistics().in_flight, 1)
        else:
            assert peek(region.address + 3 * PAGE) == word(3)
        region.madvise(mmap.MADV_DONTNEED, 3 * PAGE, PAGE)
        touching[0].join()
        assert peek(region.address + 3 * PAGE) == bytes(8)
        del applied.removed

    sources = {"asked for": Pattern(SIZE), "in memory": aiouffd.BufferSource(content(0, SIZE))}
    await beside_the_loop(mode, sources.get(kind, Gated(SIZE, gate)), work)


@pytest.mark.parametrize("kind", ["asked for", "in memory", "under way"])
@pytest.mark.parametrize("mode", MODES)
def test_a_page_between_the_system_call_and_its_message(mode: str, kind: str, tmp_path: Path, loop: str) -> None:
    """Whoever touches it waits, and finds zeros; what was on its way is not placed."""
    play(in_between, mode, kind, str(tmp_path / "gate"), loop=loop)


async def refused(mode: str) -> None:
    """Scenario."""

    def work(region: aiouffd.Region, _: aiouffd.Monitor) -> None:
        with pytest.raises(OSError, match="Invalid"):
            region.madvise(mmap.MADV_DONTNEED, 3, PAGE)
        view = memoryview(region)
        with pytest.raises(BufferError):
            region.resize(2 * SIZE)
        assert view.nbytes == SIZE
        view.release()
        with pytest.raises((OSError, ValueError, OverflowError)):
            region.resize(1 << 62)
        for page in range(0, PAGES, 7):
            assert peek(region.address + page * PAGE) == word(page)

    await beside_the_loop(mode, Pattern(SIZE), work)


@pytest.mark.parametrize("mode", MODES)
def test_a_change_that_fails_changes_nothing(mode: str, loop: str) -> None:
    """The bytes come as before, and the memory can be touched."""
    play(refused, mode, loop=loop)


def permissions(address: int) -> str:
    """Return those of the mapping at an address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, *_ = line.split()
        low, high = (int(end, 16) for end in span.split("-"))
        if low <= address < high:
            return rights
    return ""


async def moving(mode: str) -> None:
    """Scenario: moved memory cannot be touched until it is registered again."""

    def work(region: aiouffd.Region, monitor: aiouffd.Monitor) -> None:
        applied: Any = monitor._engine.layout  # type: ignore[union-attr]
        real, seen = applied.moved, []

        def moved(address: int, length: int) -> None:
            seen.append((address, permissions(address)))
            real(address, length)

        applied.moved = moved
        blocker = mmap.mmap(-1, SIZE)  # most likely right behind
        before = region.address
        region.resize(64 * SIZE)
        assert seen == [(region.address, "---p")]
        assert region.address != before, "it has not moved: the test shows nothing"
        assert permissions(region.address) == "rw-p"
        for page in range(0, PAGES, 7):
            assert peek(region.address + page * PAGE) == word(page)
        assert peek(region.address + 2 * SIZE) == bytes(8)
        blocker.close()
        del applied.moved

    await beside_the_loop(mode, Pattern(SIZE), work)


@pytest.mark.parametrize("mode", MODES)
def test_memory_that_moves_shows_no_zeros(mode: str, loop: str) -> None:
    """The kernel forgets that moved memory was registered: for that moment a touch is SIGSEGV, and no zeros."""
    play(moving, mode, loop=loop)


async def left_behind(mode: str, pages: int, gate: str) -> None:
    """Scenario: a thread waits for a page of a source that does not answer when its address is gone."""

    def work(region: aiouffd.Region, monitor: aiouffd.Monitor) -> None:
        thread = threading.Thread(target=peek, args=(region.address + SIZE - PAGE,))
        thread.start()
        eventually(lambda: monitor.statistics().in_flight, 1)
        print("it waits", flush=True)
        blocker = mmap.mmap(-1, SIZE)  # most likely right behind
        before = region.address
        region.resize(pages * PAGE)
        assert pages < PAGES or region.address != before, "it has not moved: the test shows nothing"
        thread.join()
        blocker.close()

    await beside_the_loop(mode, Gated(SIZE, gate), work)


@pytest.mark.parametrize("pages", [16, 64 * PAGES])
@pytest.mark.parametrize("mode", [*MODES, "pager"])
def test_a_thread_that_waits_where_nothing_is_any_more(mode: str, pages: int, tmp_path: Path) -> None:
    """It is SIGSEGV, as any touch there, and waits no longer: neither for the source nor until the Monitor is left."""
    output, _ = play(left_behind, mode, pages, str(tmp_path / "gate"), deadline=60, status=-signal.SIGSEGV)
    assert output == "it waits\n"


async def nobody_there() -> None:
    """Scenario: the loop does not come to it."""

    def work(region: aiouffd.Region, monitor: aiouffd.Monitor) -> None:
        engine: Any = monitor._engine
        assert peek(region.address) == word(0)
        engine.loop.call_soon_threadsafe(time.sleep, 1.0)
        with pytest.raises(aiouffd.BusyError):
            region.madvise(mmap.MADV_DONTNEED, 0, PAGE)
        assert peek(region.address) == word(0)
        assert peek(region.address + PAGE) == word(1)  # the loop is not stopped for good

    vars(layout)["_PATIENCE"] = 0.2
    await beside_the_loop("in_process", Pattern(SIZE), work)


def test_a_loop_that_does_not_run(loop: str) -> None:
    """BusyError, with nothing done."""
    play(nobody_there, loop=loop)


async def in_the_loop(mode: str) -> None:
    """Scenario: a handler changes the layout of its own region."""

    class Giving(aiouffd.Handler):
        async def pagefault(self, fault: aiouffd.Fault, batch: aiouffd.Batch) -> None:
            if fault.offset == 5 * PAGE:
                region.madvise(mmap.MADV_DONTNEED, 7 * PAGE, PAGE)
            batch.copy(fault.page, word(fault.offset // PAGE) * (PAGE // 8))

    region = aiouffd.Region(SIZE)

    async with monitored(mode, region, Giving()):
        for page, expected in ((7, word(7)), (5, word(5)), (7, bytes(8))):
            assert await asyncio.to_thread(peek, region.address + page * PAGE) == expected


@pytest.mark.parametrize("mode", MODES)
def test_a_change_that_the_loop_itself_makes(mode: str, loop: str) -> None:
    """It does not wait for itself."""
    play(in_the_loop, mode, loop=loop)


def interrupted(how: str, far: bool) -> None:
    """Scenario: signal handlers and finalizers touch missing pages while their thread changes the layout, or leaves."""
    draw = random.Random(5)
    stop = True
    source: Any = Slow(SIZE, 0.0003) if far else aiouffd.BufferSource(content(0, SIZE))
    wrong: list[bytes] = []
    touched = 0

    def touch(*_: object) -> None:
        nonlocal touched
        if not stop and threading.current_thread() is threading.main_thread():
            page = draw.randrange(PAGES)
            seen = region[page * PAGE : page * PAGE + 8]
            if seen not in (word(page), bytes(8)):
                wrong.append(seen)
            touched += 1

    class Cycle:
        def __init__(self) -> None:
            self.me = self

        __del__ = touch

    signal.signal(signal.SIGALRM, touch)
    gc.set_threshold(10)
    end = time.monotonic() + 4
    changes = 0
    while time.monotonic() < end or not touched:
        region = aiouffd.Region(SIZE)
        with monitored("in_thread", region, source, on_exit="zeros") as monitor:
            stop = False
            for _ in range(50):
                if how == "finalizer":
                    Cycle()
                else:
                    signal.setitimer(signal.ITIMER_REAL, draw.random() * 0.0005 + 1e-6)
                region.madvise(mmap.MADV_DONTNEED, draw.randrange(PAGES) * PAGE, PAGE)
                changes += 1
            monitor.prefetch_sync(0, SIZE)
        stop = True
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert not wrong
    print(changes, touched)


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("how", ["signal", "finalizer"])
def test_a_touch_by_the_thread_that_changes_the_layout(how: str, far: bool) -> None:
    """It is served, wherever the thread was interrupted: in madvise, in a prefetch, or on leaving."""
    output, errors = play(interrupted, how, far, deadline=60, measured=False)
    assert "has been waiting" not in errors
    assert all(int(number) > 0 for number in output.split())


async def unaligned(mode: str, kind: str) -> None:
    """Scenario: a region shrinks to a length that is no multiple of the page, is emptied so, and grows again."""

    def work(region: aiouffd.Region, monitor: aiouffd.Monitor) -> None:
        if kind == "present":
            assert peek(region.address + 10 * PAGE) == word(10)
        region.resize(10 * PAGE + 100)
        region.madvise(mmap.MADV_DONTNEED, 2 * PAGE, PAGE + 100)  # the kernel empties whole pages
        if kind != "missing":
            monitor.prefetch_sync(0, len(region))
            assert peek(region.address + 10 * PAGE + 92) == content(10 * PAGE + 92, 8)
        region.resize(20 * PAGE + 5)
        monitor.prefetch_sync(0, len(region))
        shown = peek(region.address, 20 * PAGE + 5)
        kept = content(0, 2 * PAGE) + bytes(2 * PAGE) + content(4 * PAGE, 6 * PAGE + 100)
        assert shown == kept + bytes(10 * PAGE - 95)
        monitor.check()

    sources = {"far": Slow(SIZE), "memory": aiouffd.BufferSource(content(0, SIZE))}
    await beside_the_loop(mode, sources.get(kind, Pattern(SIZE)), work)


@pytest.mark.parametrize("kind", ["present", "missing", "prefetched", "far", "memory"])
@pytest.mark.parametrize("mode", [*MODES, "pager"])
def test_a_length_that_is_no_multiple_of_the_page(mode: str, kind: str) -> None:
    """The last page is served, and what is added behind its end later is zeros, not bytes from before."""
    play(unaligned, mode, kind)


async def unaligned_in_the_loop() -> None:
    """Scenario: the loop's own thread grows a region whose last page is cut, and missing."""
    region = aiouffd.Region(SIZE)
    async with monitored("in_process", region, Pattern(SIZE)) as monitor:
        region.resize(10 * PAGE + 100)
        with pytest.raises(aiouffd.BusyError):
            region.resize(20 * PAGE)
        assert len(region) == 10 * PAGE + 100
        await monitor.prefetch(10 * PAGE, 1)
        region.resize(20 * PAGE)
        shown = await asyncio.to_thread(peek, region.address, 20 * PAGE)
        assert shown == content(0, 10 * PAGE + 100) + bytes(10 * PAGE - 100)


def test_the_loop_cannot_wait_for_the_last_page() -> None:
    """It is told what to do, and does not hang."""
    play(unaligned_in_the_loop)


def unserved() -> None:
    """Scenario."""
    region = aiouffd.Region(3 * PAGE)
    region[:] = b"x" * (3 * PAGE)
    region.resize(2 * PAGE + 100)
    region.resize(4 * PAGE)
    assert region[:] == b"x" * (2 * PAGE + 100) + bytes(2 * PAGE - 100)


def test_a_region_that_nobody_serves() -> None:
    """What is added is zeros there, too."""
    play(unserved)
