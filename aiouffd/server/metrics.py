"""What a server has counted, as Prometheus reads it (needs the extra `serve`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.metrics_core import Metric

    from aiouffd.engine.statistics import Statistics

__all__ = ["Metrics", "expose"]

_BITS = range(10, 34)  # buckets from 1 us to 8.6 s


class Metrics(Collector):
    """Turns statistics into metrics when it is asked.

    Args:
        statistics: returns the newest.
        rejected: returns how many clients were turned away.
    """

    def __init__(self, statistics: Callable[[], Statistics], rejected: Callable[[], int]) -> None:
        self._statistics = statistics
        self._rejected = rejected

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        now = self._statistics()
        yield _counter("faults", "Page faults read", now.faults)
        pages = CounterMetricFamily("aiouffd_pages", "Pages resolved, by cause", labels=["cause"])
        for cause in ("fault", "readahead", "prefetch", "replay", "background"):
            pages.add_metric([cause], getattr(now, f"pages_{cause}"))
        yield pages
        yield _counter("zero_pages", "Pages that were filled with zeros, of all causes", now.pages_zero)
        yield _counter("poisoned_pages", "Pages that could not be had", now.pages_poisoned)
        yield _counter("fetched_bytes", "Bytes taken from sources", now.bytes_fetched)
        answers = CounterMetricFamily("aiouffd_answers", "Refusals and partial results of ioctls", labels=["answer"])
        for answer in ("eagain", "eexist", "enoent", "partial"):
            answers.add_metric([answer], getattr(now, answer))
        yield answers
        events = CounterMetricFamily("aiouffd_events", "Layout events read", labels=["event"])
        for event in ("forks", "remaps", "removes", "unmaps"):
            events.add_metric([event.removesuffix("s")], getattr(now, event))
        yield events
        yield _counter("source_retries", "Reads of a source that were tried again", now.source_retries)
        yield _counter("source_errors", "Reads of a source that failed for good", now.source_errors)
        yield _counter("worker_restarts", "Workers that died and were replaced", now.restarts)
        yield _counter("rejected_clients", "Handoffs that were turned away", self._rejected())
        yield GaugeMetricFamily("aiouffd_clients", "Clients being served", now.clients)
        yield GaugeMetricFamily("aiouffd_address_spaces", "Address spaces served, forked ones too", now.spaces)
        yield GaugeMetricFamily("aiouffd_in_flight", "Source reads under way", now.in_flight)
        yield GaugeMetricFamily("aiouffd_in_flight_bytes", "Bytes of source reads under way", now.bytes_in_flight)
        yield _latency(now.latency)


def _counter(name: str, text: str, value: int) -> Metric:
    return CounterMetricFamily(f"aiouffd_{name}", text, value)


def _latency(counts: tuple[int, ...]) -> Metric:
    """Return the histogram; bucket n of ours ends at 2**n nanoseconds, and the sum is that of the buckets' ends."""
    buckets = [(str(2**bits / 1e9), sum(counts[: bits + 1])) for bits in _BITS]
    total = sum(count * 2**bits / 1e9 for bits, count in enumerate(counts))
    return HistogramMetricFamily(
        "aiouffd_fault_latency_seconds",
        "From reading a fault to resolving it; the sum is an upper bound",
        buckets=[*buckets, ("+Inf", sum(counts))],
        sum_value=total,
    )


def expose(metrics: Metrics, host: str, port: int) -> Any:
    """Answer on http://host:port/metrics, from a thread; return the HTTP server, which has `server_port`."""
    registry = CollectorRegistry()
    registry.register(metrics)
    server, _ = start_http_server(port, host, registry)
    return server
