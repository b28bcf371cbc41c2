"""The log of what aiohttp refuses: bytes that are no HTTP request are a line, and no traceback."""

from __future__ import annotations

import logging

from aiohttp.http_exceptions import HttpProcessingError

__all__ = ["log"]

_MOST = 200  # characters of what is said of a request


def _in_one_line(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError):
        reason = ascii(" ".join(error.message.split()))[1:-1][:_MOST]
        record.msg, record.args, record.exc_info = "bytes that are no HTTP request are refused: %s", (reason,), None
        record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
    return True


log: logging.Logger = logging.getLogger("aiouffd.server.requests")
log.addFilter(_in_one_line)
