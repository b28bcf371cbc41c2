"""`store.writer`: snapshots that are written, and read again."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshots import CHUNK, an_image, packs_of, read_all

import aiouffd
from aiouffd.engine.ahead.trace import Recorder
from aiouffd.store import create, create_sync, layer
from aiouffd.store.snapshot import open_snapshot, read_linked, trace_path

if TYPE_CHECKING:
    from pathlib import Path

    from aiouffd.store.manifest import Manifest

DATA = an_image(7, 25, 1000)


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("chunk", [CHUNK, 4 * CHUNK, 8 << 20])
def test_what_is_written_is_read(tmp_path: Path, codec: str, chunk: int) -> None:
    """By each codec, in chunks of any size."""
    manifest = create_sync(DATA, tmp_path / "x.snap", codec=codec, chunk_size=chunk, metadata={"a": [1]})
    assert read_all(tmp_path / "x.snap") == DATA
    assert (manifest.size, manifest.chunk_size, manifest.codec) == (len(DATA), chunk, codec)
    assert manifest.metadata == {"a": [1]}


def test_it_is_private(tmp_path: Path) -> None:
    """Other users can read none of it."""
    create_sync(DATA, tmp_path / "store" / "x.snap")
    for path in (tmp_path / "store", *(tmp_path / "store").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600)


def test_zeros_and_holes_are_not_written(tmp_path: Path) -> None:
    """A file of holes and zeros has neither packs nor records."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(bytes(3 * CHUNK))
        file.truncate(1 << 40)
    create_sync(path, tmp_path / "x.snap")
    opened = open_snapshot(tmp_path / "x.snap")
    assert (opened.index.size, opened.index.records, opened.index.packs) == (1 << 40, 0, 0)
    assert not packs_of(tmp_path)


@pytest.mark.parametrize("end", [0, 100, 4096, CHUNK, CHUNK + 1])
def test_extents_that_do_not_end_with_a_chunk(tmp_path: Path, end: int) -> None:
    """Each chunk that has data anywhere is there once."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        for at in (5 * 4096, 2 * CHUNK - 4096, 7 * CHUNK + 8192, 7 * CHUNK + 16384):
            file.seek(at)
            file.write(b"x" * 4096)
        file.truncate(9 * CHUNK + end)
    create_sync(path, tmp_path / "x.snap")
    assert read_all(tmp_path / "x.snap") == path.read_bytes()
    assert [record.chunk for record in open_snapshot(tmp_path / "x.snap").index.find_all()] == [0, 1, 7]


def test_a_layer_has_what_has_changed(tmp_path: Path) -> None:
    """The base's chunks stay where they are; the base can be removed."""
    changed = bytearray(DATA)
    changed[3 * CHUNK : 3 * CHUNK + 5] = b"hello"
    changed[10 * CHUNK : 11 * CHUNK] = bytes(CHUNK)
    changed[-1] ^= 1
    create_sync(DATA, tmp_path / "a.snap")
    before = set(packs_of(tmp_path))
    manifest = create_sync(bytes(changed), tmp_path / "b.snap", base=tmp_path / "a.snap")
    (new,) = set(packs_of(tmp_path)) - before
    assert new.stat().st_size < 2 * CHUNK + 1000
    assert manifest.base == "a.snap"
    (tmp_path / "a.snap").unlink()
    assert read_all(tmp_path / "b.snap") == bytes(changed)


@pytest.mark.parametrize("size", [5, 3 * CHUNK, 20 * CHUNK + 7, 40 * CHUNK])
def test_a_layer_of_another_size(tmp_path: Path, size: int) -> None:
    """An image may shrink and grow."""
    data = (DATA + an_image(8, 20))[:size]
    create_sync(DATA, tmp_path / "a.snap", chunk_size=2 * CHUNK)
    manifest = create_sync(data, tmp_path / "b.snap", base=tmp_path / "a.snap")
    assert manifest.chunk_size == 2 * CHUNK
    assert read_all(tmp_path / "b.snap") == data
    assert read_all(tmp_path / "a.snap") == DATA


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.booleans()), min_size=1, max_size=8))
def test_any_layers(tmp_path_factory: pytest.TempPathFactory, layers: list[tuple[int, int, bool]]) -> None:
    """Layers upon any of those before, with other codecs and sizes: each is what it was made from, also in the end."""
    place = tmp_path_factory.mktemp("layers")
    made: list[bytes] = []
    for number, (seed, change, upon) in enumerate(layers):
        data = bytearray(made[seed % len(made)] if made and upon else an_image(seed, 2 + seed, seed * 100))
        data[change * CHUNK : change * CHUNK + change] = bytes([number]) * change
        base = place / f"{seed % len(made)}.snap" if made and upon else None
        codec = ("zstd", "lz4", "none", "zstd")[change]
        chunk = None if base else CHUNK << (seed % 3)
        create_sync(bytes(data), place / f"{number}.snap", base=base, codec=codec, chunk_size=chunk)
        made.append(bytes(data))
    assert [read_all(place / f"{number}.snap") for number in range(len(made))] == made


