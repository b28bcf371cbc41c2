"""`store.transfer`: copies, and snapshots without layers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from snapshots import CHUNK, an_image, damage, packs_of, read_all

import aiouffd
from aiouffd.engine.ahead.trace import Recorder
from aiouffd.store import copy, copy_sync, create_sync, flatten, flatten_sync, gc_sync, open_snapshot
from examples.page_server import serving

DATA = an_image(31, 30, 700)
CHANGED = DATA[: 5 * CHUNK] + b"hello" + DATA[5 * CHUNK + 5 :]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A store with a snapshot of two layers and a recording."""
    recorder = Recorder.create(tmp_path / "r", 4096, len(DATA))
    recorder.note(8192)
    recorder.complete()
    place = tmp_path / "made"
    create_sync(DATA, place / "base.snap")
    create_sync(
        CHANGED, place / "x.snap", base=place / "base.snap", trace=tmp_path / "r", metadata={"a": 1}, page_size=16384
    )
    return place


def test_a_copy_is_the_same(made: Path, tmp_path: Path) -> None:
    """All that it needs, and nothing else; also from a server."""
    told: list[tuple[int, int]] = []
    manifest = copy_sync(made / "x.snap", tmp_path / "to" / "y.snap", progress=lambda *now: told.append(now))
    assert manifest == open_snapshot(made / "x.snap").manifest == open_snapshot(tmp_path / "to" / "y.snap").manifest
    assert told[-1][0] == told[-1][1] == sum(path.stat().st_size for path in packs_of(made))
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["indexes", "packs", "traces", "y.snap"]
    with serving(made) as url:
        copy_sync(f"{url}/x.snap", tmp_path / "web" / "y.snap")
    for place in ("to", "web"):
        assert read_all(tmp_path / place / "y.snap") == CHANGED


def test_what_is_to_be_collected_soon_is_copied_again(made: Path, tmp_path: Path) -> None:
    """It would be gone before the manifest names it."""
    to = tmp_path / "to"
    copy_sync(made / "x.snap", to / "x.snap")
    (to / "x.snap").unlink()
    gc_sync(to)
    for path in filter(Path.is_file, to.rglob("*")):
        os.utime(path, (0, 0))
    noted = json.loads((to / "unnamed.json").read_text())
    (to / "unnamed.json").write_text(json.dumps(dict.fromkeys(noted, 1.0)))
    removed: list[str] = []

    def collect(done: int, whole: int) -> None:
        if done == whole:
            removed.extend(entry.path.partition("/")[0] for entry in gc_sync(to))

    copy_sync(made / "x.snap", to / "y.snap", progress=collect)
    assert sorted(removed) == ["indexes", "traces"]  # which are written behind the packs
    assert read_all(to / "y.snap") == CHANGED


def test_what_is_there_is_not_copied_again(made: Path, tmp_path: Path) -> None:
    """Packs that another snapshot has brought."""
    copy_sync(made / "base.snap", tmp_path / "to" / "base.snap")
    before = {path: path.stat().st_mtime_ns for path in packs_of(tmp_path / "to")}
    copy_sync(made / "x.snap", tmp_path / "to" / "x.snap")
    after = {path: path.stat().st_mtime_ns for path in packs_of(tmp_path / "to")}
    assert before.items() < after.items()
    with pytest.raises(aiouffd.StoreError, match="there is a snapshot of that name already"):
        copy_sync(made / "base.snap", tmp_path / "to" / "x.snap")
    copy_sync(made / "base.snap", tmp_path / "to" / "x.snap", replace=True)
    assert read_all(tmp_path / "to" / "x.snap") == DATA


def test_damage_is_not_copied(made: Path, tmp_path: Path) -> None:
    """No snapshot appears."""
    damage(packs_of(made)[0], 100)
    with pytest.raises(aiouffd.StoreError, match=f"^{packs_of(made)[0]}: it is damaged"):
        copy_sync(made / "x.snap", tmp_path / "to" / "x.snap")
    assert not (tmp_path / "to" / "x.snap").exists()


async def test_in_threads(made: Path, tmp_path: Path) -> None:
    """Both have a coroutine."""
    one = await copy(made / "x.snap", tmp_path / "to" / "y.snap")
    other = await flatten(made / "x.snap", tmp_path / "to" / "z.snap")
    assert (one.size, one.trace) == (other.size, other.trace)


def test_flatten(made: Path, tmp_path: Path) -> None:
    """Its packs hold nothing else; what was kept with it stays."""
    manifest = flatten_sync(made / "x.snap", tmp_path / "to" / "x.snap", codec="lz4")
    assert read_all(tmp_path / "to" / "x.snap") == CHANGED
    before = open_snapshot(made / "x.snap").manifest
    assert (manifest.trace, manifest.metadata, manifest.page_size) == (before.trace, {"a": 1}, 16384)
    assert (manifest.base, manifest.codec, manifest.chunk_size) == (None, "lz4", CHUNK)
    (pack,) = packs_of(tmp_path / "to")
    records = list(open_snapshot(tmp_path / "to" / "x.snap").index.find_all())
    assert sum(record.length for record in records) == pack.stat().st_size - records[0].offset
    assert [record.offset for record in records] == sorted(record.offset for record in records)


def test_flatten_with_other_chunks(made: Path, tmp_path: Path) -> None:
    """And without a recording."""
    manifest = flatten_sync(made / "base.snap", tmp_path / "to" / "x.snap", chunk_size=4 * CHUNK)
    assert (manifest.trace, manifest.codec, manifest.chunk_size) == (None, "zstd", 4 * CHUNK)
    assert read_all(tmp_path / "to" / "x.snap") == DATA
