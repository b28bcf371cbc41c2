"""`sources.store_errors`: what exceptions mean, and what they do not show."""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import urllib.error
from email.message import Message
from typing import TYPE_CHECKING

import pytest

from aiouffd.sources.store_errors import Failure, from_exception, from_obstore, hide_secrets

if TYPE_CHECKING:
    from collections.abc import Callable


class GenericError(Exception):
    """As obstore's."""


class NotSupportedError(Exception):
    """As obstore's."""


def direct() -> None:
    """Return no proxy."""


def proxied() -> str:
    """Return one."""
    return "http://proxy:3128"


_SAYS: list[tuple[str, str, bool]] = [
    ("status: 404,", "no such object", False),
    ("status: 401,", r"refused \(401\)", False),
    ("status: 407,", "the proxy refuses", False),
    ("status: 412,", "has changed", False),
    ("status: 416,", "has changed", False),
    ("status: 429,", "Generic", True),
    ("status: 500,", "Generic", True),
    ("status: 501,", "Generic", False),
    ("status: 503,", "Generic", True),
    ("kind: Timeout,", "no answer", True),
    ("kind: Connect, ... ConnectionRefused", "the server refuses", True),
    ('kind: Connect, ... "dns error"', "name of the host", True),
    ("kind: Connect, ... unreachable", "cannot be reached", True),
    ("kind: Connect, ... InvalidCertificate(\n   Expired,", r"not trusted \(Expired\)", False),
    ("kind: Connect, ... InvalidCertificate(Other(OtherError(CaUsedAsEndEntity,)", "of an authority.*CA:FALSE", False),
    ("kind: Request, ... IncompleteMessage", "broke", True),
    ("kind: Interrupted,", "broke", True),
    ("kind: Builder, BadScheme", "AWS_ALLOW_HTTP", False),
    ("uri: http://169.254.169.254/latest/api/token, status: 403,", "no credentials", False),
    ("object was only 4096 bytes long", "has changed", False),
    ("something else", "GenericError: Generic", False),
]


@pytest.mark.parametrize(("text", "reason", "may_pass"), _SAYS)
def test_what_obstore_says(text: str, reason: str, may_pass: bool) -> None:
    """By the causes that stand behind its first line."""
    found = from_obstore(GenericError(f"Generic HTTP error\n\nDebug source: {text}"), direct)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found.reason)
    assert found.may_pass is may_pass
    assert not found.answer_refused


@pytest.mark.parametrize("text", ["Requested 0..9, got 0..5", "Failed to parse value for CONTENT_RANGE header: x"])
def test_answers_that_obstore_refuses(text: str) -> None:
    """They may be valid."""
    assert from_obstore(GenericError(text), direct).answer_refused
    assert "without Range" in from_obstore(NotSupportedError("no"), direct).reason


def status(code: int) -> urllib.error.HTTPError:
    """Return what urllib raises for a status."""
    return urllib.error.HTTPError("http://h/x", code, "Reason", Message(), io.BytesIO())


_RAISES: list[tuple[Callable[[], Exception], str, bool]] = [
    (lambda: status(404), "no such object", False),
    (lambda: status(503), "503 Reason", True),
    (TimeoutError, "no answer", True),
    (lambda: urllib.error.URLError(TimeoutError()), "no answer", True),
    (lambda: urllib.error.URLError(ConnectionRefusedError()), "the server refuses", True),
    (lambda: urllib.error.URLError(socket.gaierror(-2, "unknown")), "name of the host", True),
    (lambda: urllib.error.URLError(OSError(101, "unreachable")), "cannot be reached", True),
    (lambda: urllib.error.URLError(OSError("Tunnel connection failed: 407")), "the proxy refuses", False),
    (lambda: http.client.IncompleteRead(b""), "broke", True),
    (ConnectionResetError, "broke", True),
    (lambda: ValueError("odd"), "ValueError: odd", False),
]


@pytest.mark.parametrize(("make", "reason", "may_pass"), _RAISES)
def test_what_the_standard_library_raises(make: Callable[[], Exception], reason: str, may_pass: bool) -> None:
    """In the same words."""
    found = from_exception(make(), direct)
    assert reason in found.reason
    assert found.may_pass is may_pass


def test_a_certificate() -> None:
    """OpenSSL says why."""
    error = ssl.SSLCertVerificationError()
    error.verify_message = "self-signed certificate"
    assert "not trusted (self-signed certificate)" in from_exception(urllib.error.URLError(error), direct).reason


@pytest.mark.parametrize("text", ["ConnectionRefused", "dns error", "unreachable"])
def test_a_proxy_is_to_blame(text: str) -> None:
    """Where requests go through one."""
    assert "proxy http://proxy:3128" in from_obstore(GenericError(f"x\nkind: Connect, {text}"), proxied).reason


def test_secrets() -> None:
    """Queries of signed URLs, and passwords."""
    assert hide_secrets("GET https://me:secret@host/x?sig=secret failed") == "GET https://host/x?... failed"
    assert hide_secrets("403: <?xml version") == "403: <?xml version"  # what S3 answers
    assert Failure("x") == Failure("x")
