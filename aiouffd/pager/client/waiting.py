"""How the client's thread waits: for a descriptor, for a moment, or until another thread wakes it."""

from __future__ import annotations

import contextlib
import math
import select
import socket
import time
from typing import TYPE_CHECKING, Final, Protocol

from aiouffd.errors import PagerError
from aiouffd.kernel.owned_descriptor import OwnedSocket
from aiouffd.pager.process.handles import explained

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.native.watchdog import Watch

__all__ = ["LOOK", "Later", "StoppedError", "Waiter", "Watches"]

LOOK: Final = 1.0
"""Seconds between two looks at the client's descriptors. Who waits for one that was closed is not woken by that."""

_LOST: Final = (
    "this process has closed descriptors of the pager's client. A program that closes descriptors which it has not"
    " opened, as daemons do, must do so before it enters a Monitor"
)


class Holder(Protocol):
    """What holds descriptors."""

    @property
    def lost(self) -> bool:
        """Whether somebody else has closed one of them."""


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
        self.stopped: bool = False
        try:  # no eventfd: all of them look the same
            self._inner, self._outer = OwnedSocket.pair(socket.SOCK_DGRAM)
        except OSError as error:
            raise explained("socketpair", error) from error
        self._inner.setblocking(False)
        self._outer.setblocking(False)

    def fileno(self) -> int:
        """Return a descriptor that is readable once somebody has called `wake`."""
        return self._outer.fileno()

    def wake(self) -> None:
        """Wake the thread; from any thread."""
        with contextlib.suppress(OSError):  # EAGAIN: it was called often enough
            self._inner.sendmsg([b"."])

    def drain(self) -> None:
        """Forget the calls of `wake` so far."""
        with contextlib.suppress(OSError):
            while True:
                self._outer.recvmsg(1)

    @property
    def lost(self) -> bool:
        """Whether somebody else has closed one of its descriptors."""
        return self._inner.lost or self._outer.lost

    def check(self, *others: Holder) -> None:
        """Raise PagerError where this process has closed descriptors of this object, or of others of the client's."""
        if any(item.lost for item in (self, *others)):
            raise PagerError(_LOST)

    def stop(self) -> None:
        """Have each wait end, now and from now on."""
        self.stopped = True
        self.wake()

    def wait(self, seconds: float, fd: int = -1) -> bool:
        """Wait until `fd` is readable, at most for so long; tell whether it is.

        Raises:
            StoppedError: the client is being stopped.
            PagerError: as `check`.
        """
        poller = select.poll()
        poller.register(self, select.POLLIN)
        if fd >= 0:
            poller.register(fd, select.POLLIN)
        until = time.monotonic() + seconds
        while not self.stopped and (left := until - time.monotonic()) > 0:
            self.watch.alive()
            ready = {found for found, _ in poller.poll(min(left, LOOK, self.watch.beat) * 1000)}
            self.check()
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
        self._inner.close()
        self._outer.close()
