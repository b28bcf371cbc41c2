"""`store.cached_source`: the right bytes, whatever becomes of the cache."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import math
import os
import pickle
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from cached import CHUNK, MIB, Far, Hashed, opened, until
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from pattern import Pattern, peek

import aiouffd
from aiouffd.kernel import libc
from aiouffd.store.segments import Place


@pytest.mark.parametrize("kind", [Far, Hashed])
async def test_a_warm_cache_is_not_asked_of_the_source(kind: Any, tmp_path: Path) -> None:
    """Every way to the bytes has them: read, at once, page by page, mapped, as zeros."""
    far = kind()
    source = opened(tmp_path, far)
    whole = far.bytes_of(0, far.size)
    assert bytes(await source.read(0, far.size)) == whole
    await until(lambda: not source._fetches._flights)  # it is kept when it has been given
    await source.aclose()
    far.asked.clear()
    source = opened(tmp_path, far)
    address, length, descriptor, _ = source.memory()
    assert (length, descriptor) == (far.size, -2)
    assert source.read_nowait(0, 4096) is None  # the cache is not open yet
    assert bytes(await source.read(5, 10)) == whole[5:15]
    assert bytes(await source.read(0, far.size)) == whole
    assert far.asked == []
    assert bytes(source.read_nowait(4097, far.size - 4097)) == whole[4097:]
    for offset in range(0, far.size - 4096, 4096):
        at, hole = source.page(offset, 4096), source.hole(offset, 4096)
        assert (at is None) == (hole == 4096) == (not any(whole[offset : offset + 4096]))
        if at is not None:
            assert peek(at, 4096) == whole[offset : offset + 4096]
            assert libc.mincore(address + offset, 4096)[0] & 1
            assert peek(address + offset, 4096) == whole[offset : offset + 4096]
    assert source.page(far.size - 4000, 4096) is None
    assert source.page(CHUNK - 4096, 8192) is None
    await source.aclose()
    assert (await asyncio.to_thread(source.cache.statistics))["hits"] >= 8


async def test_neighbors_are_checked_by_a_thread(tmp_path: Path) -> None:
    """What one fault finds, the next need not look for."""
    first = opened(tmp_path)
    await first.read(0, first.size)
    await until(lambda: len(first._places) == 11)
    source = opened(tmp_path)
    await source.read(0, 10)
    await until(lambda: len(source._places) == 11)
    assert source.source.asked == []
    await first.aclose()
    await source.aclose()


async def test_a_chunk_that_comes_otherwise_while_neighbors_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it was found is not shown any more: nobody would notice when that goes."""
    first, source = opened(tmp_path), opened(tmp_path)
    await first.read(0, first.size)
    await until(lambda: len(first._places) == 11)
    address, *_ = source.memory()
    real = source._peek_and_show

    def late(numbers: list[int]) -> Any:
        found = real(numbers)
        assert libc.mincore(address + 2 * CHUNK, 4096)[0] & 1
        source._places[2] = Place(None, 0, CHUNK)
        return found

    monkeypatch.setattr(source, "_peek_and_show", late)
    await source.read(0, 10)
    await until(lambda: len(source._places) == 11)
    assert [libc.mincore(address + n * CHUNK, 4096)[0] & 1 for n in (1, 2, 4)] == [1, 0, 1]
    await first.aclose()
    await source.aclose()


async def test_a_fault_finds_a_chunk_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a cache that is open, in a segment that is; a chunk or two, not more, and none that is on its way."""
    monkeypatch.setattr("aiouffd.store.cached_source._GROUP", 1)
    source, other = opened(tmp_path), opened(tmp_path)
    await other.read(0, 7 * CHUNK)
    await until(lambda: len(other._places) == 7)
    await source.read(0, 10)
    assert source.page(CHUNK, 4096) is not None
    assert bytes(source.read_nowait(CHUNK + 5, CHUNK)) == source.source.bytes_of(CHUNK + 5, CHUNK)
    assert source.read_nowait(0, 7 * CHUNK) is None
    assert source.page(9 * CHUNK, 4096) is None
    source.source.gate = asyncio.Event()
    reading = asyncio.ensure_future(source.read(9 * CHUNK, 10))
    await until(lambda: source.source.asked)
    await other.read(8 * CHUNK, 10)
    assert source.page(9 * CHUNK, 4096) is None
    source.source.gate.set()
    await reading
    await source.aclose()
    await other.aclose()


async def test_a_source_without_a_name_is_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is said once, and read as it is."""
    source = opened(tmp_path, Pattern(MIB))
    assert source.size == MIB
    assert bytes(await source.read(5, 10)) == await Pattern(MIB).read(5, 10)
    assert source.page(0, 4096) is None
    assert source.memory() is None
    assert not (tmp_path / "cache").exists()
    copy = pickle.loads(pickle.dumps(source))  # as the pager has it
    assert copy.size == MIB
    assert not copy.keeps
    assert len(caplog.records) == 1
    assert "is not cached" in caplog.text
    await source.aclose()


