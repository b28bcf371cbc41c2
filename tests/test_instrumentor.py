"""`otel.instrumentor`: turned on and off, as OpenTelemetry's own commands do it."""

from __future__ import annotations

import logging
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from aiouffd.otel import AiouffdInstrumentor
from aiouffd.report.observers import installed

if TYPE_CHECKING:
    import pytest


def test_it_is_found_and_turned_on_once(caplog: pytest.LogCaptureFixture) -> None:
    """By the entry point that `opentelemetry-instrument` looks for; with the providers that were given."""
    (entry,) = entry_points(group="opentelemetry_instrumentor", name="aiouffd")
    assert entry.load() is AiouffdInstrumentor
    reader = InMemoryMetricReader()
    instrumentor = AiouffdInstrumentor()
    try:
        instrumentor.instrument(
            tracer_provider=trace.NoOpTracerProvider(), meter_provider=MeterProvider([reader]), skip_dep_check=True
        )
        observer = installed()
        assert observer is not None
        assert instrumentor.is_instrumented_by_opentelemetry
        with caplog.at_level(logging.WARNING):
            AiouffdInstrumentor().instrument()
        assert "instrumented already" in caplog.text
        assert installed() is observer
        assert not observer.monitor({}).traces  # nobody records: nothing is told of each flight
        assert reader.get_metrics_data() is not None
    finally:
        AiouffdInstrumentor().uninstrument()
    assert not instrumentor.is_instrumented_by_opentelemetry
