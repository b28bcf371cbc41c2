"""What can be asked for. Each action is a coroutine of `Actions`, with its place in `ACTIONS`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import attrs

from aiouffd.engine.flight import spawn
from aiouffd.errors import SessionError, SourceError, TraceError, UffdError
from aiouffd.handoff.own_threads import in_own_thread
from aiouffd.server.clashes import MAPPING, why_not
from aiouffd.server.clients import only
from aiouffd.server.control.restoring import FIRST_PAUSE, Restoring, listens, note_of
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
)
from aiouffd.server.recordings import Recorded, Terms
from aiouffd.server.yielding import YieldsError
from aiouffd.store.attaching import attach
from aiouffd.store.place import is_snapshot
from aiouffd.store.resolve import as_layers

if TYPE_CHECKING:
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
        self._restoring = Restoring(server, self._origin)

    async def aclose(self) -> None:
        """Delete nothing any more."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, self._restoring.aclose(), return_exceptions=True)

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
        """Go on with the sessions of the server before this one. No source is waited for."""
        self._created |= await self._restoring.begin()
        for session in self._created:
            if session.state == "draining":
                self._begin(self._delete_drained(session))

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return spawn(self._tasks, work)

    async def create(self, new: NewSession) -> SessionView:
        """Create one. Its source is opened, so that a wrong one is refused now, and not by the first client."""
        settings = new.settings()
        if new.name in self._server.sessions:
            raise SessionError(new.name, "is there already: delete it first, or use another name")
        _check_paths(new)
        origin = await self._origin(new)
        session = await self._server.create(new.name, origin, settings, listens(new), note=note_of(new))
        self._created[session] = new
        return self._view(session)

    async def _origin(self, new: NewSession) -> Source:
        """Open what is to serve. Canceling is safe."""
        try:
            async with asyncio.timeout(new.timeout):
                return await in_own_thread(self._open, new)
        except TimeoutError:
            raise SourceError(str(new.source), 0, 0, f"does not answer within {new.timeout:g} s") from None
        except OSError as error:
            raise SourceError(error.filename or str(new.source), 0, 0, error.strerror or str(error)) from error

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
        async with self._restoring.paused(session):
            if session.state != "draining":
                self._server.drain(session)
                self._begin(self._delete_drained(session))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(how.wait):
                await session.drained()
        return self._view(session)

    async def delete(self, name: str) -> None:
        """Delete one. Where its source could not be opened yet, its clients are given up."""
        session = self._find(name)
        async with self._restoring.paused(session):
            try:
                await self._restoring.give_up(session)
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
                    await asyncio.sleep(FIRST_PAUSE)
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
