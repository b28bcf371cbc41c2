"""Traces and metrics for OpenTelemetry (needs the extra `otel`).

`AiouffdInstrumentor().instrument()` in a program, or `opentelemetry-instrument` before its command; `--otel` of
`aiouffd serve`.

Layout: `instrumentor` (who turns it on) > `tracing` (what is told becomes spans) > `instruments` (what is counted
becomes metrics); `sdk` makes the providers that the command needs.

The process that uses the library makes the spans, and not the pager, which reads. The pager tells of each read when it
is done, with its times, on the connection that it has anyway. So the application's own provider gets them, with its
exporter, its sampler and its context; and what serves has neither an SDK in it, nor an exporter's threads and
connections, which would not survive the worker.
"""

from aiouffd.otel.instrumentor import AiouffdInstrumentor as AiouffdInstrumentor

__all__ = ["AiouffdInstrumentor"]
