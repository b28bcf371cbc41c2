"""Files of any fsspec filesystem (the extra `aiouffd[fsspec]`)."""

from __future__ import annotations

import asyncio
import hashlib
import os
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import attrs

from aiouffd.errors import ShortReadError, SourceError, SourceTimeoutError
from aiouffd.sources import repeated
from aiouffd.sources.daemon_threads import DaemonThreads

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FsspecSource", "one_file"]

_THREADS: Final = 32
_PATIENCE: Final = 5.0  # seconds to wait for a look at the version before another one
_TAGS: Final = ("ETag", "etag", "md5Hash", "md5", "sha256", "checksum", "content_hash", "blob_id", "oid", "generation")
_TIMES: Final = ("mtime", "LastModified", "Last-Modified", "last_modified", "modified", "updated", "created")
_FOR_GOOD: Final = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError)


@attrs.frozen
class _Version:
    """What a filesystem says of a file: two that are equal are of the same bytes, as far as it says anything."""

    size: int
    tag: str | None
    rest: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, info: Any) -> _Version:
        said = [(key, str(info[key])) for key in (*_TAGS, *_TIMES, "ino") if info.get(key) is not None]
        tags = [value for key, value in said if key in _TAGS and not value.startswith("W/")]
        return cls(info["size"], tags[0] if tags else None, tuple(said))