def a_diff(path: Path, size: int, data: dict[int, bytes]) -> None:
    """Write a sparse file with some data."""
    with path.open("wb") as file:
        for at, piece in data.items():
            file.seek(at)
            file.write(piece)
        file.truncate(size)


@settings(max_examples=30)
@given(
    st.dictionaries(st.integers(0, 4 * 16 + 2), st.sampled_from(["zeros", "bytes"]), max_size=8),
    st.sampled_from([CHUNK, 2 * CHUNK]),
)
def test_a_diff_of_firecracker(tmp_path_factory: pytest.TempPathFactory, pages: dict[int, str], chunk: int) -> None:
    """Its holes are its base's, and its data is its own, also where that is zeros; a chunk may have both."""
    place = tmp_path_factory.mktemp("diff")
    image = bytearray(an_image(len(pages), 4, 3 * 4096))
    data = {page * 4096: bytes(4096) if kind == "zeros" else os.urandom(4096) for page, kind in pages.items()}
    create_sync(bytes(image), place / "base.snap", chunk_size=chunk)
    a_diff(place / "diff.mem", len(image), data)
    for at, piece in data.items():
        image[at : at + 4096] = piece
    create_sync(place / "diff.mem", place / "x.snap", base=place / "base.snap", diff=True)
    assert read_all(place / "x.snap") == image
    create_sync(bytes(image), place / "y.snap", base=place / "base.snap")
    assert open_snapshot(place / "x.snap").manifest == open_snapshot(place / "y.snap").manifest


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 20 * CHUNK), st.integers(0, 3 * CHUNK)), max_size=4))
def test_only_what_may_have_changed_is_read(
    tmp_path_factory: pytest.TempPathFactory, ranges: list[tuple[int, int]]
) -> None:
    """What is in no range is as in the base, whatever the source has there."""
    place = tmp_path_factory.mktemp("changed")
    before, after = an_image(1, 18, 77), bytearray(an_image(1, 18, 77))
    for start, length in ranges:
        after[start : start + length] = os.urandom(len(after[start : start + length]))
    asked: list[tuple[int, int]] = []

    class Source:
        size = len(after)

        async def read(self, offset: int, length: int) -> bytes:
            asked.append((offset, offset + length))
            return bytes(after[offset : offset + length])

    create_sync(before, place / "a.snap")
    changed = [aiouffd.Range(*item) for item in ranges]
    create_sync(Source(), place / "b.snap", base=place / "a.snap", changed=changed)
    assert read_all(place / "b.snap") == after
    for low, high in asked:
        assert all(any(item.start < at + CHUNK and at < item.end for item in changed) for at in range(low, high, CHUNK))


def test_another_snapshot_is_a_source(tmp_path: Path) -> None:
    """With chunks of another size; its zeros are not read."""
    create_sync(DATA, tmp_path / "a.snap")
    create_sync(tmp_path / "a.snap", tmp_path / "b.snap", chunk_size=4 * CHUNK)
    assert read_all(tmp_path / "b.snap") == DATA


def test_the_same_again_writes_nothing(tmp_path: Path) -> None:
    """What is in the store already is found, and equal images have equal manifests."""
    first = create_sync(DATA, tmp_path / "a.snap")
    before = {path: path.stat().st_mtime_ns for path in packs_of(tmp_path)}
    assert create_sync(DATA, tmp_path / "b.snap") == first
    assert {path: path.stat().st_mtime_ns for path in packs_of(tmp_path)} == before


def test_a_snapshot_is_replaced_only_if_asked_to(tmp_path: Path) -> None:
    """Else it stays; this is noticed before anything is read, and again at the end."""
    create_sync(DATA, tmp_path / "a.snap")
    with pytest.raises(aiouffd.StoreError, match=r"a\.snap: there is a snapshot of that name already"):
        create_sync("/nowhere", tmp_path / "a.snap")

    def race(done: int, whole: int) -> None:
        if done == whole:
            (tmp_path / "b.snap").write_bytes((tmp_path / "a.snap").read_bytes())

    with pytest.raises(aiouffd.StoreError, match=r"b\.snap: there is a snapshot of that name already"):
        create_sync(b"abc", tmp_path / "b.snap", progress=race)
    assert read_all(tmp_path / "b.snap") == DATA
    create_sync(b"abc", tmp_path / "b.snap", replace=True)
    assert read_all(tmp_path / "b.snap") == b"abc"


