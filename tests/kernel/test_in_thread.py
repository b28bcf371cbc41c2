"""`Monitor(engine=InThread())`: what the other modes do, in the thread that touches and without a process."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import gc
import mmap
import os
import pickle
import resource
import signal
import threading
import time
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import touchers
from pattern import PAGE, Pattern, Slow, Touchers, content, peek, word
from processes import descendants
from scenario import brought, eventually, open_descriptors, play

import aiouffd
from aiouffd.monitor.registration import Registration
from aiouffd.native import faults

SIZE = 8 << 20
PAGES = SIZE // PAGE


def pages(region: aiouffd.Region, numbers: Any) -> list[int]:
    """Return those pages whose beginning or end is not what it must be."""
    return [
        number
        for number in numbers
        if region[number * PAGE : number * PAGE + 8] != word(number)
        or region[(number + 1) * PAGE - 8 : (number + 1) * PAGE] != word(number)
    ]


def at_hand(kind: str, path: str) -> Any:
    """Return a source of the pattern that needs no waiting."""
    if kind == "buffer":
        return aiouffd.BufferSource(content(0, SIZE))
    if kind == "file":
        Path(path).write_bytes(content(0, SIZE))
        return aiouffd.FileSource(path)
    return Pattern(SIZE)


def in_threads(region: aiouffd.Region, threads: int) -> list[int]:
    """Look at all pages from several Python threads; return those that are wrong."""
    wrong: list[int] = []
    workers = [
        threading.Thread(target=lambda first=n: wrong.extend(pages(region, range(first, PAGES, threads))))
        for n in range(threads)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return wrong


def every_source(kind: str, readahead: int, path: str) -> None:
    """Scenario: each page right, by threads that hold the GIL, and by native ones."""
    for threads in (1, 4):
        region = aiouffd.Region(SIZE)
        with aiouffd.Monitor(region, at_hand(kind, path), engine=aiouffd.InThread(), readahead=readahead) as monitor:
            assert monitor.pids == ()
            assert not in_threads(region, threads)
            eventually(lambda: monitor.statistics().pages >= PAGES, True)  # the loop counts after it has let them go
            seen = monitor.statistics()
            assert seen.faults > 0
            assert sum(seen.latency) > 0
            if kind == "buffer":
                assert seen.eexist <= seen.faults
                assert seen.bytes_fetched >= SIZE
            if not readahead:
                eventually(lambda: monitor.statistics().pages_readahead, 0)
            elif threads == 1:
                assert seen.faults < PAGES / 16  # windows grow: 2 MiB at last
                assert seen.faults // 2 < seen.sequential < seen.faults
        region = aiouffd.Region(SIZE)
        with aiouffd.Monitor(region, at_hand(kind, path), engine=aiouffd.InThread(), readahead=readahead):
            total = touchers.free().sum_in_threads(region.address, PAGES, threads)
            assert total == sum((number + 1) & 0xFF for number in range(PAGES))


@pytest.mark.parametrize("readahead", [0, 2 << 20])
@pytest.mark.parametrize("kind", ["buffer", "file", "read_nowait"])
def test_what_is_at_hand(kind: str, readahead: int, tmp_path: Path) -> None:
    """The right bytes from each kind of source, page by page and in windows."""
    play(every_source, kind, readahead, str(tmp_path / "file"))


def resolved_in_the_handler(path: str) -> None:
    """Scenario: the loop is not asked."""
    for source in (at_hand("buffer", ""), at_hand("file", path), aiouffd.ZeroSource(SIZE)):
        region = aiouffd.Region(SIZE)
        with aiouffd.Monitor(region, source, engine=aiouffd.InThread(), readahead=0) as monitor:
            for number in range(100):
                _ = region[number * PAGE]
            engine = monitor._engine
            assert engine._counters.snapshot().faults == 0  # type: ignore[union-attr]
            assert monitor.statistics().faults == 100
            assert monitor.statistics().pages_fault == 100
    # What is not in memory is asked for.
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, aiouffd.FileSource(path), engine=aiouffd.InThread(), readahead=0) as monitor:
        assert not pages(region, [PAGES - 1])
        assert monitor._engine._counters.snapshot().faults >= 1  # type: ignore[union-attr]


def test_what_is_at_hand_is_resolved_without_the_loop(tmp_path: Path) -> None:
    """Memory, resident files and zeros are placed by the handler; a file that is not in memory is read by the loop."""
    play(resolved_in_the_handler, str(tmp_path / "file"))


def odd_ends() -> None:
    """Scenario: sources that end in a page, or before the region does; a region of odd length."""
    for size, length in ((5 * PAGE + 100, 8 * PAGE), (5 * PAGE, 8 * PAGE), (100, 100), (9 * PAGE + 1, 8 * PAGE + 7)):
        data = os.urandom(size)
        region = aiouffd.Region(length)
        with aiouffd.Monitor(region, aiouffd.BufferSource(data), engine=aiouffd.InThread()):
            assert region[:] == (data + bytes(length))[:length]


def test_odd_ends() -> None:
    """What a region has beyond its source is zeros, within a page, too."""
    play(odd_ends)


async def handlers() -> None:
    """Scenario: a closure as handler, touched by the application's own loop."""
    region = aiouffd.Region(SIZE)
    seen: list[aiouffd.Fault] = []

    class Mine(aiouffd.Handler):
        async def pagefault(self, fault: aiouffd.Fault, batch: aiouffd.Batch) -> None:
            await asyncio.sleep(0.001)
            seen.append(fault)
            batch.copy(fault.page, content(fault.offset, PAGE))

    async with aiouffd.Monitor(region, Mine(), engine=aiouffd.InThread()) as monitor:
        assert region[9 * PAGE : 9 * PAGE + 8] == word(9)  # in the loop's own thread: it pauses
        region[10 * PAGE + 8] = 1
        assert await asyncio.to_thread(peek, region.address + 11 * PAGE) == word(11)
        await monitor.prefetch(0, 8 * PAGE)
        assert not pages(region, range(8))
        assert [(fault.offset, fault.write) for fault in seen[:3]] == [
            (9 * PAGE, False),
            (10 * PAGE, True),
            (11 * PAGE, False),
        ]
        assert seen[0].thread_id == threading.get_native_id() != seen[2].thread_id
        eventually(lambda: monitor.statistics().faults, 3)
        assert monitor.statistics().pages_prefetch == 8
        region.madvise(mmap.MADV_DONTNEED, 9 * PAGE, PAGE)
        assert region[9 * PAGE : 10 * PAGE] == bytes(PAGE)


