"""Who may look, and the answers: the page, what it is told as server-sent events, and which memory is there.

A browser sends a request to any address that a page of any site names. So requests are answered only if they name this
server as their host, or have the token. They change nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec
from aiohttp import web

from aiouffd.server.dashboard.looks import Look, residency
from aiouffd.server.requests import log as refused_log

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler

    from aiouffd.server.server import Server

__all__ = ["Dashboard", "is_loopback"]

log: logging.Logger = logging.getLogger("aiouffd.server")

_FILES: Final = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js"}
_KINDS: Final = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_COOKIE: Final = "aiouffd"
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
_EACH: Final = 1.0  # seconds between two looks
_MOST: Final = 32  # that look at once
_ENDING: Final = 1.0  # seconds for the last answers


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches an address."""
    return host in _LOOPBACK or host.startswith("127.")


class Dashboard:
    """Answers a browser. An asynchronous context manager.

    Args:
        server: is shown; it need not be entered yet.
        host: where to listen.
        port: 0: any free one.
        token: who has it may look; empty: who reaches the address may, which must be one of the loopback interface.
        version: of the package.
        shared: others of this user that share it may listen there, too: the server that this one takes over from.

    Attributes:
        port: where it listens.

    Raises:
        ValueError: no token, and others can reach the address.

    Raises on entering:
        OSError: the address cannot be used.
    """

    def __init__(
        self, server: Server, host: str, port: int, *, token: str = "", version: str = "", shared: bool = False
    ) -> None:
        if not token and not is_loopback(host):
            raise ValueError(f"{host} can be reached by others: a token must say who may look")
        self._server = server
        self._host = host
        self.port: int = port
        self._token = token
        self._version = version
        self._shared = shared
        self._followers = 0
        self._ended = asyncio.Event()
        self._files = {path: (files(__package__) / name).read_bytes() for path, name in _FILES.items()}
        application = web.Application(middlewares=[self._guard])
        for path in _FILES:
            application.router.add_get(path, self._file)
        application.router.add_get("/live", self._live)
        application.router.add_get("/residency", self._residency)
        self._runner = web.AppRunner(application, access_log=None, logger=refused_log, shutdown_timeout=_ENDING)
        self._listening: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        """Listen."""
        await self._runner.setup()
        assert self._runner.server is not None
        try:
            loop = asyncio.get_running_loop()
            self._listening = await loop.create_server(
                self._runner.server, self._host, self.port, reuse_port=self._shared
            )
        except BaseException:
            await self._runner.cleanup()
            raise
        self.port = self._listening.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop listening, and end all connections."""
        self.close()
        self._ended.set()
        await self._runner.cleanup()

    def close(self) -> None:
        """Stop listening: another process can have the address. Who looks already goes on."""
        if self._listening is not None:
            self._listening.close()
            self._listening = None

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            response = self._refusal(request) or await handler(request)
        except web.HTTPException as error:
            response = web.Response(status=error.status, text=error.reason)
        if not response.prepared:
            response.headers.update(_HEADERS)
        return response

    def _refusal(self, request: web.Request) -> web.StreamResponse | None:
        if not self._token:
            host = request.host.rpartition(":")[0] if not request.host.endswith("]") else request.host
            if (host or request.host).strip("[]") in (*_LOOPBACK, self._host):
                return None
            return web.Response(status=403, text="this is another host")
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if any(self._is_token(text) for text in (given, request.cookies.get(_COOKIE, ""))):
            return None
        if request.path == "/" and self._is_token(request.query.get("token", "")):
            response = web.Response(status=303, headers={"Location": "/"})  # so that it is in no history
            response.set_cookie(_COOKIE, self._token, httponly=True, samesite="Strict")
            return response
        return web.Response(status=401, text="open /?token=...", headers={"WWW-Authenticate": "Bearer"})

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self._token.encode())

    async def _file(self, request: web.Request) -> web.Response:
        kind = _KINDS[_FILES[request.path].rpartition(".")[2]]
        return web.Response(body=self._files[request.path], content_type=kind, charset="utf-8")

    async def _residency(self, request: web.Request) -> web.Response:
        session = self._server.sessions.get(request.query.get("session", ""))
        if session is None:
            raise web.HTTPNotFound
        found = await asyncio.to_thread(residency, session)
        return web.Response(body=msgspec.json.encode(found), content_type="application/json")

    async def _live(self, request: web.Request) -> web.StreamResponse:
        """Tell a look each second, and what happens."""
        if self._followers >= _MOST:
            raise web.HTTPServiceUnavailable
        response = web.StreamResponse(headers={**_HEADERS, "Content-Type": "text/event-stream"})
        await response.prepare(request)
        self._followers += 1
        happenings = asyncio.ensure_future(self._tell_happenings(response))
        try:
            while not self._ended.is_set():
                await _send(response, "look", Look.of(self._server, self._version))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_EACH):
                        await self._ended.wait()
        except ConnectionError:
            pass
        finally:
            self._followers -= 1
            happenings.cancel()
            await asyncio.wait([happenings])
        return response

    async def _tell_happenings(self, response: web.StreamResponse) -> None:
        async with contextlib.aclosing(self._server.happenings.follow(after=0)) as happenings:
            with contextlib.suppress(ConnectionError):
                async for happening in happenings:
                    await _send(response, "happening", happening)


async def _send(response: web.StreamResponse, kind: str, value: Any) -> None:
    await response.write(b"event: %s\ndata: %s\n\n" % (kind.encode(), msgspec.json.encode(value)))
