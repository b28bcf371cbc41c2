"""`sources.store_client`: requests through obstore, and what becomes of its answers."""

from __future__ import annotations

import base64
import datetime as dt

import odd_http
import pytest

from aiouffd.sources.http_answer import Validator
from aiouffd.sources.store_client import StoreClient
from aiouffd.sources.store_errors import RequestError

MONDAY = dt.datetime(2026, 11, 2, 10, tzinfo=dt.UTC)


def direct() -> None:
    """Return no proxy."""


@pytest.mark.parametrize(
    ("pinned", "header", "value"),
    [
        (Validator(5, '"v1"', MONDAY), "if-match", '"v1"'),
        (Validator(5, 'W/"v1"', MONDAY), "if-unmodified-since", "Mon, 02 Nov 2026 10:00:00 GMT"),
        (Validator(5), None, None),
        (None, None, None),
    ],
)
async def test_conditions(pinned: Validator | None, header: str | None, value: str | None) -> None:
    """The ETag if it is strong, else the time; the same with and without a loop."""
    with odd_http.serving("modified, ignores") as server:
        client = StoreClient(server.url, {}, 10, direct)
        for answer in (client.get(5, 9, pinned), await client.get_async(5, 9, pinned)):
            assert bytes(answer.data) == odd_http.DATA[5:9]
            assert answer.start == 5
            assert answer.validator == Validator(len(odd_http.DATA), None, MONDAY)
        for _, headers in server.requests:
            sent = {name: headers[name] for name in ("if-match", "if-unmodified-since") if name in headers}
            assert sent == ({} if header is None else {header: value})
        client.close()


def test_the_user_of_a_url_is_sent() -> None:
    """Obstore leaves it out."""
    with odd_http.serving() as server:
        StoreClient(server.url.replace("//", "//me:secret@"), {}, 10, direct).get(0, 1, None)
        assert base64.b64decode(server.requests[0][1]["authorization"].split()[1]) == b"me:secret"


async def test_obstore_does_not_retry() -> None:
    """Its retries could neither be counted nor logged."""
    with odd_http.serving() as server:
        client = StoreClient(server.url, {}, 10, direct)
        server.failures = 2
        with pytest.raises(RequestError) as caught:
            client.get(0, 1, None)
        assert caught.value.failure.may_pass
        with pytest.raises(RequestError):
            await client.get_async(0, 1, None)
        assert len(server.requests) == 2
        assert client.size() == len(odd_http.DATA)
        server.habit = "head 403"
        with pytest.raises(RequestError):
            client.size()


def test_what_cannot_be_used() -> None:
    """An option that the store does not know, a URL of no object."""
    with pytest.raises(ValueError, match="nonsense"):
        StoreClient("s3://bucket/key", {"skip_signature": True, "nonsense": 1}, 10, direct)
    with pytest.raises(ValueError, match="names no object"):
        StoreClient("s3://bucket/", {}, 10, direct)
