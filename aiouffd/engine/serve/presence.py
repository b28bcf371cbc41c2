"""Bringing ranges until each of their pages is present: what `prefetch`, `populate` and replays promise.

One pass over the ranges is not enough. It leaves out what is on its way for others, and that may fail; the kernel may
put pages off while the layout changes, and what was under way for a range that has changed is dropped. Whatever is
dropped or fails is forgotten by the space's `readahead`, so another pass finds it missing.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiouffd.engine.allowance import allowed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from aiouffd.engine.readahead import Readahead
    from aiouffd.engine.space import Space

__all__ = ["until_present"]

_MAX_PAUSE = (
    1.0  # seconds between two passes: a process that changes its layout all the time must not keep the loop busy
)


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
        if forgets and _known(space) == before:
            return
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
        if space.has_flights(shown.start, shown.end):
            return True
        if space.readahead.missing(shown.offset, shown.offset + shown.end - shown.start):
            return True
    return False