async def test_without_a_cache_it_is_read_as_it_is(tmp_path: Path) -> None:
    """Not more than was asked for; what one has that is full is read from there."""
    (tmp_path / "cache").mkdir(0o755)
    source = opened(tmp_path)
    for offset in (0, 8192):
        assert bytes(await source.read(offset, 4096)) == source.source.bytes_of(offset, 4096)
    assert source.source.asked[-1] == (8192, 4096)
    await source.aclose()
    full = opened(tmp_path / "full")
    await full.read(0, CHUNK)
    await until(lambda: full._places)
    full.cache._full_until = float("inf")
    for offset in (0, CHUNK):
        assert bytes(await full.read(offset, 10)) == full.source.bytes_of(offset, 10)
    assert full.source.asked == [(0, CHUNK), (CHUNK, 10)]
    await full.aclose()


async def test_what_it_says_of_its_source(tmp_path: Path) -> None:
    """Limits, identity, holes; it is told what the Monitor has."""

    class Known(Far):
        retries, timeout, identity, validator = 0, 1.0, ("x",), "y"

        def begin(self, timeout: float, _retries: int, _on_retry: Any) -> None:
            """Take the Monitor's."""
            self.timeout = timeout

        def recording(self) -> bytes:
            """Return some."""
            return b"recorded"

        def hole(self, offset: int, length: int) -> int:
            """Know of some zeros."""
            return min(length, 3 * CHUNK + 100 - offset) if 0 < offset < 3 * CHUNK + 100 else 0

    source = opened(tmp_path, Known())
    await source.prepare()
    assert (source.retries, source.timeout, source.identity, source.validator) == (0, 1.0, ("x",), "y")
    source.begin(7.0, None, print)
    assert source.timeout == 7.0
    assert source.hole(0, CHUNK) == 0
    assert source.hole(5, CHUNK) == CHUNK
    source._places[3] = Place(None, 0, CHUNK)
    assert source.hole(2 * CHUNK, 2 * CHUNK) == 2 * CHUNK
    assert source.recording() == b"recorded"
    assert opened(tmp_path).identity is opened(tmp_path).recording() is None
    assert type(pickle.loads(pickle.dumps(opened(tmp_path)))) is type(source)
    await source.aclose()


async def test_evicted_segments_are_let_go(tmp_path: Path) -> None:
    """Their bytes are right as long as they are mapped; then nothing keeps their room on the disk."""
    far = Far(40 * MIB)
    source = opened(tmp_path, far, 8 * MIB)
    address, *_ = source.memory()
    await source.read(0, MIB)
    await until(lambda: not source._fetches._flights)
    assert await asyncio.to_thread(source.cache.trim, 0) > 0
    assert peek(address, 4096) == far.bytes_of(0, 4096)
    assert bytes(source.read_nowait(0, 4096)) == far.bytes_of(0, 4096)
    assert b"segment (deleted)" in await asyncio.to_thread(Path("/proc/self/maps").read_bytes)
    await source._look()
    gc.collect()
    assert b"segment (deleted)" not in await asyncio.to_thread(Path("/proc/self/maps").read_bytes)
    async with asyncio.timeout(60):  # a thread may still have one
        while any("deleted" in path for path in await asyncio.to_thread(descriptors)):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert source.page(0, 4096) is None
    for offset in range(0, far.size, MIB):
        assert bytes(await source.read(offset, MIB)) == far.bytes_of(offset, MIB)
        files = await asyncio.to_thread(source.cache._opened.segments.files)
        assert sum(file.st_size for _, file in files) <= 8 * MIB
    await source.aclose()


