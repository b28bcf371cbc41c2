"""The control's socket, and its answers: JSON by HTTP, for the server's own user and root only.

aiohttp speaks HTTP: it takes a socket that listens already, and gives the connection's, by which the kernel tells who
is at its other end.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec
from aiohttp import web

from aiouffd.handoff.receive import Peer
from aiouffd.lifetime import uninterrupted
from aiouffd.server.control.actions import ACTIONS, Action, Actions
from aiouffd.server.control.openapi import document
from aiouffd.server.control.problems import problem_of
from aiouffd.server.control.values import Problem, decode
from aiouffd.server.listener import SocketFile
from aiouffd.server.requests import log as refused_log

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from aiohttp.typedefs import Handler

    from aiouffd.server.server import Server
    from aiouffd.store.cache import ChunkCache

__all__ = ["Control"]

log: logging.Logger = logging.getLogger("aiouffd.server")

_MAX_BODY: Final = 64 << 10  # bytes
_BEAT: Final = 15.0  # seconds between two comments in a stream of events: they find out whether somebody reads
_LOOK: Final = 0.1  # seconds between two looks whether somebody waits for the answer
_ENDING: Final = 2.0  # seconds for the last answers


async def _while_connected(request: web.Request, work: Coroutine[Any, Any, Any]) -> Any:
    """Return what a coroutine returns; cancel it when the connection ends."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait([task], timeout=_LOOK))[0]:
            if request.transport is None or request.transport.is_closing():
                task.cancel()
        return task.result()
    finally:
        task.cancel()


class Control:
    """Answers requests on a Unix socket. An asynchronous context manager.

    Args:
        server: entered.
        path: of the socket, whose mode is 0600.
        cache: for sources behind URLs.
        version: of the package.

    Raises on entering:
        OSError: the socket cannot be made.
    """

    def __init__(
        self, server: Server, path: str | os.PathLike[str], *, cache: ChunkCache | None = None, version: str = ""
    ) -> None:
        self._server = server
        self._path = path
        self._name = f"control {Path(path).absolute()}"
        self._actions = Actions(server, cache, version=version)
        self._document = msgspec.json.encode(document(version))
        self._file: SocketFile | None = None
        application = web.Application(client_max_size=_MAX_BODY, middlewares=[self._guard])
        for action in ACTIONS:
            application.router.add_route(action.method, action.path, self._handler(action))
        application.router.add_get("/v1/events", self._events)
        application.router.add_get("/openapi.json", self._describe)
        self._runner = web.AppRunner(application, access_log=None, logger=refused_log, shutdown_timeout=_ENDING)

    async def __aenter__(self) -> Self:
        """Listen."""
        await self._runner.setup()
        try:
            await uninterrupted(self._listen)
            assert self._file is not None
            self._server.hand_on(self._name, self._file.listener)
            await self._actions.restore()
            await web.SockSite(self._runner, self._file.listener).start()
        except BaseException:
            self.close()
            await self._runner.cleanup()
            raise
        return self

    def _listen(self) -> None:
        self._file = SocketFile(self._path, made=self._server.handed(self._name))

    async def __aexit__(self, *_: object) -> None:
        """Stop listening, and end all connections."""
        self.close()
        self._server.happenings.close()
        await self._runner.cleanup()
        await self._actions.aclose()

    def close(self) -> None:
        """Let another process have the socket's name. Connections that are there go on."""
        if self._file is not None:
            self._file.close()

    def _handler(self, action: Action) -> Handler:
        do = getattr(self._actions, action.name)

        async def handle(request: web.Request) -> web.Response:
            arguments: list[Any] = list(request.match_info.values())
            if action.body is not None:
                body = await request.read()
                arguments.append(decode(body if body or action.body_needed else b"{}", action.body))
            work = do(*arguments)
            answer = await (_while_connected(request, work) if action.ends else work)
            if action.answer is None:
                return web.Response(status=action.status)
            return web.Response(body=msgspec.json.encode(answer), status=action.status, content_type="application/json")

        return handle

    async def _describe(self, _: web.Request) -> web.Response:
        return web.Response(body=self._document, content_type="application/json")

    async def _events(self, request: web.Request) -> web.StreamResponse:
        after = request.headers.get("Last-Event-ID")
        if after is not None and not re.fullmatch(r"\d{1,18}", after):
            raise ValueError("Last-Event-ID is not the number of an event")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        await response.write(b": aiouffd\n\n")
        happenings = self._server.happenings.follow(None if after is None else int(after))
        pending: asyncio.Task[Any] | None = None
        try:
            while True:
                pending = pending or asyncio.ensure_future(anext(happenings, None))
                done, _ = await asyncio.wait([pending], timeout=_BEAT)
                if not done:
                    await response.write(b":\n\n")
                    continue
                happening, pending = pending.result(), None
                if happening is None:
                    return response
                data = msgspec.json.encode(happening)
                await response.write(
                    b"id: %d\nevent: %s\ndata: %s\n\n" % (happening.number, happening.kind.encode(), data)
                )
        except ConnectionResetError:
            return response
        finally:
            if pending is not None:
                pending.cancel()
                await asyncio.wait([pending])
            await happenings.aclose()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check who asks, and turn what is raised into an answer."""
        try:
            peer = _peer(request)
            if peer.uid not in (0, os.geteuid()):
                raise web.HTTPForbidden(reason=f"{peer} may not use this socket")  # noqa: TRY301 - as all others
            return await handler(request)
        except web.HTTPException as error:
            problem = _refused(error)
        except Exception as error:
            problem = problem_of(error)
            if problem.type.endswith("bug"):
                log.exception("a request has failed")
        log.warning("%s %s is refused: %s", request.method, request.path, problem.detail)
        return web.Response(
            body=msgspec.json.encode(problem), status=problem.status, content_type="application/problem+json"
        )


def _peer(request: web.Request) -> Peer:
    """Return who is at the other end of a connection."""
    transport = request.transport
    if transport is None:
        raise ConnectionResetError
    # uvloop's socket object has no getsockopt.
    with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as connection:
        return Peer.of(connection)


def _refused(error: web.HTTPException) -> Problem:
    """Return what aiohttp refuses as a problem."""
    advice = {404: "see /openapi.json for what there is", 405: "see /openapi.json for what there is"}
    detail = f"a body of more than {_MAX_BODY} bytes" if error.status == 413 else error.reason
    return Problem("about:blank", error.reason, error.status, detail, advice.get(error.status, ""))
