"""A file that was compressed in zstd's seekable format, as the bytes that it holds."""

from __future__ import annotations

import asyncio
import copy
import os
import threading
from typing import TYPE_CHECKING, Any, Final

import attrs

from aiouffd.errors import ShortReadError
from aiouffd.sources.file import FileSource
from aiouffd.store.chunks import Chunks
from aiouffd.store.codecs import prepare
from aiouffd.store.seek_table import SeekTable, table_length

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable

    from aiouffd.sources.base import Source

__all__ = ["ZstdSeekableSource"]

_KEPT: Final = 32 << 20
_TAIL: Final = 64 << 10  # bytes that are read at once: the whole seek table of most files


@attrs.frozen
class _Image:
    """The file, as its chunks are read from it."""

    index: SeekTable
    name_: str
    is_local = False

    @property
    def store(self) -> _Image:
        return self

    def name(self, _: str) -> str:
        return self.name_


class ZstdSeekableSource:
    """What a compressed file holds, if zstd's seekable format lets it be read at any place.

    The file is frames of zstd, which are decompressed one by one, in threads. They may have any length; small ones are
    better: all of the frame that a page is in is fetched and decompressed for it. Neighboring frames are one request.
    Where the file has checksums, no byte is shown before that of its frame has been compared.

    Args:
        compressed: the path of a file, or a source of its bytes, which belongs to this object then.
        kept: limit of the bytes of decompressed frames that are kept in memory, at least two frames.

    Attributes:
        compressed: the source.

    Raises:
        SourceError: the file cannot be opened.
    """

    local = False
    """Bytes must be waited for, also those of a local file: they are decompressed."""
    keeps = True
    """Frames are fetched once for all who ask, and kept for a while."""

    def __init__(self, compressed: str | os.PathLike[str] | Source, *, kept: int = _KEPT) -> None:
        self.compressed: Any = FileSource(compressed) if isinstance(compressed, str | os.PathLike) else compressed
        self._kept = kept
        self._table: SeekTable | None = None
        self._chunks: Chunks | None = None
        self._take_limits()

    def _take_limits(self) -> None:
        for name in ("timeout", "retries"):
            if hasattr(self.compressed, name):
                setattr(self, name, getattr(self.compressed, name))

    @property
    def table(self) -> SeekTable:
        """The seek table. The first use reads it, and blocks: `prepare()` does not.

        Raises:
            StoreError: there is none, or it is damaged.
            SourceError: the file cannot be read.
        """
        if self._table is None:
            prepare("zstd", "xxhash")
            size = self.compressed.size
            tail = _read_now(self.compressed, max(size - _TAIL, 0), size)
            length = table_length(tail, size, repr(self))
            if length > len(tail):
                tail = _read_now(self.compressed, size - length, size - len(tail)) + tail
            self._table = SeekTable.decode(tail[-length:], size, repr(self))
        return self._table

    @property
    def size(self) -> int:
        """Bytes that the file holds. The first use blocks. Raises as `table`."""
        return self.table.size

    @property
    def identity(self) -> tuple[Any, ...] | None:
        """What only the same bytes have; None: the compressed source does not say."""
        return self._named(getattr(self.compressed, "identity", None))

    @property
    def cache_identity(self) -> tuple[Any, ...] | None:
        """As `identity`: what a cache may rely on."""
        return self._named(getattr(self.compressed, "cache_identity", None))

    @property
    def validator(self) -> str | None:
        """As that of the compressed source."""
        return getattr(self.compressed, "validator", None)

    def _named(self, identity: Any) -> tuple[Any, ...] | None:
        return None if identity is None else ("zstd-seekable", identity)

    async def prepare(self) -> None:
        """Read the seek table in a thread. Canceling is safe. Raises as `table`."""
        await asyncio.to_thread(getattr, self, "table")

    def begin(self, timeout: float | None, retries: int | None, on_retry: Callable[[], None]) -> None:
        """Tell the compressed source what the Monitor was given."""
        begin = getattr(self.compressed, "begin", None)
        if begin is not None:
            begin(timeout, retries, on_retry)
            self._take_limits()

    def read_nowait(self, offset: int, length: int) -> Any:
        """Return the bytes if their frames are kept."""
        return None if self._chunks is None else self._chunks.cut_at_hand(offset, length)

    async def read(self, offset: int, length: int) -> Any:
        """Return the bytes. Canceling is safe: what is on its way comes all the same.

        Raises:
            StoreError: a frame is damaged, or cannot be had.
            SourceTimeoutError: no answer in time.
        """
        return await self._read(offset, length, urgent=True)

    async def read_ahead(self, offset: int, length: int) -> Any:
        """As `read`, for bytes that no thread waits for: others go first."""
        return await self._read(offset, length, urgent=False)

    async def _read(self, offset: int, length: int, *, urgent: bool) -> Any:
        if self._chunks is None:
            kept = max(self._kept, 2 * self.table.largest)
            self._chunks = Chunks(_Image(self.table, repr(self)), kept, lambda _: self.compressed)
        return await self._chunks.cut(offset, length, urgent=urgent)

    async def aclose(self) -> None:
        """Let the threads end, and close the compressed source."""
        if self._chunks is not None:
            await self._chunks.aclose()
            self._chunks = None
        close = getattr(self.compressed, "aclose", None)
        if close is not None:
            await close()

    def travel(self) -> tuple[Any, tuple[Any, ...]]:
        """Return what makes this source without another look at the file."""
        table = self.table
        return _arrived, (self.compressed, self._kept, table.starts, table.places, table.checksums)

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, (self.compressed, self._kept)

    def __repr__(self) -> str:
        return f"ZstdSeekableSource({self.compressed!r})"


def _read_now(source: Any, start: int, stop: int) -> bytes:
    """Return bytes of a source that no loop uses yet; blocks."""
    data = bytearray(stop - start)
    if isinstance(source, FileSource):
        source.fill(start, memoryview(data))
        return bytes(data)
    outcome: list[Any] = []

    async def read() -> None:
        other = copy.copy(source)  # the source itself belongs to the loop that will serve it
        try:
            outcome.append(bytes(await other.read(start, stop - start)))
        except Exception as error:  # noqa: BLE001 - raised by the caller
            outcome.append(error)
        finally:
            close = getattr(other, "aclose", None)
            if close is not None:
                await close()

    thread = threading.Thread(target=lambda: asyncio.run(read()), name="aiouffd-seek-table", daemon=True)
    thread.start()
    thread.join()
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    if len(outcome[0]) != stop - start:
        raise ShortReadError(repr(source), start, stop - start, f"gave {len(outcome[0])} bytes of {stop - start}")
    found: bytes = outcome[0]
    return found


def _remade(compressed: Any, kept: int) -> ZstdSeekableSource:
    return ZstdSeekableSource(compressed, kept=kept)


def _arrived(
    compressed: Any, kept: int, starts: array[int], places: array[int], checksums: array[int]
) -> ZstdSeekableSource:
    """Make a source whose seek table another process has read."""
    source = _remade(compressed, kept)
    prepare("zstd", "xxhash")
    source._table = SeekTable(starts, places, checksums)  # noqa: SLF001 - its own
    return source
