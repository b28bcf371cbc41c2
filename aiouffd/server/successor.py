"""What a server before this one has left: its clients, sockets and sessions, which a holder gives.

Both sides of it. A server keeps a note of each session and of each client in its pager, whose holder has it when all
others are killed. The next server takes what there is, has its own pager serve the memory at once, and gives each
session what was its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import socket
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

import attrs

from aiouffd.engine.mappings import Mapping
from aiouffd.errors import PagerStartError, UffdError
from aiouffd.handoff.own_threads import detach
from aiouffd.handoff.receive import Peer
from aiouffd.pager.client.fd_store import FdStore
from aiouffd.pager.client.packing import Pack
from aiouffd.pager.client.succession import Estate, HolderLostError, Predecessor
from aiouffd.pager.process.state import LASTING, RECORDING
from aiouffd.server.clients import Client, Handed
from aiouffd.server.listener import SocketFile

if TYPE_CHECKING:
    from collections.abc import Iterable
    from concurrent.futures import Future

    from aiouffd.pager.client.client import PagerClient
    from aiouffd.pager.client.tenant import Tenant
    from aiouffd.pager.process.state import Note

__all__ = [
    "DRAINING",
    "SOCKET",
    "SYSTEMD",
    "Left",
    "Successor",
    "fill_left",
    "forget_session",
    "keep_client",
    "keep_drained",
    "keep_session",
    "let_go",
]

log: logging.Logger = logging.getLogger("aiouffd.server")

SYSTEMD: Final = "systemd"
"""In place of a path: systemd's store of file descriptors."""

_HOLDER = "holder"  # the note of the socket at which successors ask
_SESSION = "session "  # notes of sessions are named so, and by the session
_DRAINED = "drained "  # of those that take no client any more: without a socket
DRAINING: Final = "draining"
"""In the text of such a note, as it is left."""
_PEER = "peer"  # in the text of a client's note, and of no other
SOCKET: Final = "socket "
"""Notes of further sockets are named so, and by what listens there."""

_ENDING = 15.0  # seconds for a holder to end
_AGAIN = 0.05  # seconds between two tries to reach the next
_LOSSES = 50  # holders in a row that may end before one of them has given all
_TIMEOUT = 90.0  # seconds for the next source or space to be opened
_REMINDER = 10.0  # seconds between two messages about what cannot be given up


def keep_session(pager: PagerClient, name: str, listener: socket.socket, text: dict[str, Any]) -> None:
    """Keep a note of a session: its socket, and what whoever makes it again needs."""
    pager.holding.keep(_SESSION + name, text, [listener.fileno()])


def keep_drained(pager: PagerClient, name: str, text: dict[str, Any]) -> None:
    """Keep a note of a session that takes no client any more, as long as it has clients."""
    pager.holding.keep(_DRAINED + name, {key: value for key, value in text.items() if key != LASTING})


def forget_session(pager: PagerClient, name: str, *, drained: bool = False) -> None:
    """Keep no note of its socket any more: nobody listens there; or, where it was drained, of the session."""
    pager.holding.forget((_DRAINED if drained else _SESSION) + name)


def keep_client(pager: PagerClient, client: Client) -> None:
    """Keep a note of a client."""
    text = {
        "session": client.session,
        "number": client.number,
        _PEER: attrs.astuple(client.peer),
        "ours": client.conversation is not None,
        "length": client.length,
        "since": client.since,
        "nydus": client.nydus,
        "places": client.places if client.tenant.pack.has_memory else [],
    }
    pager.holding.keep(client.tenant.token, text, [client.connection.fileno()])


@attrs.define(eq=False)
class Left:
    """What is left of a session.

    Attributes:
        text: of its note.
        listener: its socket; None: there was none.
        clients: those that are served, and whether they are our own, which ask questions.
        recordings: notes of what it records.
    """

    text: dict[str, Any] = attrs.field(factory=dict)
    listener: socket.socket | None = None
    clients: list[tuple[Client, bool]] = attrs.field(factory=list)
    recordings: list[Note] = attrs.field(factory=list)