async def test_canceling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No snapshot appears; the next goes on where this one was."""
    monkeypatch.setattr(layer, "PACK_BYTES", 1 << 20)
    path = tmp_path / "x"
    await asyncio.to_thread(path.write_bytes, an_image(3, 500))
    seen = asyncio.Event()
    loop = asyncio.get_running_loop()

    def report(done: int, _: int) -> None:
        if done > 8 << 20:
            loop.call_soon_threadsafe(seen.set)

    task = asyncio.ensure_future(create(path, tmp_path / "x.snap", codec="none", progress=report))
    await seen.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not (tmp_path / "x.snap").exists()
    before = {pack: pack.stat().st_mtime_ns for pack in packs_of(tmp_path)}
    assert before
    await create(path, tmp_path / "x.snap", codec="none")
    after = {pack: pack.stat().st_mtime_ns for pack in packs_of(tmp_path)}
    assert before.items() <= after.items()
    assert await asyncio.to_thread(read_all, tmp_path / "x.snap") == await asyncio.to_thread(path.read_bytes)


def test_progress(tmp_path: Path) -> None:
    """It grows up to the size of the image."""
    told: list[tuple[int, int]] = []
    data = an_image(1, 64)
    create_sync(data, tmp_path / "x.snap", progress=lambda *now: told.append(now))
    assert told == [(done << 20, len(data)) for done in range(1, 5)]


def test_a_recording_is_kept_with_it(tmp_path: Path) -> None:
    """It is checked before."""
    recorder = Recorder.create(tmp_path / "r", 4096, len(DATA))
    recorder.note(8192)
    recorder.complete()
    manifest = create_sync(DATA, tmp_path / "a.snap", trace=tmp_path / "r")
    assert manifest.trace is not None
    opened = open_snapshot(tmp_path / "a.snap")
    data = read_linked(opened.store, trace_path(manifest.trace), manifest.trace)
    assert data == (tmp_path / "r").read_bytes()
    with pytest.raises(aiouffd.TraceError, match="its size is another"):
        create_sync(b"abc", tmp_path / "b.snap", trace=tmp_path / "r")
    with pytest.raises(aiouffd.TraceError):
        create_sync(b"abc", tmp_path / "b.snap", trace=tmp_path / "a.snap")


def refused(tmp_path: Path, source: Any = b"abc", **options: Any) -> Manifest:
    """Try to write a snapshot beside one with chunks of 128 KiB."""
    create_sync(b"abc", tmp_path / "a.snap", chunk_size=2 * CHUNK)
    return create_sync(source, tmp_path / "b.snap", **options)


@pytest.mark.parametrize(
    ("options", "kind", "complaint"),
    [
        ({"source": b""}, aiouffd.StoreError, "its source is empty"),
        ({"source": "/nowhere"}, aiouffd.SourceError, "/nowhere"),
        ({"source": 5}, TypeError, "is no path"),
        ({"codec": "gzip"}, ValueError, "gzip"),
        ({"codecs": "zstd"}, TypeError, "the nearest that it takes is 'codec'"),
        ({"level": 99}, ValueError, "level"),
        ({"chunk_size": 5000}, ValueError, "chunk_size"),
        ({"chunk_size": 16 << 20}, ValueError, "chunk_size"),
        ({"metadata": {"a": object()}}, TypeError, "JSON"),
        ({"page_size": 5}, aiouffd.StoreError, "page_size"),
        ({"base": "missing.snap"}, aiouffd.StoreError, "there is no such snapshot"),
        ({"base": "a.mem"}, aiouffd.StoreError, "ends with"),
        ({"base": "a.snap", "chunk_size": CHUNK}, aiouffd.StoreError, "which are of 131072 bytes"),
        ({"diff": True}, ValueError, "since base="),
        ({"changed": []}, ValueError, "base= names it"),
        ({"changed": [], "diff": True, "base": "a.snap"}, ValueError, "takes the place of changed="),
        ({"changed": [], "base": "a.snap", "source": b"four"}, aiouffd.StoreError, "it has 3 bytes, and what has"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], kind: type[Exception], complaint: str
) -> None:
    """The error says why, and no snapshot appears."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=complaint):
        refused(tmp_path, **options)
    assert not (tmp_path / "b.snap").exists()


def test_a_base_is_in_the_same_store(tmp_path: Path) -> None:
    """By whatever name."""
    create_sync(DATA, tmp_path / "one" / "a.snap")
    (tmp_path / "same").symlink_to("one")
    create_sync(DATA, tmp_path / "same" / "b.snap", base=tmp_path / "one" / "a.snap")
    with pytest.raises(aiouffd.StoreError, match="must be in the store of its layer"):
        create_sync(DATA, tmp_path / "other" / "b.snap", base=tmp_path / "one" / "a.snap")


def test_a_source_that_changes(tmp_path: Path) -> None:
    """No snapshot of a mixture appears."""
    path = tmp_path / "x"
    path.write_bytes(DATA)
    os.utime(path, ns=(0, 0))

    def write_again(*_: int) -> None:
        path.write_bytes(DATA)

    with pytest.raises(aiouffd.SourceError, match="the file has changed while it was read"):
        create_sync(path, tmp_path / "x.snap", progress=write_again)
    assert not (tmp_path / "x.snap").exists()