def test_a_handler_that_is_a_closure(loop: str) -> None:
    """It runs in this process, told of address, access and thread; the application's loop may touch."""
    play(handlers, loop=loop)


class Together(Slow):
    """Its first reads wait for each other: 16 must be under way at once."""

    reading = 0
    enough: asyncio.Event | None = None

    async def read(self, offset: int, length: int) -> bytes:
        """Return the pattern, later."""
        self.enough = self.enough or asyncio.Event()
        self.reading += 1
        if self.reading >= 16:
            self.enough.set()
        try:
            await self.enough.wait()
            return await super().read(offset, length)
        finally:
            self.reading -= 1


def far_away() -> None:
    """Scenario: many threads that wait for a slow source."""
    region = aiouffd.Region(SIZE)
    source = Together(SIZE, 0.002)
    with aiouffd.Monitor(region, source, engine=aiouffd.InThread(), readahead=0) as monitor:
        all_ = Touchers(region.address, [range(n, 640, 32) for n in range(32)])
        holding = threading.Thread(target=pages, args=(region, range(700, 720)))
        holding.start()
        all_.join()
        holding.join()
        assert not all_.wrong
        # One page, many touchers: it is fetched once.
        several = Touchers(region.address, [[800]] * 16)
        several.join()
        assert not several.wrong
        assert not pages(region, range(700, 720))
        seen = monitor.statistics()
        assert seen.bytes_fetched <= (640 + 20 + 16) * PAGE


