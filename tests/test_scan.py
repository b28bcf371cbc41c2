"""`store.scan`: to check, extract and compare whole snapshots."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshots import CHUNK, an_image, damage, packs_of

import aiouffd
from aiouffd import Range
from aiouffd.engine.ahead.trace import Recorder
from aiouffd.store import (
    create,
    create_sync,
    diff,
    diff_sync,
    extract,
    extract_sync,
    open_snapshot,
    verify,
    verify_sync,
    writer,
)
from aiouffd.store.codecs import digest
from aiouffd.store.scan import scan

if TYPE_CHECKING:
    from pathlib import Path

    from aiouffd.store.index import Record
    from aiouffd.store.snapshot import Snapshot

DATA = bytes(CHUNK) + an_image(21, 150, 1000)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of two layers."""
    place = tmp_path_factory.mktemp("made")
    create_sync(DATA[: 90 * CHUNK] + an_image(5, 61, 1000), place / "base.snap")
    create_sync(DATA, place / "x.snap", base=place / "base.snap")
    return place


@pytest.mark.parametrize(("chunk_size", "most"), [(CHUNK, 64), (2 << 20, 2), (8 << 20, 1)])
def test_few_bytes_of_the_image_are_together(
    chunk_size: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However large chunks are, and however small their frames: each thread has so much in memory, several times."""
    create_sync(b"\1" * (17 << 20), tmp_path / "x.snap", chunk_size=chunk_size)
    runs: list[int] = []

    def note(_snapshot: Snapshot, run: list[Record]) -> list[tuple[Record, Any]]:
        runs.append(len(run))
        return [(record, b"") for record in run]

    monkeypatch.setattr("aiouffd.store.scan._fetch", note)
    assert len(list(scan(open_snapshot(tmp_path / "x.snap")))) == len(runs)
    assert max(runs) == most


def test_all_chunks(made: Path) -> None:
    """Each that is not zeros, once."""
    data = bytearray(len(DATA))
    seen = set()
    for some in scan(open_snapshot(made / "x.snap")):
        for record, outcome in some:
            assert record.chunk not in seen
            seen.add(record.chunk)
            data[record.chunk * CHUNK : record.chunk * CHUNK + len(outcome)] = outcome
    assert data == DATA


async def test_all_is_well(made: Path) -> None:
    """Nothing is found."""
    told: list[tuple[int, int]] = []
    assert await verify(made / "x.snap", progress=lambda *now: told.append(now)) == []
    assert told[-1] == (len(DATA), len(DATA))
    assert all(done <= whole for done, whole in told)


def test_all_that_is_damaged_is_found(tmp_path: Path) -> None:
    """Not only the first; and a recording, too."""
    recorder = Recorder.create(tmp_path / "r", 4096, len(DATA))
    recorder.note(8192)
    recorder.complete()
    create_sync(DATA, tmp_path / "x.snap", trace=tmp_path / "r")
    records = list(open_snapshot(tmp_path / "x.snap").index.find_all())
    (pack,) = packs_of(tmp_path)
    for record in (records[3], records[70]):
        damage(pack, record.offset + record.length - 1)
    (recording,) = tmp_path.glob("traces/*")
    damage(recording, 50)
    found = verify_sync(tmp_path / "x.snap")
    assert [error.chunk for error in found] == [None, records[3].chunk, records[70].chunk]
    assert [error.source for error in found] == [str(recording), str(pack), str(pack)]
    pack.unlink()
    assert len(verify_sync(tmp_path / "x.snap")) == 1 + len(records)


def test_a_hash_of_other_bytes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer was wrong: readers do not notice, but caches and layers would take chunks for others."""
    monkeypatch.setattr(writer, "digest", lambda data: digest(data)[::-1])
    create_sync(b"x" * 5, tmp_path / "x.snap")
    (error,) = verify_sync(tmp_path / "x.snap")
    assert (error.chunk, error.reason) == (0, "it was written with the hash of other bytes")


def test_extract(made: Path, tmp_path: Path) -> None:
    """The file is what the snapshot was made from, with holes; and it is private."""
    extract_sync(made / "x.snap", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == DATA
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "out").stat().st_blocks * 512 < len(DATA)


async def test_a_damaged_snapshot_is_not_extracted(tmp_path: Path) -> None:
    """What was there stays."""
    (tmp_path / "out").write_bytes(b"before")
    await create(DATA, tmp_path / "x.snap")
    (pack,) = packs_of(tmp_path)
    await asyncio.to_thread(damage, pack, pack.stat().st_size - 1)
    with pytest.raises(aiouffd.StoreError, match="it is damaged"):
        await extract(tmp_path / "x.snap", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"before"
    assert not list(tmp_path.glob(".part-*"))
    with pytest.raises(aiouffd.StoreError, match="must not have the name of a snapshot"):
        await extract(tmp_path / "x.snap", tmp_path / "x.snap")


def expected(one: bytes, other: bytes, unit: int) -> list[Range]:
    """Return where two images differ."""
    found: list[Range] = []
    size = max(len(one), len(other))
    for at in range(0, size, unit):
        if one[at : at + unit] != other[at : at + unit]:
            start = found.pop().start if found and found[-1].end == at else at
            found.append(Range.between(start, min(at + unit, size)))
    return found


@settings(max_examples=20)
@given(
    st.integers(0, 3),
    st.sets(st.integers(0, 9)),
    st.integers(1, 10 * CHUNK),
    st.sampled_from([CHUNK, 2 * CHUNK, 4 * CHUNK]),
)
def test_diff(tmp_path_factory: pytest.TempPathFactory, seed: int, changed: set[int], size: int, chunk: int) -> None:
    """Whatever differs, also in chunks of different sizes, and images of different lengths."""
    place = tmp_path_factory.mktemp("diff")
    one = an_image(seed, 10)
    other = bytearray(one)
    for number in changed:
        other[number * CHUNK + 5] ^= 1
    del other[size:]
    create_sync(one, place / "a.snap")
    create_sync(bytes(other), place / "b.snap", chunk_size=chunk)
    assert diff_sync(place / "a.snap", place / "b.snap") == expected(one, bytes(other), chunk)
    assert diff_sync(place / "b.snap", place / "a.snap") == expected(one, bytes(other), chunk)


async def test_layers_that_are_compared_are_not_read(made: Path, tmp_path: Path) -> None:
    """Hashes are enough where chunks have the same size."""
    told: list[tuple[int, int]] = []
    found = await diff(made / "base.snap", made / "x.snap", progress=lambda *now: told.append(now))
    assert found == expected(DATA[: 90 * CHUNK] + an_image(5, 61, 1000), DATA, CHUNK)
    assert told[-1] == (len(DATA), len(DATA))
    await create(DATA, tmp_path / "y.snap")
    for pack in packs_of(tmp_path):
        pack.unlink()
    assert await diff(made / "x.snap", tmp_path / "y.snap") == []


def test_chunks_that_have_to_be_read_are_checked(tmp_path: Path) -> None:
    """A damaged one is no difference."""
    create_sync(DATA, tmp_path / "a.snap")
    (pack,) = packs_of(tmp_path)
    create_sync(DATA, tmp_path / "b.snap", chunk_size=2 * CHUNK)
    damage(pack, pack.stat().st_size - 1)
    with pytest.raises(aiouffd.StoreError, match="it is damaged"):
        diff_sync(tmp_path / "a.snap", tmp_path / "b.snap")
