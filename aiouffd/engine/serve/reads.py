"""Reads of a source: bounded, timed and retried."""

from __future__ import annotations

import asyncio
import os
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, NoReturn

from aiouffd.engine.flight import canceled_from_outside
from aiouffd.engine.serve.deadlines import Deadlines
from aiouffd.engine.serve.gate import Gate
from aiouffd.engine.statistics import Counter
from aiouffd.errors import ShortReadError, SourceError, SourceTimeoutError, read_failure
from aiouffd.sources.steps import noted

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.engine.serve.bounds import Limits
    from aiouffd.engine.serve.common import Common
    from aiouffd.engine.serve.precedence import Precedence
    from aiouffd.engine.statistics import Counters

__all__ = ["Reads"]

_IN_FLIGHT, _BYTES_IN_FLIGHT = int(Counter.IN_FLIGHT), int(Counter.BYTES_IN_FLIGHT)
_BYTES_FETCHED, _BYTES_SHARED = int(Counter.BYTES_FETCHED), int(Counter.BYTES_SHARED)
_SOURCE_READS, _SOURCE_NS = int(Counter.SOURCE_READS), int(Counter.SOURCE_NS)
_RETRIES = 4
_LONGEST_PAUSE = 2.0  # seconds between two tries


def _between(low: float, high: float) -> float:
    """Return some number in [low, high]: enough to spread load. To import `random` would take 1 ms of each pager."""
    return low + (high - low) * os.urandom(1)[0] / 255


class Reads:
    """The reads of one source by one backend.

    Args:
        common: has the source, whose own attributes `timeout` and `retries`, if it has them, come before those of
            `limits`.
        counters: where to count.
        limits: see `Limits`.
        precedence: of other backends; None: there are none.
    """

    def __init__(
        self, common: Common, counters: Counters, limits: Limits, precedence: Precedence | None = None
    ) -> None:
        self._common = common
        self._words = counters.words
        self._backoff = limits.backoff
        common.enter(self, limits)
        self._source = source = common.source
        self._read_ahead = getattr(source, "read_ahead", None)
        self._gate = Gate(limits.concurrent_reads, limits.bytes_in_flight, precedence)
        self._deadlines = Deadlines(getattr(source, "timeout", limits.timeout))
        self._retries: int = getattr(source, "retries", _RETRIES if limits.retries is None else limits.retries)

    async def read(
        self,
        offset: int,
        length: int,
        *,
        urgent: bool,
        retries: int | None = None,
        waits: Callable[[Callable[[], None]], None] = lambda _: None,
    ) -> Any:
        """Return the bytes. Canceling is safe: the place in the queue, or the read, is given up.

        Its waits and tries are noted as steps, if this task notes any.

        Args:
            offset: where they begin.
            length: how many.
            urgent: a thread waits for them: it is let in before those that are read ahead.
            retries: in place of the usual ones.
            waits: called with a function that makes it urgent, if it has to wait and is not.

        Raises:
            SourceError: the source failed, and went on failing.
        """
        tries = 0
        while True:
            # Each try takes a place of its own in the gate: the pauses between them keep nobody waiting.
            if not self._gate.try_enter(length, urgent=urgent):
                began = perf_counter_ns()
                urgent = await self._gate.enter(length, urgent=urgent, waits=waits)
                noted("queue", began)
            began, outcome = perf_counter_ns(), ""
            try:
                with self._deadlines:
                    return await self._common.read(self, offset, length, urgent=urgent, alone=tries > 0)
            except (Exception, asyncio.CancelledError, SystemExit) as error:  # noqa: BLE001 - `_failure` raises some
                outcome = type(error).__name__
                failure = self._failure(error, offset, length)
            finally:
                noted("read", began, error=outcome)
                self._gate.leave(length, urgent=urgent)
            tries += 1
            if tries > (self._retries if retries is None else retries):
                raise failure
            self.count_retry()
            # Full jitter: clients that failed together do not come back together.
            pause, began = min(_LONGEST_PAUSE, self._backoff * 2 ** min(tries - 1, 10)), perf_counter_ns()
            await asyncio.sleep(_between(pause / 2, pause))
            noted("retry", began)

    async def ask(self, offset: int, length: int, *, urgent: bool) -> Any:
        """Return bytes of the source itself: one try, which is counted. Raises what the source does."""
        words = self._words
        words[_IN_FLIGHT] += 1
        words[_BYTES_IN_FLIGHT] += length
        words[_SOURCE_READS] += 1
        began = perf_counter_ns()
        try:
            coming = (self._read_ahead if self._read_ahead and not urgent else self._source.read)(offset, length)
            if not hasattr(coming, "__await__"):
                what = f"`read` returned {type(coming).__name__}, no awaitable: it must be `async def read(...)`"
                raise SourceError(repr(self._source), offset, length, what)
            data = await coming
            view = memoryview(data)
            if view.nbytes != length or not view.c_contiguous:
                self._refuse(view, offset, length)
            words[_BYTES_FETCHED] += length
            if not urgent:
                self._gate.took(perf_counter_ns() - began)
            return data
        finally:
            words[_SOURCE_NS] += perf_counter_ns() - began
            words[_IN_FLIGHT] -= 1
            words[_BYTES_IN_FLIGHT] -= length

    def took(self, size: int) -> None:
        """Count bytes that were had without asking."""
        self._words[_BYTES_SHARED] += size

    def count_retry(self) -> None:
        """Count a further try."""
        self._words[Counter.SOURCE_RETRIES] += 1

    async def fetch(self, offset: int, length: int) -> Any:
        """As `read`, for what nobody waits for; what is behind the end of the source is zeros."""
        there = max(min(length, self._source.size - offset), 0)
        data = await self.read(offset, there, urgent=False) if there else b""
        return data if there == length else bytes(data) + bytes(length - there)

    def _refuse(self, view: memoryview, offset: int, length: int) -> NoReturn:
        """Raise what is wrong with an answer."""
        if not view.c_contiguous:
            raise TypeError("what it gave does not lie in one piece")
        self._words[_BYTES_FETCHED] += view.nbytes
        reason = f"gave {view.nbytes} bytes of {length}; it says that it has {self._source.size}"
        raise ShortReadError(repr(self._source), offset, length, reason)

    def _failure(self, error: BaseException, offset: int, length: int) -> SourceError:
        """Return what a try has failed with; raise what another try cannot change.

        Whatever a source raises fails the pages, not the pager: also the cancelation of something that it has waited
        for, as long as nobody has canceled us.
        """
        if isinstance(error, SourceTimeoutError):
            return error
        if isinstance(error, SourceError) or canceled_from_outside(error):  # the source itself says that it is for good
            try:
                raise error
            finally:
                del error  # this frame is in its traceback: a cycle would keep the source
        if isinstance(error, TimeoutError):
            reason = f"no answer in {self._deadlines.seconds} s"
            failure: SourceError = SourceTimeoutError(repr(self._source), offset, length, reason)
        else:
            failure = SourceError(repr(self._source), offset, length, read_failure(error))
        failure.__cause__ = error
        return failure

    async def aclose(self) -> None:
        """Stop the timer, and leave the source. Nothing is read any more."""
        self._deadlines.close()
        await self._common.leave(self)
