"""Ranges of an object over HTTP by the standard library, for answers that obstore refuses though they are valid.

obstore takes only a 206 with exactly the range that was asked for, its total and a Content-Length. Others are allowed:
a shorter range, `Content-Range: bytes 0-9/*`, a chunked body. Here each request is a connection and a thread, so this
is slower; only servers that answer so are read this way.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import re
import socket
import ssl
import threading
import urllib.request
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urldefrag, urlsplit

from aiouffd.sources.daemon_threads import DaemonThreads
from aiouffd.sources.http_answer import Answer, Validator, time_of
from aiouffd.sources.store_errors import NO_RANGES, Failure, Proxy, RequestError, from_exception, from_status
from aiouffd.sources.store_settings import user_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["PlainHttp", "first_bytes"]

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_SAFE = "%/:=&?~+!$,;@'()*[]"  # what was quoted stays so
_THREADS = 16  # limit of requests under way
_CONNECT_TIMEOUT = 5.0  # seconds; as obstore's
_HEADERS = {"User-Agent": "aiouffd", "Accept-Encoding": "identity"}
_SENSITIVE = frozenset(("authorization", "cookie", "proxy-authorization"))


def first_bytes(url: str, count: int, timeout: float, meanwhile: Callable[[], None] = lambda: None) -> Answer:
    """Return the first bytes of an object behind an http URL, which is sent as it is; blocks.

    To make a client of obstore takes 10 ms, which looks for certificates: half of what it takes to open a near URL.

    Args:
        url: without a user.
        count: how many, at most.
        timeout: seconds for the answer: each byte of it may come in time, and the last one never.
        meanwhile: called before the answer is waited for.

    Raises:
        RequestError: the answer is not that, a redirect for example; or there is none in time.
        OSError, http.client.HTTPException: there is none.
    """
    parts = urlsplit(url)
    target = f"{parts.path}?{parts.query}" if parts.query else parts.path
    connection = http.client.HTTPConnection(parts.netloc, timeout=min(timeout, _CONNECT_TIMEOUT))
    with contextlib.closing(connection):
        connection.connect()
        connection.sock.settimeout(timeout)
        end = threading.Timer(timeout, _end, [connection.sock, late := threading.Event()])
        try:
            connection.request("GET", target, headers={**_HEADERS, "Range": f"bytes=0-{count - 1}"})
            meanwhile()
            end.start()
            return _answer(connection.getresponse(), 0, count)
        except Exception as error:
            if not late.is_set() and not isinstance(error, TimeoutError):
                raise
            raise RequestError(from_exception(TimeoutError(), lambda: None)) from error
        finally:
            end.cancel()


def _end(connection: socket.socket, late: threading.Event) -> None:
    late.set()
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class PlainHttp:
    """One object behind an http(s) URL. `get` and `size` block.

    Args:
        url: may have a user and a password.
        options: as for the client of obstore: `default_headers`, `root_certificate`, `allow_invalid_certificates` and
            `proxy_url` are used.
        timeout: seconds without a byte.
        proxy: see `store_errors.Proxy`.
    """

    def __init__(self, url: str, options: Mapping[str, Any], timeout: float, proxy: Proxy) -> None:
        url, user = user_of(url)
        self._url = quote(urldefrag(url).url, safe=_SAFE)
        self._headers = {name: _text(value) for name, value in options.get("default_headers", {}).items()} | user
        self._timeout = timeout
        self._proxy = proxy
        self._pool: DaemonThreads | None = None
        context = ssl.create_default_context()  # OpenSSL reads SSL_CERT_FILE
        if options.get("root_certificate"):
            context.load_verify_locations(cadata=_text(options["root_certificate"]))
        if options.get("allow_invalid_certificates"):
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        through = options.get("proxy_url")
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler({"http": through, "https": through} if through else None),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(context=context),
            urllib.request.HTTPRedirectHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
        ):
            self._opener.add_handler(handler)

    def get(self, start: int, stop: int, pinned: Validator | None) -> Answer:
        """Return the bytes from `start` on, at most up to `stop`, at least one.

        Args:
            start: offset in the object.
            stop: offset behind the last byte that is wanted.
            pinned: the version that they must be of.

        Raises:
            RequestError: with the reason.
        """
        headers = {"Range": f"bytes={start}-{stop - 1}", **(pinned.conditions() if pinned is not None else {})}
        try:
            with self._open("GET", headers) as response:
                return _answer(response, start, stop)
        except RequestError:
            raise
        except Exception as error:
            raise RequestError(from_exception(error, self._proxy)) from error

    async def get_async(self, start: int, stop: int, pinned: Validator | None) -> Answer:
        """As `get`, in a thread. Canceling is safe; the thread ends its request."""
        if self._pool is None:
            self._pool = DaemonThreads(_THREADS, "aiouffd-http")
        return await asyncio.get_running_loop().run_in_executor(self._pool, self.get, start, stop, pinned)

    def size(self) -> int | None:
        """Return the size of the object by a HEAD request, None if the server does not say. Raises as `get`."""
        try:
            with self._open("HEAD", {}) as response:
                length = response.headers.get("Content-Length", "")
                return int(length) if length.isdecimal() else None
        except Exception as error:
            raise RequestError(from_exception(error, self._proxy)) from error

    def close(self) -> None:
        """Let the threads end. Does not wait for requests under way."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _open(self, method: str, headers: Mapping[str, str]) -> Any:
        request = urllib.request.Request(self._url, method=method)  # noqa: S310 - the opener knows http and https only
        for name, value in {**_HEADERS, **headers, **self._headers}.items():
            # What proves who asks must not be sent to another host.
            add = request.add_unredirected_header if name.lower() in _SENSITIVE else request.add_header
            add(name, value)
        response = self._opener.open(request, timeout=self._timeout)
        if response is None:
            raise RequestError(Failure("the server redirects to another scheme than http and https"))
        return response


def _answer(response: http.client.HTTPResponse, start: int, stop: int) -> Answer:
    if response.status >= http.HTTPStatus.BAD_REQUEST:
        text = f"{response.status} {response.reason}"
        raise RequestError(from_status(response.status, text, response.headers.get("Retry-After")))
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.status != http.HTTPStatus.PARTIAL_CONTENT or found is None:
        raise RequestError(Failure(NO_RANGES))
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise RequestError(Failure(f"the server answers with Content-Encoding: {encoding}, where ranges mean nothing"))
    first, last = int(found[1]), int(found[2])
    if not first <= start <= last:
        raise RequestError(Failure(f"the server was asked for bytes {start}-{stop - 1}, and answered {found[0]}"))
    data = response.read(min(last + 1, stop) - first)
    if len(data) < min(last + 1, stop) - first:
        raise http.client.IncompleteRead(data)
    total = None if found[3] == "*" else int(found[3])
    modified = time_of(response.headers.get("Last-Modified"))
    validator = Validator(total, response.headers.get("ETag"), modified)
    return Answer(memoryview(data)[start - first :], start, validator)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
