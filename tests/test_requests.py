"""`server.requests`: what is logged of bytes that are no HTTP request."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

from aiouffd.server.requests import log

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: \x1b[1m\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 9000 + b"\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
async def test_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture, sent: bytes) -> None:
    """Without a traceback, and without what a terminal would obey."""
    runner = web.AppRunner(web.Application(), access_log=None, logger=log)
    await runner.setup()
    try:
        await web.UnixSite(runner, str(tmp_path / "s")).start()
        reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
        writer.write(sent)
        assert b" 400 " in await reader.readline()
        writer.close()
    finally:
        await runner.cleanup()
    (record,) = caplog.records
    said = record.getMessage()
    assert (record.levelno, record.exc_info) == (logging.WARNING, None)
    assert said.startswith("bytes that are no HTTP request are refused: ")
    assert said.isprintable()
    assert len(said) < 300


def test_defects_are_told_whole(caplog: pytest.LogCaptureFixture) -> None:
    """Of another exception the traceback says what nothing else does."""
    log.error("a request has failed", exc_info=ZeroDivisionError())
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.levelno == logging.ERROR
