"""How the client's thread waits: for a descriptor, for a moment, or until another thread wakes it."""

from __future__ import annotations

import contextlib
import math
import os
import select
import time
from typing import TYPE_CHECKING

from aiouffd.pager.process.handles import open_eventfd

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.native.watchdog import Watch

__all__ = ["Later", "StoppedError", "Waiter", "Watches"]


class StoppedError(Exception):
    """The client is being stopped."""


class Later:
    """What a thread does after a while. `run` is called by the thread itself, the rest by any."""

    def __init__(self) -> None:
        self._planned: tuple[float, Callable[[], None]] | None = None

    def plan(self, seconds: float, work: Callable[[], None]) -> None:
        """Have `work` called in so many seconds; the thread must look at `patience` again."""
        self._planned = time.monotonic() + seconds, work

    @property
    def patience(self) -> float:
        """Seconds until `run` is to be called; infinite: it need not be."""
        planned = self._planned
        return math.inf if planned is None else max(0.0, planned[0] - time.monotonic())

    def run(self) -> None:
        """Do what was planned, now."""
        planned, self._planned = self._planned, None
        if planned is not None:
            planned[1]()


class Watches:
    """Watches over the memory of several owners, told as one. Thread-safe."""

    def __init__(self) -> None:
        self._all: list[Watch] = []

    def add(self, watch: Watch) -> None:
        """Tell this one, too; it is closed with the others."""
        self._all.append(watch)

    def remove(self, watch: Watch) -> None:
        """Close one."""
        if watch in self._all:
            self._all.remove(watch)
        watch.close()

    @property
    def beat(self) -> float:
        """As `Watch.beat`: the shortest."""
        return min((watch.beat for watch in tuple(self._all)), default=math.inf)

    def over(self, *ends: int) -> None:
        """As `Watch.over`."""
        for watch in tuple(self._all):
            watch.over(*ends)

    def alive(self) -> None:
        """As `Watch.alive`."""
        for watch in tuple(self._all):
            watch.alive()

    def close(self) -> None:
        """Close all."""
        for watch in tuple(self._all):
            self.remove(watch)


class Waiter:
    """What one thread waits with, and others wake it by.

    Args:
        watch: over the memory that is served; this object's from now on. It is told that Python runs while nobody
            serves.

    Attributes:
        stopped: the client is being stopped.
    """

    def __init__(self, watch: Watches) -> None:
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
