"""`store.snapshot`: to open one."""

from __future__ import annotations

import json
import resource
import shutil
import tempfile
from typing import TYPE_CHECKING

import pytest
from snapshots import an_image, damage

import aiouffd
from aiouffd.store import create_sync
from aiouffd.store.codecs import digest_of
from aiouffd.store.folder import Folder
from aiouffd.store.snapshot import open_snapshot, read_linked

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one snapshot."""
    place = tmp_path_factory.mktemp("made")
    create_sync(an_image(1, 20, 5), place / "x.snap")
    return place


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(made, tmp_path / "store")


def test_what_is_known_of_a_snapshot(store: Path) -> None:
    """Its manifest and its index."""
    opened = open_snapshot(store / "x.snap")
    assert opened.manifest.size == opened.index.size == 20 * 65536 + 5
    assert opened.index.records <= 21
    assert repr(opened) == f"Snapshot('{store}/x.snap')"
    assert opened.store.is_local


def test_the_index_is_a_copy(store: Path) -> None:
    """What is mapped does not change when the file is cut: to look at it would be SIGBUS."""
    opened = open_snapshot(store / "x.snap")
    expected = list(opened.index.find_all())
    (path,) = store.glob("indexes/*")
    path.write_bytes(b"")
    assert list(opened.index.find_all()) == expected


def test_it_is_opened_by_two_requests(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for the manifest, one for the index: each is a way to the store and back."""
    asked: list[str] = []
    read = Folder.read

    def note(self: Folder, path: str, start: int, stop: int) -> bytes:
        asked.append(path.partition("/")[0])
        return read(self, path, start, stop)

    monkeypatch.setattr(Folder, "read", note)
    monkeypatch.setattr(Folder, "size", None)
    open_snapshot(store / "x.snap")
    assert asked == ["x.snap", "indexes"]


def test_a_large_manifest(tmp_path: Path) -> None:
    """Its metadata may need a second request, and there is a limit."""
    metadata = {"notes": "x" * 200_000}
    create_sync(b"abc", tmp_path / "x.snap", metadata=metadata)
    assert open_snapshot(tmp_path / "x.snap").manifest.metadata == metadata
    with pytest.raises(aiouffd.StoreError, match="its manifest would be too large"):
        create_sync(b"abc", tmp_path / "y.snap", metadata={"notes": "x" * 2_000_000})
    assert not (tmp_path / "y.snap").exists()


def change_size(store: Path) -> None:
    """Have a manifest say another size."""
    content = json.loads((store / "x.snap").read_text())
    (store / "x.snap").write_text(json.dumps({**content, "size": content["size"] - 1}))


def index_of(store: Path) -> Path:
    """Return the only index of a store."""
    (path,) = store.glob("indexes/*")
    return path


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (lambda store: (store / "x.snap").unlink(), r"x\.snap: there is no such snapshot: it is missing"),
        (lambda store: (store / "x.snap").write_bytes(b""), r"x\.snap: it is no manifest"),
        (lambda store: (store / "x.snap").write_bytes(bytes(2 << 20)), r"x\.snap: it is too large"),
        (change_size, r"x\.snap: it has another size than its index"),
        (lambda store: index_of(store).unlink(), r"indexes/[0-9a-f]{64}: it is missing"),
        (lambda store: index_of(store).write_bytes(b"x"), r"indexes/.*: it has 1 bytes, and its manifest says"),
        (lambda store: index_of(store).write_bytes(bytes(5000)), r"indexes/.*: it has more than \d+ bytes, and its"),
        (lambda store: damage(index_of(store), 100), r"indexes/.*: it is damaged: its hash is another"),
        (shutil.rmtree, r"it is missing"),
    ],
)
def test_what_cannot_be_opened(harm: object, complaint: str, store: Path) -> None:
    """The error names the object."""
    harm(store)  # type: ignore[operator]
    with pytest.raises(aiouffd.StoreError, match=complaint):
        open_snapshot(store / "x.snap")


def test_no_room_for_the_index(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says where it should have been."""
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(aiouffd.StoreError, match=r"there is no room for a copy of it.*TMPDIR"):
        open_snapshot(store / "x.snap")


def test_the_copy_of_the_index_is_whole_or_an_error(store: Path) -> None:
    """A write that becomes short, as on a disk that becomes full, is not taken for all: what is mapped has no hole."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(aiouffd.StoreError, match=r"there is no room for a copy of it.*TMPDIR"):
            open_snapshot(store / "x.snap")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_an_object_that_a_manifest_names(store: Path) -> None:
    """It is checked."""
    opened = open_snapshot(store / "x.snap")
    path = f"indexes/{opened.manifest.index.hash}"
    assert digest_of([read_linked(opened.store, path, opened.manifest.index)], 32).hex() == opened.manifest.index.hash
    damage(index_of(store), 5)
    with pytest.raises(aiouffd.StoreError, match="it is damaged"):
        read_linked(opened.store, path, opened.manifest.index)
