"""`map`: a region that is served without a block, as long as it or a view of it lives.

Its finalizer runs wherever the last reference goes: in the thread that hears the pager, in the loop that serves, in a
collection of garbage in the middle of anything. To leave a Monitor is to wait for others, and may not happen there. So
the finalizer gives the region to a thread of its own, which closes it. `_thread` starts that one: `threading` takes a
lock that the interrupted code may hold.
"""

from __future__ import annotations

import _thread
import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any, Final, SupportsFloat, Unpack

from aiouffd.engine.serve.bounds import Limits
from aiouffd.errors import SourceError, refuse_unknown
from aiouffd.kernel.region import Region
from aiouffd.lifetime import until_exit
from aiouffd.monitor.monitor import AllOptions, MapOptions, Monitor, checked_engine
from aiouffd.sources.storage_options import check_options
from aiouffd.store.resolve import as_source

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Buffer

    from aiouffd.monitor.engines.in_process import InProcess
    from aiouffd.monitor.engines.in_thread import InThread
    from aiouffd.monitor.engines.pager import Pager
    from aiouffd.monitor.monitor import OnFork
    from aiouffd.sources.base import Source
    from aiouffd.sources.storage_options import StorageOptions
    from aiouffd.store.cache import ChunkCache

__all__ = ["MappedRegion", "map", "monitor_of", "only_known", "source_of"]

log: logging.Logger = logging.getLogger("aiouffd")

_PAUSES: Final = 0.001, 1.0  # seconds between two tries to close what has a view still: the first, the longest
_HERE_ONLY: Final = ("on_exit", "record", "report")
"""Options of this region and not of another one that shows the same."""

_served: set[Monitor] = set()
"""Those of mapped regions. Nothing of them is garbage when the region is: no finalizer comes before the region's."""
_unclosed: list[MappedRegion] = []
"""For which no thread could be started."""


class MappedRegion(Region):
    """A region that has its Monitor for itself, and leaves it when it is closed."""

    monitor: Any

    def close(self) -> None:
        """Serve the region no longer, and unmap it. Blocks for milliseconds, until the pager has answered.

        Where another thread is closing it, returns at once.

        Raises:
            BufferError: views of it exist; it is served on.
            WriteBackError, OSError: as leaving the block of a Monitor. It is closed.
        """
        if not self.closed and (monitor := self.monitor) is not None:
            try:
                _served.remove(monitor)
            except KeyError:
                return
            try:
                self.refuse_views()
            except BufferError:
                _served.add(monitor)
                raise
            try:
                monitor.leave_region(self)
            finally:  # it is left, also where something could not be saved
                if not monitor.serves_here:
                    self.monitor = None  # in a forked child it is its parent's, and left by nobody
                    super().close()
        else:
            super().close()

    @until_exit
    def __del__(self) -> None:
        if self.monitor is None or not self.monitor.serves_here:
            super().__del__()
        else:
            _close_elsewhere(self)


def _close_elsewhere(region: MappedRegion) -> None:
    try:
        _thread.start_new_thread(_start_closing, (region,))
    except RuntimeError:  # no more threads; it is tried again
        _unclosed.append(region)


