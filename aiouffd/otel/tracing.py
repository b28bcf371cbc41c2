"""Spans: of a Monitor; of a server's sessions and clients; of the reads for each of them, and what these waited for."""

from __future__ import annotations

import atexit
import contextlib
import os
import weakref
from time import monotonic, perf_counter_ns, time_ns
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.trace import Status, StatusCode

from aiouffd.engine.landing import SLOW_NS
from aiouffd.errors import UffdError
from aiouffd.otel.instruments import Counts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from opentelemetry.trace import Span, Tracer

    from aiouffd.engine.statistics import Statistics
    from aiouffd.otel.instruments import Instruments
    from aiouffd.server.clients import Client

__all__ = ["Spans", "end_all"]

_TOTALS = ("faults", "pages_poisoned", "bytes_fetched", "source_retries", "source_errors")
_open: weakref.WeakSet[_Monitor | _Server] = weakref.WeakSet()


class Spans:
    """The `Observer` of OpenTelemetry.

    Args:
        tracer: makes the spans.
        instruments: are told what counts.
    """

    def __init__(self, tracer: Tracer, instruments: Instruments) -> None:
        self._tracer = tracer
        self._instruments = instruments

    def monitor(self, facts: Mapping[str, str | int]) -> _Monitor:
        """Begin the span of a Monitor, in the context of the thread or task that enters it."""
        return _Monitor(self._tracer, self._instruments, facts)

    def server(self, server: Any) -> _Server:
        """Watch a server."""
        return _Server(self._tracer, self._instruments, server)


class _Monitor:
    """The `MonitorWatch`."""

    def __init__(self, tracer: Tracer, instruments: Instruments, facts: Mapping[str, str | int]) -> None:
        self._tracer, self._instruments = tracer, instruments
        self._pid = os.getpid()
        attributes = {f"aiouffd.{name}": value for name, value in facts.items()}
        self._span = tracer.start_span("aiouffd.monitor", attributes=attributes)
        self._counts: Counts | None = None
        _open.add(self)

    @property
    def traces(self) -> bool:
        return bool(self._span.is_recording())

    def begin(self, statistics: Callable[[], Statistics]) -> None:
        method = weakref.WeakMethod(statistics)  # the engine is not to outlive the region

        def newest() -> Statistics | None:
            read = method()
            return None if read is None else read()

        self._counts = Counts(newest)
        self._instruments.add(self._counts)

    def flight(self, told: Mapping[str, Any]) -> None:
        if (flight := told.get("flight")) is not None and self.traces:
            _trace_flight(self._tracer, self._span, flight)

    def leaving(self) -> None:
        with contextlib.suppress(UffdError, TimeoutError):  # of a pager that was given up
            if self._counts is not None and (statistics := self._counts.statistics()) is not None:
                self._span.set_attributes({f"aiouffd.{name}": getattr(statistics, name) for name in _TOTALS})
        if self._counts is not None:
            self._instruments.remove(self._counts)
            self._counts = None

    def end(self, raised: type[BaseException] | None) -> None:
        if os.getpid() != self._pid:
            return
        self.leaving()
        _open.discard(self)
        if raised is not None:
            self._span.set_attribute("error.type", raised.__name__)
        self._span.end()


