"""Faults of all come before what is brought ahead for any of them: one set of rules for all backends of a loop.

What is brought ahead is placed in steps, one in each turn of the loop, whoever's it is, or a few small ones, and some
more where no thread waits. In between, faults are read. So a fault waits for one step, and not for one of each space
that is being filled. Between two parts of a step, spaces for which nothing is brought are served a turn, and the step
ends early where threads wait there still. Where these have faulted lately, reads ahead are small, and no more are under
way than come in while one of them is read: what comes in has to be received and placed, and faults wait for that. Else
there is no bound but each backend's own.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from functools import partial
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aiouffd.engine.space import Space

__all__ = ["Precedence"]

_STEP: Final = 64 << 10  # bytes that small steps of one turn place together
_LEAST: Final = _STEP // 8  # so that these are few
_MOST_STEPS: Final = 4 * _STEP  # where no thread waits after each part of them
_LATELY_NS: Final = 200_000_000  # since a fault of others: they may have the next one at any time
_LOOK_NS: Final = 5_000_000  # between two looks: one takes some 0.2 us for each space


class _Gate(Protocol):
    @property
    def share(self) -> int: ...

    def admit(self) -> None: ...


class Precedence:
    """Whose turn it is, on one loop.

    Attributes:
        brought: spaces for which something is being brought ahead; how often.
        urgent: reads under way, or about to be, for which threads wait; of all gates, which count them.
        ahead: bytes under way of the other reads, by gate.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()  # of so many bytes
        self._is_turning = False
        self._stepped = 0  # bytes of small steps in this turn of the loop
        self._room = _STEP  # for them
        self.brought: Counter[Space] = Counter()
        self.urgent: int = 0
        self.ahead: Counter[_Gate] = Counter()
        self._refused: dict[_Gate, None] = {}
        self._late: set[_Gate] = set()  # may have one now, whatever is under way
        self._timer: asyncio.TimerHandle | None = None
        self._turns: dict[int, int] = {}  # of others, by descriptor, when it was looked last
        self._looked_ns = self._faulted_ns = -_LATELY_NS

    # Steps

    @contextlib.contextmanager
    def brings(self, space: Space) -> Iterator[None]:
        """Within the block, something is brought for a space."""
        self.brought[space] += 1
        try:
            yield
        finally:
            self.brought[space] -= 1
            if not self.brought[space]:
                del self.brought[space]

    def serve_others(self, space: Space, until_ns: int) -> bool | None:
        """Serve a turn of each space for which nothing is brought, in the midst of a step that is made for this one.

        What is brought for several takes turns, however they fault.

        Args:
            space: for which the step is made.
            until_ns: when the step has to end, where others wait.

        Returns:
            whether threads of such spaces wait still; None: there is no such space.
        """
        return space.others.serve(self.brought, until_ns)

    def may_step(self, space: Space, size: int) -> bool:
        """Tell whether a small step, of so many bytes, may be made in this turn of the loop, as some others were.

        After a few of them it is made if no thread waits: to wait for another turn costs more than to look.
        """
        if self._waiting or size > _STEP:
            return False
        if self._stepped + size > self._room:
            if self._room == _MOST_STEPS or self.urgent or space.others.wait(()):
                return False
            self._room += _STEP
        if not self._stepped:
            asyncio.get_running_loop().call_soon(self._next_turn)
        self._stepped += max(size, _LEAST)
        return True

    def _next_turn(self) -> None:
        self._stepped, self._room = 0, _STEP

    def turn(
        self, waits: Callable[[Callable[[], None]], None] = lambda _: None, size: int = _STEP
    ) -> asyncio.Future[None]:
        """Return what is done when the next step may be made.

        Args:
            waits: called with a function that ends it at once.
            size: bytes of the step: small ones are made together.
        """
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        self._waiting.append((turn, min(max(size, _LEAST), _STEP)))
        waits(partial(_end, turn))
        if not self._is_turning:
            self._is_turning = True
            loop.call_soon(self._next)
        return turn

    def _next(self) -> None:
        room = _STEP
        while self._waiting and (self._waiting[0][0].done() or self._waiting[0][1] <= room):
            turn, size = self._waiting.popleft()
            if not turn.done():
                room -= size
                _end(turn)
        self._is_turning = bool(self._waiting)
        if self._is_turning:
            asyncio.get_running_loop().call_soon(self._next)

    # Reads

    def others_fault(self) -> bool:
        """Tell whether there was a fault lately in a space for which nothing is brought."""
        now = perf_counter_ns()
        if self.brought and now - self._looked_ns >= _LOOK_NS:
            before = self._turns if now - self._looked_ns < _LATELY_NS else {}  # what was read long ago says nothing
            self._looked_ns = now
            self._turns = next(iter(self.brought)).others.turns(self.brought)
            if any(turn != before.get(fd, turn) for fd, turn in self._turns.items()):
                self._faulted_ns = now
        return now - self._faulted_ns < _LATELY_NS

    def allows(self, gate: _Gate, size: int) -> bool:
        """Tell whether a read ahead of so many bytes may begin; else the gate is asked to admit again when it may.

        One may always be under way. It may be of a source that does not answer: so each gate gets one after a while.
        """
        if not self.ahead or gate in self._late or not self.others_fault():
            self._late.discard(gate)
            return True
        if size / gate.share + sum(under_way / its.share for its, under_way in self.ahead.items()) <= 1:
            return True
        self._refused[gate] = None
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LATELY_NS / 1e9, self._look_late)
        return False

    def reads_ahead(self, gate: _Gate, size: int) -> None:
        """Count bytes of reads ahead of a gate that are let in, or have left (negative)."""
        self.ahead[gate] += size
        if not self.ahead[gate]:
            del self.ahead[gate]
        if size < 0:
            self._look()

    def _look(self) -> None:
        """Have those look again that were not allowed: fewer reads are under way."""
        refused, self._refused = self._refused, {}
        for gate in refused:
            gate.admit()

    def _look_late(self) -> None:
        """Have those look again that have waited for long: others may fault no more."""
        self._timer, self._late = None, set(self._refused)
        self._look()
        self._late.clear()


def _end(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)
