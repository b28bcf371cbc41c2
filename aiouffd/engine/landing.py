"""What is told of flights: of those that were slow, and of all where somebody traces."""

from __future__ import annotations

from time import monotonic, perf_counter_ns
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from weakref import WeakKeyDictionary

from aiouffd.engine.allowance import Bucket
from aiouffd.sources.steps import cause_of, spent

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.engine.flight import Flight
    from aiouffd.sources.steps import Steps

__all__ = ["SLOW_NS", "Landings", "OnLanded", "untold"]

OnLanded: TypeAlias = "Callable[[Any, Flight, Steps, BaseException | None], None]"
"""Called with a space, one of its flights that has landed, its steps, and why it failed, if it has."""

SLOW_NS: Final = 100_000_000
"""A fault that takes so long is told."""
_SLOW_AGAIN: Final = 1.0  # seconds between two slow faults of a space that are told
_TRACED: Final = 500.0  # flights a second that are told where somebody traces
_STEPS: Final = 200  # of a flight that are told, and faults


def untold(_space: Any, _flight: Flight, _steps: Steps, _failure: BaseException | None) -> None:
    """An `OnLanded` that tells nobody."""


class Landings:
    """Tells of the flights of one backend, when they have landed.

    `tell` gets plain values. `slow`: of a flight that threads have waited for, and that took 100 ms or longer; of many
    of one space, those of one second are told by the first. `flight`: of each flight where somebody traces, up to 500 a
    second, and as far as there is room; it says how many were left out.

    Args:
        tell: called with the space, and what is told; it returns False where there is no room for that.
        traces: somebody traces.
    """

    def __init__(self, tell: Callable[[Any, dict[str, Any]], bool | None], *, traces: bool = False) -> None:
        self._tell = tell
        self._slow: WeakKeyDictionary[Any, float] = WeakKeyDictionary()  # when one was told
        self._bucket = Bucket(_TRACED, monotonic()) if traces else None
        self._omitted = 0

    def __call__(self, space: Any, flight: Flight, steps: Steps, failure: BaseException | None) -> None:
        """Tell of one, if that is due."""
        if self._bucket is None and not flight.wanted:
            return
        ended = perf_counter_ns()
        told: dict[str, Any] = {}
        if flight.wanted and ended - flight.waited_ns >= SLOW_NS and self._is_due(space):
            told["slow"] = _slow(flight, steps, ended)
        if self._bucket is not None and self._is_traced(self._bucket):
            told["flight"] = _traced(flight, steps, ended, failure) | {"omitted": self._omitted}
            self._omitted = 0
        if told and self._tell(space, told) is False and "flight" in told:
            self._omitted = told["flight"]["omitted"] + 1

    def _is_due(self, space: Any) -> bool:
        now = monotonic()
        due = now - self._slow.get(space, -_SLOW_AGAIN) >= _SLOW_AGAIN
        if due:
            self._slow[space] = now
        return due

    def _is_traced(self, bucket: Bucket) -> bool:
        now = monotonic()
        if bucket.level(now) <= 0:
            self._omitted += 1
            return False
        bucket.take(1, now)
        return True


def _slow(flight: Flight, steps: Steps, ended: int) -> dict[str, Any]:
    """Return what took most of the time that threads have waited."""
    since = flight.waited_ns
    return {
        "offset": flight.offset,
        "length": flight.length,
        "pages": len(flight.wanted),
        "cause": cause_of(steps, since, ended),
        "took_ns": ended - since,
        "queued_ns": spent(steps, "queue", since),
        "tries": max(
            sum(bool(details.get("error")) for *_, details in steps), [step[0] for step in steps].count("retry")
        ),
    }


def _traced(flight: Flight, steps: Steps, ended: int, failure: BaseException | None) -> dict[str, Any]:
    return {
        "offset": flight.offset,
        "length": flight.length,
        "pages": len(flight.wanted),
        "cause": cause_of(steps, flight.waited_ns, ended),
        "for": "fault" if flight.wanted else flight.purpose.cause.name.removeprefix("PAGES_").lower(),
        "began_ns": flight.began_ns,
        "waited_ns": flight.waited_ns,
        "ended_ns": ended,
        "steps": steps[:_STEPS],
        "faults": flight.faults[:_STEPS],
        "error": "" if failure is None else type(failure).__name__,
        "reason": "" if failure is None else str(failure)[:1000],
    }
