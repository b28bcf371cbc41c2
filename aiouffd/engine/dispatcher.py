"""Descriptors on one event loop: readable -> read -> serve, and look again before going to sleep.

`engine.reading` reads, and serves plain faults; the other messages come here. The loop gets a turn at least every
0.2 ms, however many faults there are: other tasks run in between.
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

from aiouffd.engine.flight import spawn
from aiouffd.engine.forsaking import forsake
from aiouffd.engine.messages import serve_messages
from aiouffd.engine.others import Others
from aiouffd.engine.reading import make_reader
from aiouffd.engine.statistics import Counter
from aiouffd.errors import ClosedError, operation_error
from aiouffd.kernel import abi
from aiouffd.kernel.events import MESSAGES
from aiouffd.kernel.userfaultfd import Userfaultfd
from aiouffd.native.reader import Outcome

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from aiouffd.engine.reading import MakeReader
    from aiouffd.engine.space import Space
    from aiouffd.engine.statistics import Counters

__all__ = ["Dispatcher", "Landing", "Memory"]

log: logging.Logger = logging.getLogger("aiouffd")

_BURST_NS = 200_000  # after so long the loop gets a turn
_RETRY = 0.001  # seconds until what is deferred is tried again, while no message comes; doubles with each vain try
_SLOWEST_RETRY = 0.064
_GONE_CHECK = 0.5  # seconds between looks whether the processes are still there
_PASSING_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_PASSING_ERROR_PAUSE = 0.05
_NO_FLAGS = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM)  # before Linux 6.10; a seccomp filter's, of preadv2
_LOGGED_AGAIN_NS = 5_000_000_000
_FILE = "file"  # why a space is held: something is done to the file of its memory
_NO_ROOM = "no room"  # for what is to be read
_UNREADABLE = "unreadable"  # for good
_MAX_NONBLOCK_RESETS = 8  # so often O_NONBLOCK is set again, until the descriptor is dropped


class Landing(Protocol):
    """Where messages land, and how layout events are kept for a successor."""

    @property
    def buffer(self) -> memoryview:
        """Room for the messages of the next read."""

    def before_reading(self) -> None:
        """Take note that messages may land now."""

    @property
    def identity(self) -> memoryview:
        """One signed word, in which the reader notes whose messages it reads into `buffer`."""

    def commit(self, space: Space, layout: list[bytes]) -> None:
        """Make layout events durable; `buffer` may be another afterwards."""


class Memory:
    """Messages land in private memory: this process has no successor."""

    def __init__(self) -> None:
        self.buffer: memoryview = memoryview(bytearray(abi.MESSAGE_SIZE * MESSAGES))
        self.identity: memoryview = memoryview(bytearray(8)).cast("q")

    def before_reading(self) -> None:
        """Nothing to do."""

    def commit(self, space: Space, layout: list[bytes]) -> None:
        """Nothing to keep."""


class Dispatcher:
    """Serves any number of spaces on one loop. Not thread-safe: everything happens on that loop.

    Args:
        loop: asyncio's or uvloop's.
        counters: where the turns of the loop are counted; each space has its own.
        spin_us: microseconds to look again before sleeping; 0: sleep at once.
        landing: where messages land.
        reader: makes what reads; None: `make_reader`.
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
        reader: MakeReader | None = None,
        on_drop: Callable[[Space], None] | None = None,
        on_idle: Callable[[], None] | None = None,
    ) -> None:
        self.spaces: dict[int, Space] = {}  # descriptor -> space
        self._loop = loop
        self._words = counters.words
        self._landing: Landing = landing or Memory()
        self._on_drop = on_drop
        self._on_idle = on_idle
        self._epoll = select.epoll()
        self._logged_ns = -_LOGGED_AGAIN_NS
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._pause = _RETRY
        self._closed = False
        self._reads_with_flags = True  # RWF_NOWAIT
        self._held: dict[int, set[str]] = {}  # descriptors that are not read, and why
        self._blocking: dict[int, int] = {}  # descriptor -> how often O_NONBLOCK was missing
        self._reader = (reader or make_reader)(self._epoll, self.spaces)
        self._others = Others(self.spaces, self._epoll, self._serve_turn, self._reader.turns)
        self._landed_at: memoryview | None = None
        self.spin_us = spin_us
        self._behind: deque[Space] = deque()  # spaces with windows that are not complete yet
        loop.add_reader(self._epoll.fileno(), self._ready)
        self._checker = loop.call_later(_GONE_CHECK, self._check_gone)

    @property
    def spin_us(self) -> int:
        """Microseconds to look again before sleeping."""
        return self._reader.spin_ns // 1000

    @spin_us.setter
    def spin_us(self, value: int) -> None:
        self._reader.spin_ns = value * 1000

    def add(self, space: Space) -> None:
        """Serve a space from now on; its `uffd` is non-blocking."""
        fd = space.uffd.fileno()
        self.spaces[fd] = space
        self._reader.admit(fd, space.identity, space.counters)
        space.counters.words[Counter.SPACES] += 1
        if type(space.uffd).try_copy is Userfaultfd.try_copy:  # others have a COPY of their own
            space.fast_path = self._reader
            space.backend.opened(space)
        self._look_at_only()
        space.on_deferred = self._deferred
        space.on_remainders = self._behind.append
        space.on_file = self._wait_for_file
        space.others = self._others
        self._epoll.register(fd, select.EPOLLIN)
        if space.allowance is not None:
            space.allowance.enter(space, self)
        if space.bound is not None and space.bound.is_waiting:
            self.hold(space, _FILE)

    def drop(self, space: Space) -> None:
        """Serve a space no longer, and close it; nothing if that was done before."""
        try:
            fd = space.uffd.fileno()
        except ClosedError:
            return
        if self.spaces.pop(fd, None) is None:
            return
        with contextlib.suppress(OSError):  # it is held
            self._epoll.unregister(fd)
        self._blocking.pop(fd, None)
        self._held.pop(fd, None)
        if space.allowance is not None:
            space.allowance.leave(space)
        if self._on_drop is not None:
            self._on_drop(space)
        space.fast_path = space.on_file = None
        self._reader.dismiss(fd)
        space.close()
        space.counters.words[Counter.SPACES] -= 1
        self._look_at_only()
        if not self.spaces and self._on_idle is not None and not self._closed:
            self._on_idle()

    def _look_at_only(self) -> None:
        self._reader.only(next(iter(self.spaces)) if len(self.spaces) == 1 and not self._held else -1)

    def hold(self, space: Space, why: str) -> None:
        """Read a space no more until `release` for each reason: its events stay in the kernel, and its threads wait."""
        self._held.setdefault(space.uffd.fileno(), set()).add(why)
        with contextlib.suppress(OSError):  # it is held already
            self._epoll.unregister(space.uffd.fileno())
        self._reader.dismiss(space.uffd.fileno())
        self._look_at_only()

    def release(self, space: Space, why: str) -> None:
        """Read a space again, if there is no other reason why it is held."""
        fd = space.uffd.fileno()
        reasons = self._held.get(fd, set())
        reasons.discard(why)
        if fd in self._held and not reasons:
            del self._held[fd]
            self._reader.admit(fd, space.identity, space.counters)
            if space.fast_path is not None:
                space.backend.opened(space)
            self._look_at_only()
            self._epoll.register(fd, select.EPOLLIN)

    def _wait_for_file(self, space: Space, waits: bool) -> None:  # noqa: FBT001 - of a callback
        if waits:
            self.hold(space, _FILE)
            return
        self.release(space, _FILE)
        self._retry(space)

    def held(self, why: str) -> list[Space]:
        """Return the spaces that are not read for this reason."""
        return [self.spaces[fd] for fd, reasons in self._held.items() if why in reasons]

    def close(self) -> None:
        """Drop all spaces and leave the loop."""
        self._closed = True
        self._checker.cancel()
        for task in self._tasks:
            task.cancel()
        for handle in (self._turn, self._timer):
            if handle is not None:
                handle.cancel()
        self._loop.remove_reader(self._epoll.fileno())
        for space in list(self.spaces.values()):
            self.drop(space)
        self._epoll.close()
        self._reader.end()

    # The way of a fault

    def _ready(self) -> None:
        """Read and serve until nothing has come for a while, or the loop is due for a turn."""
        turn = perf_counter_ns() + _BURST_NS
        came = False
        while not self._closed:
            left = turn - perf_counter_ns()
            outcome, came = self._read(max(left, 0), came=came, once=bool(self._behind))
            if outcome == Outcome.IDLE:
                if not self._behind:
                    return
                # Its toucher is at work meanwhile, and will soon be behind the window.
                if not self._behind[0].advance():
                    self._behind.popleft()
            if outcome == Outcome.DUE or left <= 0:
                # A handle, not a task: other callbacks run, the descriptors are looked at again right after.
                if self._turn is None:
                    self._turn = self._loop.call_soon(self._again)
                return

    def _read(self, turn_ns: int, fd: int = -1, *, came: bool = False, once: bool) -> tuple[int, bool]:
        """Read and serve, as the reader's `run`; return its `Outcome`, and whether something may have come."""
        self._landing.before_reading()
        if self._landing.buffer is not self._landed_at:
            self._land()
        outcome, found = self._reader.run(turn_ns, came=came, once=once, fd=fd)
        if outcome == Outcome.MESSAGES:
            self._serve(found.fd, found.length, found.events)
        elif outcome == Outcome.FAILED:
            return outcome, self._broken(self.spaces[found.fd], found.error)
        return outcome, True

    def _serve_turn(self, fd: int) -> None:
        """Read one descriptor once, and serve that, for who is in the midst of something else: a defect is not his."""
        try:
            self._read(0, fd, once=True)
        except Exception as error:  # noqa: BLE001 - as what the loop itself calls
            message = f"messages of {self.spaces.get(fd)!r} could not be served"
            self._loop.call_exception_handler({"message": message, "exception": error})
        if self._behind and self._turn is None and not self._closed:  # no message may come any more
            self._turn = self._loop.call_soon(self._again)

    def _again(self) -> None:
        self._turn = None
        self._ready()

    def _land(self) -> None:
        self._landed_at = self._landing.buffer
        self._reader.land(self._landed_at, self._landing.identity)

    def _serve(self, fd: int, length: int, events: int) -> None:
        if length:
            space = self.spaces[fd]
            serve_messages(space, self._landing.buffer, length, self._landing.commit)
            self._reader.refresh(space)
            if space.allowance is not None:
                space.allowance.read(length // abi.MESSAGE_SIZE)
        self._afterwards(fd, events)

    def _afterwards(self, fd: int, events: int) -> None:
        space = self.spaces.get(fd)
        if space is not None and space.deferred:
            self._retry(space)
        if events & select.EPOLLERR:
            self._unblock(fd)

    def _broken(self, space: Space, number: int) -> bool:
        if number in _NO_FLAGS and self._reads_with_flags:
            self._reads_with_flags = False
            self._reader.read_without_flags()
            return True  # nothing was read: look again
        if number in _PASSING_ERRORS or (space.retrying is not None and number != errno.EINTR):
            # The kernel keeps what could not be read, for instance a fork whose descriptor finds no room.
            now = perf_counter_ns()
            if now - self._logged_ns > _LOGGED_AGAIN_NS:
                self._logged_ns = now
                why = "limit of open files: RLIMIT_NOFILE" if number in _PASSING_ERRORS else repr(space)
                log.error("events cannot be read, and wait (%s): %s", why, os.strerror(number))
                if number not in _PASSING_ERRORS:
                    space.report(operation_error("read", 0, 0, number))
            self.hold(space, _NO_ROOM)
            self._loop.call_later(_PASSING_ERROR_PAUSE, self._read_again, space)
        elif number != errno.EINTR:
            log.error("%r cannot be read and is dropped: %s", space, os.strerror(number))
            space.report(operation_error("read", 0, 0, number))
            self._forsake(space)
        return False

    def _forsake(self, space: Space) -> None:
        """Drop a space once nobody waits there any more: as where a source fails for good."""
        self.hold(space, _UNREADABLE)
        spawn(self._tasks, self._drop_forsaken(space))

    async def _drop_forsaken(self, space: Space) -> None:
        with contextlib.suppress(ClosedError):
            if await forsake(space):
                self.drop(space)

    def _unblock(self, fd: int) -> None:
        """Set O_NONBLOCK again: without it, poll(2) reports an error for ever, and the loop would never sleep."""
        space = self.spaces.get(fd)
        if space is None or not os.get_blocking(fd):
            return
        os.set_blocking(fd, False)
        self._blocking[fd] = times = self._blocking.get(fd, 0) + 1
        if times == _MAX_NONBLOCK_RESETS:
            log.error("%r is dropped: O_NONBLOCK was taken from it %d times", space, times)
            self._forsake(space)

    def _read_again(self, space: Space) -> None:
        if not space.uffd.closed:
            self.release(space, _NO_ROOM)

    # Timers

    def _retry(self, space: Space) -> None:
        """Try deferred runs again now, and later on a timer: there may be no further message."""
        if space.bound is None or not space.bound.is_waiting:
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
            elif len(self.spaces) == 1:  # the others are told by epoll
                self._unblock(space.uffd.fileno())
        if not self._closed:
            self._checker = self._loop.call_later(_GONE_CHECK, self._check_gone)
