"""Sessions of the server before this one: there at once, and taking clients as soon as their source can be opened.

A source may be out of order just now, or not answer. That costs its session no client, and the others no time. While it
is tried again, the session can be asked, drained and deleted as any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
from typing import TYPE_CHECKING, Any, Final

import msgspec

from aiouffd.engine.flight import spawn
from aiouffd.errors import UffdError
from aiouffd.lifetime import uninterrupted
from aiouffd.pager.process.state import LASTING
from aiouffd.server.control.values import NewSession, decode
from aiouffd.server.jail import JailedSocket
from aiouffd.server.listener import SocketFile
from aiouffd.server.rejection import Rejections

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Awaitable, Callable

    from aiouffd.server.rejection import Policy
    from aiouffd.server.server import Server
    from aiouffd.server.session import Session
    from aiouffd.server.successor import Left

__all__ = ["FIRST_PAUSE", "Restoring", "listens", "note_of"]

log: logging.Logger = logging.getLogger("aiouffd.server")

FIRST_PAUSE: Final = 1.0
"""Seconds until something is tried again."""
_LONGEST_PAUSE = 30.0
_CREATED = "created"  # in the note of a session: what it was created with


def note_of(new: NewSession) -> dict[str, Any]:
    """Return what a server after this one needs to go on with a session."""
    return {_CREATED: msgspec.to_builtins(new), LASTING: True}


def listens(new: NewSession, made: socket.socket | None = None) -> Callable[[], SocketFile]:
    """Return what makes the socket of a session; made: it takes over this one, of a server before this one."""
    owner = (-1, -1) if new.owner is None else (new.owner.uid, -1 if new.owner.gid is None else new.owner.gid)
    kind = SocketFile if new.jail is None else functools.partial(JailedSocket, new.jail)
    return functools.partial(kind, new.socket, mode=int(new.mode, 8), owner=owner, made=made)


class Restoring:
    """Goes on with them. Used on the server's loop.

    Args:
        server: entered.
        find: returns what is to serve a session. Canceling it is safe.
    """

    def __init__(self, server: Server, find: Callable[[NewSession], Awaitable[Any]]) -> None:
        self._server, self._find = server, find
        self._trying: dict[Session, tuple[NewSession, asyncio.Task[None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._rejections: dict[Policy, Rejections] = {}

    async def begin(self) -> dict[Session, NewSession]:
        """Have all of them there, and return what each was created with. No source is waited for."""
        found = {}
        for name, left in [(name, left) for name, left in self._server.left.items() if _CREATED in left.text]:
            try:
                new = decode(json.dumps(left.text[_CREATED]).encode(), NewSession)
                settings = new.settings()
            except (UffdError, ValueError) as error:  # of a later version
                log.error("session %s takes no clients any more: %s", name, error)  # noqa: TRY400 - it says why
                continue
            session = self._server.add(name, None, settings, note_of(new))
            session.adopt(self._server.left.pop(name))
            found[session] = new
            await self._record_on(session, left)
            if session.state == "restoring":
                self._try(session, new)
        return found

    async def aclose(self) -> None:
        """Try no longer, and let go of clients that were given up."""
        for rejections in self._rejections.values():
            rejections.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def paused(self, session: Session) -> AsyncIterator[None]:
        """Change a session in this block, which is not tried meanwhile, nor after it where it was drained."""
        new, task = self._trying.pop(session, (None, None))
        try:
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
            yield
        finally:
            if new is not None and session.state == "restoring":
                self._try(session, new)

    async def give_up(self, session: Session) -> None:
        """Have the clients of a session get what its settings say of pages that cannot be had, if it is not open yet.

        Raises:
            YieldsError: another server is about to take over.
        """
        if session.state == "restoring":
            policy = session.settings.on_failure
            with self._server.yielding.change(session.name):
                await session.give_up(self._rejections.setdefault(policy, Rejections(policy)))

    async def _record_on(self, session: Session, left: Left) -> None:
        """Have what it records go on."""
        try:
            await uninterrupted(functools.partial(session.recordings.prepare, session.settings.record, left))
        except (UffdError, OSError) as error:
            log.warning("session %s does not record: %s", session.name, error)

    def _try(self, session: Session, new: NewSession) -> None:
        self._trying[session] = new, spawn(self._tasks, self._open(session, new))

    async def _change(
        self, session: Session, work: Callable[[], None], then: Callable[[], None] = lambda: None
    ) -> bool:
        """Do work that blocks, and something then; return False where the server has stopped listening meanwhile."""
        with self._server.yielding.change(session.name):
            await uninterrupted(work)
            if session.state == "draining":
                session.stop_listening()  # with what was made
                return False
            then()
            return True

    async def _open(self, session: Session, new: NewSession) -> None:
        """Have it take clients as soon as that can be."""
        pause, said = FIRST_PAUSE, ""
        listen = listens(new, session.entrance.listener)
        while True:
            try:
                await self._change(session, functools.partial(session.entrance.bind, listen))
                origin = await self._find(new)
                if not await self._change(session, functools.partial(session.serve, origin), session.open):
                    return
            except (UffdError, OSError, ValueError) as error:
                if str(error) != said:
                    log.warning("session %s takes no clients yet, and is tried again: %s", session.name, error)
                said, session.source = str(error), f"not open: {error}"
            else:
                log.info("session %s is restored", session.name)
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