async def test_what_the_native_part_copies_is_used(tmp_path: Path) -> None:
    """So it is not evicted before what nobody has used for longer; without a view nobody has."""
    source = opened(tmp_path)
    await source.read(0, 2 * CHUNK)
    await until(lambda: len(source._places) == 2)
    await source._look()
    *_, marks = source.memory()
    segment = source._places[1].segment

    async def noted(mark: int) -> bool:
        segment._touched = 0
        os.utime(segment.fd, (1, 1))
        ctypes.memset(marks + mark, 1, 1)
        await source._look()
        return os.fstat(segment.fd).st_mtime > 1

    assert [await noted(mark) for mark in (1, 9, 0)] == [True, False, True]
    ctypes.memset(marks + 1, 1, 1)
    assert list(source._view.used()) == [(CHUNK, CHUNK)]
    await source.aclose()


async def test_a_segment_that_cannot_be_read_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes come from the source."""
    source = opened(tmp_path)
    await source.read(0, 2 * CHUNK)
    await until(lambda: len(source._places) == 2)
    segment = source._places[0].segment

    def fail(_offset: int, _length: int) -> bytes:
        raise OSError(5, "Input/output error")

    for read in (fail, lambda _offset, _length: b"short"):
        monkeypatch.setattr(segment, "read", read)
        source.source.asked.clear()
        place = source._places[0]
        assert bytes(await source.read(0, 4096)) == source.source.bytes_of(0, 4096)
        assert source.source.asked == [(0, 4096)]
        assert 0 not in source._places
        source._places[0] = place
    await source.aclose()


def descriptors() -> list[str]:
    """Return what this process has open in a cache."""
    paths = (path for path in Path("/proc/self/fd").iterdir() if path.is_symlink())
    return [target for target in (os.readlink(path) for path in paths) if ".segment" in target]  # noqa: PTH115


class Machine(RuleBasedStateMachine):
    """Two processes with two sources each, over one cache that is damaged, cut, emptied, and lost."""

    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.loop = asyncio.new_event_loop()
        self.sources: list[Any] = []
        self.start()

    def start(self) -> None:
        """Begin new processes."""
        self.sources = [opened(self.folder, kind(), 8 * MIB) for kind in (Far, Hashed) for _ in range(2)]
        for source in self.sources:
            source.memory()

    def stop(self) -> None:
        """End the processes."""
        for source in self.sources:
            self.loop.run_until_complete(source.aclose())

    def files(self) -> list[Path]:
        """Return what there is of the cache."""
        return sorted(path for path in (self.folder / "cache").glob("*") if path.stat().st_size)

    @rule(which=st.integers(0, 3), start=st.integers(0, 10 * CHUNK), length=st.integers(1, 3 * CHUNK))
    def read(self, which: int, start: int, length: int) -> None:
        """Each byte is right, or the source's own error."""
        source = self.sources[which]
        length = min(length, source.size - start)
        expected = source.source.bytes_of(start, length)
        try:
            assert bytes(self.loop.run_until_complete(source.read(start, length))) == expected
        except aiouffd.SourceError:
            assert source.source.failing
        if source._fetches is not None:
            self.loop.run_until_complete(until(lambda: not source._fetches._tasks))

    @rule(which=st.integers(0, 3), page=st.integers(0, 160))
    def look(self, which: int, page: int) -> None:
        """What is at hand is right."""

        async def in_the_loop() -> None:
            self.compare(which, page)

        self.loop.run_until_complete(in_the_loop())

    @invariant()
    def count(self) -> None:
        """Steps."""
        Machine.steps += 1

    def compare(self, which: int, page: int) -> None:
        """Look at a page in each way that does not wait."""
        source, offset = self.sources[which], page * 4096
        expected = source.source.bytes_of(offset, 4096)
        at = source.page(offset, 4096)
        assert at is None or peek(at, 4096) == expected
        data = source.read_nowait(offset, 4096)
        assert data is None or data == expected
        assert not any(expected[: source.hole(offset, 4096)])
        address, *_ = source.memory()
        if libc.mincore(address + offset, 4096)[0] & 1:
            assert peek(address + offset, 4096) == expected

    @rule(which=st.integers(0, 3))
    def fail(self, which: int) -> None:
        """A source fails, or does so no longer."""
        self.sources[which].source.failing ^= True

    @rule()
    def notice(self) -> None:
        """A second has passed."""
        for source in self.sources:
            self.loop.run_until_complete(source._look())

    @rule(size=st.sampled_from([0, MIB, 2 * MIB]))
    def trim(self, size: int) -> None:
        """Segments are evicted while they are in use."""
        self.sources[0].cache.trim(size)

    @rule(which=st.integers(0, 5))
    def remove(self, which: int) -> None:
        """A file is lost while it is in use."""
        for path in self.files()[which : which + 1]:
            path.unlink()

    @rule(which=st.integers(0, 5), place=st.floats(0, 0.9999), cut=st.booleans(), junk=st.binary(min_size=1))
    def damage(self, which: int, place: float, *, cut: bool, junk: bytes) -> None:
        """While nobody has it open, some bytes change, or a file is cut; then others come, and read all."""
        self.stop()
        for path in self.files()[which : which + 1]:
            at = int(place * path.stat().st_size)
            with path.open("r+b") as file:
                if cut:
                    file.truncate(at)
                for offset in range(at, 0 if cut else path.stat().st_size, 16 << 10):
                    file.seek(offset)
                    file.write(junk)
        self.start()
        for number, source in enumerate(self.sources):
            for start in range(0, source.size, 3 * CHUNK):
                self.read(number, start, 3 * CHUNK)

    @rule()
    def restart(self) -> None:
        """All processes end, and others come."""
        self.stop()
        self.start()

    def teardown(self) -> None:
        """Remove all of it."""
        self.stop()
        self.loop.close()
        shutil.rmtree(self.folder)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=15, stateful_step_count=30, deadline=None)


