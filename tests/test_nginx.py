"""Objects behind nginx: versions, ranges and connections as a real web server has them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from scenario import eventually
from snapshots import read_all
from web import nginx

import aiouffd
from aiouffd.store import create_sync
from aiouffd.store.cached_source import CachedSource

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DATA = random.Random(6).randbytes(300_000)
OTHER = random.Random(7).randbytes(300_000)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, Path]]:
    """Its URL, the folder of the files, and the log of the requests."""
    folder, work = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("nginx")
    with nginx(folder, work) as url:
        yield url, folder, work / "access.log"


@pytest.fixture
def file(served: tuple[str, Path, Path], request: pytest.FixtureRequest) -> Path:
    """A file of this test's own, an hour old."""
    path = served[1] / f"{abs(hash(request.node.name))}"
    write(path, DATA, -3600)
    return path


def write(path: Path, data: bytes, age: int) -> None:
    """Put a file in the place of another."""
    new = path.with_suffix(".new")
    new.write_bytes(data)
    os.utime(new, (1_700_000_000 + age,) * 2)
    new.rename(path)


async def opened(url: str, cache: aiouffd.ChunkCache | None = None) -> Any:
    """Return a source that goes the direct way, as behind a Monitor."""
    source: Any = aiouffd.ObjectSource(url, timeout=10, retries=0)
    if cache is not None:
        source = CachedSource(source, cache)
    await source.prepare()
    source.begin(10, 0, lambda: None)
    return source


async def read_some(source: Any, data: bytes, count: int = 30) -> None:
    """Read ranges, many at once, and compare them."""
    rng = random.Random(1)
    places = [(at := rng.randrange(len(data)), rng.randrange(1, len(data) - at + 1)) for _ in range(count)]
    found = await asyncio.gather(*(source.read(*place) for place in places))
    assert [bytes(item) for item in found] == [data[at : at + length] for at, length in places]


def lines(url: str, log: Path) -> int:
    """Return how many requests were answered: a line may be written after its answer has come, but all in order."""
    mark = secrets.token_hex(8)
    with contextlib.suppress(urllib.error.HTTPError):
        urllib.request.urlopen(f"{url}/{mark}")
    eventually(lambda: mark in log.read_text(), expected=True)
    return log.read_text().count("\n")


@pytest.mark.parametrize("location", ["strong", "dated", "weak", "packed", "silent", "brief", "closing"])
async def test_any_range(
    served: tuple[str, Path, Path], file: Path, location: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """However versions are named, and connections end. What has no strong ETag is not kept, and that is logged."""
    url, _, log = served
    cache = aiouffd.ChunkCache(tmp_path / "cache", 8 << 20)
    for _ in range(2):
        source = await opened(f"{url}/{location}/{file.name}", cache)
        before = await asyncio.to_thread(lines, url, log)
        await read_some(source, DATA)
        await source.aclose()
        asked = await asyncio.to_thread(lines, url, log) - before - 1
    counted = await asyncio.to_thread(cache.statistics)
    if location in ("dated", "weak", "silent"):
        assert counted["misses"] == 0
        assert asked >= 30
        assert "is not cached" in caplog.text
    else:
        assert counted["misses"] == 5
        assert asked == 0
        assert "is not cached" not in caplog.text


@pytest.mark.parametrize("location", ["strong", "dated"])
async def test_what_has_changed(served: tuple[str, Path, Path], file: Path, location: str, tmp_path: Path) -> None:
    """A read is an error, and no mixture; whoever opens it again has the new bytes, also with a cache of the old."""
    url = f"{served[0]}/{location}/{file.name}"
    cache = aiouffd.ChunkCache(tmp_path / "cache", 8 << 20)
    source = await opened(url, cache)
    assert bytes(await source.read(0, 4096)) == DATA[:4096]
    await asyncio.to_thread(write, file, OTHER, 0)
    with pytest.raises(aiouffd.SourceError, match="changed"):
        await source.read(200_000, 4096)
    await source.aclose()
    source = await opened(url, cache)
    await read_some(source, OTHER)
    await source.aclose()


async def test_a_server_without_ranges(served: tuple[str, Path, Path], file: Path) -> None:
    """Is told at once."""
    with pytest.raises(aiouffd.SourceError, match=r"[Rr]ange"):
        await opened(f"{served[0]}/whole/{file.name}")


def test_snapshots(served: tuple[str, Path, Path]) -> None:
    """Also by connections that end after two requests."""
    create_sync(DATA, served[1] / "x.snap")
    for location in ("strong", "brief", "silent"):
        assert read_all(f"{served[0]}/{location}/x.snap", step=5000) == DATA
    with pytest.raises(aiouffd.StoreError, match="there is no such snapshot"):
        read_all(f"{served[0]}/strong/y.snap")
