"""Ranges of an object over HTTP by two loops, each in a thread of its own.

To receive a large answer takes longer than all else that a loop does for it. Where several are under way, a second loop
receives most of them: the first one places what both receive. That is for what is moved. A copy would have to fetch the
bytes from the other processor's caches: it comes sooner then, and takes more processor time (a quarter of all).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from aiouffd.sources.loop_http import LoopHttp
from aiouffd.sources.second_loop import SecondLoop

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

    from aiouffd.sources.http_answer import Answer, Validator

__all__ = ["HelpedHttp"]

_LARGE = 1 << 20  # bytes: they take 0.2 ms and more to receive, and to ask another thread takes 0.1


class HelpedHttp:
    """As `LoopHttp`; it belongs to the loop that runs, and that waits for what the second one receives."""

    def __init__(self, url: str, timeout: float, pinned: Validator) -> None:
        self._http = LoopHttp(url, timeout, pinned)
        self._make = partial(LoopHttp, url, timeout, pinned, self._http.rooms)
        self._second: SecondLoop[LoopHttp] | None = None
        self._has_none = False

    @property
    def is_here(self) -> bool:
        """Whether it belongs to this loop."""
        return self._http.is_here

    def get_async(self, start: int, stop: int, head: str | None = None) -> Coroutine[Any, Any, Answer]:
        """Return the coroutine of `LoopHttp`, or one that waits for it."""
        return (self._http.get_async if stop - start < _LARGE else self._large)(start, stop, head)

    async def _large(self, start: int, stop: int, head: str | None) -> Answer:
        second = self._helper() if self._http.under_way else None
        if second is None or second.under_way > 2 * self._http.under_way:
            return await self._http.get_async(start, stop, head)
        return await second.call(second.held.get_async(start, stop, head))

    def _helper(self) -> SecondLoop[LoopHttp] | None:
        if self._second is None and not self._has_none:
            try:
                self._second = SecondLoop(self._make)
            except (OSError, RuntimeError):  # it is slower without, and no less right
                self._has_none = True
        return self._second

    def close(self) -> None:
        """Close the connections: those that are in use when their requests end."""
        self._http.close()
        if self._second is not None:
            self._second.leave()
        self._second, self._has_none = None, True
