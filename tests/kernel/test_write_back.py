"""`engine.write_back`: what was written to memory is in the file, or in memory still; never lost, never torn by us."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import mmap
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from kinds import poke
from pattern import PAGE, Pattern, content, peek, word
from processes import kill
from scenario import eventually, play, replaced

import aiouffd
from aiouffd.engine.mappings import Mapping, Mappings
from aiouffd.engine.protect import WrittenPages
from aiouffd.engine.resolver import Resolver
from aiouffd.engine.statistics import Counters
from aiouffd.engine.write_back import WriteBack, _arm
from aiouffd.errors import BusyError, ClosedError, LayoutChangingError, PopulatedError, SourceError, WriteBackError
from aiouffd.kernel import libc
from aiouffd.kernel.owned_descriptor import OwnedDescriptor

PAGES = 256
SIZE = PAGES * PAGE - 100
LIMIT = 64 * PAGE
ENGINES: dict[str, Any] = {"pager": aiouffd.Pager, "in_thread": aiouffd.InThread}


def file_of(path: str) -> aiouffd.FileSource:
    """Return a writable source of a new file with the pattern."""
    Path(path).write_bytes(content(0, SIZE))
    return aiouffd.FileSource(path, writable=True)


def served(engine: str, source: Any, **options: Any) -> aiouffd.Monitor:
    """Return a Monitor that writes back."""
    options.setdefault("write_back", True)
    region = aiouffd.Region(SIZE, shared=engine == "pager")
    return aiouffd.Monitor(region, source, engine=ENGINES[engine](), **options)


def flushed(engine: str, path: str) -> None:
    """Scenario: pages are written, flushed, dropped, and written again."""
    source, model = file_of(path), bytearray(content(0, SIZE))
    with served(engine, source) as monitor:
        region = monitor.region
        for at in (5 * PAGE + 7, 9 * PAGE, SIZE - 1):
            region[at] = model[at] = 77
        assert Path(path).read_bytes() == content(0, SIZE)
        monitor.flush_sync(0, 6 * PAGE)
        assert Path(path).read_bytes()[: 9 * PAGE] == model[: 9 * PAGE]
        assert monitor.evict_sync(5 * PAGE, PAGE) == PAGE
        assert monitor.evict_sync(9 * PAGE, PAGE) == 0
        monitor.flush_sync()
        assert Path(path).read_bytes() == model
        assert monitor.statistics().pages_written_back == 3
        monitor.flush_sync()
        assert monitor.statistics().pages_written_back == 3
        monitor.evict_sync(0, SIZE)
        assert region[:] == model
        region[5 * PAGE] = model[5 * PAGE] = 78  # what was flushed is protected again
        region[6 * PAGE] = model[6 * PAGE] = 79
        asyncio.run(monitor.flush())
        assert Path(path).read_bytes() == model
        region[0] = model[0] = 80
    assert Path(path).read_bytes() == model
    assert len(model) == SIZE


@pytest.mark.parametrize("engine", ENGINES)
def test_what_was_written_goes_to_the_file(engine: str, tmp_path: Path) -> None:
    """At a flush, of what it was asked for; and at the end. The file keeps its length."""
    play(flushed, engine, str(tmp_path / "file"))


def at_random(engine: str, path: str, seed: int) -> None:
    """Scenario: more is written than may be there, by several threads; each page is compared with a model."""
    count, steps = 4, 500
    source, written = file_of(path), dict[int, bytes]()
    with served(engine, source, max_resident=LIMIT) as monitor:
        region, failed, highest = monitor.region, list[object](), 0

        def work(number: int) -> None:
            chance, model = random.Random(seed + number), dict[int, bytes]()  # each thread has its own pages
            try:
                for step in range(steps):
                    page = chance.randrange((PAGES - 1) // count) * count + number
                    address = region.address + page * PAGE
                    assert peek(address) == model.get(page, word(page)), (step, page)
                    model[page] = (step << 32 | page).to_bytes(8, "little")
                    poke(address, model[page])
                    if step % 100 == 50:
                        monitor.flush_sync()
                        here = Path(path).read_bytes()
                        assert all(here[at * PAGE : at * PAGE + 8] == data for at, data in model.items())
                    elif step % 20 == 0:
                        monitor.evict_sync(0, SIZE)
            except BaseException as error:  # noqa: BLE001 - told by the main thread
                failed.append(error)
            written.update(model)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            highest = max(highest, monitor.statistics().resident)
            time.sleep(0.001)
        assert not failed, failed
        assert highest <= LIMIT + 16 * PAGE
    data = Path(path).read_bytes()
    for page in range(PAGES - 1):
        assert data[page * PAGE : page * PAGE + 8] == written.get(page, word(page))
        assert data[page * PAGE + 8 : (page + 1) * PAGE] == content(page * PAGE, PAGE)[8:]


@pytest.mark.long
@pytest.mark.unmeasured
@pytest.mark.parametrize("engine", ENGINES)
def test_more_is_written_than_may_be_there(engine: str, tmp_path: Path) -> None:
    """It is saved, dropped and brought again; a thread waits for room, and the limit holds."""
    play(at_random, engine, str(tmp_path / "file"), 7)


def killed(path: str) -> None:
    """Scenario: workers and keepers are killed while pages are saved."""
    source, model, chance = file_of(path), bytearray(content(0, SIZE)), random.Random(3)
    with served("pager", source, max_resident=LIMIT) as monitor:
        region = monitor.region
        for kills in range(12):
            done = threading.Event()

            def kills_it(victim: int = kills % 3, done: threading.Event = done) -> None:
                time.sleep(chance.random() * 0.01)
                before = monitor.pids
                victims = (before[1:], before[:1], before)[victim]
                for pid in victims:
                    kill(pid)
                replaced(monitor, *victims)
                done.set()

            thread = threading.Thread(target=kills_it)
            thread.start()
            steps = 0
            while not done.is_set() or steps < 200:
                steps += 1
                page = chance.randrange(PAGES - 1)
                # Without the GIL: else nobody could start another pager.
                assert peek(region.address + page * PAGE, PAGE) == model[page * PAGE : (page + 1) * PAGE], (kills, page)
                poke(region.address + page * PAGE + 8, bytes([kills]))
                model[page * PAGE + 8] = kills
                if steps % 50 == 0:
                    monitor.flush_sync()
                    assert Path(path).read_bytes() == model
            thread.join()
    assert Path(path).read_bytes() == model


@pytest.mark.unmeasured
def test_no_kill_loses_a_written_page(tmp_path: Path) -> None:
    """Of the worker, of the keeper, of both; in the middle of writes to memory and to the file."""
    play(killed, str(tmp_path / "file"))


def ends(path: str) -> None:
    """Scenario: the program is killed, with pages that were written and never flushed."""
    monitor = served("pager", file_of(path))
    monitor.__enter__()
    for page in range(0, PAGES, 3):
        monitor.region[page * PAGE] = 99
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_program_loses_nothing(tmp_path: Path) -> None:
    """The pager has the memory, too, and saves what was written."""
    path = tmp_path / "file"
    play(ends, str(path), status=-signal.SIGKILL)
    model = bytearray(content(0, SIZE))
    model[:: 3 * PAGE] = bytes([99]) * len(model[:: 3 * PAGE])
    eventually(path.read_bytes, bytes(model))


class Fails(Pattern):
    """Takes nothing back for a while, or only some pages."""

    def __init__(self) -> None:
        super().__init__(PAGES * PAGE)
        self.refuses, self.forever = {3, 8}, True
        self.taken = dict[int, bytes]()
        self.synced = 0

    def read_nowait(self, offset: int, length: int) -> bytes:
        """Return what was written last."""
        pages = range(offset, offset + length, PAGE)
        return b"".join(self.taken.get(at, content(at, PAGE)) for at in pages)

    async def write(self, offset: int, data: Any) -> None:
        """Refuse what holds one of these pages."""
        if self.refuses & set(range(offset // PAGE, (offset + len(data)) // PAGE)):
            self.refuses = self.refuses if self.forever else set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.taken.update({offset + at: bytes(data[at : at + PAGE]) for at in range(0, len(data), PAGE)})

    async def sync(self) -> None:
        """Count."""
        self.synced += 1


def refused() -> None:
    """Scenario: the disk is full, and later it is not."""
    source = Fails()
    with served("in_thread", source, max_resident=LIMIT) as monitor:
        region = monitor.region
        for page in (1, 3, 8, 12):
            region[page * PAGE] = 50 + page
        with pytest.raises(WriteBackError, match="No space left on device") as caught:
            monitor.flush_sync()
        assert caught.value.ranges == [(3 * PAGE, PAGE), (8 * PAGE, PAGE)]
        assert pickle.loads(pickle.dumps(caught.value)).ranges == caught.value.ranges
        assert (sorted(source.taken), source.synced) == ([PAGE, 12 * PAGE], 0)
        monitor.evict_sync(0, SIZE)
        assert [region[page * PAGE] for page in (1, 3, 8, 12)] == [51, 53, 58, 62]
        assert {3, 8} <= {at // PAGE for item in monitor.residency() for at in range(item.start, item.end, PAGE)}
        source.refuses = set(range(PAGES))
        for page in range(PAGES - 1):  # nothing can be saved, and no thread waits for ever
            region[page * PAGE + 1] = 1
        with pytest.raises(WriteBackError):
            asyncio.run(asyncio.wait_for(monitor.wait_error(), 60))
        source.refuses = set()
        monitor.flush_sync()
        assert len(source.taken) == PAGES - 1
        assert source.taken[3 * PAGE][:2] == bytes([53, 1])
        assert source.synced == 1
        region[0] = 99
        source.refuses, source.forever = {0}, False
        kept, monitor_of = monitor.region, monitor
        with pytest.raises(WriteBackError):
            monitor_of.__exit__(None, None, None)
        assert kept[0] == source.taken[0][0] == 99  # it was tried once more
        with (
            pytest.raises(PopulatedError, match="overwrite"),
            aiouffd.Monitor(touched(), source, engine=aiouffd.InThread(), write_back=True),
        ):
            pass


def behind_the_end(engine: str, path: str) -> None:
    """Scenario: more is written behind the end of the source than may be there, while some is that can be saved."""
    region, source = aiouffd.Region(4 * PAGES * PAGE, shared=engine == "pager"), file_of(path)
    how: dict[str, Any] = {"engine": ENGINES[engine](), "max_resident": LIMIT, "write_back": True}
    with aiouffd.Monitor(region, source, **how) as monitor:
        for page in range(4 * PAGES):
            region[page * PAGE] = page % 250 + 1
            region[page % 32 * PAGE + 1] = page % 250 + 1
        assert all(region[page * PAGE] == page % 250 + 1 for page in range(4 * PAGES))
        monitor.flush_sync()
        assert monitor.statistics().resident >= 3 * PAGES * PAGE
    assert Path(path).read_bytes()[::PAGE] == bytes(page % 250 + 1 for page in range(PAGES))


@pytest.mark.parametrize("engine", ENGINES)
def test_what_lies_behind_the_end_of_the_source_stays(engine: str, tmp_path: Path) -> None:
    """Nobody can save it, and no thread waits for that."""
    _, errors = play(behind_the_end, engine, str(tmp_path / "file"), deadline=60)
    assert errors.count("most of them were written, and stay") == 1


def within_the_last_page(engine: str, path: str) -> None:
    """Scenario: the source ends within a page, and the region behind it; both parts of the page are written."""
    region, source = aiouffd.Region(PAGES * PAGE, shared=engine == "pager"), file_of(path)
    with aiouffd.Monitor(region, source, engine=ENGINES[engine](), max_resident=LIMIT, write_back=True) as monitor:
        for last in (b"x", b"\0"):
            region[SIZE - 1 : SIZE + 1] = b"w" + last
            monitor.flush_sync()
            assert Path(path).read_bytes() == content(0, SIZE - 1) + b"w"
            assert monitor.evict_sync(SIZE - SIZE % PAGE, PAGE) == (PAGE if last == b"\0" else 0)
            for at in range(0, SIZE, PAGE):  # more than may be there
                assert region[at] == content(at, 1)[0]
            assert region[SIZE - 1 : SIZE + 1] == b"w" + last
        region[SIZE - 2 : SIZE + 1] = b"end"
    assert Path(path).read_bytes() == content(0, SIZE - 2) + b"en"


@pytest.mark.parametrize("engine", ENGINES)
def test_what_lies_behind_the_end_of_the_source_in_its_last_page_stays(engine: str, tmp_path: Path) -> None:
    """The source does not bring it back. Where nothing but zeros are there, the page is dropped as any other."""
    play(within_the_last_page, engine, str(tmp_path / "file"))


def touched() -> aiouffd.Region:
    """Return a region with a page that was there before."""
    region = aiouffd.Region(SIZE)
    region[0] = 1
    return region


def test_what_cannot_be_written_stays() -> None:
    """It is told by its ranges, stays in memory, and is saved when that is possible again."""
    play(refused)


def test_one_writer(tmp_path: Path) -> None:
    """A second writable source of a file is refused, in this process and in others, until the first has gone."""
    path = tmp_path / "file"
    source = file_of(str(path))
    with pytest.raises(BusyError, match="writing to"):
        aiouffd.FileSource(path, writable=True)
    code = f"import aiouffd; aiouffd.FileSource({str(path)!r}, writable=True)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 1
    with pytest.raises(BusyError):
        pickle.loads(pickle.dumps(source))
    del source
    assert aiouffd.FileSource(path, writable=True).writable
    assert not aiouffd.FileSource(path).writable
    play(one_after_the_other, str(path))


def one_after_the_other(path: str) -> None:
    """Scenario: a file is written by one Monitor, and then by another; the pager lives on meanwhile."""
    gc.disable()
    for _ in range(2):
        with served("in_thread", file_of(path)) as monitor:
            monitor.region[0] = 1
        del monitor
    with served("in_thread", file_of(path)) as monitor:
        monitor.snapshot_sync(f"{path}.image")
    del monitor
    with served("in_thread", file_of(path)):
        pass

    async def again_and_again() -> None:
        for _ in range(20):  # a thread of the loop leaves
            async with aiouffd.open(path, write_back=True, engine=aiouffd.InThread()):
                pass

    asyncio.run(again_and_again())
    with aiouffd.map(path):
        for page in range(40):
            with aiouffd.open(aiouffd.FileSource(path, writable=True), write_back=True) as region:
                region[page * PAGE] = 1
            del region


async def test_a_file_that_takes_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own writes are no change of it; holes may be filled. It does not grow; what is not writable is refused."""
    path = tmp_path / "file"
    path.write_bytes(b"")
    os.truncate(path, 8 * PAGE)
    source = aiouffd.FileSource(path, writable=True)
    assert source.hole(0, PAGE) == 0
    assert source.memory() is None
    await source.write(PAGE, b"x" * PAGE)
    begun, call = threading.Event(), Mock(side_effect=lambda *_: begun.set())
    monkeypatch.setattr(libc, "write_out", call)
    source.begin_sync(PAGE, PAGE)
    assert await asyncio.to_thread(begun.wait, 20)
    call.assert_called_once_with(source._fd, PAGE, PAGE)
    assert source._begun is not None
    source._begun.result(60)
    go = threading.Event()
    monkeypatch.setattr(libc, "write_out", lambda *_: go.wait(60))
    for _ in range(64):  # the disk is busy
        source.begin_sync(PAGE, PAGE)
    await source.sync()
    assert await asyncio.wait_for(source.read(PAGE, PAGE), 60) == b"x" * PAGE
    go.set()
    with pytest.raises(SourceError, match="shorter"):
        await source.write(8 * PAGE, b"y")
    with pytest.raises(SourceError, match="not writable"):
        await aiouffd.FileSource(path).write(0, b"y")
    await source.aclose()
    with OwnedDescriptor(os.memfd_create("tmpfs")) as file:  # a look at a hole would fill it with memory
        os.truncate(file.fileno(), 8 * PAGE)
        sparse = aiouffd.FileSource(f"/proc/self/fd/{file.fileno()}", writable=True)
        sparse._populate(0, 8 * PAGE)
        assert os.fstat(file.fileno()).st_blocks == 0