class FsspecSource:
    """One file of an fsspec filesystem, read by ranges.

    Reads of asynchronous filesystems run on fsspec's own loop, in its thread, since some wait there without await (s3fs
    reads the model of its service from disk). Others run in threads. It is served by a pager of its own, to which the
    filesystem travels as fsspec pickles it.

    What the filesystem says of the file (ETag, checksum, time of change, size) is looked at after each read: once the
    file has changed, reads are SourceErrors, and no mixture of both versions. Reads that end meanwhile share one look.
    If it says nothing but the size, that is logged, and changes are not noticed.

    Args:
        what: a URL that `fsspec.open` takes (`hf://org/model/file`, `sftp://...`, chains with `::`), or a filesystem.
        path: of the file in it, if it is a filesystem.
        **options: for the filesystem of a URL, as `fsspec.open` takes them.

    Raises:
        TypeError: a filesystem without a path, or a URL with one.
    """

    def __init__(self, what: Any, path: str | None = None, **options: Any) -> None:
        if isinstance(what, str) == isinstance(path, str):
            raise TypeError("FsspecSource takes a URL, or a filesystem and a path in it")
        self._what, self._path, self._options = what, path, options
        self._pinned: _Version | None = None
        self._timeout: float | None = None
        # Made at first use: they do not travel.
        self._filesystem: Any = None
        self._pool: DaemonThreads | None = None
        self._here: asyncio.Future[Any] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._next_look: asyncio.Task[None] | None = None
        self._looks: set[asyncio.Task[None]] = set()  # all that have not ended

    @property
    def size(self) -> int:
        """Bytes of the file. The first use asks the filesystem, and blocks.

        Raises:
            SourceError: it is not there, not allowed, or of no known size; fsspec, or what it needs, is missing.
        """
        if self._pinned is None:
            try:
                filesystem, path = self._found()
                info = filesystem.info(path, **one_file(filesystem))
            except Exception as error:  # filesystems raise many kinds
                raise SourceError(repr(self), 0, 0, f"{type(error).__name__}: {error}") from error
            self._pin(info)
        assert self._pinned is not None
        return self._pinned.size

    @classmethod
    def on_loop(cls, filesystem: Any, path: str, info: Any) -> FsspecSource:
        """Make a source for the loop that runs, on which the filesystem is used already. It stays the caller's.

        Args:
            filesystem: asynchronous ones are used on that loop, others in threads.
            path: of the file.
            info: what the filesystem has just told of it.

        Raises:
            SourceError: it is no file, or of no known size.
        """
        self = cls(filesystem, path)
        self._pin(info)
        self._pool, loop = DaemonThreads(_THREADS, "aiouffd-fsspec"), asyncio.get_running_loop()
        self._here = loop.create_future()
        self._here.set_result((filesystem, path, loop if filesystem.async_impl else None))
        return self

    def _pin(self, info: Any) -> None:
        if info.get("type", "file") != "file" or not isinstance(info.get("size"), int):
            raise SourceError(repr(self), 0, 0, "it is no file, or its size is not known")
        self._pinned = _Version.of(info)
        if not self._pinned.rest:
            repeated.warn(self, "is of a filesystem that names no version: changes are not noticed")

    @property
    def cache_identity(self) -> tuple[Any, ...] | None:
        """What only the same bytes have; None: the filesystem does not say, or was not asked yet."""
        if self._pinned is None or self._pinned.tag is None:
            return None
        filesystem, path = self._found()
        options = repr((type(filesystem).__qualname__, filesystem.storage_args, filesystem.storage_options))
        return "fsspec", hashlib.sha256(options.encode()).hexdigest(), path, self._pinned.size, self._pinned.tag

    @property
    def validator(self) -> str | None:
        """What the filesystem calls this version; None: it does not say, or was not asked yet."""
        return None if self._pinned is None else self._pinned.tag

    def _found(self) -> tuple[Any, str]:
        """Return (filesystem, path in it)."""
        if self._filesystem is None:
            if isinstance(self._what, str):
                import fsspec  # noqa: PLC0415 - an extra

                self._filesystem, self._path = fsspec.core.url_to_fs(self._what, **self._options)
            else:
                self._filesystem = self._what
        assert self._path is not None
        return self._filesystem, self._path

    def begin(self, timeout: float | None, _retries: int | None, _on_retry: Callable[[], None]) -> None:
        """Take over the timeout of the Monitor: others may wait for a read that the engine waits for no longer."""
        self._timeout = timeout

    async def read(self, offset: int, length: int) -> Any:
        """Return the bytes. Canceling is safe; a call in a thread goes on, and what it returns is dropped.

        Raises:
            SourceError: the file has changed, is gone, or may not be read. SourceTimeoutError: no answer in time.
        """
        data = await self._ask(offset, length, "cat_file", start=offset, end=offset + length)
        if len(data) != length:
            raise ShortReadError(repr(self), offset, length, f"gave {len(data)} bytes of {length}")
        if self._pinned is not None and self._pinned.rest:
            if self._next_look is None:
                self._next_look = asyncio.ensure_future(self._look(self._looking))
                self._looks.add(self._next_look)
                self._next_look.add_done_callback(self._looks.discard)
                self._next_look.add_done_callback(_retrieve)
            try:
                await asyncio.shield(self._next_look)
            except SourceError as error:
                raise type(error)(repr(self), offset, length, error.reason) from error
        return data

    async def _look(self, before: asyncio.Task[None] | None) -> None:
        """Compare the version with what was pinned: the reads that have ended before this are of it."""
        if before is not None:
            await asyncio.wait([before], timeout=_PATIENCE)
        self._looking, self._next_look = self._next_look, None
        found = _Version.of(await self._ask(0, 0, "info"))
        if found != self._pinned:
            raise SourceError(repr(self), 0, 0, f"it has changed since it was opened: {self._pinned} -> {found}")

    async def _ask(self, offset: int, length: int, method: str, **arguments: int) -> Any:
        """Call a method of the filesystem, on its loop or in a thread."""
        try:
            async with asyncio.timeout(self._timeout):
                return await self._answer(method, arguments)
        except _FOR_GOOD as error:
            raise SourceError(repr(self), offset, length, f"{type(error).__name__}: {error}") from error
        except TimeoutError as error:
            raise SourceTimeoutError(repr(self), offset, length, "the filesystem has not answered in time") from error

    async def _answer(self, method: str, arguments: dict[str, int]) -> Any:
        loop = asyncio.get_running_loop()
        filesystem, path, its_loop = await self._settled()
        if its_loop is None:
            return await loop.run_in_executor(self._pool, _call, filesystem, method, path, arguments)
        call = _call_on_loop(filesystem, method, path, arguments)
        if its_loop is loop:
            return await call
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call, its_loop))

    async def _settled(self) -> tuple[Any, str, asyncio.AbstractEventLoop | None]:
        """Return what `_settle` does, which runs once: again only where that failed, or was not waited for."""
        here = self._here
        if here is None:
            if self._pool is None:
                self._pool = DaemonThreads(_THREADS, "aiouffd-fsspec")
            here = self._here = asyncio.get_running_loop().run_in_executor(self._pool, self._settle)
            here.add_done_callback(_retrieve)
        try:
            return await asyncio.shield(here)
        except BaseException:
            if self._here is here:
                self._here = None
            raise

    def _settle(self) -> tuple[Any, str, asyncio.AbstractEventLoop | None]:
        """Return (filesystem, path, the loop of its reads). It may connect, and so it runs in a thread."""
        filesystem, path = self._found()
        # One around another says of itself what that is, and has it on a loop of its own.
        options = filesystem.storage_options
        around = any(hasattr(each, "async_impl") for each in (*filesystem.storage_args, *options.values()))
        if around or any(name.endswith("_protocol") for name in options) or not filesystem.async_impl:
            return filesystem, path, None
        if filesystem.asynchronous or filesystem._pid != os.getpid():  # noqa: SLF001 - its loop is another's
            options = {**filesystem.storage_options, "asynchronous": False, "loop": None}
            filesystem = type(filesystem)(*filesystem.storage_args, **options)
        return filesystem, path, filesystem.loop

    async def aclose(self) -> None:
        """End what is under way, and let threads end."""
        for look in self._looks:
            look.cancel()
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    def __reduce__(self) -> tuple[Callable[..., FsspecSource], tuple[Any, ...]]:
        given = self._path if not isinstance(self._what, str) else None
        return _arrived, (self._what, given, self._options, self._pinned)

    def __repr__(self) -> str:
        if not isinstance(self._what, str):
            return f"FsspecSource({type(self._what).__name__}, {self._path!r})"
        parts = urlsplit(self._what)
        host = parts.netloc.rpartition("@")[2]  # no password in a log
        return f"FsspecSource({parts._replace(netloc=host, query='').geturl()!r})"


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Take note of what it raised: whoever waits for it does so, too, if anybody does."""
    if not future.cancelled():
        future.exception()


def _call(filesystem: Any, method: str, path: str, arguments: dict[str, Any]) -> Any:
    from fsspec.spec import AbstractFileSystem  # noqa: PLC0415 - an extra

    if method == "info":
        filesystem.invalidate_cache(path)  # what it has listed before does not count
        arguments = one_file(filesystem)
    elif type(filesystem).cat_file is AbstractFileSystem.cat_file:
        # It opens a file, which would read 5 MiB more than it is asked for.
        arguments = {**arguments, "cache_type": "none"}
    return getattr(filesystem, method)(path, **arguments)


def one_file(filesystem: Any) -> dict[str, Any]:
    """Return what `info` takes for one file: HfFileSystem lists its whole folder, unless the commit is wanted, too."""
    return {"expand_info": True} if hasattr(filesystem, "expand_info") else {}


async def _call_on_loop(filesystem: Any, method: str, path: str, arguments: dict[str, int]) -> Any:
    if method == "info":
        filesystem.invalidate_cache(path)  # as above
    return await getattr(filesystem, f"_{method}")(path, **arguments)


def _arrived(what: Any, path: str | None, options: dict[str, Any], pinned: _Version | None) -> FsspecSource:
    source = FsspecSource(what, path, **options)
    source._pinned = pinned  # noqa: SLF001 - its own
    if repr(source).startswith(("FsspecSource('memory:", "FsspecSource(MemoryFileSystem")):
        filesystem, place = source._found()  # noqa: SLF001 - as above
        if not filesystem.exists(place):
            reason = "the files of memory:// are those of one process: use engine=InThread(), or pass their bytes"
            raise SourceError(repr(source), 0, 0, reason)
    return source
