"""What went wrong with a request for an object: whether it may pass, and the sentence for the user.

obstore tells causes only in the text of its exceptions. The standard library has exceptions for them. Both become a
`Failure` here.
"""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import urllib.error
from collections.abc import Callable
from typing import TypeAlias

import attrs

from aiouffd.sources.http_answer import seconds_of

__all__ = [
    "CHANGED",
    "COMPRESSED",
    "NO_RANGES",
    "Failure",
    "Proxy",
    "RequestError",
    "from_exception",
    "from_obstore",
    "from_status",
    "hide_secrets",
]

Proxy: TypeAlias = Callable[[], str | None]
"""Returns the address of the proxy that the request went through, or None."""

_MAY_PASS = frozenset((408, 425, 429, 500, 502, 503, 504))

NO_RANGES = "this server answers without Range requests, and cannot be read page by page: use one that has them"
COMPRESSED = "the server compresses its answers, and a range of compressed bytes is not a range of the object"
_AUTHORITY = (
    "the certificate of the server is that of an authority (CA:TRUE), which may sign others and not be a server's: make"
    " one with basicConstraints=CA:FALSE"
)
_NO_TLS = "http without TLS is not allowed here: AWS_ALLOW_HTTP=true, or client_options={'allow_http': True}, allows it"
CHANGED = "the object has changed since it was opened: open it again"


@attrs.frozen
class Failure:
    """Why a request failed.

    Attributes:
        reason: a sentence, without secrets.
        may_pass: whether the same request may succeed later.
        timed_out: whether there was no answer in time.
        status: of the answer, 0 if there was none.
        answer_refused: whether the library refused an answer that may be valid.
        retry_after: seconds that the server wants to be left alone, as far as it says so. obstore does not tell them.
    """

    reason: str
    may_pass: bool = False
    timed_out: bool = False
    status: int = 0
    answer_refused: bool = False
    retry_after: float = 0.0


class RequestError(Exception):
    """A request failed; `failure` says why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure


def hide_secrets(text: str) -> str:
    """Return a text without the queries and the passwords of URLs: signatures and credentials."""
    return re.sub(r"//[^/@\s]+@", "//", re.sub(r"(?<!<)\?[^\s\"')>]+", "?...", text))


def from_obstore(error: Exception, proxy: Proxy) -> Failure:
    """Return what an exception of obstore means."""
    name, whole = type(error).__name__, str(error)  # behind the first line: the causes, as Rust's Debug prints them
    text = hide_secrets(whole.strip().partition("\n")[0])
    for pattern, explain in _KINDS:
        found = pattern.search(f"{name}: {whole}")
        if found is not None:
            return explain(found, text, proxy)
    return Failure(f"{name}: {text}")


def from_exception(error: Exception, proxy: Proxy) -> Failure:
    """Return what an exception of urllib or http.client means."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()  # it is the answer, with its connection
        return from_status(error.code, f"{error.code} {error.reason}", error.headers.get("Retry-After"))
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    text = hide_secrets(f"{type(cause).__name__}: {cause}")
    if "Tunnel connection failed" in text:
        return _proxy_refuses(text)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return _certificate(cause.verify_message)
    if isinstance(cause, OSError):
        return _from_os_error(cause, text, proxy)
    return _broken(text) if isinstance(cause, http.client.HTTPException) else Failure(text)


def _from_os_error(error: OSError, text: str, proxy: Proxy) -> Failure:
    if isinstance(error, TimeoutError):
        return _timed_out()
    if isinstance(error, ConnectionRefusedError):
        return _refused(proxy)
    if isinstance(error, socket.gaierror):
        return _no_name(proxy)
    return _broken(text) if isinstance(error, ConnectionError) else _unreachable(proxy, text)


def from_status(status: int, text: str, retry_after: str | None = None) -> Failure:
    """Return what the status of an answer means; text: as the server says it; retry_after: a header of that name."""
    if status in (404, 410):
        reason = f"there is no such object ({status}): check the URL"
    elif status in (401, 403):
        reason = f"access was refused ({status}): check the credentials, and whether a signed URL has expired ({text})"
    elif status == 407:
        return _proxy_refuses(text)
    elif status in (412, 416):
        reason = CHANGED
    else:
        reason = text
    may_pass = status in _MAY_PASS
    return Failure(reason, may_pass=may_pass, status=status, retry_after=seconds_of(retry_after) if may_pass else 0.0)


def _certificate(why: str) -> Failure:
    return Failure(
        f"the certificate of the server is not trusted ({why}): SSL_CERT_FILE names a file of trusted certificates"
    )


def _proxy_refuses(text: str) -> Failure:
    return Failure(f"the proxy refuses the request: check its credentials ({text})", status=407)


def _refused(proxy: Proxy) -> Failure:
    through = proxy()
    if through is not None:
        return Failure(f"the proxy {through} refuses connections: is it up, and is http_proxy right?", may_pass=True)
    return Failure("the server refuses connections: is it up, and is the port right?", may_pass=True)


def _no_name(proxy: Proxy) -> Failure:
    whose = "host" if (through := proxy()) is None else f"proxy {through}"
    return Failure(f"the name of the {whose} cannot be resolved: is it spelled right?", may_pass=True)


def _unreachable(proxy: Proxy, text: str) -> Failure:
    whose = "server" if (through := proxy()) is None else f"proxy {through}"
    return Failure(f"the {whose} cannot be reached ({text})", may_pass=True)


def _timed_out() -> Failure:
    return Failure("no answer", may_pass=True, timed_out=True)


def _broken(text: str) -> Failure:
    return Failure(f"the connection broke ({text})", may_pass=True)


def _no_credentials(text: str) -> Failure:
    return Failure(f"there are no credentials, and the metadata service gave none ({text})")


_KINDS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str], str, Proxy], Failure]], ...] = (
    (re.compile(r"http://169\.254\.|http://metadata\.google"), lambda _, text, __: _no_credentials(text)),
    (re.compile(r"\bstatus: (\d{3})\b"), lambda found, text, _: from_status(int(found[1]), text)),
    (re.compile(r"^NotSupportedError|Content-Range"), lambda _, __, ___: Failure(NO_RANGES)),
    (
        # Another range than was asked for; no total; no length.
        re.compile(r"\bRequested \d|parse value for CONTENT_RANGE|Content-Length Header missing"),
        lambda _, text, __: Failure(text, answer_refused=True),
    ),
    (re.compile(r"object was only \d+ bytes long"), lambda _, __, ___: Failure(CHANGED)),
    (re.compile("CaUsedAsEndEntity"), lambda _, __, ___: Failure(_AUTHORITY)),
    (re.compile(r"InvalidCertificate\(\s*(\w+)"), lambda found, _, __: _certificate(found[1])),
    (re.compile(r"kind: Timeout|operation timed out"), lambda _, __, ___: _timed_out()),
    (
        re.compile("BadScheme"),
        lambda _, __, ___: Failure(_NO_TLS),
    ),
    (re.compile("ConnectionRefused"), lambda _, __, proxy: _refused(proxy)),
    (re.compile("dns error"), lambda _, __, proxy: _no_name(proxy)),
    (re.compile("kind: Connect,"), lambda _, text, proxy: _unreachable(proxy, text)),
    (re.compile("kind: (Request|Interrupted|Decode),"), lambda _, text, __: _broken(text)),
)
"""What obstore's exceptions say, the first that matches: (name and text, its meaning)."""
