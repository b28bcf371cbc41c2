"""`store.chunks`: chunks that are fetched once, checked, and kept for a while."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scenario import until
from snapshots import CHUNK, a_record, damage, packs_of

import aiouffd
from aiouffd.sources import steps
from aiouffd.store import chunks as module
from aiouffd.store import create_sync
from aiouffd.store.chunks import Chunks, runs_of, span
from aiouffd.store.folder import Folder
from aiouffd.store.pack import header_length
from aiouffd.store.snapshot import open_snapshot

if TYPE_CHECKING:
    from pathlib import Path

    from aiouffd.store.index import Record
    from aiouffd.store.snapshot import Snapshot

DATA = random.Random(3).randbytes(20 * CHUNK)


class Far:
    """A store that is not local: it answers when it is told to, and counts."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self.go = asyncio.Event()
        self.go.set()
        self.requests: list[tuple[int, int]] = []
        self.fails = 0
        self.harm = 0

    is_local = False

    def name(self, path: str) -> str:
        """As the store's."""
        return f"far/{path}"

    def part(self, path: str) -> Any:
        """Return what reads an object."""
        far = self

        class Part:
            async def read(self, offset: int, length: int) -> bytes:
                far.requests.append((offset, length))
                await far.go.wait()
                if far.fails:
                    far.fails -= 1
                    raise aiouffd.SourceError("server", offset, length, "it is on fire")
                data = bytearray(await asyncio.to_thread(far._folder.read, path, offset, offset + length))
                if far.harm:
                    far.harm -= 1
                    data[5] ^= 1
                return bytes(data)

        return Part()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of random bytes."""
    place = tmp_path_factory.mktemp("made")
    create_sync(DATA, place / "x.snap")
    return place


@pytest.fixture
def snapshot(made: Path) -> Snapshot:
    """It, opened."""
    return open_snapshot(made / "x.snap")


def far(snapshot: Snapshot, kept: int = 1 << 30) -> tuple[Far, Chunks]:
    """Return the snapshot in a store that is far."""
    assert isinstance(snapshot.store, Folder)
    store = Far(snapshot.store)
    snapshot.store = store  # type: ignore[assignment]
    return store, Chunks(snapshot, kept, store.part)


def whole(low: int, high: int) -> list[bytes]:
    """Return what these chunks are."""
    return [DATA[chunk * CHUNK : (chunk + 1) * CHUNK] for chunk in range(low, high)]


async def test_a_local_store(snapshot: Snapshot) -> None:
    """Chunks come, and are kept; what that took is noted for those who wait."""
    chunks, noted = Chunks(snapshot, 1 << 30, lambda _: None), steps.begin()
    assert await chunks.get(3, 17, urgent=True) == whole(3, 17)
    assert {name for name, *_ in noted} == {"chunk", "decompress"}
    for name in ("chunk", "decompress"):
        assert sum(details["count"] for each, *_, details in noted if each == name) == 14
    assert chunks.at_hand(3) == whole(3, 4)[0]
    assert chunks.at_hand(2) is None
    await chunks.aclose()
    assert chunks.at_hand(3) is None


async def test_neighbors_are_one_request_and_come_once(snapshot: Snapshot) -> None:
    """However many ask, and whichever chunks are on their way or kept."""
    store, chunks = far(snapshot)
    assert await chunks.get(4, 5, urgent=True) == whole(4, 5)
    found = await asyncio.gather(*(chunks.get(low, low + 4, urgent=bool(low % 2)) for low in range(8)))
    assert found == [whole(low, low + 4) for low in range(8)]
    assert sum(length for _, length in store.requests) == 11 * CHUNK
    assert len(store.requests) <= 8  # the first of them for four chunks
    before = len(store.requests)
    assert await chunks.get(0, 11, urgent=True) == whole(0, 11)
    assert len(store.requests) == before
    assert await chunks.get(12, 20, urgent=True) == whole(12, 20)
    assert len(store.requests) == before + 1
    await chunks.aclose()


async def test_what_is_kept_is_bounded(snapshot: Snapshot) -> None:
    """The least recently used goes first; all that was asked for comes."""
    _, chunks = far(snapshot, 3 * CHUNK)
    await chunks.get(0, 3, urgent=True)
    assert chunks.at_hand(0) is not None
    await chunks.get(5, 6, urgent=True)
    assert [chunks.at_hand(chunk) is not None for chunk in (0, 1, 2, 5)] == [True, False, True, True]
    assert await chunks.get(0, 20, urgent=True) == whole(0, 20)
    assert sum(chunks.at_hand(chunk) is not None for chunk in range(20)) == 3
    await chunks.aclose()


async def test_canceling_costs_others_nothing(snapshot: Snapshot) -> None:
    """What is on its way comes for those who ask next."""
    store, chunks = far(snapshot)
    store.go.clear()
    first = asyncio.ensure_future(chunks.get(0, 4, urgent=True))
    second = asyncio.ensure_future(chunks.get(2, 6, urgent=True))
    await until(lambda: len(store.requests) == 2)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    store.go.set()
    assert await second == whole(2, 6)
    assert await chunks.get(0, 2, urgent=True) == whole(0, 2)
    assert len(store.requests) == 2
    await chunks.aclose()


async def test_what_a_fault_waits_for_overtakes(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what was begun without haste: while it is fetched, and while it waits for a thread."""
    monkeypatch.setattr(module, "_THREADS", 1)
    store, chunks = far(snapshot)
    done: list[int] = []
    expand = chunks._expand

    def note(batch: list[Record], *rest: Any) -> Any:
        done.append(batch[0].chunk)
        return expand(batch, *rest)

    monkeypatch.setattr(chunks, "_expand", note)
    store.go.clear()
    gate = threading.Event()
    held = chunks._workers.submit(gate.wait, urgent=True)

    def ask(chunk: int, *, urgent: bool) -> asyncio.Task[list[Any]]:
        return asyncio.ensure_future(chunks.get(chunk, chunk + 1, urgent=urgent))

    asked = [ask(0, urgent=False), ask(4, urgent=False), ask(8, urgent=False), ask(8, urgent=True)]
    await until(lambda: len(store.requests) == 3)
    store.go.set()
    await until(lambda: len(chunks._workers._ahead) == 2 and len(chunks._workers._urgent) == 1)
    asked.append(ask(4, urgent=True))
    await until(lambda: len(chunks._workers._urgent) == 2)
    gate.set()
    await asyncio.gather(*asked, held.result())
    assert done == [8, 4, 0]
    await chunks.aclose()


