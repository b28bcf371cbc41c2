"""How those that serve write their log: without waiting, and as lines of `key=value` where somebody collects them."""

from __future__ import annotations

import logging
import os
import select
import threading
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, Final

from aiouffd.sources.daemon_threads import DaemonThreads

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SWITCH", "Apart", "Lines", "NonBlockingHandler"]

SWITCH = "AIOUFFD_LOG_LINES"
"""In the environment of a pager: it writes such lines, as the process does that has started it."""

_PIPE_BUF: Final = 4096  # a pipe that is writable has room for so much
_MOMENT: Final = 0.5  # seconds


class Lines(logging.Formatter):
    """`time=... level=... logger=... msg="..."`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        time = self.formatTime(record, "%Y-%m-%dT%H:%M:%S")
        return (
            f'time={time}.{int(record.msecs):03d} level={record.levelname.lower()} logger={record.name} msg="{escaped}"'
        )


class _Thread:
    """Calls functions one after the other, and is waited for a moment.

    They may wait for a page that the caller is to bring. Mostly they do not, and a record is written before the signal
    that it explains.
    """

    def __init__(self) -> None:
        self._renew()

    def _renew(self) -> None:
        self._owner = os.getpid()
        self._threads = DaemonThreads(1, "aiouffd-log")
        self._last: Future[Any] | None = None

    @property
    def waits(self) -> bool:
        """Whether the last call has not returned."""
        if self._owner != os.getpid():  # a forked child does not have the thread
            self._renew()
        return self._last is not None and not self._last.done()

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Have a function called; return when it has returned, or when a moment is over."""
        waits = self.waits
        try:
            self._last = self._threads.submit(function, *args)
        except RuntimeError:  # no thread can be started
            function(*args)
            return
        if not waits:
            wait([self._last], _MOMENT)


class NonBlockingHandler(logging.Handler):
    """Writes records to standard error, as far as there is room at once.

    A pipe that nobody reads would stop the loop otherwise, and with it all that is served. O_NONBLOCK is no way out: it
    would be set for the application, too, which has the same pipe.

    Room is not enough. write(2) holds a lock of the pipe, file or terminal while it copies from memory. If an
    application writes a missing page there, any other write waits until the page has come. So a thread writes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lost = 0
        self._thread = _Thread()
        self._poller = select.poll()
        self._poller.register(2, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; it is lost where there is no room for it, and how many were lost is said later."""
        if self._thread.waits:
            self._lost += 1
            return
        text = self.format(record) + "\n"
        lost, self._lost = self._lost, 0
        if lost:
            text = f"({lost} messages were lost: standard error was full)\n{text}"
        self._thread.call(self._write, text.encode(errors="backslashreplace"), lost)

    def _write(self, data: bytes, lost: int) -> None:
        if not self._write_part(data[:_PIPE_BUF]):
            self._lost += lost + 1
            return
        for at in range(_PIPE_BUF, len(data), _PIPE_BUF):
            if not self._write_part(data[at : at + _PIPE_BUF]):
                return

    def _write_part(self, data: bytes) -> bool:
        try:
            ready = self._poller.poll(0)
            return bool(ready and ready[0][1] & select.POLLOUT and os.write(2, data))
        except OSError:
            return False


class Apart(logging.Filter):
    """Of a logger in an application: has another thread handle the records of threads that serve.

    A handler formats a record while it holds its lock. If it formats an array whose pages are missing, a thread that
    serves must not wait for that lock: it is to bring the pages.
    """

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__()
        self._logger = logger
        self._thread = _Thread()
        self.loops: list[int] = []
        """The threads that serve, once for each region."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether this thread may handle the record."""
        if threading.get_ident() not in self.loops:
            return True
        self._thread.call(self._logger.handle, record)  # with the application's own filters
        return False
