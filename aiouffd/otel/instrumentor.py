"""Turns traces and metrics on, as the instrumentors of OpenTelemetry do."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import metrics, trace

from aiouffd import __version__
from aiouffd.otel.instruments import Instruments
from aiouffd.otel.tracing import Spans
from aiouffd.report.observers import install, installed

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

__all__ = ["AiouffdInstrumentor"]

log: logging.Logger = logging.getLogger("aiouffd")

_NAME: Final = "aiouffd"


class AiouffdInstrumentor:
    """Has OpenTelemetry told of the Monitors and servers that are entered from now on.

    It has the methods of OpenTelemetry's `BaseInstrumentor`, so `opentelemetry-instrument` finds and uses it, too.
    """

    @property
    def is_instrumented_by_opentelemetry(self) -> bool:
        """Whether it is on: once for all objects of this class."""
        return installed() is not None

    def instrument(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        **_further: Any,
    ) -> None:
        """Turn it on. A second time, does nothing.

        Args:
            tracer_provider: gets the spans; None: the global one.
            meter_provider: gets the metrics; None: the global one.
        """
        if self.is_instrumented_by_opentelemetry:
            log.warning("aiouffd is instrumented already")
            return
        tracer = (tracer_provider or trace.get_tracer_provider()).get_tracer(_NAME, __version__)
        meter = (meter_provider or metrics.get_meter_provider()).get_meter(_NAME, __version__)
        install(Spans(tracer, Instruments(meter)))

    def uninstrument(self, **_further: Any) -> None:
        """Turn it off for what is entered later; what is watched is watched until it ends."""
        install(None)
