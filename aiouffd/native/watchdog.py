"""The watch of `watchdog.c`, typed: ends a process that nobody serves any more, and whose Python does not run."""

from __future__ import annotations

import logging
import math
import os
import threading
from functools import cache
from typing import TYPE_CHECKING

from aiouffd.native import library, reason

if TYPE_CHECKING:
    import ctypes

__all__ = ["Watch"]

log = logging.getLogger("aiouffd")

_LONGEST = (1 << 31) - 1  # milliseconds


@cache
def _library() -> ctypes.CDLL:
    return library()


class Watch:
    """Watches over a region, from the first `over` until `close`. Does nothing where there is no part in C.

    Where all that serve have ended, and Python has neither called `over` nor `alive` for `limit` seconds since, while
    a thread waits for a page: that is said on standard error, and the process ends with SIGABRT.

    Args:
        uffd: the region's descriptor; stays the caller's, and open until the first `over`, which duplicates it.
        limit: seconds; None: for ever.
    """

    def __init__(self, uffd: int, limit: float | None) -> None:
        self._uffd = uffd
        self._limit = limit
        self._number = -1
        self._closed = False
        self._lock = threading.Lock()

    @property
    def beat(self) -> float:
        """Seconds within which `alive` is to be called again, while nobody serves."""
        return math.inf if self._limit is None else self._limit / 4

    def over(self, first: int = -1, second: int = -1) -> None:
        """Watch over those that serve now: descriptors that are readable when they have ended; they are duplicated.

        None: who serves is not known, and nothing is watched for now. After `close`: nothing is.
        """
        with self._lock:
            if self._limit is None or self._closed or reason():
                return
            if self._number >= 0:
                failed = min(0, _library().aiouffd_watch_ends(self._number, first, second))
            elif first >= 0:
                limit = int(min(self._limit * 1000, _LONGEST))
                failed = self._number = _library().aiouffd_watch(self._uffd, first, second, limit)
            else:
                return
        if failed < 0:
            log.warning("nobody watches over the pager: %s", os.strerror(-failed))

    def alive(self) -> None:
        """Python runs, and is about to have others serve."""
        with self._lock:
            if self._number >= 0:
                _library().aiouffd_watch_alive(self._number)

    def close(self) -> None:
        """Watch no longer."""
        with self._lock:
            self._closed = True
            if self._number >= 0:
                _library().aiouffd_unwatch(self._number)
                self._number = -1
