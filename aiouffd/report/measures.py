"""What is measured: the list of metrics that Prometheus and OpenTelemetry are given alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from aiouffd.engine.statistics import LATENCY_BUCKETS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["LATENCY", "MEASURES", "MOST_SESSIONS", "SESSION_CLIENTS", "Measure", "buckets"]

MOST_SESSIONS: Final = 1000
"""Sessions that have labels of their own: the oldest."""
_BITS: Final = range(10, 34)  # buckets from 1 us to 8.6 s


@attrs.frozen
class Measure:
    """One metric.

    Attributes:
        name: for Prometheus, behind `aiouffd_`.
        path: for OpenTelemetry, behind `aiouffd.`.
        unit: as UCUM writes it.
        text: what it counts.
        counts: the names in `Statistics`, by the value of the label; without a label, one.
        label: of the metric; empty: it has none.
        is_gauge: it goes down as well.
        scale: of what is counted, to the unit.
        of_sessions: each session of a server has it, too, as the sum over all labels.
    """

    name: str
    path: str
    unit: str
    text: str
    counts: Mapping[str, str]
    label: str = ""
    is_gauge: bool = False
    scale: float = 1
    of_sessions: bool = False

    def values(self, counted: Mapping[str, int]) -> Iterator[tuple[str, float]]:
        """Yield (value of the label, value); `counted` has what is not zero."""
        return ((label, counted.get(name, 0) * self.scale) for label, name in self.counts.items())

    def total(self, counted: Mapping[str, int]) -> float:
        """Return the sum over all labels."""
        return sum(value for _, value in self.values(counted))


def _one(name: str, path: str, unit: str, text: str, count: str, **more: bool | float) -> Measure:
    return Measure(name, path, unit, text, {"": count}, **more)  # type: ignore[arg-type]


_CAUSES: Final = {cause: f"pages_{cause}" for cause in ("fault", "readahead", "prefetch", "replay", "background")}
_ANSWERS: Final = {answer: answer for answer in ("eagain", "eexist", "enoent", "partial")}
_EVENTS: Final = {event: f"{event}s" for event in ("fork", "remap", "remove", "unmap")}
SESSION_CLIENTS: Final = _one("clients", "client.count", "{client}", "Clients being served", "clients", is_gauge=True)

MEASURES: Final = (
    _one("faults", "faults", "{fault}", "Page faults read", "faults", of_sessions=True),
    _one("sequential_faults", "faults.sequential", "{fault}", "Page faults that readahead has followed", "sequential"),
    Measure("pages", "pages", "{page}", "Pages resolved", _CAUSES, "cause", of_sessions=True),
    _one("zero_pages", "pages.zero", "{page}", "Pages filled with zeros, of all causes", "pages_zero"),
    _one(
        *("poisoned_pages", "pages.poisoned", "{page}", "Pages that could not be fetched", "pages_poisoned"),
        of_sessions=True,
    ),
    _one("evicted_pages", "pages.evicted", "{page}", "Pages dropped again (max_resident, evict)", "pages_evicted"),
    _one("fetched_bytes", "fetched", "By", "Bytes read from sources", "bytes_fetched", of_sessions=True),
    _one("shared_bytes", "shared", "By", "Bytes that others had read of the same source", "bytes_shared"),
    Measure("answers", "answers", "{answer}", "Refusals and partial results of ioctls", _ANSWERS, "answer"),
    Measure("events", "events", "{event}", "Layout events read", _EVENTS, "event"),
    _one("source_reads", "source.reads", "{read}", "Reads of a source that had to be waited for", "source_reads"),
    _one("source_seconds", "source.time", "s", "Seconds that these took together", "source_ns", scale=1e-9),
    _one("source_retries", "source.retries", "{retry}", "Repeated reads of a source", "source_retries"),
    _one(
        *("source_errors", "source.errors", "{error}", "Reads of a source that failed for good", "source_errors"),
        of_sessions=True,
    ),
    _one("worker_restarts", "worker.restarts", "{restart}", "Workers that died and were replaced", "restarts"),
    _one("rejected_clients", "client.rejected", "{client}", "Clients that were turned away", "rejected"),
    _one(
        *("slowed", "client.slowed", "{occurrence}"),
        "Times that a client exceeded its events or bytes a second, and waited",
        "slowed",
    ),
    SESSION_CLIENTS,
    _one(
        *("address_spaces", "address_space.count", "{address_space}", "Address spaces served, forked ones too"),
        "spaces",
        is_gauge=True,
    ),
    _one(
        *("resident_bytes", "resident", "By", "Bytes that are there, of clients with max_resident", "resident"),
        is_gauge=True,
        of_sessions=True,
    ),
    _one("in_flight", "source.active_reads", "{read}", "Source reads under way", "in_flight", is_gauge=True),
    _one(
        *("in_flight_bytes", "source.active_bytes", "By", "Bytes of source reads under way", "bytes_in_flight"),
        is_gauge=True,
    ),
)

LATENCY: Final = _one(
    *("fault_latency_seconds", "fault.latency", "s"),
    "From reading a fault to resolving it; the sum is an upper bound",
    "latency",
)


def buckets(histogram: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Yield (upper bound in seconds, how many faults took no longer) of `Statistics.latency`."""
    for bits in _BITS:
        yield str(2**bits / 1e9), sum(histogram[: bits + 1])
    yield "+Inf", sum(histogram)


assert _BITS.stop <= LATENCY_BUCKETS