def _start_closing(region: MappedRegion) -> None:
    """Close it in a thread that `threading` knows: one that it does not know stays in its list for ever."""
    thread = threading.Thread(target=_close, args=(region,), name="aiouffd-close", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no more threads than this one
        _close(region)


def _close(region: MappedRegion) -> None:
    """Close what nobody has a reference to any more."""
    pause, longest = _PAUSES
    while True:
        try:
            region.close()
        except BufferError:  # a view in a cycle with it: collected soon, or revived by another finalizer
            for name in vars(region).keys() - Region.__annotations__:  # what a program has given it: views, perhaps
                vars(region).pop(name)
            time.sleep(pause)
            pause = min(2 * pause, longest)
        except Exception:
            log.exception("%r, which nobody uses any more, cannot be closed", region)
            return
        else:
            return


def map(  # noqa: A001 - it is called aiouffd.map
    what: str | os.PathLike[str] | Source | Buffer,
    *,
    engine: Pager | InThread | None = None,
    fork: OnFork | None = None,
    storage_options: StorageOptions | None = None,
    cache: ChunkCache | None = None,
    **options: Unpack[MapOptions],
) -> Region:
    """Map what a path or a URL names, as `open` does, and without a block.

    The region is served as long as it or a view of it (a memoryview, an array, a tensor) lives, or until
    `Region.close()`. It is a plain context manager, too: leaving the block closes it.

    **Lifetime.** When the last reference goes, in whatever thread, a thread of its own leaves the Monitor and unmaps
    the memory; nobody waits for that. `close()` does it at once, and raises BufferError while there are views. What
    lives when the interpreter ends is served until the process has ended. In a forked child the region is its parent's,
    as for `Monitor` (`fork`): closing it there ends nothing in the parent.

    **Pickles.** The region is pickled as what it shows: where it is unpickled, the same source is mapped anew with the
    same options (but `record` and `report`), so that it can be passed to spawned workers, dask or ray. A path is made
    absolute. Of a URL, the version that was pickled is demanded, and `storage_options` travel in the pickle, secrets as
    well. Bytes that were written to the region do not travel. A source of your own is pickled as any object.

    Blocks until the source has told its size and the pager has started: in a program with a loop,
    `await asyncio.to_thread(aiouffd.map, ...)`.

    Args:
        what: as for `open`.
        engine: `Pager()` or `InThread()`; None: the pager that this process shares.
        fork: as for `Monitor`.
        storage_options: as for `open`.
        cache: as for `open`.
        **options: as for `Monitor`. A recording (`record`) is complete when the region is closed, or
            the program ends.

    Raises:
        SourceError: it is not there, empty, or cannot be read page by page.
        TypeError: `what` is nothing of these; the engine needs a loop; an option is unknown or of a wrong type.
        UffdError: as for `Monitor`.
        OSError: as for `Monitor`.
    """
    only_known("map", options, what, storage_options, without="on_exit")
    if getattr(engine, "needs_loop", False):
        raise TypeError(f"engine={engine!r} serves on the caller's event loop: use `async with aiouffd.open(...)`")
    source = source_of(what, storage_options, cache, options)
    return _enter(monitor_of(MappedRegion, source, engine, fork, options))


def _enter(monitor: Monitor) -> Region:
    for left in [_unclosed.pop() for _ in range(len(_unclosed))]:
        _close_elsewhere(left)
    region = monitor.region
    monitor.__enter__()
    _served.add(monitor)
    monitor.belong_to_region()
    return region


def only_known(
    function: str,
    options: Mapping[str, Any],
    what: object,
    storage_options: StorageOptions | None,
    *,
    without: str = "",
) -> None:
    """Raise TypeError for an option that no Monitor or no store has, before anybody is asked for anything."""
    known = {"storage_options", "cache", *(Monitor.__init__.__kwdefaults__ or ())} - {without}
    refuse_unknown(f"{function}()", options, known)
    check_options(what, storage_options)


def source_of(
    what: str | os.PathLike[str] | Source | Buffer,
    storage_options: StorageOptions | None,
    cache: ChunkCache | None,
    options: AllOptions | MapOptions,
) -> Source:
    """Return the source that a Monitor with these options is to have; errors as for `as_source`.

    Raises:
        ValueError: no source could answer within that timeout, and none is asked.
    """
    timeout = options.get("timeout")
    if isinstance(timeout, SupportsFloat):  # else Monitor says what is wrong
        Limits(timeout=timeout)
    return as_source(
        what,
        timeout=timeout,
        retries=options.get("retries"),
        options=storage_options,
        cache=cache,
        writable=options.get("write_back", False),
    )


def monitor_of(
    kind: type[Region],
    source: Source,
    engine: Pager | InThread | InProcess | None,
    fork: OnFork | None,
    options: AllOptions | MapOptions,
) -> Monitor:
    """Return a Monitor, not entered, of a region that shows all of a source.

    Raises:
        SourceError, TypeError, ValueError: as `open`.
    """
    choice = checked_engine(engine)
    # What InThread cannot do is refused when the Monitor is made.
    write_back = options.get("write_back", False)
    bounded = options.get("max_resident") is not None or write_back
    shared = bounded and not choice.drops_private(write_back=write_back, fork=fork)

    def make(size: int, replay: Any) -> Monitor:
        given: Any = {**options, "replay": replay}
        return Monitor(kind(size, shared=shared), source, engine=engine, fork=fork, **given)  # type: ignore[arg-type]

    replay, monitor = options.get("replay"), None
    if _is_asked(source) and isinstance(replay, str | os.PathLike):
        from aiouffd.monitor.early import Beginning  # noqa: PLC0415 - few programs have a recording

        places = not (bounded or options.get("track_writes"))
        beginning = Beginning(replay, getattr(choice, "expect", None), make, places=places)
        replay, monitor = beginning.early, beginning.monitor_of(source)
    if not source.size:
        raise SourceError(repr(source), 0, 0, "it is empty: there is nothing to map")
    monitor = monitor or make(source.size, replay)
    if not getattr(engine, "needs_loop", False):
        travels = {name: value for name, value in options.items() if name not in _HERE_ONLY}
        monitor.region.reopens = _reopened, (source, source.size, engine, fork, travels)
    return monitor


def _is_asked(source: Source) -> bool:
    """Tell whether a server is asked for the size of a source of ours: others have a pager for themselves."""
    asked = getattr(source, "source", source)  # of one that is cached
    return hasattr(asked, "ask_size") and type(source).__module__.startswith("aiouffd.")


def _reopened(source: Source, size: int, engine: Pager | InThread | None, fork: OnFork | None, options: Any) -> Region:
    """Map what a pickled region has shown."""
    if source.size != size:
        raise SourceError(repr(source), 0, 0, f"it has {source.size} bytes; it had {size} where its region was pickled")
    return map(source, engine=engine, fork=fork, **options)
