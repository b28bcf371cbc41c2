"""What can be asked for. Each action is a coroutine of `Actions`, with its place in `ACTIONS`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import attrs
import msgspec

from aiouffd.errors import SessionError, SourceError, TraceError, UffdError
from aiouffd.handoff.own_threads import in_own_thread
from aiouffd.pager.process.state import LASTING
from aiouffd.server.clashes import MAPPING, why_not
from aiouffd.server.clients import only
from aiouffd.server.control.values import (
    Attach,
    Attached,
    Completed,
    Drain,
    Evict,
    Evicted,
    NewSession,
    NewSnapshot,
    Prefetch,
    Record,
    ServerView,
    SessionView,
    SnapshotProgress,
    Taken,
    check_path,
    decode,
)
from aiouffd.server.jail import JailedSocket
from aiouffd.server.listener import SocketFile
from aiouffd.server.recordings import Recorded, Terms
from aiouffd.server.yielding import YieldsError
from aiouffd.store.attaching import attach
from aiouffd.store.place import is_snapshot
from aiouffd.store.resolve import as_layers

if TYPE_CHECKING:
    import socket
    from collections.abc import Coroutine

    from aiouffd.server.server import Server
    from aiouffd.server.session import Session
    from aiouffd.sources.base import Source
    from aiouffd.store.cache import ChunkCache

__all__ = ["ACTIONS", "Action", "Actions", "UnknownSessionError"]


class UnknownSessionError(SessionError):
    """There is no session of this name."""


@attrs.frozen
class Action:
    """Something that can be asked for.

    Attributes:
        name: of the method of `Actions` that does it.
        method: of HTTP.
        path: a template; what is in braces is passed to the method.
        summary: one line.
        body: the type of what comes; None: nothing does.
        answer: the type of what goes; None: nothing does.
        status: where it was done.
        body_needed: whether a body must come; else it has its defaults.
        ends: it is canceled when who has asked for it goes away.
    """

    name: str
    method: str
    path: str
    summary: str
    body: Any = None
    answer: Any = None
    status: int = 200
    body_needed: bool = True
    ends: bool = False


log: logging.Logger = logging.getLogger("aiouffd.server")

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds, between two tries to open a source
_CREATED = "created"  # in the note of a session: what it was created with
_SESSION = "/v1/sessions/{name}"

ACTIONS: Final = (
    Action("server", "GET", "/v1/server", "Tell of the server, and of all sessions together.", answer=ServerView),
    Action("sessions", "GET", "/v1/sessions", "List the sessions.", answer=list[SessionView]),
    Action("create", "POST", "/v1/sessions", "Create a session; its socket listens.", NewSession, SessionView, 201),
    Action("session", "GET", _SESSION, "Tell of a session.", answer=SessionView),
    Action(
        *("prefetch", "POST", f"{_SESSION}/prefetch", "Bring a range of the source to all its clients, and wait."),
        *(Prefetch, SessionView, 200, False),
    ),
    Action(
        *("evict", "POST", f"{_SESSION}/evict", "Drop a range, as far as it was not written: a touch brings it again."),
        *(Evict, Evicted, 200, False),
    ),
    Action(
        *("complete", "POST", f"{_SESSION}/complete", "Bring all that its clients miss, and serve them no longer."),
        *(None, Completed),
    ),
    Action("record", "POST", f"{_SESSION}/recording", "Record first touches.", Record, SessionView, 201),
    Action("stop", "DELETE", f"{_SESSION}/recording", "Complete what is recorded.", answer=list[Recorded]),
    Action(
        *(
            "attach",
            "POST",
            f"{_SESSION}/recording/attach",
            "Keep a recording with the snapshot that the session serves.",
        ),
        *(Attach, Attached),
    ),
    Action(
        *("drain", "POST", f"{_SESSION}/drain", "Take no new clients; the session is deleted when the last has left."),
        *(Drain, SessionView, 202, False),
    ),
    Action("delete", "DELETE", _SESSION, "Delete a session that has no clients.", status=204),
    Action(
        *("snapshot", "POST", f"{_SESSION}/snapshot", "Write the memory of a client at one moment, while it runs."),
        *(NewSnapshot, Taken),
        ends=True,
    ),
    Action("snapshotting", "GET", f"{_SESSION}/snapshot", "Tell how far the snapshot is.", answer=SnapshotProgress),
    Action("cancel", "DELETE", f"{_SESSION}/snapshot", "Have the snapshot end that is being written.", status=202),
)


class Actions:
    """Does what is asked for. What a coroutine raises is the answer as well.

    Args:
        server: entered.
        cache: for sources behind URLs.
        version: of the package.
    """

    def __init__(self, server: Server, cache: ChunkCache | None = None, *, version: str = "") -> None:
        self._server = server
        self._version = version
        self._cache = cache
        self._created: dict[Session, NewSession] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def aclose(self) -> None:
        """Delete nothing any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def server(self) -> ServerView:
        """Tell of the server."""
        return ServerView.of(self._server, self._version, os.getpid())

    async def sessions(self) -> list[SessionView]:
        """Tell of all sessions."""
        return [self._view(session) for session in self._server.sessions.values() if session.name]

    async def session(self, name: str) -> SessionView:
        """Tell of one."""
        return self._view(self._find(name))

    async def restore(self) -> None:
        """Create again what the server before this one had. What cannot be is served on, and takes no client.

        All at once: one whose source does not answer costs the others no time.
        """
        found = [(name, left) for name, left in self._server.left.items() if _CREATED in left.text]
        await asyncio.gather(*(self._restore(name, left) for name, left in found))

    async def _restore(self, name: str, left: Any) -> None:
        """Create one. A source may be out of order just now, which costs its session nothing for good."""
        error = await self._try(name, left)
        if error is not None:
            log.warning("session %s takes no clients yet, and is tried again: %s", name, error)
            self._begin(self._try_on(name, left))

    async def _try_on(self, name: str, left: Any) -> None:
        pause = _FIRST_PAUSE
        await asyncio.sleep(pause)
        while await self._try(name, left) is not None:
            pause = min(2 * pause, _LONGEST_PAUSE)
            await asyncio.sleep(pause)

    async def _try(self, name: str, left: Any) -> UffdError | None:
        """Create one; return why it is to be tried again, if it is."""
        try:
            await self._make(decode(json.dumps(left.text[_CREATED]).encode(), NewSession), left.listener)
        except (SourceError, YieldsError) as error:
            return error
        except (UffdError, OSError, ValueError) as error:
            log.error("session %s takes no clients any more: %s", name, error)  # noqa: TRY400 - it says why
        return None

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def create(self, new: NewSession) -> SessionView:
        """Create one. Its source is opened, so that a wrong one is refused now, and not by the first client."""
        return self._view(await self._make(new))

    async def _make(self, new: NewSession, made: socket.socket | None = None) -> Session:
        settings = new.settings()
        if new.name in self._server.sessions:
            raise SessionError(new.name, "is there already: delete it first, or use another name")
        _check_paths(new)
        try:
            async with asyncio.timeout(new.timeout):
                origin = await in_own_thread(self._open, new)
        except TimeoutError:
            raise SourceError(str(new.source), 0, 0, f"does not answer within {new.timeout:g} s") from None
        except OSError as error:
            raise SourceError(error.filename or str(new.source), 0, 0, error.strerror or str(error)) from error
        owner = (-1, -1) if new.owner is None else (new.owner.uid, -1 if new.owner.gid is None else new.owner.gid)
        kind = SocketFile if new.jail is None else functools.partial(JailedSocket, new.jail)
        listen = functools.partial(kind, new.socket, mode=int(new.mode, 8), owner=owner, made=made)
        note = {_CREATED: msgspec.to_builtins(new), LASTING: True}
        session = await self._server.create(new.name, origin, settings, listen, note=note)
        self._created[session] = new
        return session

    async def prefetch(self, name: str, wanted: Prefetch) -> SessionView:
        """Bring a range."""
        session = self._find(name)
        await session.prefetch(wanted.offset, wanted.length)
        return self._view(session)

    async def evict(self, name: str, wanted: Evict) -> Evicted:
        """Drop a range."""
        return Evicted(await self._find(name).evict(wanted.offset, wanted.length))

    async def complete(self, name: str) -> Completed:
        """Bring all."""
        session = self._find(name)
        failed = await session.fill()
        return Completed({str(number): why for number, why in failed.items()}, session.served)

    async def record(self, name: str, what: Record) -> SessionView:
        """Begin to record."""
        session = self._find(name)
        check_path("path", what.path)
        if session.mapped:
            raise SessionError(name, f"has clients that map files: {why_not({'record'}, MAPPING)}")
        await session.recordings.begin(Terms(what.path, what.merge, what.most, what.pages))
        return self._view(session)

    async def stop(self, name: str) -> list[Recorded]:
        """Stop it."""
        session = self._find(name)
        if session.recordings.terms is None:
            raise SessionError(name, "records nothing: begin a recording first")
        return await session.recordings.stop()

    async def attach(self, name: str, what: Attach) -> Attached:
        """Have a snapshot keep a recording; sessions that are created from now on replay it."""
        created = self._created.get(self._find(name))
        check_path("path", what.path)
        sources = [] if created is None else created.sources
        if len(sources) != 1 or not is_snapshot(sources[0]):
            raise SessionError(name, "does not serve a snapshot of a store, with which a recording could be kept")
        by = None if what.by == "replace" else what.by
        try:
            manifest = await attach(sources[0], what.path, by=by, most=what.most)
        except (TraceError, FileNotFoundError) as error:
            raise ValueError(f"{error} - at `$.path`") from error
        assert manifest.trace is not None
        return Attached(sources[0], manifest.trace.length)

    async def drain(self, name: str, how: Drain) -> SessionView:
        """Take no new clients. Who drains twice waits twice."""
        session = self._find(name)
        if session.taking:
            self._server.drain(session)
            self._begin(self._delete_drained(session))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(how.wait):
                await session.drained()
        return self._view(session)

    async def delete(self, name: str) -> None:
        """Delete one."""
        session = self._find(name)
        try:
            await self._server.remove(session)
        finally:  # it is there still if it has clients
            if self._server.sessions.get(name) is not session:
                self._created.pop(session, None)

    async def snapshot(self, name: str, wanted: NewSnapshot) -> Taken:
        """Take a snapshot of a client. Canceling is safe: there is none then."""
        session, began = self._find(name), monotonic()
        created = self._created.get(session)
        order = wanted.order([] if created is None else created.sources)
        client = only(session.clients.values(), wanted.client, name)
        taken = attrs.asdict(await session.snapshots.take(client, order))
        return Taken(client.number, order.destination, order.base, **taken, seconds=round(monotonic() - began, 3))

    async def snapshotting(self, name: str) -> SnapshotProgress:
        """Tell of the one that is being written."""
        running, read = await self._find(name).snapshots.progress()
        seconds, known = round(monotonic() - running.since, 3), read is not None
        return SnapshotProgress(running.client.number, running.order.destination, known, *(read or (0, 0)), seconds)

    async def cancel(self, name: str) -> None:
        """Cancel it: the answer to who waits for it says so."""
        self._find(name).snapshots.cancel()

    async def _delete_drained(self, session: Session) -> None:
        try:
            while self._server.sessions.get(session.name) is session:  # else it was deleted meanwhile
                await session.drained()
                try:
                    await self._server.remove(session)
                except YieldsError:
                    await asyncio.sleep(_FIRST_PAUSE)
        except (UffdError, OSError) as error:
            log.error("session %s was drained: %s", session.name, error)  # noqa: TRY400 - nobody waits for it
        finally:
            self._created.pop(session, None)

    def _open(self, new: NewSession) -> Source:
        source = as_layers(new.sources, timeout=new.timeout, retries=new.retries, cache=self._cache)
        if not source.size:
            raise SourceError(str(new.source), 0, 0, "has no bytes")
        return source

    def _find(self, name: str) -> Session:
        session = self._server.sessions.get(name) if name else None
        if session is None:
            raise UnknownSessionError(name, "is not there")
        return session

    def _view(self, session: Session) -> SessionView:
        return SessionView.of(session, self._created.get(session), monotonic())


def _check_paths(new: NewSession) -> None:
    """Refuse relative paths: they would be relative to where the server was started."""
    paths = {"jail": new.jail, "record": new.record, "replay": new.replay}
    paths |= {f"source[{at}]": source for at, source in enumerate(new.sources) if "://" not in source}
    if new.jail is None:
        paths["socket"] = new.socket
    for field, path in paths.items():
        if path is not None:
            check_path(field, path)
