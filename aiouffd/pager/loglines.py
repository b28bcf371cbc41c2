"""How a pager writes its log: without waiting, and as lines of `key=value` where somebody collects them."""

from __future__ import annotations

import logging
import os
import select
from typing import Final

__all__ = ["SWITCH", "Lines", "NonBlockingHandler"]

SWITCH = "AIOUFFD_LOG_LINES"
"""In the environment of a pager: it writes such lines, as the process does that has started it."""

_PIPE_BUF: Final = 4096  # a pipe that is writable has room for so much


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


class NonBlockingHandler(logging.Handler):
    """Writes records to standard error, as far as there is room at once.

    A pipe that nobody reads would stop the loop otherwise, and with it all that is served. O_NONBLOCK is no way out: it
    would be set for the application, too, which has the same pipe.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lost = 0
        self._poller = select.poll()
        self._poller.register(2, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; it is lost where there is no room for it, and how many were lost is said later."""
        text = self.format(record) + "\n"
        if self._lost:
            text = f"({self._lost} messages were lost: standard error was full)\n{text}"
        data = text.encode(errors="backslashreplace")
        if not self._write(data[:_PIPE_BUF]):
            self._lost += 1
            return
        self._lost = 0
        for at in range(_PIPE_BUF, len(data), _PIPE_BUF):
            if not self._write(data[at : at + _PIPE_BUF]):
                return

    def _write(self, data: bytes) -> bool:
        try:
            ready = self._poller.poll(0)
            return bool(ready and ready[0][1] & select.POLLOUT and os.write(2, data))
        except OSError:
            return False
