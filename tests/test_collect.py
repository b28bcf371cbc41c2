"""`store.collect`: what no snapshot needs is removed, after a while."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING

import pytest
from snapshots import CHUNK, an_image, packs_of, read_all

import aiouffd
from aiouffd.store import collect, create_sync, gc, gc_sync
from aiouffd.store.folder import Entry, Folder

if TYPE_CHECKING:
    from pathlib import Path

DATA = an_image(41, 12)
CHANGED = DATA[: 5 * CHUNK] + b"hello" + DATA[5 * CHUNK + 5 :]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with a base and a layer."""
    create_sync(DATA, tmp_path / "base.snap")
    create_sync(CHANGED, tmp_path / "layer.snap", base=tmp_path / "base.snap")
    return tmp_path


def at(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let some time have passed."""
    now = time.time()
    monkeypatch.setattr("aiouffd.store.collect.time.time", lambda: now + seconds)


def objects(store: Path) -> set[str]:
    """Return the objects of a store."""
    return {str(path.relative_to(store)) for path in store.rglob("*") if path.is_file()} - {"unnamed.json"}


async def test_what_is_named_stays(store: Path) -> None:
    """However old it is."""
    before = objects(store)
    assert await gc(store, grace=0) == []
    assert objects(store) == before


def test_removing_a_base_never_breaks_its_layer(store: Path) -> None:
    """Only the base's index, and packs that the layer does not need, go."""
    (store / "base.snap").unlink()
    removed = gc_sync(store, grace=0)
    assert [entry.path.partition("/")[0] for entry in removed] == ["indexes"]
    assert read_all(store / "layer.snap") == CHANGED
    (store / "layer.snap").unlink()
    assert len(gc_sync(store, grace=0)) == 3
    assert objects(store) == set()
    assert not list(store.glob("packs/*"))


def test_the_grace_period_begins_when_it_is_seen(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run removes nothing, however old the object is; a dry run does not even note it."""
    (store / "layer.snap").unlink()
    for path in packs_of(store):
        os.utime(path, (0, 0))
    assert gc_sync(store, dry_run=True) == []
    assert not (store / "unnamed.json").exists()
    before = objects(store)
    assert gc_sync(store) == []
    at(monkeypatch, collect.GRACE - 60)
    assert gc_sync(store) == []
    at(monkeypatch, collect.GRACE + 60)
    assert len(gc_sync(store, dry_run=True)) == 2
    assert objects(store) == before
    assert len(gc_sync(store)) == 2
    assert gc_sync(store) == []
    assert json.loads((store / "unnamed.json").read_text()) == {}
    assert read_all(store / "base.snap") == DATA


def test_what_was_written_again_has_its_time(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer has taken it up meanwhile, and its manifest is not there yet."""
    (store / "layer.snap").unlink()
    gc_sync(store)
    at(monkeypatch, collect.GRACE + 60)
    (unnamed,) = (
        path for path in packs_of(store) if str(path.relative_to(store)) in (store / "unnamed.json").read_text()
    )
    later = time.time() - 5
    os.utime(unnamed, (later, later))
    assert [entry.path.partition("/")[0] for entry in gc_sync(store)] == ["indexes"]
    assert unnamed.exists()


def test_what_is_written_while_it_works_stays(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks once more before it removes."""
    (store / "layer.snap").unlink()
    pack = next(iter(gc_sync(store, grace=0, dry_run=True))).path
    finding = Folder.find

    def note(self: Folder, path: str) -> Entry | None:
        if path == pack:
            os.utime(store / pack)
        return finding(self, path)

    monkeypatch.setattr(Folder, "find", note)
    gc_sync(store, grace=0)
    assert (store / pack).exists()


@pytest.mark.parametrize("text", ["", "[]", '{"x": "y"}', "5"])
def test_what_was_noted_may_be_damaged(store: Path, text: str) -> None:
    """The grace period begins again."""
    (store / "layer.snap").unlink()
    (store / "unnamed.json").write_text(text)
    assert gc_sync(store) == []
    assert len(json.loads((store / "unnamed.json").read_text())) == 2


def test_nothing_is_removed_while_a_manifest_cannot_be_read(store: Path) -> None:
    """It may name anything."""
    (store / "layer.snap").unlink()
    (store / "odd.snap").write_text("what is this")
    before = objects(store)
    with pytest.raises(aiouffd.StoreError, match=r"odd\.snap: it is no manifest"):
        gc_sync(store, grace=0)
    assert objects(store) == before


def test_what_killed_writers_have_left(store: Path) -> None:
    """It goes as well; other files stay, and other stores in folders below."""
    for path in (".part-1", "packs/.part-2", "notes.txt", "sub/packs/aa/bb", ".part-of/x"):
        (store / path).parent.mkdir(exist_ok=True, parents=True)
        (store / path).write_text("x")
    assert sorted(entry.path for entry in gc_sync(store, grace=0)) == [".part-1", "packs/.part-2"]
    assert (store / "notes.txt").exists()
    assert (store / "sub/packs/aa/bb").exists()


def test_what_is_written_again_while_others_are_removed_stays(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a store that is listed as a whole, as buckets are, before anything of it is removed."""
    listing, deleting = Folder.list, Folder.delete
    later = an_image(42, 3)

    def delete(self: Folder, path: str) -> None:
        deleting(self, path)
        if not (store / "again.snap").exists():
            for name, data in (("again", CHANGED), ("base", DATA), ("other", later)):
                create_sync(data, store / f"{name}.snap")

    create_sync(later, store / "other.snap")
    for name in ("base", "layer", "other"):
        (store / f"{name}.snap").unlink()
    for path in store.glob("*/**/*"):
        os.utime(path, (0, time.time() - 86400))
    monkeypatch.setattr(Folder, "list", lambda self, path: iter(list(listing(self, path))))
    monkeypatch.setattr(Folder, "delete", delete)
    gc_sync(store, grace=0)
    for name, data in (("again", CHANGED), ("base", DATA), ("other", later)):
        assert read_all(store / f"{name}.snap") == data
