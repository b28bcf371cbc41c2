"""Descriptors on one event loop: readable -> read -> serve, and look again before going to sleep.

Sleeping in epoll and being woken costs more than the rest of a fault. So after a fault the reader looks again for up
to `spin_us`, but only while faults keep coming: after a fault that comes long after the last one it sleeps at once, and
looks in vain make the next ones rarer. It looks at all descriptors, not at the one that was readable: with a thousand
clients the next fault comes from another.

The loop gets a turn at least every 0.5 ms, however many faults there are: other tasks run in between.

O_NONBLOCK belongs to the open file, not to the descriptor: the process that has handed a descriptor over can clear it
at any time. A plain read would block the loop then, and with it all other spaces. So each read passes RWF_NOWAIT. A
userfaultfd knows that flag since Linux 6.10; before, O_NONBLOCK is the only protection.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
from collections import deque
from time import perf_counter_ns
from typing import TYPE_CHECKING, Protocol

from aiouffd.engine.messages import serve_messages
from aiouffd.engine.plain import SLOT, FastPath
from aiouffd.engine.statistics import Counter
from aiouffd.errors import ClosedError, operation_error
from aiouffd.kernel import abi
from aiouffd.kernel.userfaultfd import Userfaultfd

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from aiouffd.engine.space import Space
    from aiouffd.engine.statistics import Counters

__all__ = ["Dispatcher", "Landing", "Memory"]

log = logging.getLogger("aiouffd")

_preadv = os.preadv
_BURST_NS = 500_000  # after so long the loop gets a turn
_RETRY = 0.001  # seconds until what is deferred is tried again, while no message comes; doubles with each vain try
_SLOWEST_RETRY = 0.064
_GONE_CHECK = 0.5  # seconds between looks whether the processes are still there
_PASSING_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_PASSING_ERROR_PAUSE = 0.05
_LOGGED_AGAIN_NS = 5_000_000_000
_VAIN_LOOKS_UNTIL_RARER = 3
_MAX_NONBLOCK_RESETS = 8  # so often O_NONBLOCK is set again, until the descriptor is dropped
_SLOT_SIZE = SLOT.size
_slot = SLOT.unpack_from
_MAX_READY = 32  # descriptors in one look: epoll allocates room for so many
_ONE_MESSAGE = abi.MESSAGE_SIZE
MESSAGES = 64


class Landing(Protocol):
    """Where messages land, and how layout events are kept for a successor."""

    buffers: list[memoryview]

    def reading(self, identity: int) -> None:
        """Note whose messages land next."""

    def commit(self, space: Space, layout: list[bytes]) -> None:
        """Make layout events durable; `buffers` may be another afterwards."""


class Memory:
    """Messages land in private memory: this process has no successor."""

    def __init__(self) -> None:
        self.buffers = [memoryview(bytearray(abi.MESSAGE_SIZE * MESSAGES))]

    def reading(self, identity: int) -> None:
        """Nothing to note."""

    def commit(self, space: Space, layout: list[bytes]) -> None:
        """Nothing to keep."""


class Dispatcher:
    """Serves any number of spaces on one loop. Not thread-safe: everything happens on that loop.

    Args:
        loop: asyncio's or uvloop's.
        counters: shared by all spaces.
        spin_us: microseconds to look again before sleeping; 0: sleep at once.
        landing: where messages land.
        on_drop: called with a space before its descriptor is closed.
        on_idle: called when a space was dropped and none is left.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        counters: Counters,
        *,
        spin_us: int = 50,
        landing: Landing | None = None,
        on_drop: Callable[[Space], None] | None = None,
        on_idle: Callable[[], None] | None = None,
    ) -> None:
        self.spaces: dict[int, Space] = {}  # descriptor -> space
        self._loop = loop
        self._words = counters.words
        self.spin_us = spin_us
        self._landing: Landing = landing or Memory()
        self._on_drop = on_drop
        self._on_idle = on_idle
        self._epoll = select.epoll()
        self._last_ns = 0
        self._vain = 0
        self._skip = 0
        self._logged_ns = -_LOGGED_AGAIN_NS
        self._turn: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._pause = _RETRY
        self._closed = False
        self._flags = os.RWF_NOWAIT
        self._held: set[int] = set()  # descriptors that are not read
        self._blocking: dict[int, int] = {}  # descriptor -> how often O_NONBLOCK was missing
        self._only: tuple[tuple[int, int]] | None = None  # in place of epoll's list, if there is but one descriptor
        self._fast_path = FastPath(counters, self.spaces)
        self._behind: deque[Space] = deque()  # spaces with windows that are not complete yet
        loop.add_reader(self._epoll.fileno(), self._ready)
        self._checker = loop.call_later(_GONE_CHECK, self._check_gone)

    @property
    def spin_us(self) -> int:
        """Microseconds to look again before sleeping."""
        return self._spin_ns // 1000

    @spin_us.setter
    def spin_us(self, value: int) -> None:
        self._spin_ns = value * 1000
        self._near_ns = 2 * self._spin_ns  # a fault that came so soon after the last would have been worth a look

    def add(self, space: Space) -> None:
        """Serve a space from now on; its `uffd` is non-blocking."""
        fd = space.uffd.fileno()
        self.spaces[fd] = space
        self._fast_path.admit(fd, space.identity)
        if type(space.uffd) is Userfaultfd:  # others have a COPY of their own
            space.fast_path = self._fast_path
            space.backend.opened(space)
        self._count()
        space.on_deferred = self._deferred
        space.on_remainders = self._behind.append
        self._epoll.register(fd, select.EPOLLIN)

    def drop(self, space: Space) -> None:
        """Serve a space no longer, and close it; nothing if that was done before."""
        try:
            fd = space.uffd.fileno()
        except ClosedError:
            return
        if self.spaces.pop(fd, None) is None:
            return
        with contextlib.suppress(OSError):  # it could not be read just now, and is not listened to
            self._epoll.unregister(fd)
        self._blocking.pop(fd, None)
        self._held.discard(fd)
        if self._on_drop is not None:
            self._on_drop(space)
        space.fast_path = None
        self._fast_path.dismiss(fd)
        space.close()
        self._count()
        if not self.spaces and self._on_idle is not None and not self._closed:
            self._on_idle()

    def _count(self) -> None:
        self._words[Counter.SPACES] = len(self.spaces)
        self._only = ((next(iter(self.spaces)), 0),) if len(self.spaces) == 1 and not self._held else None

    def hold(self, space: Space) -> None:
        """Read a space no more until `release`: its events stay in the kernel, and its threads wait."""
        self._held.add(space.uffd.fileno())
        with contextlib.suppress(OSError):  # it could not be read just now, and is not listened to
            self._epoll.unregister(space.uffd.fileno())
        self._count()

    def release(self, space: Space) -> None:
        """Read a space again."""
        if space.uffd.fileno() in self._held:
            self._held.discard(space.uffd.fileno())
            self._count()
            self._listen_again(space)

    def close(self) -> None:
        """Drop all spaces and leave the loop."""
        self._closed = True
        self._checker.cancel()
        for handle in (self._turn, self._timer):
            if handle is not None:
                handle.cancel()
        self._loop.remove_reader(self._epoll.fileno())
        for space in list(self.spaces.values()):
            self.drop(space)
        self._epoll.close()

    # The way of a fault

    def _ready(self) -> None:
        """Read and serve until nothing has come for a while, or the loop is due for a turn."""
        now = perf_counter_ns()
        turn = now + _BURST_NS
        deadline = now
        looking = False
        while not self._closed:
            if self._poll():
                if looking:
                    self._vain = 0
                now = perf_counter_ns()
                deadline = now + self._patience(now)
                looking = True
            elif self._behind:
                if not self._behind[0].advance():
                    self._behind.popleft()
                now = perf_counter_ns()
                if looking:  # its toucher is at work meanwhile, and will soon be behind the window
                    deadline = now + self._spin_ns
            else:
                now = perf_counter_ns()
                if now >= deadline:
                    if looking and deadline > self._last_ns:
                        self._vain += 1
                        self._skip = min(1 << self._vain, 64) if self._vain >= _VAIN_LOOKS_UNTIL_RARER else 0
                    return
            if now >= turn:
                # A handle, not a task: other callbacks run, the descriptors are looked at again right after.
                if self._turn is None:
                    self._turn = self._loop.call_soon(self._again)
                return

    def _again(self) -> None:
        self._turn = None
        self._ready()

    def _patience(self, now: int) -> int:
        """Return for how many nanoseconds to look again after a fault: only while faults keep coming."""
        gap = now - self._last_ns
        self._last_ns = now
        if gap > self._near_ns:
            return 0
        if self._skip:
            self._skip -= 1
            return 0
        return self._spin_ns

    def _poll(self) -> bool:
        """Read once from each descriptor that is readable; tell whether any was."""
        came = False
        landing, fast_path = self._landing, self._fast_path
        for fd, events in self._only or self._epoll.poll(0, _MAX_READY):
            slot = _slot(fast_path.slots, fd * _SLOT_SIZE)
            if slot[0] < 0:
                continue  # dropped just now
            landing.reading(slot[0])
            buffers = landing.buffers
            try:
                length = _preadv(fd, buffers, -1, self._flags)
            except BlockingIOError:
                length = 0
            except OSError as error:
                came = self._broken(self.spaces[fd], error) or came
                continue
            if length:
                came = True
                if length == _ONE_MESSAGE and fast_path.serve(fd, slot, buffers[0]):
                    continue
                serve_messages(self.spaces[fd], buffers[0], length, landing.commit)
            self._afterwards(fd, events)
        return came

    def _afterwards(self, fd: int, events: int) -> None:
        space = self.spaces.get(fd)
        if space is not None and space.deferred:
            self._retry(space)
        if events & select.EPOLLERR:
            self._unblock(fd)

    def _broken(self, space: Space, error: OSError) -> bool:
        if error.errno == errno.EOPNOTSUPP and self._flags:
            self._flags = 0
            return True  # nothing was read: look again
        if error.errno in _PASSING_ERRORS:
            # The kernel keeps what could not be read, for instance a fork whose descriptor finds no room.
            now = perf_counter_ns()
            if now - self._logged_ns > _LOGGED_AGAIN_NS:
                self._logged_ns = now
                log.error("events cannot be read, and wait (limit of open files: RLIMIT_NOFILE): %s", error.strerror)
            with contextlib.suppress(FileNotFoundError):  # it was looked at without being listened to
                self._epoll.unregister(space.uffd.fileno())
            self._loop.call_later(_PASSING_ERROR_PAUSE, self._listen_again, space)
        elif error.errno != errno.EINTR:
            log.error("%r cannot be read and is dropped: %s", space, error)
            space.report(operation_error("read", 0, 0, error.errno or 0))
            self.drop(space)
        return False

    def _unblock(self, fd: int) -> None:
        """Set O_NONBLOCK again: without it, poll(2) reports an error for ever, and the loop would never sleep."""
        space = self.spaces.get(fd)
        if space is None or not os.get_blocking(fd):
            return
        os.set_blocking(fd, False)
        self._blocking[fd] = times = self._blocking.get(fd, 0) + 1
        if times == _MAX_NONBLOCK_RESETS:
            log.error("%r is dropped: O_NONBLOCK was taken from it %d times", space, times)
            self.drop(space)

    def _listen_again(self, space: Space) -> None:
        fd = space.uffd.fileno() if not space.closing else -1
        if not self._closed and fd not in self._held and self.spaces.get(fd) is space:
            with contextlib.suppress(FileExistsError):
                self._epoll.register(space.uffd.fileno(), select.EPOLLIN)

    # Timers

    def _retry(self, space: Space) -> None:
        """Try deferred runs again now, and later on a timer: there may be no further message."""
        space.retry()
        if space.deferred:
            self._schedule()

    def _deferred(self) -> None:
        """Something was put off just now: most likely its thread only needs to run once more."""
        self._pause = _RETRY
        self._schedule()

    def _schedule(self) -> None:
        if self._timer is None and not self._closed:
            self._timer = self._loop.call_later(self._pause, self._retry_all)

    def _retry_all(self) -> None:
        self._timer = None
        self._pause = min(2 * self._pause, _SLOWEST_RETRY)
        for space in list(self.spaces.values()):
            if space.deferred:
                self._retry(space)
        self._ready()

    def _check_gone(self) -> None:
        """Drop the spaces whose process has exited: there is no EPOLLHUP. The heartbeat beats here, too."""
        self._words[Counter.HEARTBEAT] += 1
        for space in list(self.spaces.values()):
            if space.is_gone or space.uffd.gone():
                space.gone()
                self.drop(space)
            elif self._only:  # the others are told by epoll
                self._unblock(space.uffd.fileno())
        if not self._closed:
            self._checker = self._loop.call_later(_GONE_CHECK, self._check_gone)
