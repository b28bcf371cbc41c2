"""The providers of a process that has none of its own: as the environment variables OTEL_* say."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Self

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from aiouffd.otel.instrumentor import AiouffdInstrumentor
from aiouffd.otel.tracing import end_all

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Telemetry"]

_LAST: int = 5000  # milliseconds for what is left to be sent


class Telemetry:
    """Traces and metrics of this process, from making this until it is closed. A context manager.

    Exporters, their addresses, the sampler and all else are those of the environment: OTEL_EXPORTER_OTLP_ENDPOINT,
    OTEL_TRACES_EXPORTER, OTEL_METRICS_EXPORTER, OTEL_TRACES_SAMPLER, OTEL_SERVICE_NAME and others. By default both are
    sent by OTLP as protobuf over HTTP to this machine, and the service is named `aiouffd`.

    Raises:
        OSError: an exporter that the environment names is not installed.
    """

    def __init__(self) -> None:
        named = os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        resource = Resource.create(None if named else {"service.name": "aiouffd"})
        self._tracers = TracerProvider(resource=resource)
        exporter = _exporter("traces")
        if exporter is not None:
            self._tracers.add_span_processor(BatchSpanProcessor(exporter))
        exporter = _exporter("metrics")
        readers = [] if exporter is None else [PeriodicExportingMetricReader(exporter)]
        self._meters = MeterProvider(readers, resource)
        AiouffdInstrumentor().instrument(tracer_provider=self._tracers, meter_provider=self._meters)

    def leave(self) -> None:
        """End all spans, and send what is left: this process ends without being finalized. Blocks, for 10 s at most."""
        end_all()
        self._tracers.force_flush(_LAST)
        self._meters.force_flush(_LAST)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Send what is left, and tell nothing from now on."""
        AiouffdInstrumentor().uninstrument()
        self._tracers.shutdown()
        self._meters.shutdown(_LAST)


def _exporter(signal: str) -> Any:
    """Return the exporter that the environment names; None: none."""
    variable = f"OTEL_{signal.upper()}_EXPORTER"
    name = os.environ.get(variable) or "otlp"
    if name == "none":
        return None
    if name == "otlp":
        protocols = (f"OTEL_EXPORTER_OTLP_{signal.upper()}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
        protocol = next(filter(None, map(os.environ.get, protocols)), "http/protobuf")
        name = "otlp_proto_grpc" if protocol == "grpc" else "otlp_proto_http"
    for entry in entry_points(group=f"opentelemetry_{signal}_exporter", name=name):
        return entry.load()()
    raise OSError(f"{variable}: there is no exporter {name}: install its package (opentelemetry-exporter-...)")
