"""Changes of a region's layout that go through its own methods, where the kernel is not asked for layout events.

Nothing may be placed from the moment of the system call until the engine knows what it has changed: what was placed in
between would stay. So the loop's own thread makes the whole change. The thread that asked for it waits, and holds no
lock that the loop needs: its signal handlers, finalizers and callbacks of the garbage collector may touch missing pages
meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from typing import TYPE_CHECKING, Generic, TypeVar

from aiouffd.errors import BusyError
from aiouffd.ranges import align_up

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from aiouffd.engine.space import Space
    from aiouffd.kernel.abi import RegisterMode
    from aiouffd.kernel.region import LayoutChange

__all__ = ["Layout"]

_PATIENCE = 5.0  # seconds for the loop to begin a change

T = TypeVar("T")


class _Call(Generic[T]):
    """A function to be called by the loop, while another thread waits for its result.

    It uses bare locks. With a Condition (in Future and Event) a signal handler could interrupt the waiting thread while
    that holds the Condition's lock: if the handler then touches a missing page, the loop would wait for the lock, and
    the handler for the loop.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._begun = threading.Lock()  # taken by the loop, or by the caller who gives up
        self._running = threading.Lock()
        self._running.acquire()
        self._result: T
        self._error: BaseException | None = None

    def __call__(self) -> None:
        """Make the call, unless its caller has given up."""
        if not self._begun.acquire(blocking=False):
            return
        try:
            self._result = self._work()
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            self._error = error
        finally:
            self._running.release()

    def wait(self, seconds: float) -> T:
        """Return the result. BusyError if the call has not begun after so many seconds: it will not be made then."""
        try:
            done = self._running.acquire(timeout=seconds)
        except BaseException:  # a signal handler has raised an exception
            self._cancel()
            raise
        if not done and self._cancel():
            raise BusyError("a change of the layout", 0, 0, errno.EBUSY)
        if self._error is not None:
            raise self._error
        return self._result

    def _cancel(self) -> bool:
        """Give up; or wait until the call has been made, if it has begun."""
        if self._begun.acquire(blocking=False):
            return True
        with self._running:
            return False


class Layout:
    """Applies the layout changes of a region to the space that serves it. Made in the thread that runs the loop.

    Args:
        loop: runs in this thread.
        space: the region's; it belongs to the loop.
        start: the region's address.
        end: its end, a multiple of its page size.
        modes: of its registration.
        quiet: keeps away others that place pages, beside the loop, for the time of a change.
        changed: called within `quiet`, after a change.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        space: Space,
        start: int,
        end: int,
        modes: RegisterMode,
        *,
        quiet: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._loop = loop
        self._thread = threading.get_ident()
        self._pid = os.getpid()
        self._space = space
        self.start = start
        self.end = end
        self._modes = modes
        self._quiet = quiet
        self._changed = changed

    @property
    def in_loop(self) -> bool:
        """Whether this thread runs the loop."""
        return threading.get_ident() == self._thread

    def change(self, work: Callable[[LayoutChange], T]) -> T:
        """Call `work`, which changes the region's layout and says how, at a moment when nothing is placed.

        The loop's thread calls it; in a forked child, where there is no loop, this thread.

        Raises:
            BusyError: the loop has not begun in 5 s, or a thread is stuck in a fault; nothing was changed.
        """
        if os.getpid() != self._pid:
            return work(self)
        if self.in_loop:
            return self._make(work)
        call = _Call(lambda: self._make(work))
        with contextlib.suppress(RuntimeError):  # the loop is closed: it will not begin
            self._loop.call_soon_threadsafe(call)
        return call.wait(_PATIENCE)

    def _make(self, work: Callable[[LayoutChange], T]) -> T:
        with self._quiet():
            result = work(self)
            self._changed()
            return result

    def removed(self, start: int, length: int) -> None:
        """Show zeros: bytes [start, start + length) of the region were emptied."""
        begin = self.start + start
        self._space.emptied(begin, begin + align_up(length, self._space.page_size))

    def moved(self, address: int, length: int) -> None:
        """Take note that the region lies at `address` now, and has `length` bytes; what was added shows zeros."""
        space = self._space
        end = address + align_up(length, space.page_size)
        size = min(self.end - self.start, end - address)
        space.close_fast_path()
        space.mappings.unmap(self.start + size, self.end)
        if address != self.start:
            space.mappings.remap(self.start, address, size)
            # Without EVENT_REMAP the kernel has unregistered what it moved.
            space.uffd.register(address, end - address, self._modes)
        self.start, self.end = address, end
