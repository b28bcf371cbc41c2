"""`store.attaching`: a recording that comes to a snapshot later."""

from __future__ import annotations

import asyncio
from array import array
from typing import TYPE_CHECKING, Any

import pytest
from carried import made
from snapshots import an_image, read_all

import aiouffd
from aiouffd.engine.ahead.trace import Trace, fingerprint, stored
from aiouffd.store import SnapshotSource, attach, attach_sync, create_sync, open_snapshot, verify_sync
from aiouffd.store.writer import publish, put_trace

if TYPE_CHECKING:
    from pathlib import Path

DATA = an_image(31, 30, 700)
PAGE = 4096


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A snapshot without a recording."""
    create_sync(DATA, tmp_path / "x.snap", metadata={"a": 1})
    return tmp_path / "x.snap"


def trace(folder: Path, *pages: int, size: int = len(DATA), source: bytes = bytes(32)) -> Path:
    """Return a recording of these pages."""
    path = folder / f"trace-{'-'.join(map(str, pages))}"
    Trace(PAGE, size, array("Q", [page * PAGE for page in pages]), source).save(path)
    return path


def pages(place: Path) -> list[int]:
    """Return what is replayed when a snapshot is opened."""
    found = stored(SnapshotSource(place), PAGE)
    return [] if found is None else [offset // PAGE for offset in found.offsets]


def test_it_is_replayed_from_then_on(place: Path, tmp_path: Path) -> None:
    """Merged with what is there, up to a limit, or in its place. All else of the snapshot is as before."""
    before = open_snapshot(place).manifest
    assert pages(place) == []
    source = fingerprint(SnapshotSource(place))
    attach_sync(place, trace(tmp_path, 5, 3, source=source))
    assert pages(place) == [5, 3]
    attach_sync(place, trace(tmp_path, 7, 3, source=source), by="last")
    assert pages(place) == [7, 3, 5]
    attach_sync(place, trace(tmp_path, 9), by="last", most=2 * PAGE)
    assert pages(place) == [9, 7]
    manifest = attach_sync(place, trace(tmp_path, 2), by=None)
    assert pages(place) == [2]
    assert (manifest.index, manifest.metadata, manifest.size) == (before.index, before.metadata, before.size)
    assert read_all(place) == DATA
    assert verify_sync(place) == []


async def test_beside_a_loop(place: Path, tmp_path: Path) -> None:
    """In a thread."""
    await attach(place, await asyncio.to_thread(trace, tmp_path, 4))
    assert await asyncio.to_thread(pages, place) == [4]


def test_what_is_of_another_source_is_refused(place: Path, tmp_path: Path) -> None:
    """The manifest stays as it is."""
    create_sync(DATA[:-1] + b"?", tmp_path / "y.snap")
    before = place.read_bytes()
    other = fingerprint(SnapshotSource(tmp_path / "y.snap"))
    for wrong in (trace(tmp_path, 1, source=other), trace(tmp_path, 2, size=len(DATA) - PAGE)):
        with pytest.raises(aiouffd.TraceError, match="from another source than"):
            attach_sync(place, wrong)
    with pytest.raises(aiouffd.TraceError, match="no page"):
        attach_sync(place, trace(tmp_path, 3), most=1)
    with pytest.raises(aiouffd.StoreError, match="no such snapshot"):
        attach_sync(tmp_path / "z.snap", trace(tmp_path, 3))
    with pytest.raises(aiouffd.TraceError, match="not a recording"):
        attach_sync(place, place)
    assert place.read_bytes() == before
    assert not (tmp_path / "z.snap").exists()


def test_a_snapshot_that_is_replaced_meanwhile(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one has the name by then, or none: it stays so."""
    put = put_trace

    def replaced(*arguments: Any) -> Any:
        create_sync(DATA[:-1] + b"?", place, replace=True)
        return put(*arguments)

    monkeypatch.setattr("aiouffd.store.attaching.put_trace", replaced)
    with pytest.raises(aiouffd.StoreError, match="was replaced or removed"):
        attach_sync(place, trace(tmp_path, 1))
    assert read_all(place) == DATA[:-1] + b"?"
    assert pages(place) == []

    def removed(*arguments: Any) -> Any:
        place.unlink()
        return put(*arguments)

    monkeypatch.setattr("aiouffd.store.attaching.put_trace", removed)
    with pytest.raises(aiouffd.StoreError, match="was replaced or removed"):
        attach_sync(place, trace(tmp_path, 1))
    assert not place.exists()


def test_a_snapshot_that_is_replaced_in_the_last_moment(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that has the name by then keeps it."""

    def late(*arguments: Any, **options: Any) -> Any:
        create_sync(DATA[:-1] + b"?", place, replace=True)
        return publish(*arguments, **options)

    monkeypatch.setattr("aiouffd.store.attaching.publish", late)
    with pytest.raises(aiouffd.StoreError, match="was replaced or removed"):
        attach_sync(place, trace(tmp_path, 1))
    assert read_all(place) == DATA[:-1] + b"?"
    assert pages(place) == []


def test_bytes_of_pages_stay_outside(tmp_path: Path) -> None:
    """The snapshot has them itself; also where it is made with the recording."""
    path, source = made(tmp_path, [1, 2])
    create_sync(tmp_path / "image", tmp_path / "a.snap", trace=path)
    create_sync(tmp_path / "image", tmp_path / "b.snap")
    attach_sync(tmp_path / "b.snap", path)
    for name in ("a", "b"):
        snapshot = open_snapshot(tmp_path / f"{name}.snap")
        assert snapshot.manifest.trace is not None
        assert snapshot.manifest.trace.length == 72 + 2 * 8
        assert pages(tmp_path / f"{name}.snap") == [1, 2]
    assert source.size == open_snapshot(tmp_path / "a.snap").manifest.size