def test_a_path_is_written_to_as_long_as_it_is_served(tmp_path: Path) -> None:
    """By one at a time, by `open` and by `map`; its lock goes when the block is left, though the region is kept."""
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * PAGE))
    with aiouffd.open(path, write_back=True) as opened:
        opened[0] = 1
        with pytest.raises(aiouffd.BusyError):
            aiouffd.map(path, write_back=True)
    with aiouffd.map(path.as_uri(), write_back=True) as mapped:
        mapped[PAGE] = mapped[0] + 1
    assert path.read_bytes()[::PAGE] == b"\1\2\0\0"
    with aiouffd.open(path, write_back=True) as again:
        assert (again[PAGE], opened.monitor, mapped.closed) == (2, None, True)
    (tmp_path / "x.zst").write_bytes(b"")
    for other in (b"x", str(tmp_path / "x.zst")):
        with pytest.raises((ValueError, SourceError)), aiouffd.open(other, write_back=True):
            pass


def test_what_cannot_be_written_back_is_refused(tmp_path: Path) -> None:
    """When the Monitor is made, or asked."""
    region, source = aiouffd.Region(SIZE, shared=True), file_of(str(tmp_path / "file"))
    with pytest.raises(ValueError, match="takes nothing back"):
        aiouffd.Monitor(region, aiouffd.FileSource(tmp_path / "file"), write_back=True)
    with pytest.raises(ValueError, match="takes nothing back"):
        aiouffd.Monitor(region, aiouffd.BufferSource(b"x"), write_back=True)
    with pytest.raises(ValueError, match="write_back do"):
        aiouffd.Monitor(region, source, write_back=True, track_writes=True)
    with aiouffd.Monitor(region, source) as monitor, pytest.raises(ValueError, match="write_back=True"):
        monitor.flush_sync()


