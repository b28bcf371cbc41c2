"""Metrics: what the engine counts anyway, read when a reader of OpenTelemetry asks for it."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import Counter as Tally
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
from opentelemetry.metrics import Observation

from aiouffd.engine.statistics import LATENCY_BUCKETS, Counters, told
from aiouffd.errors import UffdError
from aiouffd.report.measures import LATENCY, MEASURES, MOST_SESSIONS, SESSION_CLIENTS, buckets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from opentelemetry.metrics import CallbackOptions, Meter

    from aiouffd.engine.statistics import Statistics
    from aiouffd.report.measures import Measure

__all__ = ["Counts", "Instruments"]

_NOTHING = Counters().snapshot()


@attrs.frozen(eq=False)
class Counts:
    """What one Monitor or one server has counted.

    Attributes:
        statistics: returns the newest; None: it is there no longer.
        rejected: returns how many clients were turned away.
        sessions: returns the name, the number of clients and the words of each session.
    """

    statistics: Callable[[], Statistics | None]
    rejected: Callable[[], int] = lambda: 0
    sessions: Callable[[], Iterable[tuple[str, int, list[int]]]] = lambda: ()


class Instruments:
    """The metrics of this process: the sums of all its Monitors and servers. Read from any thread.

    Args:
        meter: of them.
    """

    def __init__(self, meter: Meter) -> None:
        self._lock = threading.Lock()
        self._live: dict[Counts, Statistics] = {}  # as they were last seen
        self._ended: Tally[str] = Tally()
        self._latency = [0] * LATENCY_BUCKETS
        for measure in MEASURES:
            _make(meter, measure, "aiouffd.", partial(self._observe, measure))
        for measure in (SESSION_CLIENTS, *(each for each in MEASURES if each.of_sessions)):
            _make(meter, measure, "aiouffd.session.", partial(self._observe_sessions, measure))
        bucket = attrs.evolve(LATENCY, path=f"{LATENCY.path}.bucket", unit="{fault}", text="Faults that took no longer")
        _make(meter, bucket, "aiouffd.", self._observe_latency)

    def add(self, counts: Counts) -> None:
        """Count something from now on."""
        with self._lock:
            self._live[counts] = _NOTHING

    def remove(self, counts: Counts) -> None:
        """Something is about to end: what it has counted stays."""
        with self._lock:
            if counts in self._live:
                self._forget(counts, _newest(counts, self._live[counts]) or self._live[counts])

    def _forget(self, counts: Counts, last: Statistics) -> None:
        del self._live[counts]
        gauges = {name for measure in MEASURES if measure.is_gauge for name in measure.counts.values()}
        self._ended.update({name: count for name, count in _counted(counts, last).items() if name not in gauges})
        self._latency = [*map(sum, zip(self._latency, last.latency, strict=True))]

    def _look(self) -> list[tuple[Counts, Statistics]]:
        """Return the newest of all; what is there no longer is not counted any more, and what it had counted stays."""
        with self._lock:
            for counts, before in list(self._live.items()):
                newest = _newest(counts, before)
                if newest is None:
                    self._forget(counts, before)
                else:
                    self._live[counts] = newest
            return list(self._live.items())

    def _observe(self, measure: Measure, _options: CallbackOptions) -> Iterator[Observation]:
        live = self._look()
        total = Tally(self._ended)
        for counts, statistics in live:
            total.update(_counted(counts, statistics))
        for label, value in measure.values(total):
            yield Observation(value, {f"aiouffd.{measure.label}": label} if measure.label else None)

    def _observe_sessions(self, measure: Measure, _options: CallbackOptions) -> Iterator[Observation]:
        sessions = itertools.chain.from_iterable(counts.sessions() for counts in list(self._live))
        for name, clients, words in itertools.islice(sessions, MOST_SESSIONS):
            value = measure.total({**told(words), "clients": clients})
            yield Observation(value, {"aiouffd.session.name": name})

    def _observe_latency(self, _options: CallbackOptions) -> Iterator[Observation]:
        histograms = [statistics.latency for _, statistics in self._look()]
        for bound, count in buckets([*map(sum, zip(self._latency, *histograms, strict=True))]):
            yield Observation(count, {"le": bound})


def _newest(counts: Counts, before: Statistics) -> Statistics | None:
    with contextlib.suppress(UffdError, TimeoutError, ValueError):  # of a pager that was given up, or has been left
        newest = counts.statistics()
        return newest if newest is None or newest.faults >= before.faults else before
    return before


def _counted(counts: Counts, statistics: Statistics) -> dict[str, int]:
    fields = attrs.asdict(statistics, filter=lambda attribute, _: attribute.name != "latency")
    return {**fields, "rejected": counts.rejected()}


def _make(meter: Meter, measure: Measure, prefix: str, observe: Callable[[CallbackOptions], Any]) -> None:
    make = meter.create_observable_up_down_counter if measure.is_gauge else meter.create_observable_counter
    make(prefix + measure.path, [observe], unit=measure.unit, description=measure.text)