async def test_chunks_side_by_side_are_mapped_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as they are so in a segment: not over one that is elsewhere, or that is zeros, or shown already."""
    first = opened(tmp_path)
    for chunks in ((0, 3), (6, 1), (4, 2), (8, 3)):
        await first.read(chunks[0] * CHUNK, min(chunks[1] * CHUNK, first.size - chunks[0] * CHUNK))
        await until(lambda: not first._fetches._flights)
    await first.aclose()
    source = opened(tmp_path)
    address, *_ = source.memory()
    shown: list[tuple[int, int]] = []
    show = source._view.show

    def note(offset: int, length: int, fd: int, at: int, unit: int) -> None:
        shown.append((offset // CHUNK, -(-length // CHUNK)))
        show(offset, length, fd, at, unit)

    monkeypatch.setattr(source._view, "show", note)
    assert bytes(await source.read(0, CHUNK)) == source.source.bytes_of(0, CHUNK)
    await until(lambda: len(source._places) == 9)  # 3 and 7 were not read
    assert shown == [(0, 1), (1, 2), (4, 2), (6, 1), (8, 2), (10, 1)]
    for chunk in (0, 1, 2, 4, 5, 6, 8, 9):
        assert peek(address + chunk * CHUNK, CHUNK) == source.source.bytes_of(chunk * CHUNK, CHUNK)
    await source.aclose()


async def test_what_has_come_is_kept_before_a_source_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a program that opens, reads and ends at once leaves a warm cache."""
    source = opened(tmp_path)
    gate, add = threading.Event(), source.cache.add

    def slowly(*arguments: Any) -> Any:
        gate.wait()
        return add(*arguments)

    monkeypatch.setattr(source.cache, "add", slowly)
    assert bytes(await source.read(0, CHUNK)) == source.source.bytes_of(0, CHUNK)
    closing = asyncio.ensure_future(source.aclose())
    assert not (await asyncio.wait([closing], timeout=0.2))[0]
    gate.set()
    await closing
    assert (await asyncio.to_thread(source.cache.statistics))["chunks"] == 1


async def test_one_look_for_segments_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk may take longer than the time between two: both would let the same segment go."""
    monkeypatch.setattr("aiouffd.store.cached_source._WATCH", 0)
    source, begun, go = opened(tmp_path), list[int](), threading.Event()

    def flush() -> None:
        begun.append(1)
        go.wait(60)

    monkeypatch.setattr(source.cache, "flush", flush)
    await source.read(0, 10)
    await until(lambda: begun)
    await source.read(2 * CHUNK, 10)
    for _ in range(20):  # another look would have begun
        await asyncio.to_thread(int)
    assert len(begun) == 1
    go.set()
    await until(lambda: len(begun) > 2)
    await source.aclose()


async def test_where_the_cache_cannot_be_used_faults_go_first_as_well(tmp_path: Path) -> None:
    """The source knows what no thread waits for."""

    class Two(Far):
        async def read_ahead(self, offset: int, length: int) -> bytes:
            """Return the bytes."""
            return self.bytes_of(offset, length)

    far = Two()
    source = opened(tmp_path, far)
    source.cache._full_until = math.inf
    assert bytes(await source.read_ahead(5, 10)) == bytes(await source.read(5, 10)) == far.bytes_of(5, 10)
    assert far.asked == [(5, 10)]
    await source.aclose()
