"""`store.filesystem`: files of fsspec through a cache."""

from __future__ import annotations

import asyncio
import io
import pickle
import random
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractFileSystem
from seekable import seekable

import aiouffd
from aiouffd.store import create_sync
from aiouffd.store.filesystem import CachedFileSystem
from examples.page_server import serving

if TYPE_CHECKING:
    from pathlib import Path

DATA = random.Random(4).randbytes(300_000)
FILES: dict[str, tuple[str, bytes]] = {}
"""Name -> (ETag, bytes)."""
ASKED: list[tuple[str, int, int]] = []


def told(path: str) -> dict[str, Any]:
    """Return what a filesystem says of a file."""
    if path not in FILES:
        raise FileNotFoundError(path)
    tag, data = FILES[path]
    return {"name": path, "size": len(data), "type": "file", "ETag": tag}


def part(path: str, start: int | None, end: int | None) -> bytes:
    """Return bytes, and note that they were asked for."""
    data = FILES[path][1][start:end]
    ASKED.append((path, start or 0, len(data)))
    return data


class Tagged(AbstractFileSystem):  # type: ignore[misc]
    """Files with ETags, of a filesystem that blocks."""

    protocol = "tagged"
    root_marker = "/"

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return the ETag and more."""
        return told(path)

    def ls(self, path: str, *, detail: bool = True, **_: Any) -> list[Any]:
        """Return all files."""
        return [told(name) if detail else name for name in FILES if name.startswith(path)]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """Return bytes."""
        return part(path, start, end)


class AsyncTagged(AsyncFileSystem):  # type: ignore[misc]
    """The same, asynchronous."""

    protocol = "atagged"
    root_marker = "/"

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        return told(path)

    async def _ls(self, path: str, *, detail: bool = True, **_: Any) -> list[Any]:
        return [told(name) if detail else name for name in FILES if name.startswith(path)]

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        return part(path, start, end)


fsspec.register_implementation("tagged", Tagged, clobber=True)
fsspec.register_implementation("atagged", AsyncTagged, clobber=True)


@pytest.fixture(autouse=True)
def _files() -> None:
    FILES.clear()
    FILES["/x"] = ('"one"', DATA)
    ASKED.clear()


def options(tmp_path: Path) -> dict[str, Any]:
    """Return what names the cache."""
    return {"aiouffd": {"cache_storage": str(tmp_path / "cache"), "cache_size": 8 << 20, "skip_instance_cache": True}}


@pytest.mark.parametrize("protocol", ["tagged", "atagged"])
def test_a_chained_url(protocol: str, tmp_path: Path) -> None:
    """Once from afar, then from the cache; by files, whole, by ranges, and as it is listed."""
    url = f"aiouffd::{protocol}:///x"
    with fsspec.open(url, **options(tmp_path)) as file:
        file.seek(100_000)
        assert file.read(5000) == DATA[100_000:105_000]
        file.seek(-10, io.SEEK_END)
        assert file.read() == DATA[-10:]
    fs, path = fsspec.core.url_to_fs(url, **options(tmp_path))
    assert isinstance(fs, CachedFileSystem)
    assert fs.cat_file(path) == DATA
    asked = len(ASKED)
    assert fs.cat_file(path, -5, None) == DATA[-5:]
    assert fs.cat_file(url, 5, 10) == DATA[5:10]
    assert fs.cat_file(path, 10, 5) == b""
    assert fs.cat_ranges([path] * 3, [0, 70_000, 299_990], [10, 80_000, 400_000]) == [
        DATA[:10], DATA[70_000:80_000], DATA[299_990:],
    ]  # fmt: skip
    assert fs.info(path)["size"] == len(DATA)
    assert fs.ls("/") == [told("/x")]
    assert fs.exists(path)
    assert len(ASKED) == asked
    assert sum(length for _, _, length in ASKED) == len(DATA)
    assert fs.cache.statistics()["misses"] == 5
    assert pickle.loads(pickle.dumps(fs)).cat_file(path, 0, 5) == DATA[:5]


def test_what_has_changed_is_read_anew(tmp_path: Path) -> None:
    """By the next call; a file that is open is of one version. What has no strong ETag is not kept."""
    fs, path = fsspec.core.url_to_fs("aiouffd::tagged:///x", **options(tmp_path))
    file = fs.open(path, cache_type="none")
    assert file.read(5) == DATA[:5]
    FILES["/x"] = ('"two"', DATA[::-1])
    assert fs.cat_file(path, 0, 5) == DATA[::-1][:5]
    file.seek(200_000)
    with pytest.raises(aiouffd.SourceError, match="it has changed"):
        file.read(5)
    file.close()
    FILES["/x"] = ('W/"three"', DATA)
    before = fs.cache.statistics()["misses"]
    for _ in range(2):
        assert fs.cat_file(path) == DATA
    assert fs.cache.statistics()["misses"] == before


def test_errors(tmp_path: Path) -> None:
    """Those of the other filesystem, of writing, and of its arguments."""
    fs, _ = fsspec.core.url_to_fs("aiouffd::atagged:///x", **options(tmp_path))
    with pytest.raises(FileNotFoundError):
        fs.cat_file("/y")
    failed, right = fs.cat_ranges(["/y", "/x"], 0, 5)
    assert (type(failed), right) == (FileNotFoundError, DATA[:5])
    with pytest.raises(FileNotFoundError):
        fs.cat_ranges(["/y", "/x"], 0, 5, on_error="raise")
    with pytest.raises(FileNotFoundError):
        fs.open("/y")
    with pytest.raises(NotImplementedError, match="read only"):
        fs.open("/x", "wb")
    with pytest.raises(ValueError, match="target_protocol"):
        CachedFileSystem()
    with pytest.raises(ValueError, match="asynchronous"):
        CachedFileSystem(AsyncTagged(asynchronous=True), cache_storage=str(tmp_path / "cache"))


async def test_on_the_loop_of_the_caller(tmp_path: Path) -> None:
    """As zarr uses it."""
    cache = aiouffd.ChunkCache(tmp_path / "cache", 8 << 20)

    def make() -> CachedFileSystem:
        return CachedFileSystem(AsyncTagged(asynchronous=True), cache_storage=cache, asynchronous=True)

    fs = await asyncio.to_thread(make)
    for _ in range(2):
        assert await fs._cat_file("/x", 5, 70_000) == DATA[5:70_000]
    assert len(ASKED) == 1
    assert (await fs._info("/x"))["size"] == len(DATA)


def test_snapshots_and_compressed_files(tmp_path: Path) -> None:
    """They are files of what they hold; a library that takes fsspec's files reads them."""
    array = np.arange(100_000, dtype=np.int32)
    buffer = io.BytesIO()
    np.save(buffer, array)
    create_sync(buffer.getvalue(), tmp_path / "store" / "x.snap")
    FILES["/x.zst"] = ('"z"', seekable([buffer.getvalue()[at : at + 9999] for at in range(0, 400_128, 9999)]))
    with serving(tmp_path / "store") as server:
        for url in (
            f"aiouffd::{server}/x.snap",
            f"aiouffd::file://{tmp_path}/store/x.snap",
            "aiouffd::tagged:///x.zst",
        ):
            with fsspec.open(url, **options(tmp_path)) as file:
                assert np.array_equal(np.load(file), array)
            fs, path = fsspec.core.url_to_fs(url, **options(tmp_path))
            assert fs.info(path)["size"] == len(buffer.getvalue())
            assert fs.cache.statistics()["misses"] > 0
