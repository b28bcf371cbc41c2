"""Pages that could not be had, and for which threads go on waiting (`on_error="retry"`).

After a pause their sleepers are woken. A thread that still needs the page faults again, so it is asked for anew, by the
same way as the first time, whatever has failed there.
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import TYPE_CHECKING, Final, Protocol

from aiouffd.engine.runs import Op
from aiouffd.ranges import RangeSet

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiouffd.engine.resolver import Resolver
    from aiouffd.engine.runs import Run

__all__ = ["Retrying"]

log: logging.Logger = logging.getLogger("aiouffd")

_PAUSE: Final = 1.0  # seconds; the source's own tries and timeouts come before
_REPORTED_AGAIN: Final = 60.0  # seconds
_MOST: Final = 1 << 16  # pages that are remembered as reported


class _Space(Protocol):
    is_gone: bool
    page_size: int
    resolver: Resolver
    closing: bool

    def run(self, op: int, page: int) -> Run: ...


class Retrying:
    """Wakes the sleepers of pages that could not be had, each after a pause. On its loop only.

    Args:
        space: whose threads wait.
    """

    def __init__(self, space: _Space) -> None:
        self._space = space
        self._reported: dict[int, float] = {}
        self._given_up = RangeSet()  # offsets

    def give_up(self, offset: int, length: int) -> None:
        """Have pages of these offsets asked for no longer, once they have failed again: they are SIGBUS then."""
        self._given_up.add(offset, offset + length)

    def lost(self, pages: Iterable[int]) -> list[int]:
        """Return those pages that are not to be asked for again."""
        return [page for page in pages if self._space.run(Op.POISON, page).offset in self._given_up]

    def postpone(self, pages: Iterable[int]) -> bool:
        """Wake the sleepers of these pages later; tell whether the failure is to be reported: the first in a minute."""
        loop, now = asyncio.get_running_loop(), monotonic()
        is_news = False
        if len(self._reported) > _MOST:
            self._reported.clear()
        for page in pages:
            loop.call_later(_PAUSE, self._wake, page)
            if now - self._reported.get(page, -_REPORTED_AGAIN) >= _REPORTED_AGAIN:
                self._reported[page] = now
                is_news = True
                log.warning("threads wait for the page at %#x, which cannot be had: it is asked for each second", page)
        return is_news

    def _wake(self, page: int) -> None:
        space = self._space
        if not space.closing and not space.is_gone:
            space.resolver.wake(page, space.page_size)
