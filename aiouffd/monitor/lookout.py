"""Tells, while a shared region is served, that another mapping of its memory has been touched."""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import TYPE_CHECKING, Final

from aiouffd.errors import UffdError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.engine.statistics import Statistics
    from aiouffd.monitor.registration import Registration

__all__ = ["Lookout"]

_INTERVAL: Final = 1.0  # seconds


class Lookout:
    """A thread that looks once a second whether more pages were in the file before they were touched in the region.

    Args:
        registration: of the region; it is told to look for the mapping that has brought them.
        statistics: reads the counters of the region.
        meanwhile: look once a second; else only in the end.
    """

    def __init__(
        self, registration: Registration, statistics: Callable[[], Statistics], *, meanwhile: bool = True
    ) -> None:
        self._registration = weakref.ref(registration)
        self._statistics = weakref.WeakMethod(statistics)
        self._seen = 0
        self._lock = threading.Lock()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="aiouffd-lookout", daemon=True)
        with contextlib.suppress(RuntimeError):  # no more threads: `close` looks once
            if meanwhile:
                self._thread.start()

    def _run(self) -> None:
        while not self._left.wait(_INTERVAL) and self._look():
            pass

    def _look(self) -> bool:
        """Look once; tell whether the region is served still."""
        registration, statistics = self._registration(), self._statistics()
        if registration is None or statistics is None:
            return False
        with contextlib.suppress(UffdError, TimeoutError), self._lock:
            counted = statistics()
            found = max(counted.minor_faults, counted.continues)
            if found > self._seen:
                self._seen = found
                registration.warn_of_unserved(found)
        return True

    def close(self) -> None:
        """Look for the last time."""
        self._left.set()
        self._look()
        if self._thread.ident is not None:
            self._thread.join()
