"""Brings pages before they are touched: those of a recording, in its order; then, if asked for, all the others.

Faults come first: the reads that they need pass those that are brought ahead, and the background fill waits while
faults come in.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from contextlib import nullcontext
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from aiouffd.engine.flight import end_of
from aiouffd.engine.serve.bulk import place_at_hand
from aiouffd.engine.serve.source import SourceBackend
from aiouffd.engine.statistics import Counter
from aiouffd.errors import ClosedError, UffdError
from aiouffd.kernel.userfaultfd import is_registered
from aiouffd.ranges import Range, RangeSet, batched, pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence

    from aiouffd.engine.ahead.pages import RecordedPages, Unit
    from aiouffd.engine.ahead.trace import Trace
    from aiouffd.engine.space import Backend, Space

__all__ = ["bring_ahead", "bring_early", "complete", "fill", "prefetch"]

log: logging.Logger = logging.getLogger("aiouffd")

_NEAR = 512 << 10  # brought at once, if the source is local: a fault waits for one such piece at most, some 0.2 ms
_HURRY = 2 << 20  # the same where a caller waits for all of it
_FAR = 8 << 20  # and if it must be waited for
_ASKED = 2 << 20  # what a caller asks for is known to be there in pieces of this size
_SAVED = 64 << 20  # bytes between two reports of progress, from which a successor goes on
_TOGETHER = 128  # small parts whose bytes are in memory, before the loop gets a turn
_QUIET = 0.002  # seconds without a fault, before the background fill goes on
_PATIENCE = 0.05  # seconds that it waits for that at most
_SMALL = 1 << 20  # a mapping that is brought before larger ones
_NOT_YET = 0.001  # seconds between looks whether memory is registered; uvloop rounds half a millisecond to none


async def prefetch(space: Space, ranges: Iterable[tuple[int, int]]) -> None:
    """Bring (offset, length) ranges that a caller asks for, of any alignment; canceling and errors as `Backend.bring`.

    However many there are: as many reads are under way as the source can answer at once.
    """
    size = space.page_size
    asked = [piece for offset, length in ranges for piece in pieces(offset, offset + length, size, _ASKED)]
    await space.backend.bring(space, asked, Counter.PAGES_PREFETCH)


async def bring_ahead(
    space: Space,
    backend: Backend,
    trace: Trace | None,
    background: float,
    on_progress: Callable[[], None] = lambda: None,
) -> None:
    """Replay a trace, then, also where that has failed, fill in the background. What fails is logged, left to faults.

    Args:
        space: its `replayed` and `filled` say where to begin, and are kept up to date.
        backend: brings the pages. Where pages are dropped again, as many as there is room for.
        trace: None: nothing to replay.
        background: bytes per second at most; 0: no background fill.
        on_progress: called after so much that a successor should know.
    """
    works = [] if trace is None else [partial(_replay, space, backend, trace, on_progress)]
    works += [partial(fill, space, backend, background, on_progress)] if background else []
    for work in works:
        try:
            await work()
        except ClosedError:
            return
        except UffdError as error:
            log.warning("%s; what was not brought ahead comes with its fault", error)


async def _replay(space: Space, backend: Backend, trace: Trace, on_progress: Callable[[], None]) -> None:
    if (
        trace.pages is not None
        and not space.replayed
        and isinstance(backend, SourceBackend)
        and not await _replay_pages(space, backend, trace.pages)
    ):
        return
    for index, ranges in trace.ranges(space.replayed):
        fitting = _fitting(space, ranges)
        await backend.bring(space, fitting, Counter.PAGES_REPLAY)
        if len(fitting) < len(ranges):
            return
        space.replayed = index
        on_progress()


async def _replay_pages(space: Space, backend: SourceBackend, pages: RecordedPages) -> bool:
    """Bring the pages whose bytes a recording carries; tell whether there was room for all. What fails is left out.

    The next unit is read while one is placed. Faults find bytes at hand that have been read.
    """
    loop, units, first = asyncio.get_running_loop(), pages.begin(), pages.placed
    _take_note(space, pages)

    def reading(number: int) -> asyncio.Future[Unit | None] | None:
        return None if units.read_nowait(number) else loop.run_in_executor(None, units.read, number)

    under_way = reading(first) if first < len(pages) else None
    try:
        with backend.has(units.at_hand):
            for number in range(first, len(pages)):
                unit = units.read(number) if under_way is None else await under_way
                under_way = reading(number + 1) if number + 1 < len(pages) else None
                if unit is None:
                    log.warning("bytes of pages that a recording carries are damaged: the pages come from the source")
                elif not await _place_unit(space, backend, unit):
                    return False
                units.drop(number)
    finally:
        if under_way is not None:
            await asyncio.wait([under_way])
    return True


def _take_note(space: Space, pages: RecordedPages) -> None:
    """Have what was placed before the space was served be known to be present, and counted, once."""
    placed = pages.parts_placed()
    for offset, length in placed:
        space.readahead.brought(offset, length)
    words, size = space.counters.words, sum(length for _, length in placed)
    if words[Counter.PAGES_REPLAY] * space.page_size < size:  # else a worker before this one has counted it
        words[Counter.PAGES_REPLAY] += size // space.page_size
        words[Counter.BYTES_SHARED] += size


async def _place_unit(space: Space, backend: SourceBackend, unit: Unit) -> bool:
    """Bring the pages of a unit; tell whether there was room for all."""
    left = list[tuple[int, int]]()
    for some in batched(unit.parts, _TOGETHER):
        left += place_at_hand(space, some, Counter.PAGES_REPLAY)
        await asyncio.sleep(0)
    fitting = _fitting(space, left)
    if fitting:
        await backend.bring(space, fitting, Counter.PAGES_REPLAY)
    return len(fitting) == len(left)


async def fill(
    space: Space,
    backend: Backend,
    rate: float,
    on_progress: Callable[[], None] = lambda: None,
    *,
    patience: float = _PATIENCE,
) -> None:
    """Bring all that the space shows.

    Args:
        space: its `filled` says where to begin, and is kept up to date.
        backend: brings the pages.
        rate: bytes per second at most; inf: as fast as it goes.
        on_progress: called after so much that a successor should know.
        patience: seconds to wait, at most, for a moment without faults before each piece.

    Raises:
        UffdError: the source or the handler failed.
        ClosedError: the space was dropped.
    """
    words = space.counters.words
    began, brought, saved = monotonic(), 0, space.filled
    under_way: deque[tuple[int, Coroutine[Any, Any, None] | asyncio.Task[None]]] = deque()

    async def first_is_there() -> None:
        nonlocal saved
        end, work = under_way.popleft()
        await work
        space.filled = end
        if end - saved >= _SAVED:
            saved = end
            on_progress()

    faults = words[Counter.FAULTS]
    hurry = backend.local and not patience
    step = _HURRY if hurry else _NEAR if backend.local else _FAR
    if hurry and space.readahead.limit:
        space.filling = max(min(_HURRY, space.readahead.limit), space.page_size)
    # It is being filled also while it waits between two pieces: faults of its threads do not shorten the steps of
    # others. At a limited rate it waits for long, and its faults go first like those of any other.
    with backend.fills(space) if rate == math.inf else nullcontext():
        try:
            for offset, length in _shown(space, step):
                faults = await _until_quiet(faults, words, patience)
                pause = began + brought / rate - monotonic()
                if pause > 0 or not backend.local:  # else `bring` has just given the loop a turn
                    await asyncio.sleep(max(pause, 0.0))
                work = backend.bring(space, [(offset, length)], Counter.PAGES_BACKGROUND)
                under_way.append((offset + length, work if backend.pieces == 1 else _begun(work)))
                brought += length
                if len(under_way) == backend.pieces:
                    await first_is_there()
            while under_way:
                await first_is_there()
        finally:
            await end_of(work for _, work in under_way if isinstance(work, asyncio.Task))
            if hurry:
                space.filling = 0
    on_progress()


async def _until_quiet(faults: int, words: Sequence[int], patience: float) -> int:
    """Wait for a moment without faults, for so many seconds at most; return how many there have been.

    Args:
        faults: how many there had been when it was looked last.
        words: the counters.
        patience: seconds.
    """
    limit = monotonic() + patience
    while faults != words[Counter.FAULTS] and monotonic() < limit:
        faults = words[Counter.FAULTS]
        await asyncio.sleep(_QUIET)
    return faults


def _fitting(space: Space, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the first of some ranges, and of the last a part, for which nothing that came before has to go."""
    if space.bound is None:
        return ranges
    room, fitting = space.bound.room, list[tuple[int, int]]()
    for offset, length in ranges:
        if part := min(length, room) & -space.page_size:
            fitting.append((offset, part))
        room -= part
    return fitting


