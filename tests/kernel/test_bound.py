"""`engine.bound`: pages are dropped and come again from the source; what was written stays, whatever happens."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import faulthandler
import fcntl
import gc
import mmap
import os
import random
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from kinds import HUGE, poke
from pattern import PAGE, Pattern, content, peek, word
from processes import kill
from scenario import eventually, play, replaced

import aiouffd
from aiouffd.engine import bound as module
from aiouffd.engine import two_threads
from aiouffd.engine.bound import Bound
from aiouffd.engine.flight import Flight, Flights
from aiouffd.engine.mappings import Mapping, Mappings
from aiouffd.engine.options import Options
from aiouffd.engine.protect import WrittenPages
from aiouffd.engine.resolver import DONTWAKE
from aiouffd.engine.runs import FOR_FAULT, Op, Purpose, Run
from aiouffd.engine.statistics import Counter, Counters
from aiouffd.errors import ClosedError
from aiouffd.kernel import abi, libc
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.monitor.engines.on_demand import may_be_dropped
from aiouffd.monitor.engines.protocol import Terms
from aiouffd.ranges import Range

PAGES = 256
SIZE = PAGES * PAGE
LIMIT = 64 * PAGE
ENGINES: dict[str, Any] = {
    "pager": (aiouffd.Pager, True),
    "pager-private": (aiouffd.Pager, False),
    "in_thread": (aiouffd.InThread, False),
    "in_thread-shared": (aiouffd.InThread, True),
}


def served(engine: str, source: Any = None, **options: Any) -> aiouffd.Monitor:
    """Return a Monitor of pages that can be told."""
    make, shared = ENGINES[engine]
    options.setdefault("max_resident", SIZE)
    region = aiouffd.Region(SIZE, shared=shared)
    return aiouffd.Monitor(region, source or aiouffd.BufferSource(content(0, SIZE)), engine=make(), **options)


def resident(monitor: aiouffd.Monitor) -> int:
    """Return how many bytes the kernel says are there."""
    return sum(item.length for item in monitor.residency())


def evicted(engine: str) -> None:
    """Scenario: pages are dropped by hand."""
    with served(engine) as monitor:
        region, model = monitor.region, bytearray(content(0, SIZE))
        assert region[:] == model
        for page in (5, 9):
            region[page * PAGE] = model[page * PAGE] = 77
        assert monitor.evict_sync(PAGE // 2, 4 * PAGE) == 3 * PAGE  # whole pages only
        assert monitor.evict_sync(0, SIZE) == SIZE - 5 * PAGE
        assert monitor.evict_sync(0, SIZE) == 0
        assert monitor.residency() == [Range(5 * PAGE, PAGE), Range(9 * PAGE, PAGE)]
        assert region[:] == model
        region[7 * PAGE] = model[7 * PAGE] = 78  # what came a second time is protected, too
        assert monitor.evict_sync(7 * PAGE, 2 * PAGE) == PAGE
        region.madvise(mmap.MADV_REMOVE if region.fd >= 0 else mmap.MADV_DONTNEED, 16 * PAGE, 8 * PAGE)
        model[16 * PAGE : 24 * PAGE] = bytes(8 * PAGE)
        region[20 * PAGE] = model[20 * PAGE] = 79
        monitor.evict_sync(0, SIZE)
        assert region[:] == model  # what was emptied is zeros, and not the source's
        statistics = monitor.statistics()
        assert statistics.pages_evicted >= 2 * PAGES - 40
        eventually(lambda: monitor.statistics().resident, SIZE - 8 * PAGE)  # of the source
        assert asyncio.run(monitor.evict(0, SIZE))
        with pytest.raises(ValueError, match="not within"):
            monitor.evict_sync(0, SIZE + 1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("engine", ENGINES)
def test_evicted_pages_are_missing_again(engine: str) -> None:
    """Not zeros. Written pages stay; emptied pages stay zeros."""
    play(evicted, engine)


def forgotten(engine: str) -> None:
    """Scenario: native code empties the page tables of shared memory; the file has the pages still."""
    with served(engine, readahead=0) as monitor:
        region, model = monitor.region, bytearray(content(0, SIZE))
        region[5 * PAGE] = model[5 * PAGE] = 77
        assert region[6 * PAGE : 8 * PAGE] == model[6 * PAGE : 8 * PAGE]
        libc.madvise(region.address + 5 * PAGE, 3 * PAGE, mmap.MADV_DONTNEED)
        assert region[5 * PAGE : 7 * PAGE] == model[5 * PAGE : 7 * PAGE]
        for page in (6, 7):
            region[page * PAGE] = model[page * PAGE] = 78  # told of, as any first write
        monitor.evict_sync(0, SIZE)
        assert region[:] == model


@pytest.mark.parametrize("engine", ["pager", "in_thread-shared"])
def test_a_page_that_only_the_file_has(engine: str) -> None:
    """It is mapped. No message tells InThread which pages these are."""
    play(forgotten, engine)


class Vanishing:
    """A source that has its first page once."""

    def __init__(self) -> None:
        self.size = SIZE
        self.asked = False

    async def read(self, offset: int, length: int) -> bytes:
        """Return the bytes, the first time."""
        if self.asked and not offset:
            raise aiouffd.SourceError(repr(self), offset, length, "gone")
        self.asked = True
        return content(offset, length)


def dropped_and_lost(engine: str) -> None:
    """Scenario: what was dropped cannot be had again."""
    faulthandler.enable(all_threads=False)  # the dump of a thread that runs meanwhile can end by SIGSEGV
    with served(engine, Vanishing(), readahead=0, retries=0) as monitor:
        assert peek(monitor.region.address) == word(0)
        assert monitor.evict_sync(0, PAGE) == PAGE
        peek(monitor.region.address)


@pytest.mark.parametrize("engine", ["pager", "pager-private", "in_thread-shared"])
def test_what_was_dropped_and_cannot_be_had_is_sigbus(engine: str) -> None:
    """Of protected shared memory that is dropped, the kernel keeps a marker, for which POISON fails with EEXIST."""
    play(dropped_and_lost, engine, status=-signal.SIGBUS, deadline=60)


def unmapped(image: str) -> None:
    """Scenario: a part of what is dropped is unmapped behind the region's back, which nobody tells."""
    with served("in_thread", max_resident=LIMIT, readahead=0) as monitor:
        region = monitor.region
        assert region[: LIMIT // 2] == content(0, LIMIT // 2)
        libc.munmap(region.address + PAGE, 2 * PAGE)
        other = region.address + 2 * PAGE
        libc.mmap_fixed(other, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        ctypes.memset(other, 7, PAGE)
        assert region[LIMIT // 2 :] == content(LIMIT // 2, SIZE - LIMIT // 2)
        assert monitor.statistics().resident <= LIMIT
        assert region[:PAGE] == content(0, PAGE)
        assert region[3 * PAGE : 4 * PAGE] == content(3 * PAGE, PAGE)
        monitor.snapshot_sync(image)
        monitor.evict_sync(0, SIZE)
        assert resident(monitor) == PAGE  # the other memory
        assert ctypes.string_at(other, PAGE) == b"\7" * PAGE
        os._exit(0)  # as any program may: it has a hole in its region


def test_what_was_unmapped_keeps_nothing_from_coming(tmp_path: Path) -> None:
    """The rest of its block is dropped, and no memory that lies in its place by now, not even behind a snapshot."""
    play(unmapped, str(tmp_path / "image"))


async def evicted_in_process() -> None:
    """Scenario: the loop is the caller's."""
    region = aiouffd.Region(SIZE)
    async with aiouffd.Monitor(region, Pattern(SIZE), engine=aiouffd.InProcess(), max_resident=LIMIT) as monitor:
        for _ in range(2):
            for page in range(PAGES):
                assert await asyncio.to_thread(peek, region.address + page * PAGE) == word(page)
                assert resident(monitor) <= LIMIT
        await asyncio.to_thread(poke, region.address, b"x")
        await monitor.evict(0, SIZE)
        assert await asyncio.to_thread(peek, region.address, 1) == b"x"
        with pytest.raises(RuntimeError, match="await"):
            monitor.evict_sync(0, SIZE)


def test_in_process() -> None:
    """Memory that others touch is dropped on the caller's loop."""
    play(evicted_in_process)


def at_random(engine: str, seed: int) -> None:
    """Scenario: threads read and write at random under a limit; each page is compared with a model."""
    count, steps = 4, 600
    with served(engine, max_resident=LIMIT, readahead=0 if seed % 2 else 64 << 10) as monitor:
        region, failed, highest = monitor.region, list[object](), 0

        def work(number: int) -> None:
            chance, model = random.Random(seed + number), dict[int, bytes]()  # each thread has its own pages
            try:
                for step in range(steps):
                    page = chance.randrange(PAGES // count) * count + number
                    address = region.address + page * PAGE
                    expected = model.get(page, word(page))
                    assert peek(address) == expected, (step, page)
                    if page < 32 and step % 5 == 0:  # more would be over the limit
                        model[page] = step.to_bytes(8, "little")
                        poke(address, model[page])
                    if step % 50 == 0:
                        monitor.evict_sync(page * PAGE, min(16 * PAGE, SIZE - page * PAGE))
            except BaseException as error:  # noqa: BLE001 - told by the main thread
                failed.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            highest = max(highest, monitor.statistics().resident)
        assert not failed
        assert LIMIT // 2 < highest <= LIMIT
        eventually(lambda: monitor.statistics().resident - resident(monitor), 0)  # some may be on its way still
        assert monitor.statistics().pages_evicted > PAGES


@pytest.mark.long
@pytest.mark.unmeasured
@pytest.mark.parametrize("engine", ENGINES)
def test_the_limit_holds(engine: str) -> None:
    """Whatever is touched, and by whom; no byte is wrong."""
    play(at_random, engine, 20)
    play(at_random, engine, 21)


def killed(engine: str) -> None:
    """Scenario: workers and keepers are killed while pages are dropped and written."""
    chance, model = random.Random(1), bytearray(content(0, SIZE))
    with served(engine, max_resident=LIMIT) as monitor:
        region = monitor.region
        for kills in range(12):
            done = threading.Event()

            def kills_it(victim: int = kills % 3, done: threading.Event = done) -> None:
                time.sleep(chance.random() * 0.01)
                before = monitor.pids
                for pid in (before[1:], before[:1], before)[victim]:
                    kill(pid)
                replaced(monitor, *(before[1:], before[:1], before)[victim])
                done.set()

            thread = threading.Thread(target=kills_it)
            thread.start()
            steps = 0
            while not done.is_set() or steps < 100:
                steps += 1
                page = chance.randrange(PAGES)
                # Without the GIL: else nobody could start another pager.
                assert peek(region.address + page * PAGE, PAGE) == model[page * PAGE : (page + 1) * PAGE], (kills, page)
                if page < 16:
                    poke(region.address + page * PAGE + 8, bytes([kills]))
                    model[page * PAGE + 8] = kills
                if steps % 20 == 0:
                    monitor.evict_sync(0, SIZE)
                # What comes and goes while the page tables are read is counted twice.
                assert any(resident(monitor) <= LIMIT for _ in range(10))
            thread.join()
        assert region[:] == model


@pytest.mark.unmeasured
def test_no_written_page_is_lost_by_kills() -> None:
    """What was written is known to each successor, and the limit holds on."""
    play(killed, "pager")
    play(killed, "pager-private")


def test_what_a_predecessor_brought_late_is_noted() -> None:
    """The write to a page counts that came when the successor had looked at the file already."""
    file, space = os.memfd_create("shared"), SimpleNamespace(mappings=Mappings([Mapping(PAGE, 3 * PAGE, 0)]))
    os.ftruncate(file, 2 * PAGE)
    with WrittenPages.create(2 * PAGE, PAGE) as written, OwnedDescriptor(file):
        bound = Bound(written, PAGE, None, Counters(), OwnedDescriptor(os.dup(file)))
        os.pwrite(file, b"late", PAGE)
        for page in (PAGE, 2 * PAGE):
            bound.note(space.mappings, page)
        assert (bound.resident, 0 in written, PAGE in written) == (PAGE, False, True)


def test_what_one_instruction_needs_stays() -> None:
    """Four pages, also where all that may be there was written; else each would be dropped for another, for ever."""
    file = os.memfd_create("shared")
    os.ftruncate(file, 32 * PAGE)
    under_way = {"flights": Flights(), "remainders": [], "deferred": []}
    space = Mock(closing=False, is_gone=False, mappings=Mappings([Mapping(PAGE, 33 * PAGE, 0)]), **under_way)
    with WrittenPages.create(32 * PAGE, PAGE) as written, OwnedDescriptor(file):
        bound = Bound(written, PAGE, 8 * PAGE, Counters(), OwnedDescriptor(os.dup(file)))
        bound.enter(space)
        written.note(0, 8 * PAGE)
        bound.came(0, 8 * PAGE)
        for page in range(10, 20):
            bound.make_room(page * PAGE, PAGE)
            bound.came(page * PAGE, PAGE)
        assert bound.evict(16 * PAGE, 20 * PAGE) == 4 * PAGE
        assert bound.resident == 8 * PAGE


def test_a_file_that_is_sealed_meanwhile_keeps_its_pages(caplog: pytest.LogCaptureFixture) -> None:
    """As they came from the source; it is said once, and who makes room goes on without."""
    file = os.memfd_create("shared", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, 32 * PAGE)
    under_way = {"flights": Flights(), "remainders": [], "deferred": []}
    space = Mock(closing=False, is_gone=False, mappings=Mappings([Mapping(PAGE, 33 * PAGE, 0)]), **under_way)
    with WrittenPages.create(32 * PAGE, PAGE) as written, OwnedDescriptor(file):
        bound = Bound(written, PAGE, 8 * PAGE, Counters(), OwnedDescriptor(os.dup(file)))
        bound.enter(space)
        bound.came(0, 8 * PAGE)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        for page in (20, 21):
            bound.make_room(page * PAGE, PAGE)
            bound.came(page * PAGE, PAGE)
        assert (bound.evict(0, 32 * PAGE), bound.resident) == (0, 10 * PAGE)
    assert [record.getMessage() for record in caplog.records] == [
        "nothing can be dropped of a memory file: Operation not permitted"
    ]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one processor")
def test_a_block_goes_while_others_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread. All is known of it when the loop goes on, whatever the kernel says; what was written stays."""
    monkeypatch.setattr(module, "_LARGE", PAGE)
    file, counters, punch = os.memfd_create("shared"), Counters(), libc.punch_hole
    os.ftruncate(file, 32 * PAGE)
    begun, copied = threading.Event(), threading.Event()
    late = threading.Timer(0.05, copied.set)

    def slowly(*arguments: int) -> None:
        begun.set()
        assert copied.wait(60)
        punch(*arguments)

    def copy(_at: int, _source: int, length: int, _mode: int) -> int:
        assert begun.wait(60)
        if late.ident is None:
            late.start()
        return -errno.EFAULT if length == 2 * PAGE else length

    space = Mock(closing=False, is_gone=False, mappings=Mappings([Mapping(PAGE, 33 * PAGE, 0)]), page_size=PAGE)
    space.configure_mock(flights=Flights(), remainders=[], deferred=[], counters=counters, uffd=Mock(try_copy=copy))
    with WrittenPages.create(32 * PAGE, PAGE) as written, OwnedDescriptor(file):
        bound = Bound(written, PAGE, 8 * PAGE, counters, OwnedDescriptor(os.dup(file)))
        resolver = bound.enter(space)
        os.pwrite(file, bytes(6 * PAGE), 0)
        bound.came(0, 6 * PAGE)
        monkeypatch.setattr(libc, "punch_hole", slowly)
        faulted = Run(Op.COPY, 11 * PAGE, 10 * PAGE, 2 * PAGE, 1, purpose=FOR_FAULT)
        assert resolver.resolve(faulted, wake=True) == -errno.EFAULT
        assert (bound.resident, os.fstat(file).st_blocks * 512) == (5 * PAGE, 5 * PAGE)
        late.join()
        # Of a block that was written nothing goes.
        bound.came(10 * PAGE, 2 * PAGE)
        written.note(PAGE)
        space.uffd.try_copy = lambda _at, _source, length, _mode: length
        for page, resident in ((12, 8), (20, 7)):
            run = Run(Op.COPY, (page + 1) * PAGE, page * PAGE, PAGE, 1, purpose=FOR_FAULT)
            assert resolver.resolve(run, wake=True) == 0
            assert bound.resident == resident * PAGE
    assert counters.words[Counter.PAGES_EVICTED] == 3


def test_a_large_piece_comes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wakes who waits for it. What came behind one that is put off counts. What was read just now is one part."""
    monkeypatch.setattr(module, "_LARGE", 2 * PAGE)
    monkeypatch.setattr(two_threads, "_PART", PAGE)
    calls, refused, counters = list[tuple[int, int, int]](), {5 * PAGE: -errno.EAGAIN}, Counters()

    def copy(at: int, _source: int, length: int, mode: int) -> int:
        calls.append((at // PAGE, length // PAGE, mode))
        return refused.get(at, length)

    file = os.memfd_create("shared")
    os.ftruncate(file, 16 * PAGE)
    space = Mock(closing=False, is_gone=False, mappings=Mappings([Mapping(PAGE, 17 * PAGE, 0)]), page_size=PAGE)
    space.configure_mock(flights=Flights(), counters=counters, uffd=Mock(try_copy=copy))
    with WrittenPages.create(16 * PAGE, PAGE) as written, OwnedDescriptor(file):
        bound = Bound(written, PAGE, None, counters, OwnedDescriptor(os.dup(file)))
        resolver = bound.enter(space)
        run = Run(Op.COPY, 3 * PAGE, 2 * PAGE, 5 * PAGE, 3 * PAGE, purpose=FOR_FAULT)
        assert resolver.resolve(run, wake=True) == -errno.EAGAIN
        assert (run.dst, run.src, run.offset, run.left) == (5 * PAGE, 5 * PAGE, 4 * PAGE, 3 * PAGE)
        assert sorted(calls) == [(page, 1, abi.COPY_MODE_WP) for page in (3, 4, 5, 5, 6, 7)]
        assert bound.resident == 4 * PAGE
        refused.clear()
        assert (resolver.resolve(run, wake=True), run.left, bound.resident) == (0, 0, 5 * PAGE)
        calls.clear()
        resolver.resolve(Run(Op.COPY, 10 * PAGE, 9 * PAGE, 4 * PAGE, 1, bytes(1)), wake=False)
        assert calls == [(10, 4, abi.COPY_MODE_WP | DONTWAKE)]


def in_order(engine: str) -> None:
    """Scenario: memory of three limits is read in order again and again, while some of its pages are written."""
    length, limit, piece, rounds = 48 << 20, 16 << 20, 64 << 10, 2
    region, make = aiouffd.Region(length, shared=ENGINES[engine][1]), ENGINES[engine][0]
    model = bytearray(content(0, length))
    with aiouffd.Monitor(region, aiouffd.BufferSource(bytes(model)), engine=make(), max_resident=limit) as monitor:
        for turn in range(rounds):
            for at in range(0, length, piece):
                assert region[at : at + piece] == model[at : at + piece], at
                if at % (1 << 20) == turn * piece:
                    region[at : at + 8] = model[at : at + 8] = b"written "
        assert monitor.statistics().pages_evicted >= (rounds * length - limit) // PAGE * 9 // 10
        assert resident(monitor) <= limit


@pytest.mark.parametrize("engine", ["pager", "pager-private", "in_thread"])
def test_what_is_read_in_order_is_right(engine: str) -> None:
    """Large pieces come while blocks are dropped beside them; what was written meanwhile is there in the next round."""
    play(in_order, engine)


def test_what_is_on_its_way_stays() -> None:
    """A page that was written and saved, after a read of its bytes began: they would be placed where it was."""
    file, counters = os.memfd_create("shared"), Counters()
    os.ftruncate(file, 8 * PAGE)
    flights, remainders = Flights(), [Run(Op.COPY, 5 * PAGE, 4 * PAGE, PAGE, 1)]
    flights.add(Flight(2 * PAGE, 4 * PAGE, PAGE, 0, Purpose(Counter.PAGES_FAULT)))
    deferred = [Run(Op.COPY, 7 * PAGE, 6 * PAGE, PAGE, 1), Run(Op.UNPROTECT, 8 * PAGE, 7 * PAGE, PAGE)]
    uffd = Mock(**{"try_writeprotect.side_effect": [-errno.EAGAIN, PAGE]})
    space = Mock(closing=False, is_gone=False, mappings=Mappings([Mapping(PAGE, 9 * PAGE, 0)]), page_size=PAGE)
    space.configure_mock(flights=flights, remainders=remainders, deferred=deferred, uffd=uffd, counters=counters)
    with WrittenPages.create(8 * PAGE, PAGE) as written, OwnedDescriptor(file):
        bound = Bound(written, PAGE, None, counters, OwnedDescriptor(os.dup(file)))
        resolver = bound.enter(space)
        bound.came(0, 8 * PAGE)
        assert bound.evict(0, 8 * PAGE) == 4 * PAGE  # 0, 3, 5 and 7
        # A lifting of protection that was put off is a write, whatever was saved meanwhile.
        bound.came(7 * PAGE, PAGE)
        for expected in (-errno.EAGAIN, 0):
            assert resolver.resolve(Run(Op.UNPROTECT, 8 * PAGE, 7 * PAGE, PAGE), wake=True) == expected
            assert 7 * PAGE in written
            written.forget(7 * PAGE, 8 * PAGE)
        # Of memory that was left just now, nothing is forgotten that is to be saved.
        written.note(0)
        del space, resolver, uffd  # a Mock has its parent
        gc.collect()
        bound.lost([(0, 8 * PAGE)])
        assert 0 in written
    with WrittenPages.create(PAGE, PAGE) as written, pytest.raises(ClosedError):
        Bound(written, PAGE, None, counters).peek([(0, PAGE)])


def forked() -> None:
    """Scenario: children share the region, and touch more of it than the limit."""
    with served("pager", max_resident=LIMIT, fork="serve") as monitor:
        region = monitor.region
        assert region[:PAGE] == content(0, PAGE)
        child = os.fork()
        if not child:
            for _ in range(2):
                for page in range(PAGES):
                    if page not in (3, 4):
                        assert region[page * PAGE : page * PAGE + 8] == word(page)
            region[3 * PAGE] = 33  # it has never been touched by the parent
            region[3 * PAGE + 1] = 34
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert resident(monitor) <= LIMIT
        region[4 * PAGE] = 44
        monitor.evict_sync(0, SIZE)
        assert monitor.residency() == [Range(3 * PAGE, 2 * PAGE)]
        assert (region[3 * PAGE], region[3 * PAGE + 1], region[4 * PAGE]) == (33, 34, 44)
        eventually(lambda: monitor.statistics().spaces, 1)


def test_forked_children_count() -> None:
    """Shared memory is one for all of them: what any has written stays, and the limit is that of all."""
    play(forked)


def moved() -> None:
    """Scenario: a region that InThread serves grows, and moves."""
    with served("in_thread") as monitor:
        region = monitor.region
        region[PAGE] = 11
        blocker = aiouffd.Region(PAGE)  # most likely in the way
        region.resize(4 * SIZE)
        region[2 * PAGE] = 22
        region[1] = region[SIZE + 1] = 44
        monitor.evict_sync(0, len(region))
        assert (region[PAGE], region[2 * PAGE], region[1], region[SIZE + 1]) == (11, 22, 44, 44)
        assert region[3 * PAGE : 4 * PAGE] == content(3 * PAGE, PAGE)
        region.resize(SIZE // 2)
        assert monitor.evict_sync(0, len(region)) == PAGE
        assert monitor.statistics().resident <= 4 * PAGE
        blocker.close()


def test_a_region_that_moves() -> None:
    """The kernel takes the protection from what it moves, and no write is missed all the same."""
    play(moved)


def cut(engine: str, path: str) -> None:
    """Scenario: shared memory ends within a page, as its file does then, and that page is written."""
    with served(engine, max_resident=LIMIT) as monitor:
        region = monitor.region
        assert region[10 * PAGE : 10 * PAGE + 8] == word(10)
        region.resize(10 * PAGE + 3000)
        assert os.fstat(region.fd).st_size == len(region)
        if engine == "pager":  # a successor asks which pages are there
            victim = monitor.pids[1]
            kill(victim)
            replaced(monitor, victim)
        region[10 * PAGE + 8] = 99
        monitor.evict_sync(0, len(region))
        shown = content(0, 10 * PAGE + 8) + b"\x63" + content(10 * PAGE + 9, 2991)
        for _ in range(2):
            monitor.snapshot_sync(path)
            assert Path(path).read_bytes() == shown
            assert region[:] == shown


@pytest.mark.parametrize("engine", ["pager", "in_thread-shared"])
def test_shared_memory_that_ends_within_a_page(engine: str, tmp_path: Path) -> None:
    """The last page is there as any other: it is known to be written, not dropped, and in snapshots."""
    play(cut, engine, str(tmp_path / "image"))


def huge(engine: str, shared: bool) -> None:
    """Scenario: four huge pages of six may be there."""
    region, source = aiouffd.Region(6 * HUGE, page_size=HUGE, shared=shared), Pattern(6 * HUGE)
    with aiouffd.Monitor(region, source, engine=ENGINES[engine][0](), max_resident=4 * HUGE) as monitor:
        for page in (0, 1, 2, 3, 4, 5, 1, 0, 2):
            assert region[page * HUGE + PAGE : page * HUGE + PAGE + 8] == word(page * HUGE // PAGE + 1)
            assert monitor.statistics().resident <= 4 * HUGE
        region[0] = 99
        for page in (1, 2, 3, 4, 5):
            assert region[page * HUGE : page * HUGE + 8] == word(page * HUGE // PAGE)
        assert region[0] == 99
        if shared:  # a successor asks which pages are there
            victim = monitor.pids[1]
            kill(victim)
            replaced(monitor, victim)
        assert monitor.statistics().resident == resident(monitor) == 5 * HUGE  # one was written, three are spared
        assert monitor.evict_sync(0, 6 * HUGE) == 4 * HUGE
        assert (monitor.residency(), monitor.statistics().resident) == ([Range(0, HUGE)], HUGE)


@pytest.mark.usefixtures("huge_pages")
def test_huge_pages() -> None:
    """Of private and of shared memory."""
    play(huge, "in_thread", False)
    assert "most of them were written" not in play(huge, "pager", True)[1]


def ahead() -> None:
    """Scenario: more is to be brought ahead than may be there."""
    with served("in_thread", max_resident=LIMIT, background=True) as monitor:
        eventually(lambda: monitor.statistics().pages_background, LIMIT // PAGE)
        with pytest.raises(ValueError, match="max_resident"):
            monitor.prefetch_sync(0, LIMIT + 1)
        monitor.prefetch_sync(SIZE - LIMIT, LIMIT)
        assert monitor.residency() == [Range(SIZE - LIMIT, LIMIT)]
        assert monitor.region[:] == content(0, SIZE)


def all_at_once(limit: int) -> None:
    """Scenario: as much is to be brought ahead as may be there, in steps beside which a block could be dropped."""
    module._LARGE = 4 * PAGE
    with served("in_thread", max_resident=limit) as monitor:
        monitor.prefetch_sync(0, limit)
        assert monitor.residency() == [Range(0, limit)]
        if limit < SIZE:
            return
        assert monitor.region[:] == content(0, SIZE)
        assert monitor.statistics().pages_evicted == 0


@pytest.mark.parametrize("limit", [LIMIT, SIZE])
def test_what_comes_ahead_drops_none_of_itself(limit: int) -> None:
    """All of it is there in the end. A limit of as much as there is drops nothing at all."""
    play(all_at_once, limit)


@pytest.mark.parametrize(("purpose", "resident"), [(Purpose(Counter.PAGES_PREFETCH, []), 8), (FOR_FAULT, 7)])
def test_nothing_goes_beside_what_comes_for_no_fault(
    purpose: Purpose, resident: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is brought ahead has room, or stops: what came first for the same caller would go. A fault drops a block."""
    monkeypatch.setattr(module, "_LARGE", PAGE)
    counters, file = Counters(), os.memfd_create("shared")
    os.ftruncate(file, 32 * PAGE)
    space = Mock(closing=False, is_gone=False, mappings=Mappings([Mapping(PAGE, 33 * PAGE, 0)]), page_size=PAGE)
    space.configure_mock(flights=Flights(), remainders=[], deferred=[], counters=counters)
    space.uffd.try_copy = lambda _at, _source, length, _mode: length
    with WrittenPages.create(32 * PAGE, PAGE) as written:
        bound = Bound(written, PAGE, 8 * PAGE, counters, OwnedDescriptor(file))
        resolver = bound.enter(space)
        bound.came(0, 6 * PAGE)
        run = Run(Op.COPY, 11 * PAGE, 10 * PAGE, 2 * PAGE, 1, purpose=purpose)
        assert resolver.resolve(run, wake=True) == 0
        assert bound.resident == resident * PAGE


def test_nothing_is_begun_where_nothing_can_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a large COPY, where all of the block was written: no other thread is asked."""
    monkeypatch.setattr(module, "_LARGE", PAGE)
    with WrittenPages.create(32 * PAGE, PAGE) as written:
        bound = Bound(written, PAGE, 8 * PAGE, Counters())
        bound.came(0, 7 * PAGE)
        written.note(0, 7 * PAGE)
        assert bound.make_room_beside(10 * PAGE, PAGE) is None


def test_a_limit_of_all_there_is() -> None:
    """It is none: nothing is dropped beside the last pages that come."""
    with WrittenPages.create(8 * PAGE, PAGE) as written:
        assert Bound(written, PAGE, 8 * PAGE, Counters()).limit is None
        assert Bound(written, PAGE, 7 * PAGE, Counters()).limit == 7 * PAGE


def test_what_comes_ahead_stops_at_the_limit() -> None:
    """A background fill drops nothing; a prefetch does, and is refused where it could not all be there."""
    play(ahead)


def all_written() -> None:
    """Scenario: more is written than may be there."""
    with served("in_thread", max_resident=LIMIT, readahead=0) as monitor:
        for page in range(PAGES):
            monitor.region[page * PAGE] = 1
        assert monitor.statistics().pages_evicted == 0
        assert monitor.region[::PAGE] == b"\1" * PAGES


def test_written_pages_stay() -> None:
    """Above the limit, too: nobody has them but the memory. The log says so, once."""
    assert play(all_written)[1].count("most of them were written, and stay") == 1


def test_what_cannot_be_bounded_is_refused() -> None:
    """When the Monitor is made; the error says why."""
    region, source = aiouffd.Region(SIZE), Pattern(SIZE)

    def refused(why: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=why):
            aiouffd.Monitor(region, *arguments, **{"max_resident": LIMIT, **options})

    with pytest.raises(ValueError, match=r"needs Region.*shared=True"):
        aiouffd.Pager().check(Terms(source, None, Options(0, bounded=True), page_size=HUGE))
    refused("ServedBy.*max_resident", engine=aiouffd.ServedBy("x"))
    refused("need a Source", aiouffd.Handler(), engine=aiouffd.InThread())
    refused("track_writes", source, track_writes=True, engine=aiouffd.InThread())
    refused("populate", source, on_exit="populate", engine=aiouffd.InThread())
    refused("at least 4 pages", source, max_resident=4 * PAGE - 1, engine=aiouffd.InThread())
    with pytest.raises(TypeError, match="max_resident= takes a whole number"):
        aiouffd.Monitor(region, source, max_resident="1G")  # type: ignore[call-overload]
    with aiouffd.Monitor(region, source) as monitor, pytest.raises(ValueError, match="max_resident"):
        monitor.evict_sync(0, SIZE)


def opened(path: str) -> None:
    """Scenario: `open` and `map` choose memory that the engine can drop."""
    here = not may_be_dropped()
    kinds: Any = ((None, "serve", True), (None, None, here), (aiouffd.InThread(), None, False))
    for engine, fork, shared in kinds:
        with aiouffd.open(path, max_resident=LIMIT, engine=engine, fork=fork) as region:
            assert (region.fd >= 0) is shared
            assert region[:SIZE] == content(0, SIZE)
            assert resident(region.monitor) <= LIMIT
    with aiouffd.map(path, max_resident=LIMIT) as region:
        assert region[:SIZE] == content(0, SIZE)


def test_open_and_map(image: Any) -> None:
    """A file larger than the limit is read through either."""
    play(opened, str(image))


def test_a_worker_that_hangs_is_no_loss() -> None:
    """A pager that is stopped and goes on has dropped nothing that was written."""
    play(stopped)


def stopped() -> None:
    """Scenario: the worker is stopped while a thread writes."""
    with served("pager", max_resident=LIMIT) as monitor:
        region = monitor.region
        assert region[:PAGE] == content(0, PAGE)
        os.kill(monitor.pids[1], signal.SIGSTOP)
        thread = threading.Thread(target=ctypes.memset, args=(region.address, 5, 1))
        thread.start()
        asked = monitor._ask_to_evict(0, SIZE)
        os.kill(monitor.pids[1], signal.SIGCONT)
        thread.join()
        asked.result()
        assert region[0] == 5