async def test_a_store_that_fails(snapshot: Snapshot) -> None:
    """Each chunk's error names it; asked again, it comes."""
    store, chunks = far(snapshot)
    store.fails = 1
    with pytest.raises(aiouffd.StoreError, match=r"^far/packs/.*, chunk 3 \[196608, 262144\): it is on fire") as caught:
        await chunks.get(3, 5, urgent=True)
    assert isinstance(caught.value.__cause__, aiouffd.SourceError)
    assert await chunks.get(3, 5, urgent=True) == whole(3, 5)
    await chunks.aclose()


async def test_what_was_damaged_on_its_way_is_fetched_again(snapshot: Snapshot) -> None:
    """Once: the chunk alone."""
    store, chunks = far(snapshot)
    store.harm = 1
    assert await chunks.get(3, 5, urgent=True) == whole(3, 5)
    assert [length for _, length in store.requests] == [2 * CHUNK, CHUNK]
    store.harm = 2
    with pytest.raises(aiouffd.StoreError, match=r"chunk 6 .* it is damaged: its hash is another than the index says"):
        await chunks.get(6, 8, urgent=True)
    assert await chunks.get(7, 8, urgent=True) == whole(7, 8)
    await chunks.aclose()


async def test_a_damaged_chunk_costs_no_other(tmp_path: Path) -> None:
    """Neither those of its request; and it is no byte of a page."""
    await asyncio.to_thread(create_sync, DATA, tmp_path / "x.snap")
    opened = await asyncio.to_thread(open_snapshot, tmp_path / "x.snap")
    record = opened.index.find(7)
    assert record is not None
    (pack,) = packs_of(tmp_path)
    await asyncio.to_thread(damage, pack, record.offset + 1000)
    chunks = Chunks(opened, 1 << 30, lambda _: None)
    for _ in range(2):
        with pytest.raises(aiouffd.StoreError, match=rf"^{pack}, chunk 7 \[458752, 524288\): it is damaged") as caught:
            await chunks.get(6, 9, urgent=True)
        assert caught.value.chunk == 7
    assert await chunks.get(8, 9, urgent=True) == whole(8, 9)
    await asyncio.to_thread(pack.write_bytes, pack.read_bytes()[: record.offset + 5])
    with pytest.raises(aiouffd.StoreError, match=r"chunk 7 .* the object ends 65531 bytes too early"):
        await chunks.get(7, 8, urgent=True)
    await asyncio.to_thread(pack.unlink)
    with pytest.raises(aiouffd.StoreError, match=r"chunk 9 .* it is missing"):
        await chunks.get(9, 10, urgent=True)
    assert await chunks.get(6, 7, urgent=True) == whole(6, 7)
    await chunks.aclose()