class _Server:
    """The `ServerWatch`: a span for each session, in it one for each client."""

    def __init__(self, tracer: Tracer, instruments: Instruments, server: Any) -> None:
        self._tracer, self._instruments, self._server = tracer, instruments, server
        self._pid = os.getpid()
        self._sessions: dict[str, Span] = {}
        self._clients: dict[tuple[str, int], Span] = {}
        self._counts = Counts(server.statistics, lambda: server.rejected, server.counted)
        instruments.add(self._counts)
        _open.add(self)

    def happened(self, session: str, kind: str, details: Mapping[str, Any]) -> None:
        client = session, details.get("client", 0)
        if kind == "session.created":
            self._sessions[session] = self._tracer.start_span(
                "aiouffd.session", context=trace.set_span_in_context(trace.INVALID_SPAN), attributes=_named(session)
            )
        elif kind == "client.served":
            for each in self._server.sessions[session].clients.values():  # it may have ended meanwhile
                if each.number == details["client"]:
                    self._span_of(session, each)
        elif kind == "client.gone" and client in self._clients:
            span = self._clients.pop(client)
            span.set_attribute("aiouffd.client.end", str(details["reason"]))
            span.end()
        elif kind == "client.failed" and client in self._clients:
            self._clients[client].set_status(Status(StatusCode.ERROR, details["reason"]))
        elif kind == "session.deleted" and session in self._sessions:
            self._end_session(session)
        elif session in self._sessions and client not in self._clients:
            self._sessions[session].add_event(kind, _prefixed(kind.partition(".")[0], details))

    def flight(self, session: str, client: Client, told: Mapping[str, Any]) -> None:
        span = self._span_of(session, client)
        if span.is_recording() and "flight" in told:
            _trace_flight(self._tracer, span, told["flight"])

    def _span_of(self, session: str, client: Client) -> Span:
        """Return the span of a client; it begins when the client was taken. A flight may land before that is told."""
        key = session, client.number
        if key not in self._clients:
            about = {"number": client.number, "pid": client.peer.pid, "uid": client.peer.uid, "size": client.length}
            self._clients[key] = self._tracer.start_span(
                "aiouffd.client",
                context=trace.set_span_in_context(self._sessions.get(session, trace.INVALID_SPAN)),
                attributes={**_named(session), **_prefixed("client", about)},
                start_time=time_ns() - round((monotonic() - client.since) * 1e9),
            )
        return self._clients[key]

    def end(self, _raised: type[BaseException] | None = None) -> None:
        if os.getpid() != self._pid:
            return
        _open.discard(self)
        self._instruments.remove(self._counts)
        for span in self._clients.values():
            span.end()
        for session in list(self._sessions):
            self._end_session(session)

    def _end_session(self, session: str) -> None:
        self._sessions.pop(session).end()


def _named(session: str) -> dict[str, Any]:
    return {"aiouffd.session.name": session} if session else {}


def _prefixed(what: str, details: Mapping[str, Any]) -> dict[str, Any]:
    return {f"aiouffd.{what}.{name}": value for name, value in details.items()}


def _trace_flight(tracer: Tracer, parent: Span, flight: Mapping[str, Any]) -> None:
    """Make the spans of a read that has ended: its steps, and the fault that has waited for it, if that was slow."""
    ahead = time_ns() - perf_counter_ns()
    ended = flight["ended_ns"] + ahead
    attributes: dict[str, Any] = {
        "aiouffd.offset": flight["offset"],
        "aiouffd.length": flight["length"],
        "aiouffd.reason": flight["for"],
    }
    if flight["omitted"]:
        attributes["aiouffd.omitted"] = flight["omitted"]
    fetch = tracer.start_span(
        "aiouffd.fetch",
        context=trace.set_span_in_context(parent),
        start_time=flight["began_ns"] + ahead,
        attributes=attributes,
    )
    within = trace.set_span_in_context(fetch)
    for name, step_began, step_ended, details in flight["steps"]:
        told = {f"aiouffd.{name}.{key}": value for key, value in details.items() if key != "error"}
        step = tracer.start_span(
            f"aiouffd.{name}", context=within, start_time=step_began + ahead, attributes=told or None
        )
        _fail(step, details.get("error", ""), "")
        step.end(step_ended + ahead)
    if flight["pages"] and flight["ended_ns"] - flight["waited_ns"] >= SLOW_NS:
        waits = {"aiouffd.pages": flight["pages"], "aiouffd.cause": flight["cause"]}
        fault = tracer.start_span(
            "aiouffd.fault", context=within, start_time=flight["waited_ns"] + ahead, attributes=waits
        )
        fault.end(ended)
    _fail(fetch, flight["error"], flight["reason"])
    fetch.end(ended)


def _fail(span: Span, kind: str, reason: str) -> None:
    if kind:
        span.set_attribute("error.type", kind)
        span.set_status(Status(StatusCode.ERROR, reason or None))


@atexit.register
def end_all() -> None:
    """End the spans of this process that are open: it is about to end."""
    for watch in list(_open):
        watch.end(None)
