"""Changes of a region's layout that go through its own methods, where the kernel is not asked for layout events.

Nothing may be placed from the moment of the system call until the engine knows what it has changed: what was placed in
between would stay. So the loop's own thread makes the whole change. The thread that asked for it waits, and holds no
lock that the loop needs: its signal handlers, finalizers and callbacks of the garbage collector may touch missing pages
meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, TypeVar

from aiouffd.engine.bound import losing
from aiouffd.engine.messages import emptied
from aiouffd.kernel import abi
from aiouffd.monitor.engines.calls import call_in_loop
from aiouffd.ranges import align_up

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from aiouffd.engine.mappings import Mappings
    from aiouffd.engine.space import Space
    from aiouffd.kernel.abi import RegisterMode
    from aiouffd.kernel.region import LayoutChange

__all__ = ["Layout"]

_PATIENCE = 5.0  # seconds for the loop to begin a change

T = TypeVar("T")


class Layout:
    """Applies the layout changes of a region to the space that serves it.

    Attributes:
        thread: runs the loop; 0: not known yet.

    Args:
        loop: the engine's.
        space: the region's; it belongs to the loop.
        start: the region's address.
        end: its end, a multiple of its page size.
        modes: of its registration.
        quiet: called with this object, keeps away others that place pages, beside the loop, for the time of a change.
        changed: called with this object within `quiet`, after a change. Both refer to nothing that has this object:
            an engine that has been left goes at once, with its loop, and not with the next collection.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        space: Space,
        start: int,
        end: int,
        modes: RegisterMode,
        *,
        quiet: Callable[[Layout], AbstractContextManager[object]] = contextlib.nullcontext,
        changed: Callable[[Layout], None] = lambda _: None,
    ) -> None:
        self._loop = loop
        self.thread = 0
        self._pid = os.getpid()
        self._space = space
        self.start: int = start
        self.end: int = end
        self._modes = modes
        self._quiet = quiet
        self._changed = changed

    @property
    def mappings(self) -> Mappings:
        """What is shown where."""
        return self._space.mappings

    @property
    def may_wait(self) -> bool:
        """Whether this thread may wait for a missing page: it does not run the loop."""
        return threading.get_ident() != self.thread

    def quiet(self) -> AbstractContextManager[object]:
        """Keep away others that place pages, beside the loop, inside the block."""
        return self._quiet(self)

    def change(self, work: Callable[[LayoutChange], T]) -> T:
        """Call `work`, which changes the region's layout and says how, at a moment when nothing is placed.

        The loop's thread calls it; in a forked child, where there is no loop, this thread.

        Raises:
            BusyError: the loop has not begun in 5 s, or a thread is stuck in a fault; nothing was changed.
        """
        if os.getpid() != self._pid:
            return work(self)
        if not self.may_wait:
            return self._make(work)
        return call_in_loop(self._loop, lambda: self._make(work), _PATIENCE)

    def _make(self, work: Callable[[LayoutChange], T]) -> T:
        with self._quiet(self):
            result = work(self)
            self._changed(self)
            return result

    def removed(self, start: int, length: int) -> None:
        """Show zeros: bytes [start, start + length) of the region were emptied."""
        begin = self.start + start
        emptied(self._space, begin, begin + align_up(length, self._space.page_size))

    def moved(self, address: int, length: int) -> None:
        """Take note that the region lies at `address` now, and has `length` bytes; what was added shows zeros.

        Who waits for a page of what has left its place is woken, and finds out.
        """
        space = self._space
        end = address + align_up(length, space.page_size)
        size = min(self.end - self.start, end - address)
        left, until = self.start if address != self.start else self.start + size, self.end
        space.close_fast_path()
        with losing(space, self.start + size, self.end):
            space.mappings.unmap(self.start + size, self.end)
        if address != self.start:
            space.mappings.remap(self.start, address, size)
            # Without EVENT_REMAP the kernel has unregistered what it moved.
            space.uffd.register(address, end - address, self._modes)
            if space.bound is not None:  # nor does it keep the protection of what it moved
                space.uffd.try_writeprotect(address, end - address, abi.WRITEPROTECT_MODE_WP)
        self.start, self.end = address, end
        if left < until:
            space.changed(left, until)
