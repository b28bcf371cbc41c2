"""Changes of a region's layout that its own methods make, where the kernel is not asked for events.

The loop must not serve while the layout is about to change: what it placed in between would stay. So it stands still
until the system call is done, and the engine knows of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from typing import TYPE_CHECKING

from aiouffd.errors import BusyError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

    from aiouffd.engine.space import Space

__all__ = ["Standstill", "moved"]

_PATIENCE = 5.0  # seconds for the loop to come to it


class Standstill:
    """Has a loop stand still. Made in the thread that runs it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread = threading.get_ident()
        self._pid = os.getpid()
        self._one = threading.Lock()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Nothing is served inside the block; what belongs to the loop may be used there.

        In the loop's own thread nothing needs to be done. In a forked child there is no loop.

        Raises:
            BusyError: the loop has not come to it in 5 s; nothing was done.
        """
        if threading.get_ident() == self._thread or os.getpid() != self._pid:
            yield
            return
        standing, done = threading.Event(), threading.Event()

        def stand() -> None:
            standing.set()
            done.wait()

        with self._one:
            try:
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    self._loop.call_soon_threadsafe(stand)
                if not standing.wait(_PATIENCE):
                    raise BusyError("a change of the layout", 0, 0, errno.EBUSY)
                yield
            finally:
                done.set()


def moved(space: Space, old: tuple[int, int], new: tuple[int, int], register: Callable[[int, int], object]) -> None:
    """Apply to a space that its memory, [start, end) of `old`, lies at `new` now; what was added shows zeros.

    Args:
        space: its loop stands still.
        old: addresses.
        new: addresses.
        register: called with start and length where the kernel has forgotten the memory, since it was moved.
    """
    size = min(old[1] - old[0], new[1] - new[0])
    space.close_fast_path()
    space.mappings.unmap(old[0] + size, old[1])
    if new[0] != old[0]:
        space.mappings.remap(old[0], new[0], size)
        register(new[0], (new[1] - new[0] + space.page_size - 1) & -space.page_size)
