"""The watchdog thread, typed (`watchdog.c`): it ends a process that waits for a page which nobody will ever bring.

`Watch`: all processes that served a region were killed (`watch_servers.c`). `LoopWatch`: the event loop that serves a
region runs in this process, and waits for itself (`watch_loop.c`).
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import threading
from functools import cache

from aiouffd.native import library, reason

__all__ = ["LoopWatch", "Watch"]

log: logging.Logger = logging.getLogger("aiouffd")

_LONGEST = (1 << 31) - 1  # milliseconds


@cache
def _library() -> ctypes.CDLL:
    """Return the library, its functions declared."""
    watchdog = library()
    word = ctypes.c_uint64
    watchdog.aiouffd_watch_loop.argtypes = [
        *(ctypes.c_int, word, ctypes.c_int, word, word, ctypes.c_uint32, ctypes.c_uint32)
    ]
    return watchdog


def _milliseconds(seconds: float | None) -> int:
    """Return what the C functions take; 0: never."""
    return 0 if seconds is None else max(int(min(seconds * 1000, _LONGEST)), 1)


class _Watch:
    """One watch of the watchdog thread."""

    def __init__(self) -> None:
        self._number = -1
        self._closed = False
        self._lock = threading.Lock()

    def close(self) -> None:
        """Watch no longer."""
        with self._lock:
            self._closed = True
            if self._number >= 0:
                _library().aiouffd_unwatch(self._number)
                self._number = -1


class Watch(_Watch):
    """Watches over a region that other processes serve, from the first `over` until `close`.

    If all processes that serve have ended, and Python has called neither `over` nor `alive` for `limit` seconds since,
    while a thread waits for a page, then a line on standard error says so, and the process ends with SIGABRT. Without
    the native part nothing is watched.

    Args:
        uffd: the region's descriptor. It stays the caller's, and open until the first `over`, which duplicates it.
        limit: seconds; None: for ever.
    """

    def __init__(self, uffd: int, limit: float | None) -> None:
        super().__init__()
        self._uffd = uffd
        self._limit = limit

    @property
    def beat(self) -> float:
        """The interval in seconds at which `alive` must be called while nobody serves."""
        return math.inf if self._limit is None else self._limit / 4

    def over(self, first: int = -1, second: int = -1) -> None:
        """Watch over the processes that serve now.

        Args:
            first: a descriptor that is readable when such a process has ended; it is duplicated. -1: it is not known
                who serves, and nothing is watched for now.
            second: likewise, if there are two processes.
        """
        with self._lock:
            if self._limit is None or self._closed or reason():
                return
            if self._number >= 0:
                failed = min(0, _library().aiouffd_watch_ends(self._number, first, second))
            elif first >= 0:
                failed = self._number = _library().aiouffd_watch(self._uffd, first, second, _milliseconds(self._limit))
            else:
                return
        if failed < 0:
            log.warning("nobody watches over the pager: %s", os.strerror(-failed))

    def alive(self) -> None:
        """Say that Python runs, and is about to have others serve."""
        with self._lock:
            if self._number >= 0:
                _library().aiouffd_watch_alive(self._number)


class LoopWatch(_Watch):
    """Watches over a region that an event loop of this process serves, until `close`.

    If a message lies unread in the region's descriptor for `limit` seconds while the loop makes no progress, lines on
    standard error say so, and the process ends with SIGABRT: faulthandler writes the traceback of each thread. Where
    the native part is missing, or no thread can be started, a line in the log says that nothing is watched.

    Args:
        uffd: the region's descriptor. It stays the caller's; it is duplicated.
        start: the region's address.
        thread: the loop's thread, by its native identifier.
        progress: the addresses of two 64-bit words, of which one at least changes while the loop serves. They must stay
            valid until `close`.
        warning: seconds until the first line.
        limit: seconds until the process ends; None: never.
    """

    def __init__(
        self, uffd: int, start: int, thread: int, progress: tuple[int, int], *, warning: float, limit: float | None
    ) -> None:
        super().__init__()
        if why := reason():
            _say_once(why)
            return
        self._number = _library().aiouffd_watch_loop(
            uffd, start, thread, *progress, _milliseconds(warning), _milliseconds(limit)
        )
        if self._number < 0:
            log.warning("nothing watches over the event loop: %s", os.strerror(-self._number))


@cache
def _say_once(why: str) -> None:
    log.warning("nothing watches over event loops that serve the memory of their own process: %s", why)
