"""Log records as lines of `key=value`, for whoever collects them: each record is one line."""

from __future__ import annotations

import logging

__all__ = ["SWITCH", "Lines"]

SWITCH = "AIOUFFD_LOG_LINES"
"""In the environment of a pager: it writes such lines, as the process does that has started it."""


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