def protecting(protect: Any, *mappings: Mapping) -> Any:
    """Return a space of which pages are protected so."""
    uffd = Mock(try_writeprotect=protect, try_writeprotects=lambda _: 0)
    resolver = Resolver(uffd, PAGE, Counters())
    return SimpleNamespace(uffd=uffd, resolver=resolver, closing=False, is_gone=False, mappings=Mappings(mappings))


async def test_memory_that_is_left_while_it_is_protected() -> None:
    """Nobody writes to that of a process which has ended; of any other, nothing may count as saved."""
    tried = list[int]()

    def changing(start: int, *_: int) -> int:
        tried.append(start)
        space.closing, space.is_gone = True, ended
        return -errno.EAGAIN

    for ended in (True, False):
        space = protecting(changing)
        with contextlib.nullcontext() if ended else pytest.raises(ClosedError):
            await _arm(space, 0, PAGE)
        with contextlib.nullcontext() if ended else pytest.raises(ClosedError):
            await _arm(space, 0, PAGE)  # it has been left before its turn comes
    assert len(tried) == 2


def emptied(path: str) -> None:
    """Scenario: written pages are emptied, and the region shrinks."""
    source = file_of(path)
    with served("in_thread", source) as monitor:
        region = monitor.region
        region[PAGE] = region[2 * PAGE] = region[200 * PAGE] = 5
        region.madvise(mmap.MADV_DONTNEED, PAGE, PAGE)
        region.resize(100 * PAGE)
        region[PAGE + 1] = 6
    data = Path(path).read_bytes()
    assert (data[PAGE : PAGE + 2], data[2 * PAGE], data[200 * PAGE]) == (content(PAGE, 2), 5, content(200 * PAGE, 1)[0])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_was_emptied_is_not_saved(tmp_path: Path) -> None:
    """Nor what is unmapped: it shows the source no more."""
    play(emptied, str(tmp_path / "file"))


