"""Snapshots of a region, one after the other, of which the old ones become fewer."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Self, SupportsFloat, Unpack

from aiouffd.errors import SourceError, refuse_unknown
from aiouffd.lifetime import begun, uninterrupted
from aiouffd.store.collect import GRACE, gc_sync
from aiouffd.store.live import LiveOptions
from aiouffd.store.place import SUFFIX, absolute, without_scheme
from aiouffd.store.snapshot import open_store

if TYPE_CHECKING:
    from aiouffd.monitor.capturing import Capturing
    from aiouffd.sources.storage_options import StorageOptions
    from aiouffd.store.bucket import Bucket
    from aiouffd.store.folder import Folder
    from aiouffd.store.live import Captured

__all__ = ["Checkpointer", "thinned"]

log: logging.Logger = logging.getLogger("aiouffd")

_DIGITS = 10
_COLLECTED_AGAIN = 3600.0  # seconds


class Checkpointer:
    """Writes a layer after the other of a region, as long as its block lasts: a context manager, plain or asynchronous.

    Layers are called `0000000001.snap` and so on, and go on where another program has stopped. Each has the one before
    as its base: only what was written since is read. `aiouffd.open` of any of them is the memory at that moment.

    Of old layers fewer and fewer are kept: the newest `keep`; then each second up to twice that age, each fourth up to
    four times, and so on. What no layer needs any more is removed from the store once an hour (`aiouffd.store.gc`).

    A layer that could not be written is logged, and `error` says why; the next one is tried as usual. Where the pager
    has died, or a layer failed, the next one reads all of the memory.

    Args:
        monitor: of the region, entered.
        store: path or URL of a folder, which is this Checkpointer's alone.
        every: seconds from the beginning of one layer to that of the next; None: only when `take` is called.
        keep: how many of the newest are all kept, one or more.
        grace: seconds for which what is not needed any more stays: see `aiouffd.store.gc`.
        **options: see `aiouffd.store.LiveOptions`.

    Attributes:
        last: path or URL of the newest layer; None: there is none.
        error: why the last layer that was tried could not be written; None: it was.

    Raises:
        ValueError: `every` or `keep` is too small.
        StoreError: the store cannot be read.
        TypeError: there is no such option.
    """

    def __init__(
        self,
        monitor: Capturing,
        store: str | os.PathLike[str],
        *,
        every: float | None = None,
        keep: int = 8,
        grace: float = GRACE,
        **options: Unpack[LiveOptions],
    ) -> None:
        refuse_unknown("Checkpointer()", options, LiveOptions.__optional_keys__)
        if every is not None and not isinstance(every, SupportsFloat):
            raise TypeError(f"every= is a number of seconds, above 0, or None, not {every!r}")
        if every is not None and not every > 0:
            raise ValueError(f"every= is a number of seconds, above 0, not {every!r}")
        if keep < 1:
            raise ValueError(f"keep= is one layer or more, not {keep!r}")
        self._monitor = monitor
        self._place = absolute(without_scheme(os.fspath(store)))
        self._every, self._keep, self._grace = every, keep, grace
        self._options: LiveOptions = options
        self._store = open_store(self._place, options.get("storage_options"), make=True)
        self._numbers: list[int] = _layers(self._store)
        self._lock = threading.Lock()
        self._ends = threading.Event()
        self._collected = time.monotonic()
        self._thread: threading.Thread | None = None
        self.error: Exception | None = None

    @staticmethod
    def last_of(store: str | os.PathLike[str], storage_options: StorageOptions | None = None) -> str | None:
        """Return path or URL of the newest layer in a store, to go on from; None: there is none. Blocks.

        Raises:
            StoreError: the store cannot be read; a folder that is not there has no layer.
        """
        place = absolute(without_scheme(os.fspath(store)))
        if "://" not in place and not os.path.isdir(place):  # noqa: PTH112 - a text
            return None
        numbers = _layers(open_store(place, storage_options))
        return _name(place, numbers[-1]) if numbers else None

    @property
    def last(self) -> str | None:
        """Path or URL of the newest layer; None: there is none."""
        return _name(self._place, self._numbers[-1]) if self._numbers else None

    async def take(self) -> Captured:
        """Write a layer now. Canceling gives up waiting: it is completed all the same. Raises as `Monitor.snapshot`."""
        return await asyncio.shield(begun(self.take_sync))

    def take_sync(self) -> Captured:
        """As `take`, for programs without a loop."""
        with self._lock:
            try:
                result = self._take()
            except Exception as error:
                self.error = error
                raise
            self.error = None
            self._thin()
            return result

    def _take(self) -> Captured:
        if self.error is not None:  # that layer may be there all the same: its answer was lost
            self._numbers = _layers(self._store)
        number = self._numbers[-1] + 1 if self._numbers else 1
        result = self._monitor.snapshot_sync(_name(self._place, number), self.last, **self._options)
        self._numbers.append(number)
        return result

    def _thin(self) -> None:
        """Remove old layers, and what they alone have needed. The new one is there, whatever becomes of that."""
        try:
            self._remove_old()
        except (SourceError, OSError) as error:
            log.warning("old layers of %s could not be removed: %s", self._place, error)

    def _remove_old(self) -> None:
        for number in thinned(self._numbers, self._keep):
            self._store.delete(f"{number:0{_DIGITS}}{SUFFIX}")
            self._numbers.remove(number)
        if time.monotonic() - self._collected > min(_COLLECTED_AGAIN, self._grace):
            self._collected = time.monotonic()
            gc_sync(self._place, grace=self._grace, storage_options=self._options.get("storage_options"))

    def _run(self) -> None:
        assert self._every is not None
        due = time.monotonic() + self._every
        while not self._ends.wait(max(due - time.monotonic(), 0)):
            due = time.monotonic() + self._every
            try:
                self.take_sync()
            except Exception as error:  # noqa: BLE001 - as one of too many open files, that the next one may not meet
                log.warning("a layer of %s could not be written: %s", self._place, error)

    def __enter__(self) -> Self:
        """Begin to write layers."""
        if self._every is not None:
            self._thread = threading.Thread(target=self._run, name="aiouffd-checkpointer", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Write no more; a layer that is under way is completed."""
        self._ends.set()
        if self._thread is not None:
            self._thread.join()

    async def __aenter__(self) -> Self:
        """Begin to write layers."""
        return self.__enter__()

    async def __aexit__(self, *_: object) -> None:
        """As `__exit__`. Canceling does not interrupt this."""
        await uninterrupted(self.__exit__)


def _name(place: str, number: int) -> str:
    return f"{place.rstrip('/')}/{number:0{_DIGITS}}{SUFFIX}"


def _layers(store: Folder | Bucket) -> list[int]:
    names = (entry.path.removesuffix(SUFFIX) for entry in store.list("") if entry.path.endswith(SUFFIX))
    return sorted(int(name) for name in names if name.isdecimal() and len(name) == _DIGITS)


def thinned(numbers: list[int], keep: int) -> list[int]:
    """Return which layers are to be removed, given the numbers of those that are there, the newest last."""
    return [number for number in numbers if number % (1 << ((numbers[-1] - number) // keep).bit_length())]
