"""`open`: a region for what a path or a URL names, and the Monitor that serves it."""

from __future__ import annotations

from errno import EBUSY
from typing import TYPE_CHECKING, NoReturn, Unpack

from aiouffd.errors import BusyError
from aiouffd.kernel.region import Region
from aiouffd.monitor.map import monitor_of, only_known, source_of

if TYPE_CHECKING:
    import os
    from types import TracebackType

    from typing_extensions import Buffer

    from aiouffd.monitor.engines.in_process import InProcess
    from aiouffd.monitor.engines.in_thread import InThread
    from aiouffd.monitor.engines.pager import Pager
    from aiouffd.monitor.monitor import AllOptions, Monitor, OnFork
    from aiouffd.sources.base import Source
    from aiouffd.sources.storage_options import StorageOptions
    from aiouffd.store.cache import ChunkCache

__all__ = ["Opened", "open"]

_USE = "nothing is mapped yet: `with aiouffd.open(...) as region`, or `region = aiouffd.map(...)` without a block"


class Opened:
    """What `open` returns: an asynchronous context manager of a region, and a plain one.

    `len()` is the size of the source; it asks for it, and blocks. For all else a block is needed.
    """

    def __init__(
        self,
        what: str | os.PathLike[str] | Source | Buffer,
        engine: Pager | InThread | InProcess | None,
        fork: OnFork | None,
        storage_options: StorageOptions | None,
        cache: ChunkCache | None,
        options: AllOptions,
    ) -> None:
        self._what, self._engine, self._fork, self._storage_options = what, engine, fork, storage_options
        self._cache = cache
        self._options = options
        self._found: Source | None = None  # by `len`
        self._monitor: Monitor | None = None

    def _source(self) -> Source:
        return source_of(self._what, self._storage_options, self._cache, self._options)

    def _prepare(self) -> Monitor:
        if self._monitor is not None:
            region = self._monitor.region
            raise BusyError("entering what aiouffd.open has returned a second time", region.address, len(region), EBUSY)
        source, self._found = self._found or self._source(), None
        return monitor_of(Region, source, self._engine, self._fork, self._options)

    async def __aenter__(self) -> Region:
        """Find the source, map a region of its size, and serve it."""
        import asyncio  # noqa: PLC0415 - 20 ms, that a program with a loop has spent already

        monitor = await asyncio.to_thread(self._prepare)
        await monitor.__aenter__()
        self._monitor = monitor
        return monitor.region

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the Monitor."""
        monitor, self._monitor = self._monitor, None
        assert monitor is not None
        await monitor.__aexit__(kind, value, trace)

    def __enter__(self) -> Region:
        """Find the source, map a region of its size, and serve it."""
        monitor = self._prepare()
        monitor.__enter__()
        self._monitor = monitor
        return monitor.region

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the Monitor."""
        monitor, self._monitor = self._monitor, None
        assert monitor is not None
        monitor.__exit__(kind, value, trace)

    def __len__(self) -> int:
        self._found = self._found or self._source()
        return self._found.size

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<what aiouffd.open has returned: {_USE}>"

    def __getattr__(self, name: str) -> NoReturn:
        if hasattr(Region, name) or name in Region.__annotations__:
            raise AttributeError(f"a region has {name!r}, and {_USE}")
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")

    if not TYPE_CHECKING:  # a type checker says the same

        def _refuse(self, *_: object) -> NoReturn:
            raise TypeError(_USE)

        __buffer__ = __getitem__ = __setitem__ = __iter__ = _refuse


def open(  # noqa: A001 - it is called aiouffd.open
    what: str | os.PathLike[str] | Source | Buffer,
    *,
    engine: Pager | InThread | InProcess | None = None,
    fork: OnFork | None = None,
    storage_options: StorageOptions | None = None,
    cache: ChunkCache | None = None,
    **options: Unpack[AllOptions],
) -> Opened:
    """Map what a path or a URL names: a region of its size, whose pages come on first touch.

    `async with aiouffd.open(...) as region`, or plain `with`. `region.monitor` is the `Monitor`; behind the block it is
    None, so keep the Monitor if `check()` is called then. The region is served inside the block only, arrays on
    it as well: `map` is without a block.

    Args:
        what: a path, `http(s)://`, `s3://`, `gs://`, `az://`, `file://`; also a buffer or a `Source`. URLs other than
            `file://` need the extra `aiouffd[http]`. Other URLs that fsspec knows (`hf://`, `sftp://`, chains with
            `::`) are read by `FsspecSource` (`aiouffd[fsspec]`).
        engine: as for `Monitor`; a server has sources of its own, so `ServedBy` is not for `open`.
        fork: as for `Monitor`.
        storage_options: credentials, endpoint, region and the like, for URLs: see `StorageOptions`.
        cache: where what comes from URLs is kept, for all processes of the user. An object whose server names no
            version (a strong ETag) is not kept.
        **options: as for `Monitor`.

    Raises on entering:
        SourceError: it is not there, empty, or cannot be read page by page.
        TypeError: `what` is none of these, or an option is of a wrong type.
        UffdError: as for `Monitor`.
        OSError: as for `Monitor`.

    Raises:
        TypeError: an option is unknown.
    """
    only_known("open", options, what, storage_options)
    return Opened(what, engine, fork, storage_options, cache, options)
