"""Which pages have to be brought: those of ranges until each is present, and those of faults that are up to date.

Ranges until each of their pages is present are what `prefetch`, `populate` and replays promise.

One pass over the ranges is not enough. It leaves out what is on its way for others, and that may fail; the kernel may
put pages off while the layout changes, and what was under way for a range that has changed is dropped. Whatever is
dropped or fails is forgotten by the space's `readahead`, so another pass finds it missing.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiouffd.engine.allowance import allowed
from aiouffd.engine.statistics import Counter

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from aiouffd.engine.readahead import Readahead
    from aiouffd.engine.space import Space

__all__ = ["has_come", "look_again", "until_present"]

_MAX_PAUSE = (
    1.0  # seconds between two passes: a process that changes its layout all the time must not keep the loop busy
)


def has_come(space: Space, page: int, offset: int, thread: int) -> bool:
    """Tell whether a page is known to have come since a thread has found it missing. The thread must `look_again` then.

    A thread that finds a page missing may be delayed before its message is there to be read. Without this, the page
    would be read from the source, or asked of the handler, a second time.

    Args:
        space: whose fault it is.
        page: its address.
        offset: what it shows.
        thread: who has faulted; 0: unknown.
    """
    return page not in space.flights and space.readahead.is_doubtful(offset, thread)


def look_again(space: Space, pages: Iterable[int], began_ns: int) -> None:
    """Wake the threads whose pages have come, after the other faults of their wake-up have been counted.

    The kernel has no question that only asks, but a thread that is woken looks: if its page is missing after all, it
    faults again, and that fault is believed.

    Args:
        space: whose faults they are.
        pages: addresses, for each fault.
        began_ns: when the faults were read.
    """
    for page in pages:
        space.counters.words[Counter.JOINED] += 1
        space.counters.asked_for()
        space.resolver.wake(page, space.page_size)
        space.record_latency(began_ns)


async def until_present(
    space: Space,
    ranges: Iterable[tuple[int, int]],
    one_pass: Callable[[Sequence[tuple[int, int]]], Awaitable[None]],
    *,
    forgets: bool = False,
) -> None:
    """Repeat passes over those ranges that still miss pages, until none does. Canceling is safe.

    Pages that were removed, and memory that grew, show no offset: they are left out, and are zeros when touched.

    Args:
        space: whose pages are brought.
        ranges: (offset, length), whole pages.
        one_pass: begins what is missing of some ranges and is not on its way, waits for that, and for what others have
            under way there; raises if what it has begun fails.
        forgets: `readahead` is told of all that was on its way and has not come: if it has forgotten nothing during a
            pass, no page is missing, and none is looked up.

    Raises:
        UffdError: of `one_pass`.
        ClosedError: the space is served no longer.
    """
    pause = 0.0
    wanted = list(ranges)
    while True:
        await allowed(space)
        before = _known(space)
        await one_pass(wanted)
        space.require_served()
        if space.bound is not None or (forgets and _known(space) == before):
            return  # what was dropped again meanwhile has been there
        wanted = [(offset, length) for offset, length in wanted if _misses(space, offset, offset + length)]
        if not wanted:
            return
        await asyncio.sleep(pause)
        pause = min(pause + 0.01, _MAX_PAUSE)


def _known(space: Space) -> tuple[int, Readahead, int]:
    """Return another value whenever pages may be missing that were taken for present."""
    return space.mappings.generation, space.readahead, space.readahead.losses


def _misses(space: Space, offset: int, end: int) -> bool:
    for shown in space.mappings.addresses(offset, end):
        if space.flights.touches(shown.start, shown.end):
            return True
        if space.readahead.missing(shown.offset, shown.offset + shown.end - shown.start):
            return True
    return False
