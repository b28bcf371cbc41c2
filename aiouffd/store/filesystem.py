"""A filesystem of fsspec that reads another one through a `ChunkCache`: `aiouffd::s3://bucket/key`.

It needs `aiouffd[fsspec,store]`. fsspec finds it by the entry point `fsspec.specs` of this package.
"""
# ruff: noqa: SLF001 - fsspec's own filesystems call these methods of each other, too

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Any, Final

from fsspec import filesystem
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.chained import ChainedFileSystem
from fsspec.spec import AbstractBufferedFile

from aiouffd.sources.fsspec_source import FsspecSource, one_file
from aiouffd.store.cache import ChunkCache
from aiouffd.store.cached_source import CachedSource
from aiouffd.store.place import is_snapshot, names_with

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["CachedFileSystem"]

_CACHE_SIZE: Final = 10 << 30
_BLOCK: Final = 256 << 10  # bytes that a file reads at once: what is in the cache costs little


if TYPE_CHECKING:

    class _Filesystem:
        """fsspec has no types: all of its methods may be called."""

        def __init__(self, *, asynchronous: bool, loop: Any, **options: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...

else:

    class _Filesystem(AsyncFileSystem, ChainedFileSystem):
        """The class of an asynchronous filesystem that others are chained to."""


class CachedFileSystem(_Filesystem):
    """Reads files of another filesystem of fsspec, and keeps their chunks in a `ChunkCache`.

    It is read only. `fsspec.open("aiouffd::s3://bucket/key", s3={...}, aiouffd={"cache_storage": ...})` makes one, and
    so does each library that takes such URLs. A snapshot (`.snap`), and a file in zstd's seekable format (`.zst`), is a
    file of the bytes that it holds. What has no strong ETag or checksum is read, and not kept.

    Args:
        fs: the other filesystem; or:
        target_protocol: its protocol, which fsspec takes from the URL.
        target_options: its options, which fsspec takes from the keyword of that name.
        cache_storage: folder of the cache, or a `ChunkCache`. By default `aiouffd` in the user's folder of caches
            (`XDG_CACHE_HOME`, `~/.cache`).
        cache_size: limit of the cache, in bytes.
        storage_options: for the store of a snapshot behind a URL, which fsspec does not read: as for `open`.
        fo: is not used; fsspec gives it.
        asynchronous: as fsspec has it: whether coroutines are called on the loop of the caller.
        loop: as fsspec has it.
        **options: of `AsyncFileSystem`.

    Raises:
        ValueError: neither or both of `fs` and `target_protocol` are given; only one of both is asynchronous.
        PermissionError: the folder of the cache is another user's, or others may enter it.
    """

    protocol = "aiouffd"

    def __init__(
        self,
        fs: Any = None,
        *,
        target_protocol: str | None = None,
        target_options: dict[str, Any] | None = None,
        cache_storage: str | os.PathLike[str] | ChunkCache | None = None,
        cache_size: int = _CACHE_SIZE,
        storage_options: dict[str, Any] | None = None,
        fo: str | None = None,
        asynchronous: bool = False,
        loop: Any = None,
        **options: Any,
    ) -> None:
        if (fs is None) == (target_protocol is None):
            raise ValueError("give a filesystem (fs=), or the protocol of one (target_protocol=)")
        super().__init__(asynchronous=asynchronous, loop=loop, **options)
        if target_protocol is not None:
            fs = filesystem(target_protocol, **{"asynchronous": asynchronous, **(target_options or {})})
        if fs.async_impl and fs.asynchronous != asynchronous:
            raise ValueError("both filesystems are asynchronous=, or none is")
        self.fs: Any = fs
        self._target: Any = fs if fs.async_impl else AsyncFileSystemWrapper(fs, asynchronous=asynchronous)
        place = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - a text
        self.cache: ChunkCache = (
            cache_storage
            if isinstance(cache_storage, ChunkCache)
            else ChunkCache(cache_storage or f"{place}/aiouffd", cache_size)
        )
        self.cache.check()
        self._store_options = storage_options or {}
        self._strip_protocol: Any = lambda path: fs._strip_protocol(_without(path))

    async def _info(self, path: str, **options: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if not (is_snapshot(path) or names_with(path, ".zst")):
            found: dict[str, Any] = await self._target._info(path, **options)
            return found
        async with self._opened(path) as source:
            return {"name": path, "size": source.size, "type": "file", "ETag": source.validator}

    async def _ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:  # noqa: FBT001, FBT002 - fsspec's
        found: list[Any] = await self._target._ls(self._strip_protocol(path), detail=detail, **options)
        return found

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        async with self._opened(self._strip_protocol(path)) as source:
            return await _read(source, start, end)

    async def _cat_ranges(
        self, paths: list[str], starts: Any, ends: Any, max_gap: int | None = None, batch_size: int | None = None,
        on_error: str = "return", **_: Any,
    ) -> list[Any]:  # fmt: skip
        """Read ranges; those of one file at once, and of one version of it."""
        each = zip(
            starts if isinstance(starts, list) else [starts] * len(paths),
            ends if isinstance(ends, list) else [ends] * len(paths),
            strict=True,
        )
        wanted: dict[str, list[tuple[int, Any, Any]]] = {}
        for number, (path, (start, end)) in enumerate(zip(paths, each, strict=True)):
            wanted.setdefault(path, []).append((number, start, end))
        found: list[Any] = [b""] * len(paths)

        async def of_one(path: str, ranges: list[tuple[int, Any, Any]]) -> None:
            try:
                async with self._opened(self._strip_protocol(path)) as source:
                    done = await asyncio.gather(
                        *(_read(source, start, end) for _, start, end in ranges), return_exceptions=True
                    )
            except Exception as error:  # noqa: BLE001 - fsspec returns it
                done = [error] * len(ranges)
            for (number, _, _), outcome in zip(ranges, done, strict=True):
                found[number] = outcome

        await asyncio.gather(*(of_one(path, ranges) for path, ranges in wanted.items()))
        failed = next((item for item in found if isinstance(item, BaseException)), None)
        if failed is not None and on_error != "return":
            raise failed
        return found

    def _open(self, path: str, mode: str = "rb", **options: Any) -> _File:
        if mode != "rb":
            raise NotImplementedError(f"files are read only here: mode {mode!r}")
        return _File(self, path, mode, **{"block_size": _BLOCK, **options})

    def ukey(self, path: str) -> str:
        """Return what fsspec tells versions by."""
        key: str = self.fs.ukey(self._strip_protocol(path))
        return key

    @contextlib.asynccontextmanager
    async def _opened(self, path: str) -> AsyncIterator[CachedSource]:
        source = await self._source(path)
        try:
            yield source
        finally:
            await source.aclose()

    async def _source(self, path: str) -> CachedSource:
        """Return a source that knows its size."""
        inner: Any
        if is_snapshot(path):
            from aiouffd.store.snapshot_source import SnapshotSource  # noqa: PLC0415 - most programs do without

            inner = SnapshotSource(self.fs.unstrip_protocol(path), **self._store_options)
        else:
            inner = FsspecSource.on_loop(self.fs, path, await self._target._info(path, **one_file(self.fs)))
        if names_with(path, ".zst"):
            from aiouffd.store.zstd_seekable import ZstdSeekableSource  # noqa: PLC0415 - as above

            inner = ZstdSeekableSource(inner)
        source = CachedSource(inner, self.cache)
        await source.prepare()
        return source


class _File(AbstractBufferedFile):  # type: ignore[misc]
    """One version of a file, as it is when it is opened."""

    def __init__(self, fs: CachedFileSystem, path: str, mode: str, **options: Any) -> None:
        self._source: CachedSource = sync(fs.loop, fs._source, fs._strip_protocol(path))
        super().__init__(fs, path, mode, size=self._source.size, **options)

    def _fetch_range(self, start: int, end: int) -> bytes:
        found: bytes = sync(self.fs.loop, _read, self._source, start, end)
        return found

    def close(self) -> None:
        """Let threads end."""
        if not self.closed:
            sync(self.fs.loop, self._source.aclose)
        super().close()


async def _read(source: CachedSource, start: int | None, end: int | None) -> bytes:
    """Return bytes; the places may be those of a slice."""
    low, high, _ = slice(start, end).indices(source.size)
    return bytes(await source.read(low, high - low)) if low < high else b""


def _without(path: str) -> str:
    """Return a URL without the protocol of this filesystem."""
    return path.removeprefix("aiouffd::").removeprefix("aiouffd://")
