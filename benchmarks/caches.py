"""A cache of chunks: faults of what it has, and processes that want the same at once."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import aiouffd
from aiouffd.store.cached_source import CachedSource
from aiouffd.store.chunk_names import ChunkNames
from benchmarks.contestants import Arena, content, monitored
from benchmarks.far import web
from benchmarks.row import MIB, Bar, Row, touching

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["cache_rows"]

_PROCESSES = 8
_LIMIT = 1 << 30
_READ_ALL = """
import sys
import aiouffd
cache = aiouffd.ChunkCache(sys.argv[2], int(sys.argv[3]))
with aiouffd.open(sys.argv[1], cache=cache, readahead=0) as region:
    print("open", flush=True)
    sys.stdin.readline()
    sum(region[:: 4096])
"""


class Known:
    """A source that is in the cache, and is not asked for anything else."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.cache_identity = ("benchmark", size)

    async def read(self, offset: int, length: int) -> bytes:
        """Fail."""
        raise aiouffd.SourceError(repr(self), offset, length, "the cache does not have it")


_folders: list[tempfile.TemporaryDirectory[str]] = []


@cache
def warm_cache(size: int) -> aiouffd.ChunkCache:
    """Return a cache that has all of a source, in a folder that is removed when the benchmarks end."""
    _folders.append(tempfile.TemporaryDirectory(prefix="aiouffd-cache-", dir="/var/tmp"))
    kept = aiouffd.ChunkCache(_folders[-1].name, _LIMIT)
    names, data = ChunkNames(Known(size)), content(size).map
    assert data is not None
    for number, start, stop in names.pieces(0, size):
        key = names.of(number)
        assert key is not None
        at = number * names.chunk_size
        assert kept.add([(key, data[at + start : at + stop])]) != [None]
    return kept


@contextlib.contextmanager
def cached(size: int) -> Iterator[Arena]:
    """Ours: what the cache has, page by page."""
    with monitored(size, CachedSource(Known(size), warm_cache(size)), readahead=0) as arena:
        yield arena


@contextlib.contextmanager
def buffered(size: int) -> Iterator[Arena]:
    """The same bytes in memory, page by page."""
    with monitored(size, readahead=0) as arena:
        yield arena


def fetched(size: int, processes: int) -> float:
    """Ours: MiB that are fetched when so many processes open one object with a cold cache, and read all of it."""
    with web(size) as port, tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        place = Path(folder) / "cache"
        url = f"http://127.0.0.1:{port}/file"
        command = [sys.executable, "-c", _READ_ALL, url, str(place), str(_LIMIT)]
        readers = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(processes)
        ]
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "open\n"
        for reader in readers:
            assert reader.stdin is not None
            reader.stdin.write("\n")
            reader.stdin.flush()
        for reader in readers:
            reader.communicate()
            assert reader.returncode == 0
        return aiouffd.ChunkCache(place, _LIMIT).statistics()["bytes"] / MIB


def cache_rows(*, quick: bool) -> Iterator[Row]:
    """What a cache is for."""
    size = (8 if quick else 64) * MIB
    yield Row(
        "cache-warm",
        "random 4 KiB touches of what a cache has",
        "us/page",
        {"aiouffd": touching(cached, size, 1), "BufferSource": touching(buffered, size, 1)},
        (Bar("BufferSource", 1.1),),
        setup="readahead=0",
    )
    yield Row(
        "cache-once",
        f"{_PROCESSES} processes open one cold object: bytes fetched",
        "MiB",
        {"aiouffd": partial(fetched, size, _PROCESSES), "1 process": partial(fetched, size, 1)},
        (Bar("1 process", 1.0),),
        repeats=3,
    )