async def test_a_local_file_system_that_fails_for_a_while(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked again, more and more rarely, and not for ever; what is missing is missing at once."""
    monkeypatch.setattr(module, "_PAUSES", (0, 0))
    chunks = Chunks(snapshot, 1 << 30, lambda _: None)
    failures: list[int] = []
    read = Folder.read

    def failing(self: Folder, path: str, start: int, stop: int) -> bytes:
        if failures:
            number = failures.pop()
            raise self.failure(path, OSError(number, os.strerror(number))) from OSError(number, os.strerror(number))
        return read(self, path, start, stop)

    monkeypatch.setattr(Folder, "read", failing)
    failures[:] = [errno.EIO] * 2
    assert await chunks.get(0, 20, urgent=True) == whole(0, 20)
    chunks._kept.clear()
    failures[:] = [errno.EIO] * 9
    with pytest.raises(aiouffd.StoreError, match=r"chunk 3 .*Input/output error.*the disk"):
        await chunks.get(3, 4, urgent=True)
    assert len(failures) == 6
    failures[:] = [errno.ENOENT] * 9
    with pytest.raises(aiouffd.StoreError, match=r"chunk 3 .*it is missing"):
        await chunks.get(3, 4, urgent=True)
    assert len(failures) == 8
    await chunks.aclose()


async def test_closing_ends_what_is_under_way(snapshot: Snapshot) -> None:
    """Who waits is told so."""
    store, chunks = far(snapshot)
    store.go.clear()
    waiting = asyncio.ensure_future(chunks.get(0, 4, urgent=True))
    await until(lambda: bool(store.requests))
    late = asyncio.ensure_future(chunks.get(4, 8, urgent=True))
    await asyncio.sleep(0)  # it waits for a task, which has not begun
    await chunks.aclose()
    for each in (waiting, late):
        with pytest.raises(aiouffd.StoreError, match="CancelledError"):
            await asyncio.wait_for(each, 20)


records = st.builds(
    a_record,
    chunk=st.integers(0, 5000),
    pack=st.integers(0, 2),
    offset=st.integers(0, 1 << 23),
    length=st.integers(1, 1 << 16),
)


@given(st.lists(records, max_size=30))
def test_runs(given: list[Record]) -> None:
    """Each record is in one run, of one pack, that is bounded and has no large gap."""
    runs = runs_of(given)
    assert sorted(record for run in runs for record in run) == sorted(given)
    for run in runs:
        start, stop = span(run)
        assert len({record.pack for record in run}) == 1
        assert stop - start <= (4 << 20) + (1 << 16)
        assert all(start <= record.offset and record.offset + record.length <= stop for record in run)


def test_where_a_request_is_cut() -> None:
    """At another pack, at a gap that costs more than a request, and where it would be too long."""
    far_off = header_length(1) + 100 + (32 << 10)
    together = [a_record(0), a_record(1, offset=far_off), a_record(5, offset=far_off + 100)]
    assert runs_of(together) == [together]
    assert runs_of([a_record(0), a_record(1, offset=far_off + 1)]) == [[a_record(0)], [a_record(1, offset=far_off + 1)]]
    assert len(runs_of([a_record(0), a_record(1, pack=1, offset=140)])) == 2
    assert len(runs_of(a_record(n, offset=64 + n * 65536, length=65536) for n in range(65))) == 2


async def test_one_chunk_alone_needs_no_thread(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes less time than waking one; with others under way the loop is kept free."""
    store, chunks = far(snapshot)
    jobs: list[object] = []
    submit = chunks._workers.submit

    def note(call: Any, *, urgent: bool) -> Any:
        jobs.append(call)
        return submit(call, urgent=urgent)

    monkeypatch.setattr(chunks._workers, "submit", note)
    assert await chunks.get(3, 4, urgent=True) == whole(3, 4)
    assert jobs == []
    assert await asyncio.gather(chunks.get(5, 6, urgent=True), chunks.get(9, 10, urgent=True))
    assert jobs
    assert len(store.requests) == 3
    await chunks.aclose()
