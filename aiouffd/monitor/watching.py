"""Shows how far a background fill or a replay is, as long as it takes."""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import TYPE_CHECKING, Final

from aiouffd.errors import ClosedError
from aiouffd.kernel.residency import residency
from aiouffd.monitor.progress import Meter, shown
from aiouffd.ranges import RangeSet

if TYPE_CHECKING:
    from aiouffd.engine.ahead.trace import Trace
    from aiouffd.monitor.held import Held
    from aiouffd.monitor.progress import Show

__all__ = ["Watching"]

_INTERVAL: Final = 0.5  # seconds between two looks
_PATIENCE: Final = 1.0  # seconds for the last of them


class Watching:
    """A thread that looks how much has come, until all has, or `close`. It does not keep the region.

    Args:
        held: the region.
        show: as for `shown`.
        trace: what is brought; None: all.
        source: what it is of, for people.
    """

    def __init__(self, held: Held, show: Show, trace: Trace | None, source: str) -> None:
        self._held = weakref.ref(held)
        self._show = show
        size = len(held.region)
        self._expected = RangeSet()
        # Sorted: to add what is behind all others costs least.
        for offset, length in [(0, size)] if trace is None else [(at, trace.page_size) for at in sorted(trace.offsets)]:
            self._expected.add(offset, min(offset + length, size))
        self._total = size - sum(gap.length for gap in self._expected.gaps(0, size))
        self._what = source if trace is None else f"what was recorded of {source}"
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="aiouffd-progress", daemon=True)
        with contextlib.suppress(RuntimeError):  # no more threads: nobody looks
            self._thread.start()

    def _run(self) -> None:
        meter = Meter(self._total)
        with shown(self._show, self._what) as show:
            last = False
            while not last:
                last = self._closed.wait(_INTERVAL)
                if (come := self._come()) is None:
                    return
                show(meter.look(come))
                last = last or come == self._total

    def _come(self) -> int | None:
        """Return how many bytes have come of those that are expected; None: the region is gone."""
        if (held := self._held()) is None:
            return None
        try:
            ranges = residency(held.region)
        except (ClosedError, ValueError):  # ValueError: of a closed mmap
            return None
        unexpected = (gap for item in ranges for gap in self._expected.gaps(item.start, item.end))
        return sum(item.length for item in ranges) - sum(gap.length for gap in unexpected)

    def close(self) -> None:
        """Look for the last time."""
        self._closed.set()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(_PATIENCE)
