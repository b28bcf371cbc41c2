"""`store.snapshot_source`: a snapshot as a source."""

from __future__ import annotations

import asyncio
import pickle
import random
import shutil
import sys
from typing import TYPE_CHECKING, Any

import pytest
from snapshots import CHUNK, an_image, damage, read_all
from stored import travelled

import aiouffd
from aiouffd.engine.ahead.trace import Recorder, fingerprint
from aiouffd.pager.process.serialization import is_pickle, pack
from aiouffd.store import create_sync
from aiouffd.store.resolve import as_source
from examples.page_server import serving

if TYPE_CHECKING:
    from pathlib import Path

DATA = bytes(2 * CHUNK) + an_image(5, 30, 77)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a snapshot."""
    place = tmp_path_factory.mktemp("made")
    create_sync(DATA, place / "x.snap")
    return place


async def test_any_range(made: Path) -> None:
    """Within a chunk, across chunks, zeros, the end: by reading, and without waiting once chunks are kept."""
    source = aiouffd.SnapshotSource(made / "x.snap")
    await source.prepare()
    assert source.size == len(DATA)
    rng = random.Random(1)
    for _ in range(60):
        offset = rng.randrange(len(DATA))
        length = rng.randrange(1, min(5 * CHUNK, len(DATA) - offset) + 1)
        expected = DATA[offset : offset + length]
        read = source.read if rng.random() < 0.5 else source.read_ahead
        assert bytes(await read(offset, length)) == expected
        at_hand = source.read_nowait(offset, length)
        assert at_hand is None or bytes(at_hand) == expected
    await source.aclose()


async def test_what_is_kept_needs_no_waiting(made: Path) -> None:
    """A fault of 4 KiB brings a chunk: its neighbors are at hand then."""
    source = aiouffd.SnapshotSource(made / "x.snap")
    await source.prepare()
    chunk = next(source.snapshot.index.present(0, 32))
    at = chunk * CHUNK
    assert source.read_nowait(at, 4096) is None
    await source.read(at + 8192, 4096)
    assert bytes(source.read_nowait(at, CHUNK)) == DATA[at : at + CHUNK]
    await source.aclose()


async def test_zeros_are_known(made: Path) -> None:
    """Without asking the store."""
    source = aiouffd.SnapshotSource(made / "x.snap")
    await source.prepare()
    assert source.sparse
    assert source.hole(0, 1 << 30) >= 2 * CHUNK
    assert source.hole(4096, 8192) == 8192
    first = source.hole(0, 1 << 30)
    assert source.hole(first - 5, 4096) == 5
    assert source.hole(first, 4096) == 0
    assert not any(DATA[:first])
    assert DATA[first : first + CHUNK].strip(b"\0")


async def test_it_travels_opened(made: Path, tmp_path: Path) -> None:
    """As plain values; its files are found where they were, whatever they are called now."""
    place = await asyncio.to_thread(shutil.copytree, made, tmp_path / "a")
    source = as_source(place / "x.snap", timeout=3)
    assert isinstance(source, aiouffd.SnapshotSource)
    await source.prepare()
    assert not is_pickle(pack(source)[0])
    place.rename(tmp_path / "b")
    arrived = await asyncio.to_thread(travelled, source)
    assert bytes(await arrived.read(CHUNK, 5 * CHUNK)) == DATA[CHUNK : 6 * CHUNK]
    assert arrived.identity == source.identity
    assert (arrived.url, arrived._given) == (source.url, source._given)
    await arrived.aclose()


def test_it_can_be_pickled_unopened(made: Path) -> None:
    """It is opened again where it arrives."""
    source = pickle.loads(pickle.dumps(aiouffd.SnapshotSource(made / "x.snap", retries=2, kept=5)))
    assert (source.url, source._given, source._kept) == (f"{made}/x.snap", (None, 2), 5)
    assert source.size == len(DATA)


def test_equal_bytes_are_known_as_equal(made: Path, tmp_path: Path) -> None:
    """Clients of a server share them; a recording is of them."""
    create_sync(DATA, tmp_path / "y.snap")
    one, other = aiouffd.SnapshotSource(made / "x.snap"), aiouffd.SnapshotSource(tmp_path / "y.snap")
    assert one.identity == other.identity
    assert fingerprint(one) == fingerprint(other)
    create_sync(DATA[:-1], tmp_path / "z.snap")
    assert aiouffd.SnapshotSource(tmp_path / "z.snap").identity != one.identity


def test_its_recording(made: Path, tmp_path: Path) -> None:
    """What was kept with it, checked; or nothing."""
    recorder = Recorder.create(tmp_path / "trace", 4096, len(DATA))
    recorder.note(8192)
    recorder.complete()
    create_sync(DATA, tmp_path / "y.snap", trace=tmp_path / "trace")
    source = aiouffd.SnapshotSource(tmp_path / "y.snap")
    assert source.recording() == (tmp_path / "trace").read_bytes()
    assert aiouffd.SnapshotSource(made / "x.snap").recording() is None
    (kept,) = tmp_path.glob("traces/*")
    damage(kept, 50)
    with pytest.raises(aiouffd.StoreError, match="it is damaged"):
        source.recording()


def test_who_repeats_a_failed_read(made: Path) -> None:
    """The engine, of a local one; the source itself, behind a URL."""
    assert not hasattr(aiouffd.SnapshotSource(made / "x.snap"), "retries")
    assert aiouffd.SnapshotSource("http://host/x.snap").retries == 0
    options: dict[str, Any] = {"regions": "x"}
    with pytest.raises(TypeError, match="the store behind s3:// got an unexpected keyword argument 'regions'"):
        aiouffd.SnapshotSource("s3://bucket/x.snap", **options)


def test_a_missing_library_is_told_at_once(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the snapshot is opened, not by SIGBUS at the first touch."""
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(aiouffd.StoreError, match=r"needs the library zstandard: install it with .*aiouffd\[store\]"):
        _ = aiouffd.SnapshotSource(made / "x.snap").size


async def test_timeouts(made: Path) -> None:
    """Its own come before the Monitor's, for the engine as well."""
    assert aiouffd.SnapshotSource(made / "x.snap", timeout=90).timeout == 90
    assert not hasattr(aiouffd.SnapshotSource(made / "x.snap"), "timeout")
    with serving(made) as url:
        for own, expected in ((7, (7, 3)), (None, (40, 3))):
            source = aiouffd.SnapshotSource(f"{url}/x.snap", timeout=own)
            await source.prepare()
            source.begin(40, 3, lambda: None)
            part = source._part("packs/x")
            assert (part.timeout, part._most) == expected
            assert part._shared()._timeout == expected[0]
            store: Any = source.snapshot.store
            assert store.part("x").timeout == (own or 30)  # its manifest was asked for so
            await source.aclose()


def test_passwords_are_not_shown() -> None:
    """Neither in a log nor in an error."""
    assert repr(aiouffd.SnapshotSource("http://me:secret@host/x.snap")) == "SnapshotSource('http://host/x.snap')"


@pytest.mark.parametrize("kept", [0, 3 * CHUNK])
def test_little_memory(made: Path, kept: int) -> None:
    """All comes, whatever is kept."""
    assert read_all(made / "x.snap", step=10 * CHUNK + 1000, kept=kept) == DATA
