"""`otel.sdk`: `aiouffd serve --otel`, and a receiver of OTLP."""

from __future__ import annotations

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from scenario import play
from served import MIB, Serve, client

from aiouffd.otel.sdk import Telemetry

if TYPE_CHECKING:
    from pathlib import Path

REQUESTS: dict[str, Any] = {"/v1/traces": ExportTraceServiceRequest, "/v1/metrics": ExportMetricsServiceRequest}


class Receiver(ThreadingHTTPServer):
    """Takes what is sent by OTLP over HTTP."""

    def __init__(self) -> None:
        self.taken: list[Any] = []
        super().__init__(("127.0.0.1", 0), Taker)

    @property
    def spans(self) -> dict[str, tuple[str, Any]]:
        """The spans that came, by name; each with the name of its service."""
        return {
            span.name: (service_of(each.resource), span)
            for request in self.taken if isinstance(request, ExportTraceServiceRequest)
            for each in request.resource_spans for scope in each.scope_spans for span in scope.spans
        }  # fmt: skip

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of each metric with one point."""
        return {
            metric.name: metric.sum.data_points[0].as_int or metric.sum.data_points[0].as_double
            for request in self.taken if isinstance(request, ExportMetricsServiceRequest)
            for each in request.resource_metrics for scope in each.scope_metrics for metric in scope.metrics
            if len(metric.sum.data_points) == 1
        }  # fmt: skip


class Taker(BaseHTTPRequestHandler):
    """Takes one request."""

    server: Receiver

    def do_POST(self) -> None:
        """Decode it."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.taken.append(REQUESTS[self.path].FromString(body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def service_of(resource: Any) -> str:
    """Return the name of a service."""
    return next(str(item.value.string_value) for item in resource.attributes if item.key == "service.name")


@pytest.mark.parametrize("end", ["keep", "leave"])
def test_a_server_sends_what_it_has_done(image: Path, tmp_path: Path, end: str) -> None:
    """To where the environment says, at the latest when it ends, in whichever way."""
    hold = ["--hold", tmp_path / "hold"] if end == "leave" else []
    with Receiver() as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        with Serve(
            tmp_path, image, "--otel", "--on-term", end, *hold,
            OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{receiver.server_port}",
            OTEL_EXPORTER_OTLP_COMPRESSION="gzip",
            OTEL_SERVICE_NAME="pagers",
        ) as serve:  # fmt: skip
            play(client, str(serve.path), MIB)
            serve.says("0 left")
            assert serve.end() == 0, serve.said
        receiver.shutdown()
    assert {"aiouffd.session", "aiouffd.client"} <= set(receiver.spans)
    service, served = receiver.spans["aiouffd.client"]
    assert (service, served.parent_span_id) == ("pagers", receiver.spans["aiouffd.session"][1].span_id)
    assert receiver.metrics["aiouffd.faults"] > 0


def test_exporters_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """None at all, or one that is not installed: that is said before anything begins."""
    for signal in ("TRACES", "METRICS"):
        monkeypatch.setenv(f"OTEL_{signal}_EXPORTER", "none")
    with Telemetry():
        pass
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(OSError, match="OTEL_METRICS_EXPORTER: there is no exporter otlp_proto_grpc"):
        Telemetry()
