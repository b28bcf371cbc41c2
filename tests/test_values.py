"""`server.control.values`: what a new session says is what its clients get."""

from __future__ import annotations

import math

import attrs
import msgspec
import pytest

from aiouffd.server.control.values import NewSession, Owner


def test_settings() -> None:
    """Each field arrives, and the defaults are those of a server."""
    plain = NewSession(name="a", socket="/s", source="/x")
    assert plain.sources == ["/x"]
    assert plain.settings().options.readahead == 2 << 20
    full = msgspec.convert(
        {
            "name": "a", "socket": "/s", "source": ["/x", "/y"], "owner": {"uid": 7}, "allow_uids": [8],
            "on_reject": "kill", "on_failure": "hold", "readahead": 5, "spin_us": 6, "background": "max",
            "replay": "/r", "timeout": 9,
            "retries": 10, "concurrent_reads": 11, "bytes_in_flight": 1 << 21, "events_per_second": 12,
            "bytes_per_second": 13, "handoff_timeout": 14, "max_resident": 1 << 22,
        },
        NewSession,
    )  # fmt: skip
    assert full.sources == ["/x", "/y"]
    settings = full.settings()
    options, limits = settings.options, settings.options.limits
    assert settings.uids == {7, 8}
    assert (settings.on_reject, settings.replay, settings.handoff_timeout) == ("kill", "/r", 14.0)
    assert (options.readahead, options.spin_us, options.background) == (5, 6, math.inf)
    assert (limits.timeout, limits.retries, limits.concurrent_reads, limits.bytes_in_flight) == (9, 10, 11, 1 << 21)
    assert (settings.on_failure, options.on_error) == ("hold", "hold")
    assert (limits.client_events, limits.client_bytes) == (12, 13)
    assert (options.max_resident, options.bounded, plain.settings().options.bounded) == (1 << 22, True, False)
    with pytest.raises(ValueError, match="either record or max_resident"):
        NewSession(name="a", socket="/s", source="/x", record="/r", max_resident=1 << 22).settings()
    clones = NewSession(name="a", socket="/s", source="/x", one_copy="huge")
    assert (options.one_copy, clones.settings().options.one_copy) == (0, 2 << 20)
    with pytest.raises(ValueError, match="either one_copy or max_resident"):
        attrs.evolve(clones, max_resident=1 << 22).settings()


def test_a_recording_sees_what_is_touched() -> None:
    """With readahead as without a recording; and it does not go with a replay."""
    recorded = NewSession(name="a", socket="/s", source="/x", record="/r", owner=Owner(3)).settings()
    assert (recorded.record, recorded.options.readahead) == ("/r", 2 << 20)
    with pytest.raises(ValueError, match="either record or replay"):
        NewSession(name="a", socket="/s", source="/x", record="/r", replay="/r").settings()
