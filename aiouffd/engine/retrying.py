"""Pages that could not be had, and for which threads go on waiting (`on_error="retry"`).

After a pause their sleepers are woken. A thread that still needs the page faults again, so it is asked for anew, by the
same way as the first time, whatever has failed there.
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiouffd.engine.resolver import Resolver

__all__ = ["Retrying"]

log = logging.getLogger("aiouffd")

_PAUSE: Final = 1.0  # seconds; the source's own tries and timeouts come before
_REPORTED_AGAIN: Final = 60.0  # seconds
_MOST: Final = 1 << 16  # pages that are remembered as reported


class _Space(Protocol):
    page_size: int
    resolver: Resolver
    closing: bool
    is_gone: bool


class Retrying:
    """Wakes the sleepers of pages that could not be had, each after a pause. On its loop only.

    Args:
        space: whose threads wait.
    """

    def __init__(self, space: _Space) -> None:
        self._space = space
        self._reported: dict[int, float] = {}

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
                log.warning('threads go on waiting for the page at %#x (on_error="retry"): it is asked for again', page)
        return is_news

    def _wake(self, page: int) -> None:
        space = self._space
        if not space.closing and not space.is_gone:
            space.resolver.wake(page, space.page_size)
