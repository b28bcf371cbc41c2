"""`store.layer`: packs and the index of a snapshot that is being written."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from snapshots import CHUNK, packs_of

import aiouffd
from aiouffd.store import layer as module
from aiouffd.store.codecs import digest
from aiouffd.store.folder import Folder
from aiouffd.store.index import Index
from aiouffd.store.layer import Layer, in_order
from aiouffd.store.snapshot import index_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiouffd.store.manifest import Link

CHUNKS = [bytes([n]) * CHUNK for n in range(1, 6)]


@pytest.fixture
def store(tmp_path: Path) -> Folder:
    """An empty store."""
    return Folder(str(tmp_path))


@pytest.fixture(autouse=True)
def _small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack has two chunks."""
    monkeypatch.setattr(module, "PACK_BYTES", 2 * CHUNK)


@contextmanager
def begun(store: Folder, base: Index | None = None, codec: str = "zstd") -> Iterator[Layer]:
    """A layer of ten chunks."""
    with (
        ThreadPoolExecutor(2) as pool,
        ThreadPoolExecutor(2) as writing,
        Layer(store, 10 * CHUNK, CHUNK, codec, 3, base, pool, writing) as layer,
    ):
        yield layer


def add(layer: Layer, *chunks: int) -> None:
    """Add chunks; what they hold says their number."""
    for chunk in chunks:
        layer.add(chunk, digest(CHUNKS[chunk % 5]), CHUNKS[chunk % 5])


def index_of(store: Folder, link: Link) -> Index:
    """Return an index that was written."""
    return Index(store.read(index_path(link), 0, link.length), "x")


def test_chunks_go_to_packs_in_order(store: Folder, tmp_path: Path) -> None:
    """The index says where, and what is zeros."""
    with begun(store) as layer:
        add(layer, 1, 2, 4, 8, 9)
        link = layer.finish()
    index = index_of(store, link)
    assert [(record.chunk, record.pack) for record in index.find_all()] == [(1, 0), (2, 0), (4, 1), (8, 1), (9, 2)]
    assert [record.hash for record in index.find_all()] == [digest(CHUNKS[n % 5]) for n in (1, 2, 4, 8, 9)]
    assert sorted(index.pack(n).path for n in range(3)) == [
        str(path.relative_to(tmp_path)) for path in packs_of(tmp_path)
    ]
    assert [index.pack(n).length for n in range(3)] == [store.size(index.pack(n).path) for n in range(3)]


def test_chunks_of_the_base_stay_where_they_are(store: Folder) -> None:
    """Only the packs that are needed are named."""
    with begun(store) as layer:
        add(layer, 1, 2, 4, 8)
        base = index_of(store, layer.finish())
    with begun(store, base) as layer:
        add(layer, 0)
        kept = base.find(4), base.find(8)
        for record in kept:
            assert record is not None
            layer.keep(record)
        add(layer, 9)
        index = index_of(store, layer.finish())
    found = list(index.find_all())
    assert [record.chunk for record in found] == [0, 4, 8, 9]
    assert [index.pack(record.pack) for record in found[1:3]] == [base.pack(1)] * 2
    assert [record[2:] for record in found[1:3]] == [record[2:] for record in kept if record is not None]
    assert index.packs == 2
    assert len(packs_of(Path(store.path))) == 3


def test_who_begins_again_takes_over_what_is_there(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is neither compressed nor written again."""
    with begun(store) as layer:
        add(layer, 1, 2, 4)  # and killed: one pack is there
    puts: list[str] = []
    put = store.put

    def note(path: str, parts: Any, **options: Any) -> bool:
        puts.append(path)
        return put(path, parts, **options)

    monkeypatch.setattr(store, "put", note)
    with begun(store) as layer:
        add(layer, 1, 2, 4)
        first = layer.finish()
    assert [path.partition("/")[0] for path in puts] == ["packs", "indexes"]
    with begun(store) as layer:
        add(layer, 1, 2, 4)
        assert layer.finish() == first
        assert layer.written == 0


@pytest.mark.parametrize("harm", ["old", "cut", "damaged", "name", "other"])
def test_what_is_not_taken_over(store: Folder, tmp_path: Path, harm: str) -> None:
    """A pack that may be collected soon, and one that is not what its name says."""
    with begun(store) as layer:
        add(layer, 1, 2)
        first = layer.finish()
    (path,) = packs_of(tmp_path)
    whole = path.read_bytes()
    if harm == "old":
        os.utime(path, (0, time.time() - module.REUSED - 60))
    elif harm == "cut":
        path.write_bytes(whole[:-1])
    elif harm == "damaged":
        path.write_bytes(b"x" + whole[1:])
    elif harm == "name":
        path.rename(path.with_name(".part-5"))
    else:
        path.write_bytes(whole[:30] + b"x" + whole[31:])
    before = path.stat().st_mtime_ns if path.exists() else 0
    with begun(store) as layer:
        add(layer, 1, 2)
        assert layer.finish() == first
        assert layer.written == len(whole)
    assert path.read_bytes() == whole
    assert path.stat().st_mtime_ns > before


def test_a_pack_that_is_removed_meanwhile(store: Folder, tmp_path: Path) -> None:
    """No index names it."""
    with begun(store) as layer:
        add(layer, 1, 2)
        base = index_of(store, layer.finish())
    with begun(store, base) as layer:
        record = base.find(1)
        assert record is not None
        layer.keep(record)
        (path,) = packs_of(tmp_path)
        path.unlink()
        with pytest.raises(aiouffd.StoreError, match=f"^{path}: it has gone while a layer was written upon it"):
            layer.finish()
    assert len(list(tmp_path.glob("indexes/*"))) == 1


def test_the_index_is_last(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind all packs, however long they take."""
    order, put = [], store.put

    def slow(path: str, parts: object, **options: bool) -> bool:
        if path.startswith("packs"):
            time.sleep(0.02)
        done = put(path, parts, **options)  # type: ignore[arg-type]
        order.append(path.partition("/")[0])
        return done

    monkeypatch.setattr(store, "put", slow)
    with begun(store) as layer:
        add(layer, 1, 2, 3, 4, 5)
        layer.finish()
    assert order == ["packs"] * 3 + ["indexes"]


def test_a_pack_that_cannot_be_written(store: Folder, tmp_path: Path) -> None:
    """The error comes, and there is no index."""
    (tmp_path / "packs").touch()
    with begun(store) as layer:
        add(layer, 1)
        with pytest.raises(aiouffd.StoreError, match=r"/packs/.*NotADirectoryError"):
            layer.finish()
    assert not list(tmp_path.glob("indexes/*"))


def test_in_order() -> None:
    """Results come in the order of the items, and not too many are under way."""
    lock, now, most = threading.Lock(), 0, 0

    def work(item: int) -> int:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.001 * (item % 3))
        with lock:
            now -= 1
        return item

    with ThreadPoolExecutor(8) as pool:
        assert list(in_order(pool, work, range(40), 4)) == list(range(40))
    assert most <= 4


def test_records_are_written_whole(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a write becomes short; and if there is no room for them, that is a StoreError."""
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    with begun(store) as layer:
        add(layer, 1, 2, 4)
        index = index_of(store, layer.finish())
    assert [record.hash for record in index.find_all()] == [digest(CHUNKS[n % 5]) for n in (1, 2, 4)]

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with begun(store) as layer:
        add(layer, 1)
        with pytest.raises(aiouffd.StoreError, match=r"no room for a copy of it \(No space left on device\)"):
            layer.finish()
