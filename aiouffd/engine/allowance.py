"""What a client may have in a second: events that are read for it, and bytes that are placed for it.

Each is a token bucket. What was done is paid afterwards: the bytes that a fault brings are known only then. So a bucket
goes below empty, by one read and what it brings. The client's descriptors are not read until it has refilled: its
messages stay in the kernel, its threads wait, and nothing is lost. Nobody else waits.

The space of a limited client has no fast path, whose faults nobody counts. The others cost nothing.
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from aiouffd.engine.statistics import Counter
from aiouffd.kernel.userfaultfd import Userfaultfd

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.engine.statistics import Counters

__all__ = ["Allowance", "Allowances", "Bucket", "MeteredUserfaultfd", "allowed"]

log: logging.Logger = logging.getLogger("aiouffd")

_BURST = 1.0  # a full bucket holds the tokens of so many seconds
_STEP = 0.01  # seconds that spaces are held at least: to hold and release them costs time
_SAID_AGAIN = 60.0  # seconds


class Bucket:
    """A token bucket, which holds the tokens of one second, and may be overdrawn.

    Args:
        rate: tokens per second.
        now: seconds. It is full then.
    """

    def __init__(self, rate: float, now: float) -> None:
        self.rate = rate
        self._empty = now - _BURST  # the time at which its level is 0; in the future if it is overdrawn

    def take(self, tokens: float, now: float) -> None:
        """Take tokens, whether there are so many or not."""
        self._empty = max(self._empty, now - _BURST) + tokens / self.rate

    def level(self, now: float) -> float:
        """Return the seconds whose tokens it holds: 1 if it is full; below 0 if it is overdrawn."""
        return min(now - self._empty, _BURST)


class _Dispatcher(Protocol):
    def hold(self, space: Any, why: str) -> None: ...
    def release(self, space: Any, why: str) -> None: ...


class Allowance:
    """What one client may have. Its spaces share it: those that it has handed over, and its forked children.

    Args:
        name: of the client, for the log.
        events: messages per second; None: no limit.
        size: bytes per second; None: no limit.
        counters: where to count.
        clock: seconds.
    """

    def __init__(
        self,
        name: str,
        events: float | None,
        size: float | None,
        counters: Counters,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.spaces: dict[Any, _Dispatcher] = {}  # who reads them
        self.name = name
        self._clock = clock
        self.counters = counters
        now = clock()
        self._events = None if events is None else Bucket(events, now)
        self._bytes = None if size is None else Bucket(size, now)
        self._timer: asyncio.TimerHandle | None = None  # while its spaces are held
        self._changed = asyncio.Event()
        self._said = now - _SAID_AGAIN

    @property
    def level(self) -> float:
        """As that of the emptier bucket."""
        now = self._clock()
        return min((bucket.level(now) for bucket in (self._events, self._bytes) if bucket is not None), default=_BURST)

    @property
    def is_forgettable(self) -> bool:
        """Whether nobody uses it and it is full, as a new one would be."""
        return not self.spaces and self.level >= _BURST

    def read(self, events: int) -> None:
        """Take note that so many messages were read."""
        self._take(self._events, events, "events")

    def placed(self, size: int) -> None:
        """Take note that so many bytes were placed."""
        self._take(self._bytes, size, "bytes")

    def _take(self, bucket: Bucket | None, tokens: int, what: str) -> None:
        if bucket is None:
            return
        now = self._clock()
        bucket.take(tokens, now)
        if bucket.level(now) <= 0 and self._hold() and now - self._said >= _SAID_AGAIN:
            self._said = now
            log.warning("%s has used up its %s %s a second, and is slowed", self.name, f"{bucket.rate:,.0f}", what)

    def _hold(self) -> bool:
        """Have no space read until it has refilled; tell whether that is new."""
        if self._timer is not None or not self.spaces:
            return False
        self.counters.words[Counter.SLOWED] += 1
        for space, dispatcher in self.spaces.items():
            dispatcher.hold(space, "allowance")
        self._wait()
        return True

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_STEP - min(self.level, 0.0), self._refilled)

    def _refilled(self) -> None:
        if self.level <= 0:  # bytes that were on their way have come meanwhile
            self._wait()
            return
        self._timer = None
        for space, dispatcher in self.spaces.items():
            dispatcher.release(space, "allowance")
        self._let_look()

    # Spaces

    def enter(self, space: Any, dispatcher: _Dispatcher) -> None:
        """Share it with a space that is read from now on, and whose descriptor is metered."""
        self.spaces[space] = dispatcher
        space.uffd.allowance = self
        if self._timer is not None:
            dispatcher.hold(space, "allowance")
        elif self.level <= 0:  # it has come again
            self._hold()

    def leave(self, space: Any) -> None:
        """Forget a space that is read no longer."""
        self.spaces.pop(space, None)
        if not self.spaces and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._let_look()

    async def ready(self, space: Any) -> None:
        """Wait until more may be placed in a space, or it is read no longer. Canceling is safe."""
        while self._timer is not None and space in self.spaces:
            await self._changed.wait()

    def _let_look(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


async def allowed(space: Any) -> None:
    """Wait until the client of a space may have more, before anything is brought ahead of its faults; as `ready`."""
    if space.allowance is not None:
        await space.allowance.ready(space)


class Allowances:
    """Those of all clients, by what names them."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, float | None, float | None], Allowance] = {}

    def of(self, name: str, events: float | None, size: float | None, counters: Counters) -> Allowance | None:
        """Return that of a client, which counts there from now on; None: it has no limit.

        A client that comes again finds its own: it gains nothing by leaving.
        """
        if events is None and size is None:
            return None
        self._known = {key: known for key, known in self._known.items() if not known.is_forgettable}
        key = (name, events, size)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = Allowance(name, events, size, counters)
        else:
            known.counters = counters
        return known


class MeteredUserfaultfd(Userfaultfd):
    """Counts the bytes that it places, whatever they are placed for."""

    allowance: Allowance | None = None
    """Where they are counted."""

    def try_copy(self, dst: int, src: int, length: int, mode: int) -> int:
        """As UFFDIO_COPY."""
        return self._counted(super().try_copy(dst, src, length, mode))

    def try_zeropage(self, start: int, length: int, mode: int) -> int:
        """As UFFDIO_ZEROPAGE."""
        return self._counted(super().try_zeropage(start, length, mode))

    def try_continue(self, start: int, length: int, mode: int) -> int:
        """As UFFDIO_CONTINUE."""
        return self._counted(super().try_continue(start, length, mode))

    def _counted(self, result: int) -> int:
        if result > 0 and self.allowance is not None:
            self.allowance.placed(result)
        return result
