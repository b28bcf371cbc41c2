"""How the client's thread waits: for a descriptor, for a moment, or until another thread wakes it."""

from __future__ import annotations

import contextlib
import os
import select
import time
from typing import TYPE_CHECKING

from aiouffd.pager.process.handles import open_eventfd

if TYPE_CHECKING:
    from aiouffd.native.watchdog import Watch

__all__ = ["StoppedError", "Waiter"]


class StoppedError(Exception):
    """The client is being stopped."""


class Waiter:
    """What one thread waits with, and others wake it by.

    Args:
        watch: over the memory that is served; the client's from now on. It is told that Python runs while nobody
            serves.

    Attributes:
        stopped: the client is being stopped.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.stopped = False
        self._event = open_eventfd()

    def fileno(self) -> int:
        """Return a descriptor that is readable once somebody has called `wake`."""
        return self._event

    def wake(self) -> None:
        """Wake the thread; from any thread."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._event, 1)

    def drain(self) -> None:
        """Forget the calls of `wake` so far."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)

    def stop(self) -> None:
        """Have each wait end, now and from now on."""
        self.stopped = True
        self.wake()

    def wait(self, seconds: float, fd: int = -1) -> bool:
        """Wait until `fd` is readable, at most for so long; tell whether it is.

        Raises:
            StoppedError: the client is being stopped.
        """
        poller = select.poll()
        poller.register(self._event, select.POLLIN)
        if fd >= 0:
            poller.register(fd, select.POLLIN)
        until = time.monotonic() + seconds
        while not self.stopped and (left := until - time.monotonic()) > 0:
            self.watch.alive()
            ready = {found for found, _ in poller.poll(min(left, 1.0, self.watch.beat) * 1000)}
            if fd in ready:
                return True
            if ready:
                self.drain()
        if self.stopped:
            raise StoppedError
        return False

    def close(self) -> None:
        """Be done with it."""
        self.watch.close()
        os.close(self._event)