def _begun(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Have a piece begin now. Its error is that of the fill, or of none where another piece has failed before."""
    task = asyncio.get_running_loop().create_task(work)
    task.add_done_callback(lambda task: task.cancelled() or task.exception())
    return task


async def bring_early(space: Space, backend: Backend, late: asyncio.Event) -> None:
    """Bring all that a space shows as soon as its process has registered it, which may be after it was handed over.

    Before that, a COPY would find nothing (ENOENT), as if the mapping were gone. What fails is tried again by
    `complete`.

    Args:
        space: just opened.
        backend: brings the pages.
        late: set when it is too late to wait for what is not registered yet.
    """
    for mapping in list(space.mappings):
        while not (late.is_set() or space.closing or is_registered(space.uffd, mapping.start, space.page_size)):  # noqa: ASYNC110 - no event
            await asyncio.sleep(_NOT_YET)
    if late.is_set():
        return
    # Stacks, data and heaps are what the last steps of a restore touch; what is large can wait a little longer.
    small = [
        (mapping.offset, mapping.end - mapping.start)
        for mapping in space.mappings
        if mapping.offset >= 0 and mapping.end - mapping.start <= _SMALL
    ]
    try:
        await backend.bring(space, small, Counter.PAGES_BACKGROUND)
        await fill(space, backend, math.inf, patience=0.0)
    except UffdError as error:
        log.debug("%s; it is tried again", error)


async def complete(space: Space, backend: Backend) -> None:
    """Bring all that a space misses, as fast as it goes, until nothing can be missing; errors as for `fill`.

    What is known to be present is so wherever it was moved to, and is not offered again. What was on its way when a
    read failed or its layout changed is not known to be present, and comes in another pass.
    """
    # Of a successor: what its predecessor had brought may have gone with its mapping.
    is_lost, known = space.born < 0 or space.readahead.losses > 0, (space.born, 0)
    pause = 0.0
    while True:
        if _has_missed(space, known):
            space.readahead = space.readahead.fresh()
            is_lost = True
        if is_lost:
            space.filled = 0
        known, losses = (space.mappings.generation, space.resolver.gone), space.readahead.losses
        await fill(space, backend, math.inf, patience=0.0)
        await space.quiet()
        is_lost = space.readahead.losses != losses
        if not (space.flights or is_lost or _has_missed(space, known)):
            return
        # A process whose layout changes all the time is served on, and does not keep the loop busy.
        pause = min(pause + 0.01, 1.0)
        await asyncio.sleep(pause)


def _has_missed(space: Space, known: tuple[int, int]) -> bool:
    """Tell whether pages may be missing that are known to be present: no mapping covered some, of another layout."""
    generation, gone = known
    return space.resolver.gone != gone and space.mappings.generation != generation


def _shown(space: Space, step: int) -> Iterator[tuple[int, int]]:
    """Yield (start, length) of the offsets that a space shows, from `filled` on, in pieces."""
    shown = RangeSet(
        Range(mapping.offset, mapping.end - mapping.start) for mapping in space.mappings if mapping.offset >= 0
    )
    for run in shown:
        if run.end > space.filled:
            for piece in pieces(max(run.start, space.filled), run.end, space.page_size, step):
                if not (fitting := _fitting(space, [piece])):
                    return
                yield fitting[0]
