"""Bounds of a backend: how much at once, how long, how often again."""

from __future__ import annotations

from aiouffd.values import Value, above_zero_or_none, at_least

__all__ = ["Limits"]


class Limits(Value):
    """Bounds of a backend.

    Attributes:
        concurrent_reads: source reads (or handlers) under way at once.
        bytes_in_flight: bytes of source reads under way at once.
        timeout: seconds for one read of the source, None for no limit.
        retries: further tries after a read that failed, with exponential backoff and jitter; None: 4, and for URLs as
            many as the timeout allows.
        backoff: seconds before the first of them; the longest pause is 2 s.
        client_events: messages (faults, layout events) per second that are read for one client of a server, its forked
            children included; None: no limit.
        client_bytes: bytes per second that are placed for it, whatever for; None: no limit.
    """

    concurrent_reads: int = 128
    bytes_in_flight: int = 128 << 20
    timeout: float | None = 30.0
    retries: int | None = None
    backoff: float = 0.05
    client_events: float | None = None
    client_bytes: float | None = None

    def _check(self) -> None:
        at_least(1, concurrent_reads=self.concurrent_reads, bytes_in_flight=self.bytes_in_flight)
        at_least(0, retries=0 if self.retries is None else self.retries)
        above_zero_or_none(timeout=self.timeout, client_events=self.client_events, client_bytes=self.client_bytes)
