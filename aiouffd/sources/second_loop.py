"""A second loop, in a thread of its own: one processor receives while another one places what has come.

All sources of a process share it. It begins with the first that enters it, and ends with the last that leaves.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from aiouffd.lifetime import Closable, close_in_children
from aiouffd.loops import new_event_loop, run

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["SecondLoop"]

_Result = TypeVar("_Result")
_Held = TypeVar("_Held", bound=Closable)


class SecondLoop(Generic[_Held]):
    """A place in the second loop of this process, for who runs another loop, and what belongs to it there.

    Args:
        make: returns what belongs to it, for a loop that it is given by the name `loop`.

    Attributes:
        held: what belongs to it. It is closed there when this leaves, or is garbage.
        under_way: how many coroutines of it are running.

    Raises:
        OSError: there is no room for a loop's descriptors, or only one processor for both.
        RuntimeError: no thread can be started.
    """

    def __init__(self, make: Callable[..., _Held]) -> None:
        if len(os.sched_getaffinity(0)) == 1:
            raise OSError("there is one processor only")
        self._loop = loop = _thread.enter()
        self.held: _Held = make(loop=loop)
        self.under_way: int = 0
        self._leaves = False
        self._end = weakref.finalize(self, loop.call_soon_threadsafe, _thread.leave, self.held)
        self._end.atexit = False

    async def call(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Return the result of a coroutine, which the second loop runs. Canceling cancels it, and does not wait."""
        self.under_way += 1
        try:
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))
        finally:
            self.under_way -= 1
            if self._leaves:
                self.leave()

    def leave(self) -> None:
        """Leave it when nothing is under way any more."""
        self._leaves = True
        if not self.under_way:
            self._end()


class _Thread:
    """The thread, while there is one. Thread-safe."""

    def __init__(self) -> None:
        self.close()

    def close(self) -> None:
        """Forget it: a forked child has none."""
        self._lock = threading.Lock()
        self._places = 0

    def enter(self) -> asyncio.AbstractEventLoop:
        """Return its loop, which runs until all who have entered have left."""
        with self._lock:
            if not self._places:
                self._begin()
            self._places += 1
            return self._loop

    def _begin(self) -> None:
        loop, self._done = new_event_loop(), asyncio.Event()
        main = _until(self._done)
        try:
            threading.Thread(target=run, args=(loop, main), name="aiouffd-receiving", daemon=True).start()
        except RuntimeError:
            main.close()
            loop.close()
            raise
        self._loop = loop

    def leave(self, held: Closable) -> None:
        """Close what belonged to a place; end with the last one. Called by the loop itself."""
        held.close()
        with self._lock:
            self._places -= 1
            if not self._places:
                self._done.set()


async def _until(done: asyncio.Event) -> None:
    await done.wait()


_thread = close_in_children(_Thread())
