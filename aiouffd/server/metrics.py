"""What a server has counted, as Prometheus reads it over HTTP (needs the extra `serve`)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from typing import TYPE_CHECKING, Final, Self

import attrs
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry

from aiouffd.engine.statistics import told
from aiouffd.report.measures import LATENCY, MEASURES, MOST_SESSIONS, SESSION_CLIENTS, buckets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.metrics_core import Metric

    from aiouffd.engine.statistics import Statistics
    from aiouffd.report.measures import Measure

__all__ = ["Endpoint", "Metrics"]

log: logging.Logger = logging.getLogger("aiouffd.server")

_MAX_CONNECTIONS: Final = 32
_MAX_HEAD: Final = 16 << 10  # bytes of a request line and its headers
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
        counted = {**attrs.asdict(now), "rejected": self._rejected()}
        for measure in MEASURES:
            family = _family(measure, f"aiouffd_{measure.name}", f", by {measure.label}", measure.label)
            for label, value in measure.values(counted):
                family.add_metric([label] if measure.label else [], value)
            yield family
        yield _latency(now.latency)
        yield from self._of_sessions()

    def _of_sessions(self) -> Iterator[Metric]:
        measures = [SESSION_CLIENTS, *(measure for measure in MEASURES if measure.of_sessions)]
        families = [_family(each, f"aiouffd_session_{each.name}", ", by session", "session") for each in measures]
        for session, clients, words in itertools.islice(self._sessions(), MOST_SESSIONS):
            counted = {**told(words), "clients": clients}
            for family, measure in zip(families, measures, strict=True):
                family.add_metric([session], measure.total(counted))
        yield from families


def _family(measure: Measure, name: str, by: str, label: str) -> CounterMetricFamily | GaugeMetricFamily:
    make = GaugeMetricFamily if measure.is_gauge else CounterMetricFamily
    return make(name, measure.text + (by if label else ""), labels=[label] if label else [])


def _latency(counts: tuple[int, ...]) -> Metric:
    """Return the histogram; bucket n of ours ends at 2**n nanoseconds, and the sum is that of the buckets' ends."""
    return HistogramMetricFamily(
        f"aiouffd_{LATENCY.name}",
        LATENCY.text,
        buckets=list(buckets(counts)),
        sum_value=sum(count * 2**bits / 1e9 for bits, count in enumerate(counts)),
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
