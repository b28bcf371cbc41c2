"""What can be asked of a Monitor that is entered."""

from __future__ import annotations

import contextlib
import math
import operator
import os
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, SupportsIndex, overload

from aiouffd.errors import ClosedError
from aiouffd.ranges import Range, RangeSet, align_down, align_up

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future

    from aiouffd.engine.options import Options
    from aiouffd.engine.statistics import Statistics
    from aiouffd.kernel.region import Region
    from aiouffd.monitor.engines.protocol import Engine
    from aiouffd.monitor.error_queue import ErrorQueue
    from aiouffd.monitor.held import Held
    from aiouffd.monitor.progress import Meter, Progress, Show
    from aiouffd.monitor.registration import Registration

__all__ = ["Entered"]

_INTERVAL: Final = 0.2  # seconds between two looks at what a prefetch has brought


class Entered:
    """The half of a `Monitor` that is used inside its block; the other half enters and leaves it."""

    _held: Held
    _engine: Engine | None
    _registration: Registration | None
    _errors: ErrorQueue
    _options: Options
    _writes: str
    _pid: int
    _meter: Meter | None = None

    @overload
    async def prefetch(self, start: int, length: int, *, progress: Show = ...) -> None: ...

    @overload
    async def prefetch(self, ranges: Iterable[Range], /, *, progress: Show = ...) -> None: ...

    async def prefetch(
        self, start: int | Iterable[Range], length: int | None = None, *, progress: Show = False
    ) -> None:
        """Bring `length` bytes from offset `start` of the region, or many ranges by one request. Faults go first.

        Returns when all of them are there. Many ranges come in order of their offsets, several at once; neighbours are
        joined. Canceling gives up waiting. What is under way comes all the same, and with `Pager` and `ServedBy` the
        rest of what was asked for as well.

        Args:
            start: offset in bytes; or each `Range` of offsets, in place of both.
            length: in bytes.
            progress: True: show it on standard error: a bar on a terminal, where rich is installed (`aiouffd[cli]`),
                else a line every five seconds. Or a function, called five times a second, and at the end, in some
                thread, with a `Progress`.

        Raises:
            SourceError: the source failed; nothing is poisoned, what came is kept.
            ValueError: not within the region, or more than `max_resident`.
        """
        import asyncio  # noqa: PLC0415 - as in `__aenter__`

        asked = self._asked(start, length)
        coming = asyncio.wrap_future(self._running().prefetch(asked))
        if progress:
            with self._looks(progress, asked) as look:
                try:
                    while not (await asyncio.wait([coming], timeout=_INTERVAL))[0]:
                        await asyncio.to_thread(look)
                    await asyncio.to_thread(look)
                except asyncio.CancelledError:
                    coming.cancel()
                    raise
        try:
            await coming
        finally:
            del coming  # as in `uninterrupted`

    @overload
    def ask_for(self, start: int, length: int) -> Future[Any]: ...

    @overload
    def ask_for(self, ranges: Iterable[Range], /) -> Future[Any]: ...

    def ask_for(self, start: int | Iterable[Range], length: int | None = None) -> Future[Any]:
        """As `prefetch`, and return at once: the future has its result when all is there."""
        return self._running().prefetch(self._asked(start, length))

    @overload
    def prefetch_sync(self, start: int, length: int, timeout: float | None = ..., *, progress: Show = ...) -> None: ...

    @overload
    def prefetch_sync(
        self, ranges: Iterable[Range], /, *, timeout: float | None = ..., progress: Show = ...
    ) -> None: ...

    def prefetch_sync(
        self,
        start: int | Iterable[Range],
        length: int | None = None,
        timeout: float | None = None,
        *,
        progress: Show = False,
    ) -> None:
        """As `prefetch`, for programs without a loop; TimeoutError after `timeout` seconds."""
        asked = self._asked(start, length)
        self._running().check_may_wait()
        coming = self._running().prefetch(asked)
        end = math.inf if timeout is None else monotonic() + timeout
        try:
            if progress:
                with self._looks(progress, asked) as look:
                    while not _is_done(coming, min(_INTERVAL, end - monotonic())) and monotonic() < end:
                        look()
                    look()
            if not _is_done(coming, None if timeout is None else end - monotonic()):
                raise TimeoutError(f"{_named(asked)} is not all there after {timeout} s; it goes on coming")
        finally:
            del coming  # as in `uninterrupted`

    def _asked(self, start: int | Iterable[Range], length: int | None) -> list[tuple[int, int]]:
        """Return what was asked for as (offset, length): the pages within the region, sorted and joined."""
        given: Any = start
        if (length is None) is isinstance(start, SupportsIndex):
            raise TypeError("an offset needs a length; ranges have theirs")
        size, page, pages = len(self.region), self.region.page_size, RangeSet()
        pairs = [(given, length)] if length is not None else _pairs(given)
        for pair in sorted(pairs):  # to add what is behind all others costs least
            at, count = map(operator.index, pair)
            self._check_within(at, count, size)
            if count:
                pages.add(align_down(at, page), align_up(at + count, page))
        if (limit := self._options.max_resident) is not None and pages.total > limit:
            raise ValueError(f"{pages.total} bytes cannot all be there: max_resident is {limit}")
        return [(low, min(high, size) - low) for low, high in pages.bounds()]

    def _check_within(self, start: int, length: int, size: int) -> None:
        if start < 0 or length < 0 or start + length > size:
            raise ValueError(f"[{start}, {start + length}) is not within the region of {size} bytes")

    @contextlib.contextmanager
    def _looks(self, progress: Show, asked: Sequence[tuple[int, int]]) -> Iterator[Callable[[], object]]:
        """Give what looks how much of some ranges has come, and shows it."""
        from aiouffd.kernel.residency import residency  # noqa: PLC0415 - half a millisecond, for few programs
        from aiouffd.monitor.progress import Meter, shown  # noqa: PLC0415 - 1 ms

        total = sum(length for _, length in asked)
        low, high = (asked[0][0], sum(asked[-1])) if asked else (0, 0)
        meter = Meter(total)
        with shown(progress, _named(asked)) as show:

            def look() -> None:
                come = RangeSet(residency(self.region, low, high - low))
                missing = sum(gap.length for start, length in asked for gap in come.gaps(start, start + length))
                show(meter.look(total - missing))

            yield look

    async def evict(self, start: int, length: int) -> int:
        """Drop pages of [start, start + length), which are missing again then: a touch brings them from the source.

        Whole pages within the range, of what the source shows. Pages that were written since they came stay: they are
        in no source, unless they were flushed. So the Monitor must know of them: it does with `max_resident=` or
        `write_back=True`. Emptied by madvise, pages are zeros in place of that. Canceling gives up waiting.

        Args:
            start: offset in bytes.
            length: in bytes.

        Returns:
            How many bytes were there and are missing now.

        Raises:
            ValueError: not within the region, or the Monitor has neither `max_resident` nor `write_back`.
        """
        import asyncio  # noqa: PLC0415 - as in `__aenter__`

        return await asyncio.wrap_future(self._ask_to_evict(start, length))

    def evict_sync(self, start: int, length: int) -> int:
        """As `evict`, for programs without a loop."""
        self._running().check_may_wait()
        return self._ask_to_evict(start, length).result()

    async def flush(self, start: int = 0, length: int | None = None) -> None:
        """Write what was written of [start, start + length) to the source; return when it is durable (fsync).

        Needs `write_back=True`. What is written meanwhile, by other threads, may or may not be among it. Canceling
        gives up waiting.

        Args:
            start: offset in bytes.
            length: in bytes; None: all from `start` on.

        Raises:
            WriteBackError: some of it could not be written (the disk is full, for example): it says what. These pages
                stay in memory and count as written.
            ValueError: not within the region, or the Monitor does not write back.
        """
        import asyncio  # noqa: PLC0415 - as in `__aenter__`

        await asyncio.wrap_future(self._ask_to_flush(start, length))

    def flush_sync(self, start: int = 0, length: int | None = None) -> None:
        """As `flush`, for programs without a loop."""
        self._running().check_may_wait()
        self._ask_to_flush(start, length).result()

    def _ask_to_flush(self, start: int, length: int | None) -> Future[None]:
        length = len(self.region) - start if length is None else length
        self._check_within(start, length, len(self.region))
        if not self.writes_back:
            raise ValueError("it does not write back: Monitor(..., write_back=True)")
        return self._running().flush(start, length)

    def _ask_to_evict(self, start: int, length: int) -> Future[int]:
        self._check_within(start, length, len(self.region))
        if not self._options.bounded:
            raise ValueError(
                "evict needs max_resident= or write_back=True: else it is not known which pages were written"
            )
        return self._running().evict(start, length)

    def residency(self) -> list[Range]:
        """Return what of the region has come, as ranges of offsets, in order; neighbours are joined.

        The page tables are read: that takes 3 ms for each GiB that has come, and waits for nothing. It is exact where
        nothing comes or goes meanwhile. A page in swap has come. So has, for the kernel, one that is poisoned; of
        shared memory, one that is in the file.

        Raises:
            ClosedError: the region is gone.
        """
        from aiouffd.kernel.residency import residency  # noqa: PLC0415 - as in `_looks`

        return residency(self.region)

    def progress(self) -> Progress:
        """Return how much of the region has come, how fast, and how long the rest takes at that rate.

        For a background fill, a replay, or whatever brings pages. As for `residency`, page tables are read. The rate is
        that between the calls of the last ten seconds, so the first call knows none.
        """
        from aiouffd.monitor.progress import Meter  # noqa: PLC0415 - as in `_looks`

        if self._meter is None:
            self._meter = Meter(len(self.region))
        return self._meter.look(sum(item.length for item in self.residency()))

    def read(self, start: int, length: int) -> bytes:
        """Return a copy of `length` bytes from offset `start` on. Missing pages are brought first.

        For what cannot wait for a missing page itself: with `InThread` (and with `user_mode_only`) a system call on a
        missing page fails with EFAULT, write(2) of a view for example. It succeeds with what this returns.

        Raises:
            SourceError: a page could not be had.
            ValueError: not within the region.
            RuntimeError: this thread runs the engine's loop: await `prefetch` there, and take a slice.
        """
        self.prefetch_sync(start, length)
        return self.region[start : start + length]

    def collect(self) -> list[Range]:
        """Return the pages written since the last call, or since entering, and protect them again, in one step.

        The ranges are offsets in the region, of whole pages, in order; neighbours are joined, and the last may reach
        behind `len(region)`. Needs `track_writes=True`. After `Region.resize` has moved the region, it may
        have pages that were not written. Three kinds of writes are not seen: through another mapping of
        a shared region, by write(2) to its memfd, and by a device (DMA) into pinned memory.
        """
        if self._writes != "tracked":
            raise ValueError("writes are not tracked: Monitor(..., track_writes=True)")
        if self._registration is None:
            raise ClosedError("this Monitor is not entered: use it inside its `with` block")
        return self._registration.collect()

    def statistics(self) -> Statistics:
        """Return what has been counted since entering; also after worker deaths. Costs microseconds.

        With `ServedBy`, what the server has counted for all its clients, since it began.
        """
        return self._running().statistics()

    async def wait_error(self) -> None:
        """Wait until a page could not be had, and raise why: each error once, in order. Canceling is safe.

        A thousand errors are kept until they are raised; of further ones the statistics tell, and the log. Right after
        the report the page is poisoned: a thread of this process that waits for it gets SIGBUS, before this
        can act, unless on_error="retry". What `prefetch` and `read` raise is not raised here again.

        Raises:
            SourceError: why a page could not be had.
            HandlerError: the same, for a handler.
            PagerDiedError: the pager was given up.
            PagerError: this process has closed descriptors of the pager's client.
            ClosedError: the Monitor was left.
        """

        def check() -> None:
            if self._engine is None:
                raise ClosedError("the Monitor was left")

        await self._errors.wait(check)

    def check(self) -> None:
        """Raise the next error that has not been raised yet, also after the block was left; return if there is none."""
        self._errors.raise_next()

    def _running(self) -> Engine:
        if self._engine is None:
            raise ClosedError("this Monitor is not entered: use it inside its `with` block")
        if os.getpid() != self._pid:
            raise ClosedError(
                "this Monitor belongs to the process that entered it, not to its forked child: touch the memory here,"
                " if children are served, or map it anew"
            )
        return self._engine

    @property
    def region(self) -> Region:
        """What it serves.

        Raises:
            ClosedError: `aiouffd.map` has made it, and nobody keeps it any more.
        """
        return self._held.region

    @property
    def serves_here(self) -> bool:
        """Whether it is entered, and was in this process: a forked child has a copy of its parent's."""
        return self._engine is not None and os.getpid() == self._pid

    @property
    def writes_back(self) -> bool:
        """Whether what is written goes to the source."""
        return self._options.write_back

    @property
    def resting_loop(self) -> AbstractEventLoop | None:
        """The caller's loop, where that serves and does not run just now."""
        loop: AbstractEventLoop | None = getattr(self._engine, "loop", None)
        return None if loop is None or loop.is_running() else loop

    @property
    def pids(self) -> tuple[int, ...]:
        """The pager's processes: keeper and worker; empty where the loop runs elsewhere."""
        return () if self._engine is None else self._engine.pids


def _pairs(wanted: Iterable[Any]) -> list[tuple[int, int]]:
    if isinstance(wanted, RangeSet):
        return [(start, end - start) for start, end in wanted.bounds()]
    return list(map(_pair, wanted))


def _pair(wanted: Any) -> tuple[int, int]:
    if not isinstance(wanted, Range):
        raise TypeError(f"a range is an aiouffd.Range(start, length), not {wanted!r:.80}")
    return wanted.start, wanted.length


def _named(asked: Sequence[tuple[int, int]]) -> str:
    return f"[{asked[0][0]}, {sum(asked[0])})" if len(asked) == 1 else f"what {len(asked)} ranges hold"


def _is_done(future: Future[Any], timeout: float | None) -> bool:
    """Wait for a future; raise its error, or tell whether it is done."""
    try:
        future.result(timeout)
    except TimeoutError:
        if not future.done():
            return False
        future.result()  # just now, or with an error of this kind
    finally:
        del future
    return True