async def test_private_memory_is_read_on_the_loop() -> None:
    """Its region may move while any other thread runs; what is moving just now is read when that has been told."""
    threads, protected, moves = list[int](), list[list[tuple[int, int]]](), [PAGE]

    def peek(parts: list[tuple[int, int]]) -> list[tuple[int, bytes]]:
        ((offset, length),) = parts
        threads.append(threading.get_ident())
        if offset in moves:
            moves.remove(offset)
            raise LayoutChangingError("a write back", offset, length, errno.EAGAIN)
        return [(offset, content(offset, length))]

    async def protect(batch: list[tuple[int, int]]) -> None:
        protected.append(batch)

    bound: Any = SimpleNamespace(page=PAGE, shared=False, peek=peek)
    back: Any = WriteBack(SimpleNamespace(size=2 * PAGE - 8), bound, Counters())
    back._protect = protect
    assert await back._peeked([(0, PAGE), (PAGE, PAGE)]) == [(0, content(0, PAGE)), (PAGE, content(PAGE, PAGE))]
    assert threads == 3 * [threading.get_ident()]
    assert protected == [[(PAGE, PAGE)]]


def written_to(space: Any, **attributes: Any) -> Any:
    """Return what is needed of a bound."""
    places = {"places": lambda *at: [(space, shown) for shown in space.mappings.addresses(*at)]}
    return SimpleNamespace(page=PAGE, **places, **attributes)


