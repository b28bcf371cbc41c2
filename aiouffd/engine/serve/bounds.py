"""Bounds of a backend: how much at once, how long, how often again."""

from __future__ import annotations

import attrs

__all__ = ["Limits"]

_above_zero = attrs.validators.optional(attrs.validators.gt(0))


@attrs.frozen(repr=False)
class Limits:
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
        recent: bytes that were read last of far sources, of all of them together, which are kept for others that read
            the same; where services of one pager differ, the most of them.
    """

    concurrent_reads: int = attrs.field(default=128, validator=attrs.validators.ge(1))
    bytes_in_flight: int = attrs.field(default=128 << 20, validator=attrs.validators.ge(1))
    timeout: float | None = attrs.field(default=30.0)
    retries: int | None = attrs.field(default=None, validator=attrs.validators.optional(attrs.validators.ge(0)))
    backoff: float = 0.05
    client_events: float | None = attrs.field(default=None, validator=_above_zero)
    client_bytes: float | None = attrs.field(default=None, validator=_above_zero)
    recent: int = attrs.field(default=0, validator=attrs.validators.ge(0))

    @timeout.validator
    def _time_passes(self, _: object, value: float | None) -> None:
        if value is not None and not value > 0:
            raise ValueError(f"'timeout' must be > 0, or None: {value}")