def test_what_is_far_away() -> None:
    """Threads wait with the GIL free, all at once; each page is fetched once."""
    play(far_away)


class Failing:
    """Raises for page 5."""

    size = SIZE

    async def read(self, offset: int, length: int) -> bytes:
        """Return the pattern."""
        if offset <= 5 * PAGE < offset + length:
            raise aiouffd.SourceError("Failing", offset, length, "no such page")
        return content(offset, length)


async def prefetching() -> None:
    """Scenario: errors of a prefetch; what is prefetched is there."""
    region = aiouffd.Region(SIZE)
    async with aiouffd.Monitor(region, Failing(), engine=aiouffd.InThread(), readahead=0) as monitor:
        await monitor.prefetch(8 * PAGE, 100 * PAGE)
        before = monitor.statistics().faults
        assert not pages(region, range(8, 108))
        assert monitor.statistics().faults == before
        with pytest.raises(aiouffd.SourceError, match="no such page"):
            await monitor.prefetch(0, 16 * PAGE)
        with pytest.raises(ValueError, match="not within"):
            monitor.prefetch_sync(0, SIZE + 1)
        waiting = asyncio.ensure_future(monitor.wait_error())
        assert not pages(region, [3])
    with pytest.raises(aiouffd.ClosedError):
        await waiting


def test_prefetch(loop: str) -> None:
    """It returns when all is there, and raises what the source has raised; nothing is poisoned."""
    play(prefetching, loop=loop)


def left_meanwhile() -> None:
    """Scenario: a Monitor is left while the lock is taken of what a thread waits for; then it is asked for more."""
    region = aiouffd.Region(SIZE)
    monitor = aiouffd.Monitor(region, Slow(SIZE), engine=aiouffd.InThread(), readahead=0)
    monitor.__enter__()
    engine: Any = monitor._engine
    asked = engine.prefetch([(0, SIZE)])
    leaving = threading.Thread(target=monitor.__exit__, args=(None, None, None))
    with asked._condition:
        leaving.start()
        engine._thread.join(60)
    leaving.join(60)
    with pytest.raises(aiouffd.ClosedError, match="has been left"):
        asked.result(60)
    with pytest.raises(aiouffd.ClosedError, match="has been left"):
        engine.prefetch([(0, SIZE)])


def test_nobody_waits_for_a_loop_that_has_ended() -> None:
    """It is an error."""
    play(left_meanwhile)


def system_calls() -> None:
    """Scenario: EFAULT, and the two ways around it."""
    region = aiouffd.Region(SIZE)
    reading, writing = os.pipe()
    with aiouffd.Monitor(region, Slow(SIZE), engine=aiouffd.InThread(), readahead=0) as monitor:
        view = memoryview(region)
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is looked at
            os.write(writing, view[PAGE : 2 * PAGE])
        assert caught.value.errno == errno.EFAULT
        assert os.write(writing, monitor.read(PAGE, PAGE)) == PAGE
        assert os.read(reading, PAGE) == content(PAGE, PAGE)
        monitor.prefetch_sync(2 * PAGE, PAGE)
        assert os.write(writing, view[2 * PAGE : 3 * PAGE]) == PAGE
        assert os.read(reading, PAGE) == content(2 * PAGE, PAGE)
        with pytest.raises(ValueError, match="not within"):
            monitor.read(SIZE, 1)
        view.release()
    with pytest.raises(aiouffd.ClosedError):
        monitor.read(0, 1)


def test_system_calls_on_missing_pages() -> None:
    """EFAULT; what was prefetched can be given to one, and so can what `read` returns."""
    play(system_calls)


def recorded(path: str) -> None:
    """Scenario: touches that the handler could resolve are recorded as well, and replayed."""
    order = [7, 3, 900, 5, 6, 1]
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, at_hand("buffer", ""), engine=aiouffd.InThread(), record=path, readahead=0):
        assert not pages(region, order)
    assert [offset // PAGE for offset in aiouffd.Trace.load(path, PAGE).offsets] == order
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Slow(SIZE), engine=aiouffd.InThread(), replay=path, readahead=0) as monitor:
        eventually(lambda: monitor.statistics().pages_replay, len(order))
        brought(monitor, len(order) * PAGE)
        assert not pages(region, order)
        assert monitor.statistics().faults == 0