async def test_memory_that_moves_while_it_is_protected() -> None:
    """It is protected again where it is then: the kernel says of its old place that nothing is there."""
    moved, protected = Mappings([Mapping(64 * PAGE, 65 * PAGE, 0)]), list[int]()

    def protect(start: int, length: int, _: int) -> int:
        if space.mappings is not moved:
            space.mappings = moved
            return -errno.ENOENT
        protected.append(start)
        return length

    space = protecting(protect, Mapping(PAGE, 2 * PAGE, 0))
    await WriteBack(SimpleNamespace(size=PAGE), written_to(space), Counters())._protect([(0, PAGE)])
    assert 64 * PAGE in protected


async def test_memory_of_several_mappings_is_protected() -> None:
    """Before Linux 6.3 the kernel takes each of them alone; a page that is in none is written no more."""
    mappings, protected = (range(64, 67), range(68, 80)), set[int]()

    def protect(start: int, length: int, _: int) -> int:
        pages = range(start // PAGE, (start + length) // PAGE)
        if not any(pages[0] in mapping and pages[-1] in mapping for mapping in mappings):
            return -errno.ENOENT
        protected.update(pages)
        return length

    space = protecting(protect, Mapping(64 * PAGE, 80 * PAGE, 0))
    await WriteBack(SimpleNamespace(size=16 * PAGE), written_to(space), Counters())._protect([(0, 16 * PAGE)])
    assert protected == {*mappings[0], *mappings[1]}


async def test_what_is_emptied_while_it_is_saved() -> None:
    """It shows the source no more: neither its zeros nor a page of them go there. The rest is saved."""
    space, taken = protecting(lambda _, length, __: length, Mapping(64 * PAGE, 80 * PAGE, 0)), dict[int, bytes]()

    async def write(offset: int, data: bytes) -> None:
        taken[offset] = data

    def peek(parts: list[tuple[int, int]]) -> list[tuple[int, bytes]]:
        written.forget(2 * PAGE, 3 * PAGE)
        there = ((offset, length, content(offset, min(length, source.size - offset))) for offset, length in parts)
        return [(offset, data.ljust(length, b"\0")) for offset, length, data in there]

    with WrittenPages.create(16 * PAGE, PAGE) as written:
        written.note(PAGE, 4 * PAGE)
        begun, sync = Mock(), AsyncMock()
        source = SimpleNamespace(size=5 * PAGE - 8, write=write, begin_sync=begun, sync=sync)
        attributes = {"written": written, "peek": peek, "shared": True, "count_noted": lambda: None}
        back = WriteBack(source, written_to(space, **attributes), Counters())
        begun.side_effect = lambda *_: sync.assert_not_called()
        await back.flush(0, 16 * PAGE)
        begun.assert_called_once_with(PAGE, 4 * PAGE)  # what is to be durable soon may go to the disk
        sync.assert_awaited_once_with()
        assert taken == {PAGE: content(PAGE, PAGE), 3 * PAGE: content(3 * PAGE, 2 * PAGE - 8)}
        assert not list(written.ranges(0, 16 * PAGE))
        await back.flush(0, 16 * PAGE)


def unmapped(path: str) -> None:
    """Scenario: a written page is unmapped behind the region's back, which nobody tells."""
    source = file_of(path)
    with served("in_thread", source) as monitor:
        region = monitor.region
        region[PAGE] = region[5 * PAGE] = region[8 * PAGE] = 5
        libc.munmap(region.address + 5 * PAGE, PAGE)
        with pytest.raises(WriteBackError, match="a write back"):
            monitor.flush_sync(4 * PAGE, 2 * PAGE)
        monitor.flush_sync(0, 4 * PAGE)
        assert Path(path).read_bytes()[: 8 * PAGE] == content(0, PAGE) + b"\5" + content(PAGE + 1, 7 * PAGE - 1)
        libc.mmap_fixed(region.address + 5 * PAGE, PAGE)  # as the kernel may choose, for another thread
        poke(region.address + 5 * PAGE, b"a secret")
        with pytest.raises(WriteBackError, match="a write back"):
            monitor.flush_sync(4 * PAGE, 2 * PAGE)
        assert b"a secret" not in Path(path).read_bytes()
        os._exit(0)  # as any program may: it has a hole in its region


def test_a_page_that_was_unmapped_is_told(tmp_path: Path) -> None:
    """It ends no process, and is not saved as zeros; nor is other memory that is there now."""
    play(unmapped, str(tmp_path / "file"))
