"""`loglines`: each record of a log is one line, whatever is in it, and is written whole."""

from __future__ import annotations

import logging
import re
import sys
import threading
from typing import TYPE_CHECKING

from aiouffd.pager.loglines import Apart, Lines, NonBlockingHandler

if TYPE_CHECKING:
    import pytest


def line_of(message: str, *arguments: object, error: bool = False) -> str:
    """Return what a record looks like."""
    about = sys.exc_info() if error else None
    record = logging.LogRecord("aiouffd.keeper", logging.WARNING, "", 0, message, arguments, about)
    record.created, record.msecs = 86400.25, 250.0
    return Lines().format(record)


def test_a_record_is_keys_and_values() -> None:
    """Time with milliseconds, level, logger and text."""
    assert re.fullmatch(
        r'time=1970-01-0[12]T\d\d:\d\d:\d\d\.250 level=warning logger=aiouffd\.keeper msg="the worker died \(7\)"',
        line_of("the worker died (%d)", 7),
    )


def test_what_would_end_the_text_is_escaped() -> None:
    """Quotes, backslashes and line ends."""
    assert line_of('a "b"\\\nc').endswith('msg="a \\"b\\"\\\\\\nc"')


def test_a_traceback_is_in_the_same_line() -> None:
    """With what was raised."""
    try:
        int("no")
    except ValueError:
        line = line_of("it failed", error=True)
    assert "\n" not in line
    assert "it failed\\nTraceback (most recent call last):" in line
    assert "ValueError: invalid literal" in line
    assert line.endswith('"')


def test_the_handler_writes_whole_records(capfd: pytest.CaptureFixture[str]) -> None:
    """Also those that are longer than what a pipe takes at once."""
    handler = NonBlockingHandler()
    handler.emit(logging.LogRecord("x", logging.ERROR, "", 0, "y" * 10_000, (), None))
    assert capfd.readouterr().err == "y" * 10_000 + "\n"


def test_the_application_filters_what_threads_that_serve_log() -> None:
    """As all other records: in the thread that handles them."""
    logger, handled, threads = logging.getLogger("filtered"), list[str](), list[int]()
    logger.addFilter(apart := Apart(logger))
    apart.loops.append(threading.get_ident())

    def says_it(record: logging.LogRecord) -> bool:
        threads.append(threading.get_ident())
        return record.msg != "no"

    logger.addFilter(says_it)
    handler = logging.Handler()
    handler.emit = lambda record: handled.append(record.msg)  # type: ignore[method-assign]
    logger.addHandler(handler)
    for text in ("no", "yes"):
        logger.warning(text)
    assert handled == ["yes"]
    assert threading.get_ident() not in threads
