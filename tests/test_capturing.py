"""`monitor.capturing`: what a snapshot is refused for, by name, before anything is done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from kinds import HUGE

import aiouffd
from aiouffd.monitor.engines.served_by import ServedByEngine
from aiouffd.store.live import Order

if TYPE_CHECKING:
    from pathlib import Path

    from aiouffd import Batch, Fault


class Own(aiouffd.Handler):
    """A handler."""

    async def pagefault(self, fault: Fault, batch: Batch) -> None:
        """Bring nothing."""


def refusal(region: aiouffd.Region, origin: Any = None, **options: Any) -> str:
    """Return why a Monitor takes no snapshots of its region."""
    monitor = aiouffd.Monitor(region, origin, **options)
    with pytest.raises(ValueError, match="snapshot") as caught:
        monitor._check_capturable()
    return str(caught.value)


def test_what_cannot_be_captured_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each refusal says what goes not together."""
    region, shared = aiouffd.Region(16 * 4096), aiouffd.Region(16 * 4096, shared=True)
    assert "track_writes" in refusal(region, track_writes=True)
    assert "Handler" in refusal(region, Own())
    for page, of, why in ((1 << 30, region, "8388608"), (HUGE, shared, "private")):
        monkeypatch.setattr(of, "page_size", page)
        assert why in refusal(of)


def test_a_server_writes_nothing() -> None:
    """Where a client of it says."""
    engine = ServedByEngine(aiouffd.ServedBy("/run/uffd.sock"))
    with pytest.raises(ValueError, match=r"ServedBy\(\) takes no snapshots"):
        engine.snapshot(Order("/x.snap", None, [(0, 4096, 0)], 4096))
    engine.cancel_snapshot()


def test_options_that_cannot_be(tmp_path: Path) -> None:
    """A rate of nothing, and what a plain file does not have; it must be entered."""
    monitor: Any = aiouffd.Monitor(aiouffd.Region(4096))
    with pytest.raises(aiouffd.ClosedError, match="not entered"):
        monitor.snapshot_sync(tmp_path / "x")
    with pytest.raises(ValueError, match=r"rate= is bytes in a second, above 0, not 0"):
        monitor._begin_snapshot(tmp_path / "x", None, {"rate": 0})
    for base, options in (("y.snap", {}), (None, {"codec": "lz4"})):
        with pytest.raises(ValueError, match=r"is a plain file"):
            monitor._begin_snapshot(tmp_path / "x", base, options)
    with pytest.raises(ValueError, match=r"is a plain file"):
        monitor._begin_snapshot("http://host/x", None, {})
    with pytest.raises(TypeError, match="'replaces'; the nearest that it takes is 'replace'"):
        monitor._begin_snapshot("x.snap", None, {"replaces": True})
