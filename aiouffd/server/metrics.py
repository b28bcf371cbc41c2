"""What a server has counted, as Prometheus reads it over HTTP (needs the extra `serve`)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from typing import TYPE_CHECKING, Final, Self

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry

from aiouffd.engine.statistics import Counter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.metrics_core import Metric

    from aiouffd.engine.statistics import Statistics

__all__ = ["Endpoint", "Metrics"]

log: logging.Logger = logging.getLogger("aiouffd.server")

_BITS: Final = range(10, 34)  # buckets from 1 us to 8.6 s
_MAX_CONNECTIONS: Final = 32
_MAX_HEAD: Final = 16 << 10  # bytes of a request line and its headers
_MAX_SESSIONS: Final = 1000
_OF_SESSIONS: Final = (
    ("faults", "Page faults read", [Counter.FAULTS]),
    ("pages", "Pages resolved", list(range(Counter.PAGES_FAULT, Counter.PAGES_BACKGROUND + 1))),
    ("poisoned_pages", "Pages that could not be fetched", [Counter.PAGES_POISONED]),
    ("fetched_bytes", "Bytes read from sources", [Counter.BYTES_FETCHED]),
    ("source_errors", "Reads of a source that failed for good", [Counter.SOURCE_ERRORS]),
)
_TIMEOUT: Final = 10.0  # seconds for one request and its answer


class Metrics(Collector):
    """Turns statistics into metrics when they are read.

    Args:
        statistics: returns the newest.
        rejected: returns how many clients were turned away.
        sessions: returns the name of each session, how many clients it has, and the words of its counters. At most
            1,000 are told of, the oldest: each has labels of its own.
    """

    def __init__(
        self,
        statistics: Callable[[], Statistics],
        rejected: Callable[[], int],
        sessions: Callable[[], Iterable[tuple[str, int, list[int]]]] = lambda: (),
    ) -> None:
        self._statistics = statistics
        self._rejected = rejected
        self._sessions = sessions

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        now = self._statistics()
        yield _counter("faults", "Page faults read", now.faults)
        yield _counter("sequential_faults", "Page faults that readahead has followed", now.sequential)
        pages = CounterMetricFamily("aiouffd_pages", "Pages resolved, by cause", labels=["cause"])
        for cause in ("fault", "readahead", "prefetch", "replay", "background"):
            pages.add_metric([cause], getattr(now, f"pages_{cause}"))
        yield pages
        yield _counter("zero_pages", "Pages filled with zeros, of all causes", now.pages_zero)
        yield _counter("poisoned_pages", "Pages that could not be fetched", now.pages_poisoned)
        yield _counter("fetched_bytes", "Bytes read from sources", now.bytes_fetched)
        yield _counter("shared_bytes", "Bytes that others had read of the same source", now.bytes_shared)
        answers = CounterMetricFamily("aiouffd_answers", "Refusals and partial results of ioctls", labels=["answer"])
        for answer in ("eagain", "eexist", "enoent", "partial"):
            answers.add_metric([answer], getattr(now, answer))
        yield answers
        events = CounterMetricFamily("aiouffd_events", "Layout events read", labels=["event"])
        for event in ("forks", "remaps", "removes", "unmaps"):
            events.add_metric([event.removesuffix("s")], getattr(now, event))
        yield events
        yield _counter("source_reads", "Reads of a source that had to be waited for", now.source_reads)
        yield _counter("source_seconds", "Seconds that these took together", now.source_ns / 1e9)
        yield _counter("source_retries", "Repeated reads of a source", now.source_retries)
        yield _counter("source_errors", "Reads of a source that failed for good", now.source_errors)
        yield _counter("worker_restarts", "Workers that died and were replaced", now.restarts)
        yield _counter("rejected_clients", "Clients that were turned away", self._rejected())
        yield _counter("slowed", "Times that a client exceeded its events or bytes a second, and waited", now.slowed)
        yield GaugeMetricFamily("aiouffd_clients", "Clients being served", now.clients)
        yield GaugeMetricFamily("aiouffd_address_spaces", "Address spaces served, forked ones too", now.spaces)
        yield GaugeMetricFamily("aiouffd_in_flight", "Source reads under way", now.in_flight)
        yield GaugeMetricFamily("aiouffd_in_flight_bytes", "Bytes of source reads under way", now.bytes_in_flight)
        yield _latency(now.latency)
        yield from self._of_sessions()

    def _of_sessions(self) -> Iterator[Metric]:
        clients = GaugeMetricFamily("aiouffd_session_clients", "Clients being served, by session", labels=["session"])
        counters = [
            (CounterMetricFamily(f"aiouffd_session_{name}", f"{text}, by session", labels=["session"]), words)
            for name, text, words in _OF_SESSIONS
        ]
        for session, count, counted in itertools.islice(self._sessions(), _MAX_SESSIONS):
            clients.add_metric([session], count)
            for family, words in counters:
                family.add_metric([session], sum(counted[word] for word in words))
        yield clients
        yield from (family for family, _ in counters)


def _counter(name: str, text: str, value: float) -> Metric:
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


class Endpoint:
    """Answers GET and HEAD of /metrics on the running loop. An asynchronous context manager.

    Connections are bounded in number and in time: a slow or silent one is closed, the oldest one first where there are
    too many. So whoever connects costs the loop a few descriptors, and no thread.

    Args:
        metrics: what is answered.
        host: where to listen.
        port: 0: any free one.
        shared: others of this user that share it may listen there, too: the server that this one takes over from.

    Attributes:
        port: where it listens.

    Raises on entering:
        OSError: the address cannot be used.
    """

    def __init__(self, metrics: Metrics, host: str, port: int, *, shared: bool = False) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(metrics)
        self._host, self._shared = host, shared
        self.port: int = port
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], None] = {}  # oldest first

    async def __aenter__(self) -> Self:
        """Listen."""
        self._server = await asyncio.start_server(
            self._connected, self._host, self.port, limit=_MAX_HEAD, reuse_port=self._shared
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop listening, and close all connections."""
        self.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def close(self) -> None:
        """Stop listening: another process can have the address. What was asked for already is answered."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._connections[task] = None
        task.add_done_callback(lambda task: self._connections.pop(task, None))
        if len(self._connections) > _MAX_CONNECTIONS:
            oldest = next(iter(self._connections))
            del self._connections[oldest]
            oldest.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request, and close the connection."""
        try:
            async with asyncio.timeout(_TIMEOUT):
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                writer.write(self._answer(head))
                await writer.drain()
        except asyncio.LimitOverrunError:
            writer.write(_response("431 Request Header Fields Too Large"))
        except (TimeoutError, asyncio.IncompleteReadError, OSError):
            pass
        except Exception:
            log.exception("the metrics could not be collected")
            writer.write(_response("500 Internal Server Error"))
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                if writer.transport.get_write_buffer_size():  # unread for so long: it is not waited for
                    writer.transport.abort()

    def _answer(self, head: str) -> bytes:
        request, *lines = head.split("\r\n")
        method, _, rest = request.partition(" ")
        target, _, version = rest.partition(" ")
        if not version.startswith("HTTP/1."):
            return _response("400 Bad Request")
        if target.partition("?")[0] != "/metrics":
            return _response("404 Not Found", b"the metrics are at /metrics\n")
        if method not in ("GET", "HEAD"):
            return _response("405 Method Not Allowed", extra="Allow: GET, HEAD\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        encode, kind = choose_encoder(headers.get("accept", ""))
        return _response("200 OK", encode(self._registry), kind, head=method == "HEAD")


def _response(
    status: str, body: bytes = b"", kind: str = "text/plain", *, extra: str = "", head: bool = False
) -> bytes:
    fields = f"Content-Length: {len(body)}\r\nContent-Type: {kind}\r\n{extra}Connection: close\r\n"
    return f"HTTP/1.1 {status}\r\n{fields}\r\n".encode("latin-1") + (b"" if head else body)
