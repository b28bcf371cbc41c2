"""`server.metrics`: what is answered over HTTP, and what whoever connects can cost."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

import attrs
import pytest
from scenario import open_descriptors

from aiouffd.engine.statistics import Counters
from aiouffd.server import metrics
from aiouffd.server.metrics import Endpoint, Metrics

STATISTICS = attrs.evolve(Counters().snapshot(), faults=7, latency=tuple([0] * 20 + [3] + [0] * 43), clients=2)


def endpoint() -> Endpoint:
    """Return one on a free port."""
    return Endpoint(Metrics(lambda: STATISTICS, lambda: 5), "127.0.0.1", 0)


async def ask(port: int, request: bytes) -> tuple[str, bytes]:
    """Send a request; return the status line and the body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(ConnectionError):
        writer.write(request)
        await writer.drain()
    data = await reader.read()
    writer.close()
    head, _, body = data.partition(b"\r\n\r\n")
    return head.split(b"\r\n")[0].decode(), body


async def test_prometheus_is_answered() -> None:
    """Counters, gauges and a histogram, at /metrics."""
    async with endpoint() as there:
        status, body = await ask(there.port, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status == "HTTP/1.1 200 OK"
    lines = body.decode().splitlines()
    assert "aiouffd_faults_total 7.0" in lines
    assert "aiouffd_rejected_clients_total 5.0" in lines
    assert "aiouffd_clients 2.0" in lines
    assert 'aiouffd_fault_latency_seconds_bucket{le="+Inf"} 3.0' in lines
    assert "aiouffd_fault_latency_seconds_count 3.0" in lines


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", "200 OK"),
        (b"GET /metrics?name=x HTTP/1.0\r\n\r\n", "200 OK"),
        (b"GET / HTTP/1.1\r\n\r\n", "404 Not Found"),
        (b"GET /metrics/x HTTP/1.1\r\n\r\n", "404 Not Found"),
        (b"GET /debug HTTP/1.1\r\n\r\n", "404 Not Found"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405 Method Not Allowed"),
        (b"nonsense\r\n\r\n", "400 Bad Request"),
        (b"\xff\xfe\0\r\n\r\n", "400 Bad Request"),
        (b"GET /metrics HTTP/2\r\n\r\n", "400 Bad Request"),
        (b"GET /metrics HTTP/1.1\r\n" + b"x: y\r\n" * 20_000, "431 Request Header Fields Too Large"),
    ],
)
async def test_what_else_is_asked(request_: bytes, status: str) -> None:
    """Each has its status; HEAD has no body."""
    async with endpoint() as there:
        found, body = await ask(there.port, request_)
    assert found == f"HTTP/1.1 {status}"
    assert not request_.startswith(b"HEAD") or body == b""


async def test_connections_that_say_nothing_are_bounded() -> None:
    """No thread and no descriptor for each of them, beyond a few; and they keep nobody else out."""
    async with endpoint() as there:
        threads, before = threading.active_count(), open_descriptors()
        silent = [await asyncio.open_connection("127.0.0.1", there.port) for _ in range(300)]
        silent[-1][1].write(b"GET /metrics HTTP/1.1\r\nslow: ")
        status, _ = await ask(there.port, b"GET /metrics HTTP/1.1\r\n\r\n")
        assert status == "HTTP/1.1 200 OK"
        assert await silent[0][0].read() == b""  # the oldest was closed
        assert threading.active_count() == threads
        ends = 2 * metrics._MAX_CONNECTIONS + 300 - metrics._MAX_CONNECTIONS
        assert open_descriptors() - before <= ends + 2
        for _, writer in silent:
            writer.close()


async def test_a_slow_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not finish its request, and one that does not read its answer."""
    monkeypatch.setattr(metrics, "_TIMEOUT", 0.05)
    async with endpoint() as there:
        reader, writer = await asyncio.open_connection("127.0.0.1", there.port)
        writer.write(b"GET /metrics HTTP/1.1\r\n")
        async with asyncio.timeout(60):
            assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        monkeypatch.setattr(there, "_answer", lambda _: bytes(64 << 20))  # more than buffers take
        before = open_descriptors()
        with socket.create_connection(("127.0.0.1", there.port)) as unread:
            unread.send(b"GET /metrics HTTP/1.1\r\n\r\n")
            for taken in (True, False):
                async with asyncio.timeout(60):
                    while (open_descriptors() > before + 1) != taken:  # noqa: ASYNC110 - nothing tells
                        await asyncio.sleep(0)


async def test_metrics_that_cannot_be_collected() -> None:
    """A status, and the endpoint goes on."""

    def fail() -> int:
        raise ValueError("no")

    async with Endpoint(Metrics(lambda: STATISTICS, fail), "127.0.0.1", 0) as there:
        for _ in range(2):
            status, _ = await ask(there.port, b"GET /metrics HTTP/1.1\r\n\r\n")
            assert status == "HTTP/1.1 500 Internal Server Error"


async def test_the_address_is_free_for_a_successor() -> None:
    """As soon as the endpoint is closed, also while its connections last."""
    async with endpoint() as there:
        _, writer = await asyncio.open_connection("127.0.0.1", there.port)
        await ask(there.port, b"GET /metrics HTTP/1.1\r\n\r\n")
        with pytest.raises(OSError, match="in use"):
            async with Endpoint(Metrics(lambda: STATISTICS, lambda: 0), "127.0.0.1", there.port):
                pass
        there.close()
        async with Endpoint(Metrics(lambda: STATISTICS, lambda: 0), "127.0.0.1", there.port) as successor:
            status, _ = await ask(successor.port, b"GET /metrics HTTP/1.1\r\n\r\n")
            assert status == "HTTP/1.1 200 OK"
        writer.close()
