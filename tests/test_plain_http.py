"""`sources.plain_http`: ranges by the standard library."""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import http.server
import threading
from typing import TYPE_CHECKING

import odd_http
import pytest

from aiouffd.sources.http_answer import Validator
from aiouffd.sources.plain_http import PlainHttp, first_bytes
from aiouffd.sources.store_errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

MONDAY = dt.datetime(2026, 11, 2, 10, tzinfo=dt.UTC)
SIZE = len(odd_http.DATA)


def direct() -> None:
    """Return no proxy."""


@pytest.mark.parametrize(
    ("habit", "start", "stop", "got", "validator"),
    [
        ("", 5, 9, 4, Validator(SIZE, '"v1"')),
        ("modified", SIZE - 3, SIZE + 9, 3, Validator(SIZE, None, MONDAY)),
        ("weak", 0, 1, 1, Validator(SIZE, 'W/"v1"', MONDAY)),
        ("none", 0, SIZE, SIZE, Validator(SIZE)),
        ("short", 70_000, 90_000, 1000, Validator(SIZE, '"v1"')),
        ("aligned", 70_000, 70_010, 10, Validator(SIZE, '"v1"')),
        ("aligned", 131_000, 131_100, 100, Validator(SIZE, '"v1"')),
        ("star", 5, 9, 4, Validator(None, '"v1"')),
        ("chunked", 5, 60_000, 59_995, Validator(SIZE, '"v1"')),
    ],
)
async def test_answers(habit: str, start: int, stop: int, got: int, validator: Validator) -> None:
    """The bytes that were asked for, or their beginning, whatever else came."""
    with odd_http.serving(habit) as server:
        client = PlainHttp(server.url, {}, 10, direct)
        blocking = await asyncio.to_thread(client.get, start, stop, None)
        for answer in (blocking, await client.get_async(start, stop, None)):
            assert bytes(answer.data) == odd_http.DATA[start : start + got]
            assert (answer.start, answer.validator) == (start, validator)
        assert await asyncio.to_thread(client.size) == SIZE
        client.close()


@pytest.mark.parametrize("pinned", [Validator(SIZE, '"v1"'), Validator(SIZE, None, MONDAY)])
def test_conditions(pinned: Validator) -> None:
    """An object that has changed is refused by the server."""
    with odd_http.serving("modified" if pinned.tag is None else "") as server:
        client = PlainHttp(server.url, {}, 10, direct)
        assert bytes(client.get(5, 6, pinned).data) == odd_http.DATA[5:6]
        server.change()
        with pytest.raises(RequestError) as caught:
            client.get(5, 6, pinned)
        assert caught.value.failure.status == 412


def test_an_answer_that_takes_too_long() -> None:
    """Each byte of it comes in time, and the last one not within minutes."""
    with odd_http.serving("trickles") as server, pytest.raises(RequestError) as caught:
        first_bytes(server.url, 4096, 0.2)
    assert caught.value.failure.timed_out


def test_headers() -> None:
    """The user of the URL, what was given, and no compression."""
    with odd_http.serving() as server:
        url = server.url.replace("//", "//me:secret@")
        PlainHttp(url, {"default_headers": {"X-Token": b"token"}}, 10, direct).get(0, 1, None)
        headers = server.requests[0][1]
        assert base64.b64decode(headers["authorization"].split()[1]) == b"me:secret"
        assert headers["x-token"] == "token"
        assert headers["accept-encoding"] == "identity"


class _Redirects(http.server.BaseHTTPRequestHandler):
    to = ""

    def do_GET(self) -> None:
        self.send_response(307)
        self.send_header("Location", self.to)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def redirecting() -> Iterator[str]:
    """Yield the URL of a server that redirects to `_Redirects.to`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Redirects) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://me:secret@127.0.0.1:{server.server_port}/x"
        server.shutdown()
        thread.join()


def test_redirects(redirecting: str) -> None:
    """They are followed with the range, without what proves who asks; not to other schemes."""
    with odd_http.serving() as server:
        _Redirects.to = server.url
        assert bytes(PlainHttp(redirecting, {}, 10, direct).get(7, 9, None).data) == odd_http.DATA[7:9]
        assert "authorization" not in server.requests[0][1]
    for elsewhere in ("file:///etc/passwd", "ftp://127.0.0.1/x"):
        _Redirects.to = elsewhere
        with pytest.raises(RequestError):
            PlainHttp(redirecting, {}, 10, direct).get(0, 1, None)
