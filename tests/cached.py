"""Sources and caches for tests: what is fetched is counted, held back, or fails."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiouffd.errors import SourceError
from aiouffd.store.cache import ChunkCache
from aiouffd.store.cached_source import CachedSource
from aiouffd.store.codecs import digest

if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK = 64 << 10
MIB = 1 << 20


def block(number: int, name: str = "") -> bytes:
    """Return the 4 KiB of number `number`; each fourth 64 KiB are zeros."""
    if number // 16 % 4 == 3:
        return bytes(4096)
    return (digest(f"{name} {number}".encode(), 32) * 128)[:4096]


class Far:
    """Bytes that must be waited for.

    Attributes:
        asked: (offset, length) of each read.
        failing: whether reads fail.
        gate: reads wait for it.
    """

    sparse = False

    def __init__(self, size: int = 10 * CHUNK + 5000, name: str = "x", log: str | None = None) -> None:
        self.size = size
        self.name = name
        self.asked: list[tuple[int, int]] = []
        self.failing = False
        self.gate: asyncio.Event | None = None
        self._log = log

    @property
    def cache_identity(self) -> Any:
        """Its name."""
        return ("far", self.name, self.size)

    def bytes_of(self, offset: int, length: int) -> bytes:
        """Return what must be read."""
        first = offset // 4096
        whole = b"".join(block(n, self.name) for n in range(first, -(-(offset + length) // 4096)))
        return whole[offset - first * 4096 :][:length]

    async def read(self, offset: int, length: int) -> bytes:
        """Return the bytes."""
        self.asked.append((offset, length))
        if self._log is not None:
            with Path(self._log).open("a") as log:  # noqa: ASYNC230 - a line
                log.write(f"{os.getpid()} {offset} {length}\n")
        await asyncio.sleep(0)
        if self.gate is not None:
            await self.gate.wait()
        if self.failing:
            raise SourceError(repr(self), offset, length, "not today")
        return self.bytes_of(offset, length)


class Hashed(Far):
    """As a snapshot: its chunks are named by their hashes, and those of zeros are known."""

    chunk_size = 8192

    def chunk_key(self, number: int) -> bytes | None:
        """Return the hash of a chunk."""
        data = self.bytes_of(number * 8192, min(8192, self.size - number * 8192))
        return digest(data) if any(data) else None


def opened(path: Path, source: Any = None, limit: int = 64 * MIB) -> Any:
    """Return a cached source, as a process of its own would have it."""
    return CachedSource(Far() if source is None else source, ChunkCache(path / "cache", limit))


async def until(condition: Callable[[], object]) -> None:
    """Wait until something is true."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - of threads and other processes, too
            await asyncio.sleep(0.001)