def test_record_and_replay(tmp_path: Path) -> None:
    """The order of first touches, all of them."""
    play(recorded, str(tmp_path / "trace"))


def in_the_background() -> None:
    """Scenario."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, at_hand("buffer", ""), engine=aiouffd.InThread(), background=True) as monitor:
        assert not pages(region, [1000])
        eventually(lambda: monitor.statistics().pages >= PAGES, True)
        assert not pages(region, range(PAGES))


def test_background() -> None:
    """All of it comes, whoever places a page first."""
    play(in_the_background)


def tracked(kind: str) -> None:
    """Scenario: WP_ASYNC needs no reader, and no signal."""
    region = aiouffd.Region(SIZE)
    source: Any = aiouffd.BufferSource(content(0, SIZE // 2)) if kind == "buffer" else Slow(SIZE // 2)
    with aiouffd.Monitor(region, source, engine=aiouffd.InThread(), track_writes=True) as monitor:
        assert not pages(region, range(100))
        assert region[SIZE - PAGE] == 0
        assert monitor.collect() == []
        region[5 * PAGE] = 1
        region[200 * PAGE] = 1
        region[SIZE - 2 * PAGE] = 1
        written = [(part.start, part.length) for part in monitor.collect()]
        assert written == [(5 * PAGE, PAGE), (200 * PAGE, PAGE), (SIZE - 2 * PAGE, PAGE)]
        assert monitor.collect() == []


@pytest.mark.parametrize("kind", ["buffer", "slow"])
def test_track_writes(kind: str) -> None:
    """What is loaded does not count as written, whoever placed it."""
    play(tracked, kind)


def shared_region() -> None:
    """Scenario: two mappings of one memfd; the second finds what the first has brought."""
    region = aiouffd.Region(SIZE, shared=True)
    other = aiouffd.Region.from_fd(region.fd)
    with (
        aiouffd.Monitor(region, at_hand("buffer", ""), engine=aiouffd.InThread(), readahead=0),
        aiouffd.Monitor(other, Slow(SIZE), engine=aiouffd.InThread(), readahead=0) as second,
    ):
        assert not pages(region, range(50))
        assert not pages(other, range(50))
        assert second.statistics().continues == 50
        assert second.statistics().bytes_fetched == 0
        assert not pages(other, range(50, 60))
        assert not pages(region, range(50, 60))
        region[3 * PAGE] = 77
        assert other[3 * PAGE] == 77


def test_a_shared_region_is_fetched_once() -> None:
    """Pages that the file has are mapped by the handler, and not fetched again."""
    play(shared_region)


def huge() -> None:
    """Scenario."""
    size = 4 << 20
    for source in (aiouffd.BufferSource(content(0, size)), Slow(size), aiouffd.BufferSource(content(0, size - 1))):
        for shared in (False, True):
            region = aiouffd.Region(size, page_size=2 << 20, shared=shared)
            with aiouffd.Monitor(region, source, engine=aiouffd.InThread()) as monitor:
                assert not pages(region, range(0, size // PAGE - 1, 7))
                eventually(lambda: monitor.statistics().pages, 2)
            region.close()


@pytest.mark.usefixtures("huge_pages")
def test_huge_pages() -> None:
    """Of 2 MiB, private and shared."""
    play(huge)


def layout(kind: str) -> None:
    """Scenario: madvise and resize, while others touch."""
    region = aiouffd.Region(SIZE)
    source: Any = at_hand("buffer", "") if kind == "buffer" else Slow(SIZE)
    with aiouffd.Monitor(region, source, engine=aiouffd.InThread(), readahead=0) as monitor:
        touching = Touchers(region.address, [range(n, PAGES, 4) for n in range(4)], may_be_zero=True)
        for number in range(0, PAGES, 16):
            region.madvise(mmap.MADV_DONTNEED, number * PAGE, PAGE)
            assert region[number * PAGE : (number + 1) * PAGE] == bytes(PAGE)
        touching.join()
        assert not touching.wrong
        for number in range(0, PAGES, 16):
            assert region[number * PAGE : (number + 1) * PAGE] == bytes(PAGE)
        assert not pages(region, [number for number in range(PAGES) if number % 16])
        with pytest.raises(OSError, match="Invalid"):
            region.madvise(mmap.MADV_DONTNEED, 1, PAGE)
        assert monitor.statistics().pages_zero >= PAGES // 16


@pytest.mark.parametrize("kind", ["buffer", "slow"])
def test_what_is_emptied_is_zeros(kind: str) -> None:
    """From the moment that madvise returns, whoever touches meanwhile; one that fails changes nothing."""
    play(layout, kind)


def resized(kind: str) -> None:
    """Scenario."""
    region = aiouffd.Region(SIZE)
    source: Any = at_hand("buffer", "") if kind == "buffer" else Slow(SIZE)
    blocker = aiouffd.Region(PAGE)  # most likely right behind: the next one must move
    with aiouffd.Monitor(region, source, engine=aiouffd.InThread(), readahead=0):
        assert not pages(region, range(100))
        view = memoryview(region)
        with pytest.raises(BufferError):
            region.resize(2 * SIZE)
        view.release()
        for size in (2 * SIZE, 2 * SIZE + 5, SIZE // 2, SIZE):
            region.resize(size)
            assert len(region) == size
            assert not pages(region, range(0, SIZE // 2 // PAGE, 3))
            assert region[-1] == (0 if size != SIZE // 2 else word(SIZE // 2 // PAGE - 1)[-1])
    blocker.close()


@pytest.mark.parametrize("kind", ["buffer", "slow"])
def test_a_region_that_moves_and_grows(kind: str) -> None:
    """What was not there yet comes from the source still; what was added is zeros, and what was cut off stays off."""
    play(resized, kind)


def both_modes() -> None:
    """Scenario."""
    one, two, three = (aiouffd.Region(SIZE) for _ in range(3))
    with (
        aiouffd.Monitor(one, at_hand("buffer", ""), engine=aiouffd.InThread()),
        aiouffd.Monitor(two, Slow(SIZE)),
        aiouffd.Monitor(three, Slow(SIZE), engine=aiouffd.InThread()),
    ):
        workers = [Touchers(each.address, [range(n, 200, 2) for n in range(2)]) for each in (one, two, three)]
        assert not pages(two, range(300, 310))
        assert not pages(one, range(300, 310))
        assert not pages(three, range(300, 310))
        for worker in workers:
            worker.join()
            assert not worker.wrong


def test_both_modes_side_by_side() -> None:
    """A pager's region, and two that are served in the thread."""
    play(both_modes)


