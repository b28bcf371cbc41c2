"""`open`: a region for what a path or a URL names, and the Monitor that serves it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

from aiouffd.errors import SourceError
from aiouffd.kernel.region import Region
from aiouffd.monitor.monitor import AllOptions, Monitor
from aiouffd.store.resolve import as_source

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from aiouffd.monitor.engines.in_process import InProcess
    from aiouffd.monitor.engines.in_thread import InThread
    from aiouffd.monitor.engines.pager import Pager
    from aiouffd.monitor.monitor import OnFork

__all__ = ["Opened", "open"]


class Opened:
    """What `open` returns: an asynchronous context manager of a region, and a plain one."""

    def __init__(self, prepare: Callable[[], Monitor]) -> None:
        self._prepare = prepare
        self._monitor: Monitor | None = None

    async def __aenter__(self) -> Region:
        """Find the source, map a region of its size, and serve it."""
        import asyncio  # noqa: PLC0415 - 20 ms, that a program with a loop has spent already

        self._monitor = await asyncio.to_thread(self._prepare)
        await self._monitor.__aenter__()
        return self._monitor.region

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the Monitor."""
        assert self._monitor is not None
        await self._monitor.__aexit__(kind, value, trace)

    def __enter__(self) -> Region:
        """Find the source, map a region of its size, and serve it."""
        self._monitor = self._prepare()
        self._monitor.__enter__()
        return self._monitor.region

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the Monitor."""
        assert self._monitor is not None
        self._monitor.__exit__(kind, value, trace)


def open(  # noqa: A001 - it is called aiouffd.open
    what: Any,
    *,
    engine: Pager | InThread | InProcess | None = None,
    fork: OnFork | None = None,
    storage_options: Mapping[str, Any] | None = None,
    **options: Unpack[AllOptions],
) -> Opened:
    """Map what a path or a URL names: a region of its size, whose pages come on first touch.

    `async with aiouffd.open(...) as region`, or plain `with`. `region.monitor` is the `Monitor`.

    Args:
        what: a path, `http(s)://`, `s3://`, `gs://`, `az://`, `file://`; also a buffer or a `Source`. URLs other than
            `file://` need the extra `aiouffd[http]`.
        engine: as for `Monitor`; a server has sources of its own, so `ServedBy` is not for `open`.
        fork: as for `Monitor`.
        storage_options: credentials, endpoint, region and the like, for URLs: see `ObjectSource`.
        **options: as for `Monitor`.

    Raises on entering:
        SourceError: it is not there, empty, or cannot be read page by page.
        TypeError: `what` is none of these, or an option is of a wrong type.
        UffdError: as for `Monitor`.
        OSError: as for `Monitor`.
    """

    def prepare() -> Monitor:
        source = as_source(
            what, timeout=options.get("timeout"), retries=options.get("retries"), options=storage_options
        )
        if not source.size:
            raise SourceError(repr(source), 0, 0, "it is empty: there is nothing to map")
        # What InThread cannot do is refused when the Monitor is made.
        return Monitor(Region(source.size), source, engine=engine, fork=fork, **options)  # type: ignore[arg-type]

    return Opened(prepare)
