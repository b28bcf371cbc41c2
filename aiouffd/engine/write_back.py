"""What was written to memory goes back to its source.

A piece is protected first, and then read: a write that comes later is noted anew, and the page stays written. Until the
source has taken the bytes they count as written, for a successor as well, so a kill at any moment loses none. No page
is written twice at once: the later bytes could be overtaken by the earlier ones. So nothing that was begun is canceled.

Where memory has a limit, what was written is saved before it fills that: only then can it be dropped. A thread that
needs a page waits meanwhile, if all that is there was written. Where the source takes nothing, or what was written lies
behind its end, the thread goes on, above the limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from array import array
from bisect import bisect_left, bisect_right
from operator import itemgetter
from time import monotonic
from typing import TYPE_CHECKING, Any

from aiouffd.engine.mappings import ZEROS
from aiouffd.engine.runs import Op, Run
from aiouffd.engine.statistics import Counter
from aiouffd.errors import ClosedError, LayoutChangingError, UffdError, WriteBackError, read_failure
from aiouffd.kernel.memory import zero_blocks
from aiouffd.ranges import align_down, align_up, batched, pieces
from aiouffd.sources.daemon_threads import DaemonThreads

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from aiouffd.engine.bound import Bound
    from aiouffd.engine.statistics import Counters

__all__ = ["WriteBack"]

log: logging.Logger = logging.getLogger("aiouffd")

_PIECE = 2 << 20
_BATCH = 8 << 20  # bytes, or so many pieces, that are protected, read and written together
_AT_ONCE = 512
_WRITES = 16  # of a batch that are under way
_NAMED = 100  # ranges that an error tells
_THREADS = 4
_RETRY = 0.001  # seconds
_PAUSE = 1.0  # seconds after a failure
_BEGINS, _STOPS = 4, 8  # one part in so many of the limit was written
_PATIENCE = 5_000  # times that a layout which is changing is waited for


class WriteBack:
    """Writes to one source. Used on one loop.

    Args:
        source: has `write`, and may have `sync`.
        bound: knows what was written, and where.
        counters: where to count.
    """

    def __init__(self, source: Any, bound: Bound, counters: Counters) -> None:
        self._source = source
        self._bound = bound
        self._page = bound.page
        self._words = counters.words
        self._lock = asyncio.Lock()
        self._threads = DaemonThreads(_THREADS, "aiouffd-write-back")
        self._tasks: set[asyncio.Task[None]] = set()
        self._cleaning: asyncio.Task[None] | None = None
        self._not_before = 0.0
        self._waiting: list[tuple[Any, int]] = []  # spaces and pages

    async def flush(self, start: int, end: int) -> None:
        """Write what was written of offsets [start, end), and wait until it is durable.

        Canceling gives up waiting.

        Raises:
            WriteBackError: the source has not taken some of it, which stays written.
        """
        await asyncio.shield(self._begin(self._flush(start, end)))

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved: who waited may have given up

    async def _flush(self, start: int, end: int) -> None:
        async with self._lock:
            await self._write(start, end, getattr(self._source, "begin_sync", None))
            sync = getattr(self._source, "sync", None)
            if sync is not None:
                try:
                    await sync()
                except Exception as error:
                    raise WriteBackError(repr(self._source), read_failure(error)) from error

    # Below a limit

    def clean_if_due(self) -> None:
        """Begin to save what was written, if that is much of the limit."""
        limit = self._bound.limit
        if limit is None or self._cleaning is not None or self._bound.noted * _BEGINS <= limit:
            return
        if monotonic() >= self._not_before:
            self._cleaning = self._begin(self._clean(limit // _STOPS))

    def keeps_waiting(self, space: Any, pages: list[int]) -> bool:
        """Tell whether there is no room for pages until something has been saved; their threads are woken then."""
        bound = self._bound
        bound.make_room(0, self._page)
        if bound.room >= self._page or bound.limit is None or bound.staying + self._page > bound.limit:
            return False
        self.clean_if_due()
        if self._cleaning is None:
            return False
        self._waiting += [(space, page) for page in pages]
        return True

    async def _clean(self, enough: int) -> None:
        try:
            for start, end in self._bound.order():
                async with self._lock:
                    await self._write(start, end)
                self._bound.reconsider()
                self._bound.make_room(0, self._page)
                if self._bound.room >= self._page:
                    self._let_go()
                if self._bound.noted <= enough:
                    break
        except WriteBackError as error:
            self._not_before = monotonic() + _PAUSE
            self._bound.report(error)
        finally:
            self._cleaning = None
            self._let_go()

    def _let_go(self) -> None:
        waiting, self._waiting = self._waiting, []
        for space, page in waiting:
            if not space.closing and not space.is_gone:
                space.resolver.wake(page, self._page)

    async def aclose(self) -> None:
        """Write what was written and not flushed: the process that wrote it was killed, perhaps."""
        self._let_go()
        if any(self._bound.written.runs(0, self._source.size)):
            try:
                await self.flush(0, self._source.size)
            except WriteBackError as error:
                log.error("%s; nobody has it any more", error)  # noqa: TRY400 - the text says it
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._threads.close()

    # Pieces

    async def _write(self, start: int, end: int, then: Callable[[int, int], None] | None = None) -> None:
        at, end, failed = start, min(end, self._source.size), list[tuple[int, int, BaseException]]()

        async def save() -> None:
            nonlocal at
            while runs := self._bound.written.begin(at, end, max(_BATCH, self._page), _AT_ONCE):
                at = runs[-1][1]
                failed.extend(await self._save(runs))
                if then is not None:
                    then(runs[0][0], runs[-1][1] - runs[0][0])

        await asyncio.gather(save(), save())  # one is protected while the one before is being written
        self._bound.count_noted()
        if failed:
            failed.sort(key=itemgetter(0))
            error = failed[0][2]
            reason = str(error) if isinstance(error, UffdError) else read_failure(error)
            bounds = [number for offset, length, _ in failed[:_NAMED] for number in (offset, length)]
            raise WriteBackError(repr(self._source), reason, *bounds) from error

    async def _save(self, runs: list[tuple[int, int]]) -> list[tuple[int, int, BaseException]]:
        """Save what was begun; return the pieces (offset, length) that the source has not taken, and why."""
        written, results = self._bound.written, list[BaseException | None]()
        batch = parts = _pieces(runs, self._page)
        losses = written.losses
        try:
            await self._protect(batch)
            data = self._of_source(await self._peeked(batch))
            if written.losses != losses:
                data = self._still_written(data)
            parts = [(offset, align_up(len(some), self._page)) for offset, some in data]
            results = await self._hand_over(data)
        except Exception as error:  # noqa: BLE001 - it is told
            results = [error] * len(parts)
        finally:
            results = results or [ClosedError("it is served no longer")] * len(parts)
            self._take_note(batch, parts, results)
        try:
            pairs = zip(parts, results, strict=True)
            return [(offset, length, result) for (offset, length), result in pairs if result is not None]
        finally:
            del results, pairs  # an error in whose traceback this frame is: a cycle would keep the source

    def _take_note(
        self, batch: list[tuple[int, int]], parts: list[tuple[int, int]], results: list[BaseException | None]
    ) -> None:
        written = self._bound.written
        if parts == batch and all(result is None for result in results):
            written.end(batch[0][0], sum(batch[-1]), saved=True)
        else:
            for (offset, length), result in zip(parts, results, strict=True):
                written.end(offset, offset + length, saved=result is None)
        saved = sum(length for (_, length), result in zip(parts, results, strict=True) if result is None)
        self._words[Counter.PAGES_WRITTEN_BACK] += saved // self._page

    def _of_source(self, parts: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        """Return parts (offset, bytes) without what is behind the end of the source.

        A page that has anything but zeros there stays written, as if it had been written again: only memory has them.
        """
        size, last = self._source.size, align_down(self._source.size, self._page)
        behind = (memoryview(data)[size - offset :] for offset, data in parts)
        if any(len(tail) and not zero_blocks(tail, self._page) for tail in behind):
            self._bound.written.end(last, last + self._page, saved=False)
        return [(offset, data[: size - offset]) for offset, data in parts]

    def _still_written(self, parts: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        """Return what is left of parts (offset, bytes): what was emptied or unmapped meanwhile is not saved.

        The kernel tells that before the pages of a file go, and the loop has taken note of it.
        """
        return [
            (run.start, data[run.start - offset : run.end - offset])
            for offset, data in parts
            for run in self._bound.written.ranges(offset, offset + len(data))
        ]

    async def _peeked(self, batch: list[tuple[int, int]]) -> list[tuple[int, bytes]]:
        if self._bound.shared:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._bound.peek, batch)
        parts: list[tuple[int, bytes]] = []
        for piece in batch:
            try:
                parts += self._bound.peek([piece])
            except LayoutChangingError:
                await self._protect([piece])  # until the kernel has told what has changed
                parts += self._bound.peek([piece])
            await asyncio.sleep(0)  # faults go first
        return parts

    async def _hand_over(self, parts: list[tuple[int, bytes]]) -> list[BaseException | None]:
        """Give parts (offset, bytes) to the source; return why it has not taken them, for each."""
        if len(parts) > 1 and hasattr(self._source, "write_many"):
            with contextlib.suppress(Exception):  # one by one, each says whether it is the one
                await self._source.write_many(parts)
                return [None] * len(parts)
        results: list[BaseException | None] = []
        for some in batched(parts, _WRITES):
            results += await asyncio.gather(*(self._source.write(*part) for part in some), return_exceptions=True)
        return results

    async def _protect(self, batch: list[tuple[int, int]]) -> None:
        """Have the next write to each page of pieces be noted, wherever it is shown.

        While the kernel refuses that, since the layout is changing, pages may move, and children be forked.
        """
        places: list[Any] = []
        while (now := self._bound.places(batch[0][0], sum(batch[-1]))) != places:
            places = now
            await self._protect_at(places, batch)

    async def _protect_at(self, places: list[tuple[Any, Any]], batch: list[tuple[int, int]]) -> None:
        starts = [offset for offset, _ in batch]
        for space, shown in places:
            skew, end = shown.start - shown.offset, shown.offset + shown.end - shown.start
            first, ranges = max(bisect_right(starts, shown.offset) - 1, 0), array("Q")
            for offset, length in batch[first : bisect_left(starts, end)]:
                low, high = max(offset, shown.offset), min(offset + length, end)
                if low < high:
                    ranges.extend((low + skew, high - low))
            done = 0 if space.is_gone or space.closing else space.resolver.protect_many(ranges)
            for at in range(2 * done, len(ranges), 2):
                await _arm(space, *ranges[at : at + 2])


def _pieces(runs: list[tuple[int, int]], page: int) -> list[tuple[int, int]]:
    """Return the (offset, length) of runs; long ones are cut."""
    if all(end - start == page for start, end in runs):  # as at random
        return [(start, page) for start, _ in runs]
    return [piece for run in runs for piece in pieces(*run, page, _PIECE)]


async def _arm(space: Any, start: int, length: int) -> None:
    """Protect addresses. While the layout is changing, the kernel refuses that."""
    for _ in range(_PATIENCE):
        if space.is_gone:
            return
        if space.closing:
            raise ClosedError("it is served no longer")
        result = space.resolver.resolve(Run(Op.PROTECT, start, ZEROS, length), wake=False)
        if result in (0, -errno.ESRCH):  # or its process is gone
            return
        if result != -errno.EAGAIN:
            break
        await asyncio.sleep(_RETRY)
    raise OSError(-result, os.strerror(-result), "UFFDIO_WRITEPROTECT")
