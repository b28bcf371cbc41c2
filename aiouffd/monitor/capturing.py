"""Snapshots of a region that is in use: what a Monitor offers, and checks."""

from __future__ import annotations

import contextlib
import errno
import mmap
import weakref
from typing import TYPE_CHECKING, Any, Unpack

from aiouffd.errors import BusyError, refuse_unknown
from aiouffd.lifetime import result_of
from aiouffd.monitor.entered import Entered

if TYPE_CHECKING:
    import os
    import threading
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from aiouffd.store.live import Captured, LiveOptions, Order

__all__ = ["Capturing"]


class Capturing(Entered):
    """What can be asked of a `Monitor` that is entered, and writes snapshots."""

    origin: Any
    _layout: threading.RLock  # held while it changes, or a snapshot is asked for
    _pending: Callable[[], Future[dict[str, Any]] | None] = staticmethod(lambda: None)

    async def snapshot(
        self,
        destination: str | os.PathLike[str],
        base: str | os.PathLike[str] | None = None,
        **options: Unpack[LiveOptions],
    ) -> Captured:
        """Write the bytes that the region has at one moment, while all threads write on.

        Threads that write to a page which is still to be read wait until its bytes have been kept; that takes 20 us,
        and longer while 64 MiB are kept. Pages that nobody has touched are read from the source, and stay missing.
        `aiouffd.open(destination)` of a snapshot shows the memory as it was then, in any process.

        With `Pager()` any thread may write meanwhile, with the GIL held or not. With `InThread()` a system call that
        writes to such a page (read(2) into the region, for example) fails with EFAULT. What is not seen: writes by a
        device (DMA) into pinned memory, by write(2) to the memfd of a shared region, and through a mapping of it that
        no Monitor serves. Private memory of forked children is theirs, and in no snapshot.

        Canceling is safe: there is no snapshot then. What was written since its base stays known, as after any failure.

        Args:
            destination: path or URL of a snapshot, which ends with `.snap`; or path of a plain file, which appears
                when it is whole, and is replaced.
            base: a snapshot in the same store, of which chunks that did not change are used. If it is the last that
                this Monitor has written, or the one that the region shows, only what was written since then is read;
                else all of it. After a snapshot, until the Monitor is left, the first write to each page takes 15 us,
                so that it is known; not after a plain file.
            **options: see `aiouffd.store.LiveOptions`.

        Returns:
            What it has taken.

        Raises:
            LayoutChangingError: pages were unmapped, moved or emptied before they were read, and not through the
                `Region`: its own methods wait for the snapshot.
            BusyError: another snapshot is under way, or a change of the layout.
            StoreError: it cannot be written, or is there already.
            SourceError: missing pages could not be read.
            PagerDiedError: the pager's worker died meanwhile. Nothing else is lost: take another.
            UnsupportedError: the kernel cannot protect this memory (Linux 5.7; shared and huge pages: 5.19).
            ValueError: an option cannot be, or goes not with those of the Monitor.
        """
        import asyncio  # noqa: PLC0415 - 20 ms, that a program with a loop has spent already

        return _captured(
            await result_of(
                asyncio.wrap_future(self._begin_snapshot(destination, base, options)), self._running().cancel_snapshot
            )
        )

    def snapshot_sync(
        self,
        destination: str | os.PathLike[str],
        base: str | os.PathLike[str] | None = None,
        **options: Unpack[LiveOptions],
    ) -> Captured:
        """As `snapshot`, for programs without a loop."""
        self._running().check_may_wait()
        return _captured(self._begin_snapshot(destination, base, options).result())

    def _begin_snapshot(
        self, destination: str | os.PathLike[str], base: str | os.PathLike[str] | None, options: LiveOptions
    ) -> Future[dict[str, Any]]:
        from aiouffd.store.live import LiveOptions, Order  # noqa: PLC0415 - few programs take snapshots
        from aiouffd.store.place import absolute  # noqa: PLC0415 - as above

        refuse_unknown("snapshot()", options, LiveOptions.__optional_keys__)
        self._check_capturable()
        rate = options.pop("rate", None)
        if rate is not None and not rate > 0:
            raise ValueError(f"rate= is bytes in a second, above 0, not {rate!r}")
        place, below = absolute(destination), None if base is None else absolute(base)
        if not self._layout.acquire(blocking=False):
            raise self._busy()
        try:
            region = self.region
            places = [(region.address, region.address + region.mapped_length, 0)]
            return self._ask_for_snapshot(Order(place, below, places, len(region), rate, dict(options)))
        finally:
            self._layout.release()

    def _busy(self) -> BusyError:
        return BusyError("a snapshot", self.region.address, len(self.region), errno.EBUSY)

    def _ask_for_snapshot(self, order: Order) -> Future[dict[str, Any]]:
        base, options, place = order.base, order.options, order.destination
        if order.is_file and (base is not None or options or "://" in place):
            raise ValueError(f"{place!r} is a plain file: a URL, base= and options of a store need a name in .snap")
        asked = self._running().snapshot(order)
        pending = self._pending()
        if pending is None or pending.done():  # else this one is refused, and that one goes on
            self._pending = weakref.ref(asked)  # it has the error that it fails with, and that this Monitor
        return asked

    @contextlib.contextmanager
    def no_snapshot(self) -> Iterator[None]:
        """Within the block none is under way, and none begins: the layout changes.

        Raises:
            BusyError: one is, and this thread runs the loop that takes it.
        """
        if not self.serves_here:
            yield
            return
        may_wait = self._may_wait()
        if not self._layout.acquire(blocking=may_wait):
            raise self._busy()
        try:
            pending = self._pending()
            if pending is not None and not pending.done():
                if not may_wait:
                    raise self._busy()
                from concurrent.futures import wait  # noqa: PLC0415 - 3 ms, with logging, and few take snapshots

                wait([pending])
            yield
        finally:
            self._layout.release()

    def _may_wait(self) -> bool:
        try:
            self._running().check_may_wait()
        except RuntimeError:
            return False
        return True

    def _check_capturable(self) -> None:
        from aiouffd.store.manifest import LARGEST_CHUNK  # noqa: PLC0415 - as above

        region = self.region
        reason = ""
        if self._writes == "tracked":
            reason = "with track_writes=True the kernel lets all writes go on: a snapshot must hold them back"
        elif not callable(getattr(self.origin, "read", None)):
            reason = "missing pages of a Handler cannot be had without touching them: a snapshot needs a Source"
        elif region.page_size > LARGEST_CHUNK:
            reason = f"a snapshot has chunks of at most {LARGEST_CHUNK} bytes, and a page of the region is larger"
        elif region.fd >= 0 and region.page_size > mmap.PAGESIZE:
            reason = "of shared huge pages nobody knows which are in the file: a snapshot needs private ones"
        if reason:
            raise ValueError(reason)


def _captured(values: dict[str, Any]) -> Captured:
    from aiouffd.store.live import Captured  # noqa: PLC0415 - as above

    return Captured(**values)
