"""`open`: a region for what a path or a URL names, and the Monitor that serves it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aiouffd.errors import SourceError
from aiouffd.kernel.region import Region
from aiouffd.monitor.monitor import Monitor
from aiouffd.sources.resolve import as_source

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["open"]


class _Opened:
    """What `open` returns: an asynchronous context manager of a region, and a plain one."""

    def __init__(self, source: Any, options: dict[str, Any]) -> None:
        self._source = source
        self._options = options
        self._monitor: Monitor | None = None

    def _prepare(self) -> Monitor:
        source = as_source(self._source)
        if not source.size:
            raise SourceError(repr(source), 0, 0, "it is empty: there is nothing to map")
        return Monitor(Region(source.size), source, **self._options)

    async def __aenter__(self) -> Region:
        self._monitor = await asyncio.to_thread(self._prepare)
        await self._monitor.__aenter__()
        return self._monitor.region

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._monitor is not None
        await self._monitor.__aexit__(kind, value, trace)

    def __enter__(self) -> Region:
        self._monitor = self._prepare()
        self._monitor.__enter__()
        return self._monitor.region

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._monitor is not None
        self._monitor.__exit__(kind, value, trace)


def open(  # noqa: A001 - it is called aiouffd.open
    url_or_path: Any, **options: Any
) -> _Opened:
    """Map what a path or a URL names: a region of its size, whose pages come on first touch.

    `async with aiouffd.open(...) as region`, or plain `with`. `region.monitor` is the `Monitor`.

    Args:
        url_or_path: a path, `http(s)://`, `s3://`, `gs://`, `az://`, `file://`; also a buffer or a `Source`.
            URLs but `file://` need the extra `aiouffd[http]`.
        **options: as for `Monitor`.

    Raises (on entering):
        SourceError: it is not there, empty, or cannot be read page by page.
        UffdError: as for `Monitor`.
    """
    return _Opened(url_or_path, options)