def many() -> None:
    """Scenario: more regions than there is room for, one after the other and at once."""
    regions = [aiouffd.Region(4 * PAGE) for _ in range(257)]
    with contextlib.ExitStack() as stack:
        for number, region in enumerate(regions[:256]):
            source = aiouffd.BufferSource(word(number) * (4 * PAGE // 8))
            stack.enter_context(aiouffd.Monitor(region, source, engine=aiouffd.InThread()))
        with (
            pytest.raises(aiouffd.LimitError, match=r"the number of regions of InThread\(\) is 256: .*Pager"),
            aiouffd.Monitor(regions[256], engine=aiouffd.InThread()),
        ):
            pass
        for number, region in enumerate(regions[:256]):
            assert region[PAGE : PAGE + 8] == word(number)
    with aiouffd.Monitor(regions[256], engine=aiouffd.InThread()):
        assert regions[256][0] == 0


def test_many_regions() -> None:
    """256 at once; one more is told so, and served when there is room."""
    play(many)


def refuse(_: threading.Thread) -> None:
    """Do as `Thread.start` does at a limit."""
    raise RuntimeError("can't start new thread")


def no_thread() -> None:
    """Scenario: no thread can be had when a Monitor is entered, then there is one."""
    region = aiouffd.Region(4 * PAGE)
    source = aiouffd.BufferSource(content(0, 4 * PAGE))
    failing = aiouffd.Monitor(region, source, engine=aiouffd.InThread())
    with aiouffd.Monitor(region, source, engine=aiouffd.InThread(), on_exit="zeros"):
        pass
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(aiouffd.LimitError, match=r"InThread\(\): .*RLIMIT_NPROC is .*pids\.max of the cgroup is$"):
            failing.__enter__()
        resource.setrlimit(resource.RLIMIT_AS, (1 << 40, resource.RLIM_INFINITY))
        with pytest.raises(aiouffd.LimitError, match=f"RLIMIT_AS, which is {1 << 40} .* each thread has a stack"):
            failing.__enter__()
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    with aiouffd.Monitor(region, source, engine=aiouffd.InThread()):
        assert not pages(region, range(4))


def test_no_thread_can_be_had() -> None:
    """Entering fails, names the limit, and leaves nothing behind."""
    play(no_thread)


def interrupted(when: str) -> None:
    """Scenario: Ctrl-C while the thread starts, before it runs or when it does; or when all is served already."""
    region, engine = aiouffd.Region(4 * PAGE), aiouffd.Pager() if when == "with a pager" else aiouffd.InThread()
    source, begun, start = aiouffd.BufferSource(content(0, 4 * PAGE)), list[threading.Thread](), threading.Thread.start

    def starting(thread: threading.Thread) -> None:
        begun.append(thread)
        if when == "runs":
            start(thread)
        raise KeyboardInterrupt

    with aiouffd.Monitor(region, source, engine=engine, on_exit="zeros"):
        pass
    eventually(partial(descendants, os.getpid()), set())
    descriptors = open_descriptors()
    with pytest.MonkeyPatch.context() as patch:
        if when in ("begins", "runs"):
            patch.setattr(threading.Thread, "start", starting)
        else:
            patch.setattr(Registration, "is_served", lambda _: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            aiouffd.Monitor(region, source, engine=engine).__enter__()
    if when == "begins":
        start(begun[0])
    for thread in begun:
        thread.join()
    eventually(lambda: (descendants(os.getpid()), open_descriptors()), (set(), descriptors))
    with aiouffd.Monitor(region, source, engine=engine):
        assert not pages(region, range(4))


@pytest.mark.parametrize("when", ["begins", "runs", "is served", "with a pager"])
def test_entering_is_interrupted(when: str) -> None:
    """Nothing serves then, and nothing is left behind; the interrupt is what is raised."""
    play(interrupted, when)


def left_behind(path: str) -> None:
    """Scenario: a Monitor is left, and no garbage is collected."""
    gc.disable()
    for _ in range(2):  # the first one also makes what stays
        region = aiouffd.Region(4 * PAGE)
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        with aiouffd.Monitor(region, aiouffd.FileSource(path), engine=aiouffd.InThread(), on_exit="zeros") as monitor:
            engine = weakref.ref(monitor._engine)
            assert not pages(region, range(4))
        del monitor
    assert engine() is None
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_what_has_served_goes_at_once(image: Path) -> None:
    """Loop and source are in no cycle, which would keep them until the next collection."""
    play(left_behind, str(image))


def on_exit(how: str) -> None:
    """Scenario: what becomes of what is missing, when nobody waits."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, at_hand("buffer", ""), engine=aiouffd.InThread(), on_exit=how, readahead=0):  # type: ignore[call-overload]
        assert not pages(region, range(10))
    assert not pages(region, range(10))
    if how == "populate":
        assert not pages(region, range(PAGES))
    elif how == "zeros":
        assert region[20 * PAGE : 21 * PAGE] == bytes(PAGE)
        with aiouffd.Monitor(region, at_hand("buffer", ""), engine=aiouffd.InThread()):  # once more
            assert not pages(region, [21])


@pytest.mark.parametrize("how", ["sigbus", "populate", "zeros"])
def test_leaving(how: str) -> None:
    """What is there stays, what is missing is as was said."""
    play(on_exit, how)


def test_what_cannot_be() -> None:
    """It is said before anything is done."""
    region = aiouffd.Region(PAGE)

    class Writes(aiouffd.Handler):
        async def write(self, fault: aiouffd.Fault, batch: aiouffd.Batch) -> None: ...

    with pytest.raises(ValueError, match="fork="):
        aiouffd.Monitor(region, engine=aiouffd.InThread(), fork="serve")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="source"):
        aiouffd.Monitor(region, aiouffd.ZeroSource(1), engine=aiouffd.ServedBy("/nowhere"))  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="track_writes"):
        aiouffd.Monitor(region, Writes(), engine=aiouffd.InThread())


def test_without_the_part_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typed error that says what to do, and nothing has happened."""
    monkeypatch.setattr("aiouffd.native._load", lambda: (None, "install a C compiler"))
    faults._table.cache_clear()
    region = aiouffd.Region(PAGE)
    with (
        pytest.raises(aiouffd.UnsupportedError, match="install a C compiler") as caught,
        aiouffd.Monitor(region, engine=aiouffd.InThread()),
    ):
        pass
    assert region.monitor is None
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def as_nobody() -> None:
    """Scenario: no privilege is needed."""
    _ = aiouffd.Monitor, aiouffd.InThread  # imported on first use, and only root may be able to read this interpreter
    os.setgid(65534)
    os.setuid(65534)
    with (
        pytest.raises(aiouffd.AccessError, match="dumpable"),
        aiouffd.Monitor(aiouffd.Region(SIZE), engine=aiouffd.InThread()),
    ):
        pass
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: as a user's processes are
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Slow(SIZE), engine=aiouffd.InThread(), readahead=0):
        assert not pages(region, range(20))


def test_an_unprivileged_user() -> None:
    """User mode only is enough: system calls are not served in any case."""
    if os.geteuid() != 0:
        pytest.skip("only root can become nobody")
    play(as_nobody)


async def opened(path: str) -> None:
    """Scenario."""
    Path(path).write_bytes(content(0, SIZE))
    with aiouffd.open(path, engine=aiouffd.InThread()) as region:
        assert not pages(region, range(PAGES))

    async with aiouffd.open(path, engine=aiouffd.InThread()) as region:
        assert not pages(region, range(PAGES))


def test_open(tmp_path: Path, loop: str) -> None:
    """`aiouffd.open(..., engine=aiouffd.InThread())`, in both forms."""
    play(opened, str(tmp_path / "file"), loop=loop)


def truncated(path: str) -> None:
    """Scenario: the file is cut behind its mapping."""
    Path(path).write_bytes(content(0, SIZE))
    os.utime(path, ns=(0, 0))
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, aiouffd.FileSource(path), engine=aiouffd.InThread(), readahead=0) as monitor:
        assert not pages(region, range(10))
        os.truncate(path, 20 * PAGE + 5)
        time.sleep(0.01)  # the source looks at the file at most once in a millisecond
        for page in (20, 10):
            with pytest.raises(aiouffd.SourceError):
                monitor.prefetch_sync(page * PAGE, PAGE)
        assert not pages(region, range(10))


def overwritten(path: str) -> None:
    """Scenario: the file is written in place, with the same size, while a signal handler serves it."""
    Path(path).write_bytes(content(0, SIZE))
    os.utime(path, ns=(0, 0))
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, aiouffd.FileSource(path), engine=aiouffd.InThread(), readahead=0):
        assert not pages(region, range(10))
        with open(path, "r+b") as file:  # noqa: PTH123 - in place
            file.write(bytes(SIZE))
        time.sleep(0.01)  # the source looks at the file at most once in a millisecond
        print("touching", flush=True)
        print(region[20 * PAGE])


def test_a_file_that_was_overwritten(tmp_path: Path) -> None:
    """No byte of the new one is shown: the touch is SIGBUS."""
    output, _ = play(overwritten, str(tmp_path / "file"), status=-signal.SIGBUS)
    assert output == "touching\n"


def test_a_file_that_was_cut(tmp_path: Path) -> None:
    """What is missing is an error from then on, and no zeros."""
    play(truncated, str(tmp_path / "file"))
