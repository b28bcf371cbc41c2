"""`otel.tracing`: the spans of a Monitor and of a server, with the SDK's exporter in memory."""

from __future__ import annotations

import asyncio
import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pattern import PAGE, content, peek, word
from scenario import play, until
from served import hand_over
from test_instruments import read

import aiouffd
from aiouffd.otel import AiouffdInstrumentor
from aiouffd.otel.instruments import Instruments
from aiouffd.otel.tracing import Spans, end_all
from aiouffd.server.listener import SocketFile
from aiouffd.server.server import Server
from aiouffd.server.services import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

SIZE = 256 * PAGE
SLOW, LOST = 9, 20
"""Pages of the source: one takes long, one cannot be had."""


class Odd:
    """A source with a page that is slow at its second try, and one that is lost, perhaps."""

    size = SIZE

    def __init__(self, lost: int = -1) -> None:
        self.failed, self.lost = False, lost

    async def read(self, offset: int, length: int) -> bytes:
        """Read pages."""
        pages = range(offset // PAGE, (offset + length) // PAGE)
        if self.lost in pages:
            raise aiouffd.SourceError("the source", offset, length, "is odd")
        if SLOW in pages and not self.failed:
            self.failed = True
            raise OSError("not yet")
        await asyncio.sleep(0.2 if SLOW in pages else 0.0)
        return content(offset, length)


def instrumented() -> tuple[TracerProvider, InMemorySpanExporter, InMemoryMetricReader]:
    """Have both exporters in memory told."""
    tracers, spans, reader = TracerProvider(), InMemorySpanExporter(), InMemoryMetricReader()
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    AiouffdInstrumentor().instrument(tracer_provider=tracers, meter_provider=MeterProvider([reader]))
    return tracers, spans, reader


def within(spans: list[ReadableSpan], parent: ReadableSpan) -> list[ReadableSpan]:
    """Return the children of a span, in order of their begin; each lies within it."""
    context = parent.context
    assert context is not None
    found = [span for span in spans if span.parent is not None and span.parent.span_id == context.span_id]
    for span in found:
        assert span.context is not None
        assert span.context.trace_id == context.trace_id
        assert (parent.start_time or 0) <= (span.start_time or 0) <= (span.end_time or 0) <= (parent.end_time or 0)
    return sorted(found, key=lambda span: span.start_time or 0)


def check_slow(spans: list[ReadableSpan], fetch: ReadableSpan) -> None:
    """The read of the slow page says what it waited for."""
    named = [(span.name, span.status.is_ok, dict(span.attributes or {})) for span in within(spans, fetch)]
    steps = [(name, fine, attributes.get("error.type")) for name, fine, attributes in named]
    assert [step for step in steps if step[0] != "aiouffd.fault"] == [
        ("aiouffd.read", False, "OSError"), ("aiouffd.retry", True, None), ("aiouffd.read", True, None)
    ]  # fmt: skip
    assert [attributes for name, _, attributes in named if name == "aiouffd.fault"] == [
        {"aiouffd.pages": 1, "aiouffd.cause": "source"}
    ]


def of_a_monitor(engine: str) -> None:
    """Scenario: see the test."""
    began = time.time_ns()
    tracers, exported, reader = instrumented()
    region = aiouffd.Region(SIZE)
    monitor = aiouffd.Monitor(region, Odd(LOST), engine=getattr(aiouffd, engine)(), readahead=0, on_exit="zeros")
    with tracers.get_tracer("program").start_as_current_span("request"), monitor:
        assert region[SLOW * PAGE : SLOW * PAGE + 8] == word(SLOW)
        with pytest.raises(aiouffd.SourceError):
            monitor.prefetch_sync(LOST * PAGE, PAGE)
        assert read(reader)["aiouffd.faults"] == {(): 1}
    spans = list(exported.get_finished_spans())
    (request,) = [span for span in spans if span.name == "request"]
    (served,) = within(spans, request)
    attributes: Any = served.attributes
    assert (served.name, attributes["aiouffd.region.size"], attributes["aiouffd.page_size"]) == (
        "aiouffd.monitor", SIZE, PAGE
    )  # fmt: skip
    assert (attributes["aiouffd.faults"], attributes["aiouffd.source_retries"]) == (1, 1)
    assert began < (served.start_time or 0)
    slow, lost = within(spans, served)
    told: Any = slow.attributes
    assert (told["aiouffd.offset"], told["aiouffd.length"], told["aiouffd.reason"]) == (SLOW * PAGE, PAGE, "fault")
    assert slow.status.is_ok
    check_slow(spans, slow)
    failed: Any = lost.attributes
    assert (failed["aiouffd.reason"], failed["error.type"], lost.status.is_ok) == ("prefetch", "SourceError", False)
    assert "is odd" in (lost.status.description or "")
    assert read(reader)["aiouffd.faults"] == {(): 1}  # what has ended stays


@pytest.mark.parametrize("engine", ["Pager", "InThread"])
def test_a_monitor(engine: str) -> None:
    """In the program's own trace: each read, and what it waited for; whichever process has read."""
    play(of_a_monitor, engine)


async def of_a_server(path: str) -> None:
    """Scenario: see the test."""
    _, exported, reader = instrumented()
    async with Server() as server:
        session = await server.create("vm1", lambda *_: Odd(), Settings(), functools.partial(SocketFile, Path(path)))
        region, _connection, _uffd = await asyncio.to_thread(hand_over, path)
        assert await asyncio.to_thread(peek, region.address + SLOW * PAGE) == word(SLOW)
        await until(lambda: any(span.name == "aiouffd.fetch" for span in exported.get_finished_spans()))
        found = await asyncio.to_thread(read, reader)
        assert found["aiouffd.session.faults"] == {("vm1",): 1}
        assert (found["aiouffd.client.count"], found["aiouffd.faults"]) == ({(): 1}, {(): 1})
        assert await session.fill() == {}
        await server.remove(session)
    spans = list(exported.get_finished_spans())
    (root,) = [span for span in spans if span.parent is None]
    assert (root.name, dict(root.attributes or {})) == ("aiouffd.session", {"aiouffd.session.name": "vm1"})
    (client,) = within(spans, root)
    attributes: Any = client.attributes
    assert (client.name, attributes["aiouffd.client.number"], attributes["aiouffd.client.end"]) == (
        "aiouffd.client", 1, "has all its pages"
    )  # fmt: skip
    check_slow(spans, within(spans, client)[0])
    assert (await asyncio.to_thread(read, reader))["aiouffd.faults"] == {(): 1}


def test_what_happens_to_clients() -> None:
    """One that fails, one that has ended before it is told, and one that is turned away; what is left ends with it."""
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    client: Any = attrs.make_class("Client", ["number", "peer", "length", "since"])(
        1, attrs.make_class("Peer", ["pid", "uid"])(7, 0), SIZE, time.monotonic()
    )
    session = attrs.make_class("Session", ["clients"])({"token": client})
    counts: dict[str, Any] = {"statistics": lambda: None, "rejected": 0, "counted": list}
    server = attrs.make_class("Server", ["sessions", *counts])({"vm1": session}, *counts.values())
    watch = Spans(provider.get_tracer("x"), Instruments(MeterProvider().get_meter("x"))).server(server)
    watch.happened("vm1", "session.created", {})
    watch.happened("vm1", "client.served", {"client": 1})
    watch.happened("vm1", "client.gone", {"client": 2, "reason": "has ended"})
    watch.happened("vm1", "client.served", {"client": 2})
    watch.happened("vm1", "client.failed", {"client": 1, "reason": "a page cannot be had"})
    watch.happened("vm1", "client.rejected", {"pid": 8, "uid": 0, "reason": "nonsense"})
    now = time.perf_counter_ns()
    times = {"began_ns": now, "waited_ns": now, "ended_ns": now + 50_000_000}
    flight = {"offset": 0, "length": PAGE, "pages": 1, "cause": "source", "for": "fault", "omitted": 2, "steps": []}
    watch.flight("vm1", client, {"flight": {**flight, **times, "error": "", "reason": ""}})
    end_all()
    end_all()
    fetch, failed, root = spans.get_finished_spans()  # and no fault: none was slow
    assert (fetch.name, dict(fetch.attributes or {})["aiouffd.omitted"]) == ("aiouffd.fetch", 2)
    assert (failed.name, failed.status.description, failed.status.is_ok) == (
        "aiouffd.client", "a page cannot be had", False
    )  # fmt: skip
    (event,) = [event for event in root.events if event.name == "client.rejected"]
    assert dict(event.attributes or {})["aiouffd.client.reason"] == "nonsense"


def test_a_server(tmp_path: Path) -> None:
    """A trace for each session: its clients, and the reads for each of them."""
    play(of_a_server, str(tmp_path / "socket"))
