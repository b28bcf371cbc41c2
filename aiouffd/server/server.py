"""The face for memory of other processes: takes handoffs on Unix sockets, and has a pager serve them.

The process that listens does not serve. The pager does: it survives its own death, and goes on when the listener ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import attrs

from aiouffd.engine.one_copy import page_size_of
from aiouffd.engine.options import Options
from aiouffd.engine.serve.bounds import Limits
from aiouffd.engine.statistics import Counters, told
from aiouffd.errors import SessionError
from aiouffd.handoff.own_threads import Unneeded
from aiouffd.lifetime import uninterrupted
from aiouffd.pager.client.client import PagerClient
from aiouffd.pager.process.serialization import Pickles
from aiouffd.report.observers import NOBODY, installed
from aiouffd.report.words import several
from aiouffd.server.clients import Client
from aiouffd.server.happenings import Happenings
from aiouffd.server.listener import SocketFile
from aiouffd.server.rejection import on_error_of
from aiouffd.server.services import Settings
from aiouffd.server.session import Session
from aiouffd.server.successor import SOCKET, Left, Successor, fill_left, let_go
from aiouffd.server.yielding import Yielding

if TYPE_CHECKING:
    import os
    import socket
    from collections.abc import Callable, Collection
    from types import TracebackType

    from aiouffd.engine.ahead.pages import Recording
    from aiouffd.engine.statistics import Statistics
    from aiouffd.handoff.nydus import Answers
    from aiouffd.pager.client.tenant import Tenant
    from aiouffd.report.observers import ServerWatch
    from aiouffd.server.rejection import Policy

__all__ = ["Client", "Server"]

log: logging.Logger = logging.getLogger("aiouffd.server")


class Server:
    """Serves the processes that hand over a userfaultfd on a socket: Firecracker, and Monitors with `ServedBy(path)`.

    An asynchronous context manager. Entering it starts listening. Leaving it ends the listener; the pager goes on
    serving each client until it is gone, unless `fill` came before.

    Args:
        origin: a source or a handler for all clients; or a function of (peer, number of the client, name that it asks
            for) that returns one. The function runs in a thread, and may raise an error to turn the client away. Equal
            sources (by their `identity`, else the same object) are read once for all their clients, and closed with
            the last one. None: there is no socket until `create` makes one.
        path: of the socket, which is made; None: `listener` is used.
        listener: a socket that listens already (systemd's).
        mode: of the socket's file.
        uids: the users that may connect, besides root and the server's own.
        on_reject: what becomes of a client that is turned away after it has sent its userfaultfd, and does not read
            why: `poison` makes its missing pages SIGBUS (Linux 6.6), `kill` ends the process that connected, `hold`
            lets it wait.
        on_failure: what becomes of a client, after all tries, whose page cannot be had: `poison` makes the page
            SIGBUS, `kill` ends the process that connected, also when the pager is given up, and `hold` asks for the
            page again and again, while its threads wait.
        readahead: the largest window that one fault brings, in bytes; 0 serves page by page.
        spin_us: microseconds to poll for further faults before sleeping, while faults keep coming.
        background: bytes per second to fill without a fault; 0: none.
        record: a file for the order of first touches of all clients together, of the first one's source and page size;
            or a directory, in which each source and page size has a file. They are complete when the server is left.
            With `Recording(path, pages=True)` they also carry the bytes of the pages, which are read again at the end.
        replay: such a file or directory, whose pages are prefetched for each client.
        timeout: seconds for opening a source, and for each read of it; None: no limit.
        retries: further tries after a failed read. None: 4, and for URLs as many as two thirds of the timeout allow.
        concurrent_reads: the most reads of sources at once.
        bytes_in_flight: the most bytes of these reads together.
        client_events: the most events per second (faults, layout events) that are read for the memory of one process,
            its forked children included. Who exceeds them waits, and nobody else. None: no limit.
        client_bytes: the most bytes per second that are placed for it: with its faults, ahead of them, or to fill it.
            None: no limit. Up to one second's worth of either may come at once.
        recent: bytes of what was read last from sources that are far, of all sessions together, which are kept in
            memory for other clients of the same source. What two clients want at once is read once in any case.
        handoff_timeout: seconds that a client has to send its handoff.
        nydus_answers: what precedes each answer to a client of nydus: its length, or nothing (`bare`).
        one_copy: "small" or "huge" (pages of 2 MiB): each client is sent a file of memory (a memfd) as it connects. It
            maps that privately, and registers it for missing pages and minor faults: what is read is there once for
            all of them. None: no file is sent. Other clients are served as well.
        hold: a path. Clients, sockets and sessions outlive this process and its pager, however they end: the next
            server with this path has them. "systemd": its store of file descriptors has them, until it starts the
            service again; memory whose forks are told is refused then. None: they do not.
        takeover: take them over from a server that lives, too. It ends when this one serves.

    Raises on entering:
        OSError: the socket cannot be made (EADDRINUSE: another server listens there), or `record` cannot be written.
        TraceError: `replay` is not a recording.
        PagerStartError: the pager did not start, or cannot take over; who was to be taken over from serves on.
    """

    _watch: ServerWatch = NOBODY

    def __init__(
        self,
        origin: Any = None,
        path: str | os.PathLike[str] | None = None,
        *,
        listener: socket.socket | None = None,
        mode: int = 0o600,
        uids: Collection[int] = (),
        on_reject: Policy = "poison",
        on_failure: Policy = "poison",
        readahead: int = 2 << 20,
        spin_us: int = 50,
        background: float = 0.0,
        record: str | os.PathLike[str] | Recording | None = None,
        replay: str | os.PathLike[str] | None = None,
        timeout: float | None = 30.0,
        retries: int | None = None,
        concurrent_reads: int = 128,
        bytes_in_flight: int = 128 << 20,
        client_events: float | None = None,
        client_bytes: float | None = None,
        recent: int = 128 << 20,
        handoff_timeout: float = 5.0,
        nydus_answers: Answers = "length",
        one_copy: Literal["small", "huge"] | None = None,
        hold: str | os.PathLike[str] | None = None,
        takeover: bool = False,
    ) -> None:
        _check_place(origin, path, listener)
        self._pager = PagerClient(
            on_error=lambda tenant, error: self._soon(self._failed, tenant, error),
            on_gone=lambda tenant: self._soon(self._gone, tenant),
            on_flight=lambda tenant, told: self._soon(self._landed, tenant, told),
            pickles=Pickles.ALWAYS,
        )
        self.sessions: dict[str, Session] = {}
        self._successor = None if hold is None else Successor(hold, self._pager, over=takeover)
        self._path, self._mode, self._listener = path and str(Path(path).absolute()), mode, listener
        limits = Limits(
            concurrent_reads, bytes_in_flight, timeout, retries, client_events=client_events, client_bytes=client_bytes
        )
        on_error = on_error_of(on_failure)
        options = Options(readahead, spin_us, background=background, limits=limits, on_error=on_error)
        options = attrs.evolve(options, one_copy=page_size_of(one_copy))
        settings = Settings(
            frozenset(uids), on_reject, on_failure, options, record, replay, handoff_timeout, nydus_answers
        )
        self._recent = recent
        self._ended = Counters().words.tolist()  # of sessions that are no more
        self._rejected = 0  # by these
        self._started = self._ending = False
        self.happenings: Happenings = Happenings()
        self._changed, self._dead, self._taken = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.yielding: Yielding = Yielding(self.sessions, self._pager)
        self._death: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop
        if origin is not None:
            self.add("", origin, settings, {"path": self._path})

    # Life

    async def __aenter__(self) -> Self:
        """Listen, and start the pager."""
        self._loop = asyncio.get_running_loop()
        successor = self._successor
        try:
            if successor is not None:
                await uninterrupted(successor.begin)
            await uninterrupted(self._pager.start)
            if successor is not None:
                await uninterrupted(successor.succeed)
            for session in self.sessions.values():
                left = self.left.get(session.name)
                await uninterrupted(functools.partial(session.prepare, self._listen, left))
        except BaseException:
            inherits = successor is not None and successor.inherits
            if not inherits:  # else nothing is closed in order: it is another server's, before this one or after it
                self.stop_listening()
            await uninterrupted(functools.partial(self._pager.stop, leave=inherits))
            if successor is not None:
                successor.close(leave=inherits)
            raise
        self._started = True
        if (observer := installed()) is not None:
            self._watch = observer.server(self)
        for session in self.sessions.values():
            session.open(self.left.pop(session.name, None))
        if successor is not None:
            holding = self._pager.holding
            holding.on_yield = lambda number: self._soon(self._yield, number)
            holding.on_kept = lambda: self._soon(self._go_on)
            holding.on_taken = lambda: self._soon(self._taken.set)
            holding.listen()
        return self

    def _listen(self) -> socket.socket | SocketFile:
        """Return the socket of the session without a name: that of a server before this one, if it is at its path."""
        if self._listener is not None:
            return self._listener
        left = self.left.get("")
        made = left.listener if left is not None and left.text.get("path") == self._path else None
        return SocketFile(self._path or "", mode=self._mode, made=made)

    def hand_on(self, name: str, listener: socket.socket) -> None:
        """Give a listening socket to the server after this one, as long as this one has it."""
        self._pager.holding.keep(SOCKET + name, {}, [listener.fileno()])

    def handed(self, name: str) -> socket.socket | None:
        """Return the socket that the server before this one has handed on by this name."""
        return self._successor.sockets.pop(name, None) if self._successor is not None else None

    @property
    def holds(self) -> bool:
        """Whether another server may take the place of this one, or this one has taken another's."""
        return self._successor is not None

    @property
    def left(self) -> dict[str, Left]:
        """The sessions of a server before this one that nobody has created again; `create` does."""
        return self._successor.left if self._successor is not None else {}

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take no new clients; the pager goes on serving those that are there."""
        self._watch.end()
        if self._taken.is_set():  # all of it is another process's
            await asyncio.to_thread(self._pager.stop, leave=True)
            return
        self.stop_listening()
        served = bool(self.clients)
        why = "goes on being served by the pager alone" if self._death is None else "is served no longer"
        sessions = list(self.sessions.values())

        def end() -> None:
            self._pager.stop(leave=served)
            if self._successor is not None and not served:
                self._successor.close()

        try:
            results = await asyncio.gather(*(session.aclose(why) for session in sessions), return_exceptions=True)
        finally:
            Unneeded.here().close()
            await uninterrupted(end)
        for error in filter(None, results):
            raise error  # that of the first; the others are done all the same

    def stop_listening(self) -> None:
        """Take no new clients, and no new sessions; those that are served stay."""
        self._ending = True
        for session in self.sessions.values():
            session.stop_listening()

    # A successor

    def _yield(self, number: str) -> None:
        """Another server is about to take over: take no client, and answer none."""
        log.info("another server takes over")
        self.yielding.begin(number)

    def _go_on(self) -> None:
        """It has failed."""
        log.warning("the other server has not taken over: serving on")
        self.yielding.end()

    async def wait_taken(self) -> None:
        """Wait until another server has taken over: this process has nothing left to do. Canceling is safe."""
        await self._taken.wait()

    # Sessions

    async def create(
        self,
        name: str,
        origin: Any,
        settings: Settings,
        listen: Callable[[], socket.socket | SocketFile],
        *,
        note: dict[str, Any] | None = None,
    ) -> Session:
        """Have clients served on another socket, until `remove`.

        Canceling is safe: there is no session then.

        Args:
            name: of the session.
            origin: as for the server.
            settings: how its clients are taken and served.
            listen: makes the socket; it may block.
            note: what `left` is to say of it in a server after this one: plain values.

        Raises:
            SessionError: there is a session of this name, or the server is about to end; YieldsError: another server is
                about to take over.
            OSError, TraceError: as on entering the server.
        """
        self._check_ending(name)
        if name in self.sessions:
            raise SessionError(name, "is there already: delete it first, or use another name")
        with self.yielding.change(name):
            session = self.add(name, origin, settings, note)
            try:
                await uninterrupted(functools.partial(session.prepare, listen, self.left.get(name)))
                self._check_ending(name)
            except BaseException:
                del self.sessions[name]
                session.stop_listening()
                raise
            session.open(self.left.pop(name, None))
        log.info("session %s is created", name)
        return session

    def _check_ending(self, name: str) -> None:
        if self._ending:
            raise SessionError(name, "cannot be created: the server is about to end")

    def drain(self, session: Session) -> None:
        """Have a session take no new clients. Raises YieldsError: another server is about to take over."""
        with self.yielding.change(session.name):
            session.stop_listening()

    async def remove(self, session: Session) -> None:
        """End a session, which serves nobody any more.

        Raises:
            SessionError: it has clients; YieldsError: another server is about to take over.
        """
        if not session.is_idle:
            reason = f"serves {several(session.served, 'client')}, or is just taking one: drain or complete it first"
            raise SessionError(session.name, reason)
        with self.yielding.change(session.name):
            del self.sessions[session.name]
            counted = session.statistics()
            self._ended = list(map(sum, zip(self._ended, session.counted, strict=True)))
            self._rejected += session.rejected
            try:
                await session.aclose("is served no longer")
            finally:
                log.info("session %s has ended: %s", session.name, counted)
                self._tell(session.name, "session.deleted", faults=counted.faults, pages=counted.pages)

    def add(self, name: str, origin: Any, settings: Settings, note: dict[str, Any] | None) -> Session:
        """Have a session that is neither prepared nor open; the arguments are as for `create`."""
        settings = settings.keeping(self._recent, traces=installed() is not None)
        tell = functools.partial(self._tell, name)
        session = Session(origin, settings, self._pager, name=name, note=note, tell=tell)
        self.sessions[name] = session
        return session

    def _tell(self, session: str, kind: str, **details: Any) -> None:
        self._changed.set()
        self.happenings.tell(kind, session, **details)
        self._watch.happened(session, kind, details)

    # All of them

    @property
    def clients(self) -> dict[str, Client]:
        """The clients of all sessions, by the token of their memory; with those in `left`."""
        left = {client.tenant.token: client for its in self.left.values() for client, _ in its.clients}
        return left | {token: client for session in self.sessions.values() for token, client in session.clients.items()}

    @property
    def served(self) -> int:
        """How many clients there are, with those that map files, and those in `left`."""
        return sum(session.served for session in self.sessions.values()) + sum(
            len(its.clients) for its in self.left.values()
        )

    async def wait_clients(self, most: int = 0) -> None:
        """Wait until at most so many clients are left. Canceling is safe."""
        while self.served > most:
            self._changed.clear()
            await self._changed.wait()

    async def fill(self) -> None:
        """Fill all missing pages of the clients, and release each client that has all. One that fails stays served."""
        filling = [session.fill() for session in self.sessions.values()]
        await asyncio.gather(*filling, fill_left(self._pager, self.left.values()))

    async def wait_dead(self) -> None:
        """Wait until the pager has been given up: nobody can be served any more. Canceling is safe.

        Raises:
            PagerDiedError: always; it says why.
        """
        await self._dead.wait()
        assert self._death is not None
        raise self._death

    def statistics(self) -> Statistics:
        """Return what the pager has counted, for all clients."""
        return attrs.evolve(Counters(array("Q", self._words)).snapshot(), clients=self.served)

    def told(self) -> dict[str, int]:
        """Return the same as plain values, without what is zero."""
        return {**told(self._words), "clients": self.served}

    @property
    def _words(self) -> list[int]:
        if not self._started:
            return Counters().words.tolist()
        counts = [self._pager.journal.counters.words.tolist(), self._ended]
        counts += [session.counted for session in self.sessions.values()]
        return list(map(sum, zip(*counts, strict=True)))

    def counted(self) -> list[tuple[str, int, list[int]]]:
        """Return the name of each session that has one, how many clients it has, and the words of its counters."""
        named = [session for session in list(self.sessions.values()) if session.name]
        return [(session.name, session.served, session.counted) for session in named]

    @property
    def rejected(self) -> int:
        """How many clients were turned away."""
        return self._rejected + sum(session.rejected for session in self.sessions.values())

    @property
    def pids(self) -> tuple[int, int]:
        """The pager's processes: keeper and worker."""
        return self._pager.pids

    def _gone(self, tenant: Tenant) -> None:
        let_go(self._pager, self.left.values(), tenant)
        self._changed.set()
        for session in list(self.sessions.values()):
            session.gone(tenant)

    def _landed(self, tenant: Tenant, told: dict[str, Any]) -> None:
        for session in list(self.sessions.values()):
            client = session.landed(tenant, told)
            if client is not None:
                self._watch.flight(session.name, client, told)

    def _failed(self, tenant: Tenant | None, error: BaseException) -> None:
        if tenant is None:
            self._death = error
            self._dead.set()
            self._tell("", "pager.died", reason=str(error))
        for session in list(self.sessions.values()):
            session.failed(tenant, error)

    def _soon(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(functools.partial(function, *arguments))


def _check_place(origin: Any, path: str | os.PathLike[str] | None, listener: socket.socket | None) -> None:
    if origin is None and (path is not None or listener is not None):
        raise ValueError("give a source or a handler for the clients of the socket")
    if origin is not None and (path is None) == (listener is None):
        raise ValueError("give either the path of a socket, or one that listens")