def let_go(pager: PagerClient, left: Iterable[Left], tenant: Tenant) -> None:
    """Be done with a client that no session has, if it is one: it has ended, or has all its pages."""
    for its in left:
        for client in [client for client, _ in its.clients if client.tenant is tenant]:
            its.clients = [item for item in its.clients if item[0] is not client]
            tenant.slot = 0  # it is the session's
            pager.forget(tenant)
            tenant.uffd.close()
            if tenant.tether >= 0:
                os.close(tenant.tether)
            client.disconnect()
            if all(other.tenant.pack is not tenant.pack for other, _ in its.clients):
                detach(tenant.pack.close)


async def fill_left(pager: PagerClient, left: Iterable[Left]) -> None:
    """Fill the memory of the clients that no session has, and be done with them; one where that fails stays served."""
    its = list(left)

    async def fill(tenant: Tenant) -> None:
        with contextlib.suppress(UffdError):
            await asyncio.wrap_future(pager.request("release", tenant))
            let_go(pager, its, tenant)

    await asyncio.gather(*(fill(client.tenant) for each in its for client, _ in each.clients))


class Successor:
    """Takes over what there is at a path, and sees to it that there is something for the next. Blocks.

    Args:
        path: of the socket at which a holder is asked; `SYSTEMD`: systemd's store has what a holder would have.
        pager: of this server.
        over: take over from a server that lives, too.

    Attributes:
        inherits: what it has was, and perhaps still is, that of a server before.
        left: by name, the sessions that no session of this server goes on with yet.
        sockets: by name, further ones.
    """

    def __init__(self, path: str | os.PathLike[str], pager: PagerClient, *, over: bool) -> None:
        self._path = path
        self._store: FdStore | None = None
        self._pager = pager
        self._over = over
        self._predecessor: Predecessor | None = None
        self._file: SocketFile | None = None
        self.inherits: bool = False
        self._packs: dict[str, Pack] = {}  # by token, of sources that are open in the pager
        self.left: dict[str, Left] = defaultdict(Left)
        self.sockets: dict[str, socket.socket] = {}

    def begin(self) -> None:
        """See what there is, and give the pager's holder its socket. Before the pager is started.

        Raises:
            OSError: EADDRINUSE: a server lives there, and is not to be taken over from.
            PagerStartError: what there is cannot be read.
        """
        if self._path == SYSTEMD:
            self._store = self._pager.holding.store = FdStore.of_systemd()
            self.inherits = True
            return
        made = None
        self._predecessor, estate = self._meet()
        self.inherits = estate is not None
        if estate is not None:
            try:
                if estate.owned and not self._over:
                    reason = "another server serves there: --takeover takes its clients over"
                    raise OSError(errno.EADDRINUSE, reason, os.fspath(self._path))
                if _HOLDER not in estate.state.notes:
                    raise PagerStartError(f"what is held at {self._path} is not complete: its server has died early")
                (fd,) = estate.state.notes[_HOLDER].fds
                made = socket.socket(fileno=estate.take(fd))
            finally:
                estate.close()
        self._file = SocketFile(self._path, kind=socket.SOCK_SEQPACKET, made=made)
        self._pager.holding.listener = self._file.listener
        if self._predecessor is not None:
            self._pager.holding.lifeline = self._predecessor.connection

    def _meet(self) -> tuple[Predecessor, Estate] | tuple[None, None]:
        """Return who holds there, and what; one that ends meanwhile, since there is nothing of use, holds nothing."""
        until = time.monotonic() + _ENDING
        while (found := Predecessor.at(self._path)) is not None:
            try:
                return found, found.look()
            except HolderLostError:
                found.close()
                if time.monotonic() > until:
                    raise
                time.sleep(_AGAIN)
        return None, None

    def succeed(self) -> None:
        """Take over. The pager runs.

        Raises:
            PagerStartError, OSError: nothing was taken: who has served before goes on.
        """
        if self._store is not None:
            estate = Estate.stored(self._store)
            if estate is not None:
                self._take(estate)
            self._store.forget_unknown()
            return
        assert self._file is not None
        if self._predecessor is not None:
            self._take(self._ask(self._predecessor))
            _await_surely(self._pager.holding.go())
            self._predecessor.serving()
            self._predecessor.close()
        self._pager.holding.keep(_HOLDER, {}, [self._file.listener.fileno()])

    def _ask(self, holder: Predecessor) -> Estate:
        """Return all that there is: nobody serves it any more. Where a holder was killed, the next one is asked."""
        for losses in itertools.count(1):  # not so many seconds: what is asked takes its time
            try:
                there = holder.look()
                if there.owned:  # sources are opened while it serves; what cannot be opened is no reason to end it
                    self._prepare(there)
                else:
                    there.close()
                return holder.take(over=self._over, journal=self._pager.holding.journal)
            except HolderLostError:
                holder.close()
                time.sleep(_AGAIN)
                found = Predecessor.at(self._path)
                if found is None or losses > _LOSSES:
                    raise
                log.warning("the holder was killed: the next one is asked")
                holder = self._predecessor = found
                # The owner of the one before waits until no process has that connection any more.
                _await([self._pager.holding.reach(holder.connection)])
        raise AssertionError

    def close(self, *, leave: bool = False) -> None:
        """Be done: the socket's file is removed; `leave`: it stays, since others are asked there."""
        if self._predecessor is not None:
            self._predecessor.close()
        if self._file is not None and not leave:
            self._file.close()

    def _prepare(self, estate: Estate) -> None:
        opening = []
        for record in estate.state.origins.values():
            if record["token"] in self._packs:  # of a holder that was killed
                continue
            pack = self._packs[record["token"]] = self._arrived(estate, record)
            opening.append(self._pager.prepare(pack))
        estate.close()
        _await(opening)

    def _take(self, estate: Estate) -> None:
        state, pager = estate.state, self._pager
        packs: dict[int, Pack] = {}
        for identity, record in state.origins.items():
            known = self._packs.pop(record["token"], None)
            packs[identity] = known if known is not None else self._arrived(estate, record)
            pager.slots.reserve(record["slot"])
        served = {space.token for space in state.spaces.values() if not space.is_child}
        for note in state.notes.values():
            if _PEER in note.text and note.name not in served:
                continue  # its handoff was lost with who received it: it hears that, since its connection ends
            for fd in note.fds:
                estate.take(fd)
            pager.holding.keep(note.name, note.text, note.fds)
            if note.name.startswith(SOCKET):
                self.sockets[note.name.removeprefix(SOCKET)] = socket.socket(fileno=note.fds[0])
            elif note.name.startswith(_SESSION):
                self._left_session(note.name.removeprefix(_SESSION), note.text, note.fds)
            elif note.name.startswith(_DRAINED):
                self._left_session(note.name.removeprefix(_DRAINED), note.text | {DRAINING: True}, [])
            elif note.name.startswith(RECORDING):
                self.left[note.text["session"]].recordings.append(note)
        for space in state.spaces.values():
            estate.take(space.fd)
            if space.tether >= 0:
                estate.take(space.tether)
            its = state.notes.get(space.token)
            if its is not None and not space.is_child:
                tenant = Handed.left(space, packs[space.origin], state, peer=Peer(*its.text[_PEER]))
                pager.add(tenant)
                self._left_client(tenant, its.text, its.fds)
        _await(pager.holding.restore(estate.journal, state, packs))
        estate.close()
        for pack in self._packs.values():
            pack.close()

    def _arrived(self, estate: Estate, record: dict[str, Any]) -> Pack:
        for fd in (record["config"], *record["fds"]):
            estate.take(fd)
        return Pack.arrived(record)

    def _left_session(self, name: str, text: dict[str, Any], fds: list[int]) -> None:
        left = self.left[name]
        left.text |= text  # where both notes are there, it was being drained
        if fds:
            left.listener = socket.socket(fileno=fds[0])
        self._pager.slots.reserve(text["slot"])

    def _left_client(self, tenant: Handed, text: dict[str, Any], fds: list[int]) -> None:
        client = Client(
            text["number"],
            tenant.peer,
            tenant,
            text["length"],
            socket.socket(fileno=fds[0]),
            since=text["since"],
            session=text["session"],
            nydus=text.get("nydus", False),
            places=[Mapping(*place) for place in text.get("places", [])],
        )
        self.left[client.session].clients.append((client, text["ours"]))


def _await(futures: Iterable[Future[Any]]) -> None:
    for future in futures:
        try:
            future.result(_TIMEOUT)
        except TimeoutError:
            raise PagerStartError(f"the pager has opened no further source or memory within {_TIMEOUT:g} s") from None


def _await_surely(going: Future[Any]) -> None:
    """Wait for what cannot be taken back once it was asked for: the pager may do it at any time."""
    while True:
        with contextlib.suppress(TimeoutError):
            going.result(_REMINDER)
            return
        log.warning("the pager was told to serve what it has taken over, and has not answered: it is waited for")
