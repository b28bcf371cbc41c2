"""`store.bucket`: objects behind URLs."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from snapshots import CHUNK, an_image, damage, packs_of, read_all

import aiouffd
from aiouffd.store import create_sync
from aiouffd.store.bucket import Bucket
from examples.page_server import serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DATA = an_image(9, 40, 500)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a snapshot of two layers."""
    place = tmp_path_factory.mktemp("made")
    create_sync(DATA[: 7 * CHUNK] + DATA[8 * CHUNK :], place / "base.snap")
    create_sync(DATA, place / "a b.snap", base=place / "base.snap")
    return place


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(made, tmp_path / "store")


@pytest.fixture
def url(store: Path) -> Iterator[str]:
    """Where an HTTP server serves the store."""
    with serving(store) as url:
        yield url


@pytest.mark.parametrize("step", [10_000, CHUNK, 4 << 20])
def test_a_snapshot_behind_http(url: str, step: int) -> None:
    """All of it; its name may be quoted."""
    assert read_all(f"{url}/a%20b.snap", step=step) == DATA


def test_objects_that_are_missing(url: str, store: Path) -> None:
    """The error names the object, and the chunk."""
    with pytest.raises(aiouffd.StoreError, match=f"^{url}/c.snap: there is no such snapshot"):
        read_all(f"{url}/c.snap")
    packs_of(store)[0].unlink()
    with pytest.raises(aiouffd.StoreError, match=rf"^{url}/packs/[0-9a-f/]*, chunk \d+ .*: there is no such object"):
        read_all(f"{url}/a%20b.snap")


def test_objects_that_are_damaged(url: str, store: Path) -> None:
    """Not a byte of them is shown."""
    for pack in packs_of(store):
        damage(pack, pack.stat().st_size - 10)
    with pytest.raises(aiouffd.StoreError, match=r"chunk \d+ .*: it is damaged"):
        read_all(f"{url}/a%20b.snap")
    for pack in packs_of(store):
        pack.write_bytes(pack.read_bytes()[:-10])
    with pytest.raises(aiouffd.StoreError, match=r"chunk \d+ "):
        read_all(f"{url}/a%20b.snap")


def test_http_is_read_only(url: str) -> None:
    """The error says what can be written to."""
    with pytest.raises(aiouffd.StoreError, match="behind http can be read only: write to a bucket or a folder"):
        create_sync(DATA, f"{url}/new.snap")
    for call in (lambda store: list(store.list("packs")), lambda store: store.delete("x")):
        with pytest.raises(aiouffd.StoreError, match="can be read only"):
            call(Bucket(url, {}))


def test_a_server_that_is_gone() -> None:
    """It is not said to be without the snapshot."""
    with pytest.raises(aiouffd.SourceError, match="refuses connections"):
        Bucket("http://127.0.0.1:1", {}).size("x.snap")


def test_connections_are_shared(url: str) -> None:
    """All objects are asked for by one client of obstore; what it is called shows no password."""
    bucket = Bucket(url, {})
    one, other = bucket.part("a"), bucket.part("b")
    assert one._client._store is other._client._store  # type: ignore[union-attr]
    assert bucket.is_same(Bucket(url + "/", {}))
    assert not bucket.is_same(Bucket(url + "/x", {}))
    secret = Bucket("http://me:secret@host", {})
    assert (repr(secret), secret.name("x")) == ("Bucket('http://host')", "http://host/x")
    bucket.close()
    assert bucket.part("a")._client._store is not one._client._store  # type: ignore[union-attr]
