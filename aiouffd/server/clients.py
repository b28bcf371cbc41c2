"""Clients of a server, and the conversation with those of them that ask questions."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from time import monotonic
from typing import TYPE_CHECKING, Any

import attrs

from aiouffd.engine.flight import spawn
from aiouffd.errors import HandoffError, SessionError, UffdError, encode_error
from aiouffd.handoff.json_lines import AGAIN, Lines, line
from aiouffd.handoff.own_threads import Unneeded
from aiouffd.handoff.receive import Peer, receive
from aiouffd.kernel.userfaultfd import Userfaultfd
from aiouffd.pager.client.tenant import Tenant, root_of
from aiouffd.ranges import Range

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from aiouffd.engine.mappings import Mapping, Mappings

__all__ = ["Client", "Conversation", "Handed", "only"]

log: logging.Logger = logging.getLogger("aiouffd.server")

_MAX_REQUESTS = 256  # of one client, without an answer


@attrs.define(eq=False, repr=False)
class Handed(Tenant):
    """Memory that was handed over.

    Attributes:
        peer: who has done so. Where it has no payer, it shares with all that the peer hands over.
    """

    peer: Peer = attrs.field(kw_only=True)

    def record(self, mappings: Mappings) -> dict[str, Any]:
        """Return what a pager is told of it."""
        payer = self.payer or (str(self.peer) if self.peer.pid else f"client {root_of(self.token)}")
        return {**super().record(mappings), "payer": payer}


@attrs.define(eq=False, repr=False)
class Client:
    """A process whose memory is served.

    Attributes:
        number: counts the handoffs of a session, from 1 on.
        peer: who it is.
        tenant: the memory.
        length: bytes of it.
        connection: on which the handoff came. Its end tells that one of our own clients has left.
        conversation: with one of our own clients; None: it is another one, which reads nothing.
        since: when it was taken, on the monotonic clock.
        pidfd: of the peer; -1: its process cannot be seen.
        session: the name of the session that it came to.
        nydus: it may ask for the size, as nydus' clients do.
        places: which addresses [start, end) have which offset of the source, as it was handed over.
    """

    number: int
    peer: Peer
    tenant: Tenant
    length: int
    connection: socket.socket
    conversation: Conversation | None = None
    since: float = attrs.field(factory=monotonic)
    pidfd: int = -1
    session: str = ""
    nydus: bool = False
    places: list[Mapping] = attrs.field(factory=list)

    def __str__(self) -> str:
        return f"{self.session and f'session {self.session}, '}client {self.number} ({self.peer})"

    @property
    def end(self) -> int:
        """How far into its source the memory shows, in bytes."""
        return max(mapping.offset + mapping.end - mapping.start for mapping in self.tenant.mappings)

    @property
    def has_memory(self) -> bool:
        """Whether it has handed over the file behind its memory."""
        return self.tenant.pack.has_memory

    def turned_away(self) -> tuple[socket.socket, Peer, Userfaultfd, list[Range]]:
        """Return what `Rejections.reject` takes, as duplicates."""
        uffd = self.tenant.uffd
        kept = Userfaultfd.from_fd(os.dup(uffd.fileno()), uffd.features)
        claimed = [Range(each.start, each.end - each.start) for each in self.tenant.mappings]
        return self.connection.dup(), self.peer, kept, claimed

    def disconnect(self) -> None:
        """End the connection. Does not block: in its queue may be descriptors whose close(2) does."""
        if self.connection.fileno() >= 0:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)  # whoever is at its other end hears of it now
            Unneeded.here().add(self.connection.detach())


def only(clients: Iterable[Client], number: int | None, session: str) -> Client:
    """Return the client of a number; None: the only one there is.

    Raises:
        SessionError: there is none, or several.
    """
    known = list(clients)
    found = [client for client in known if number in (None, client.number)]
    if len(found) != 1:
        numbers = ", ".join(str(client.number) for client in known)
        reason = f"has these clients, of which one must be named: {numbers}" if known else "has no client"
        raise SessionError(session, reason)
    return found[0]


class Conversation:
    """Answers the requests of one of our own clients, and reports errors to it.

    Args:
        connection: non-blocking. It stays the caller's.
        answer: carries out a request, and returns what it is answered with. An `UffdError` or `ValueError` is sent
            to the client.
    """

    def __init__(self, connection: socket.socket, answer: Callable[[dict[str, Any]], Awaitable[Any]]) -> None:
        self._connection = connection
        self._peer = Peer.of(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # nothing is asked for before it was taken
        self._answer = answer
        self._sending = asyncio.Lock()  # one line at a time
        self._unsent = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, *, again: bool = False) -> None:
        """Answer requests until the client leaves. They are carried out concurrently.

        Canceling is safe: requests that are being carried out are canceled as well.

        Args:
            again: another process has answered before, or this one until it was canceled.

        Raises:
            HandoffError, ValueError, OSError: the client sends what is no request, or its connection is broken.
        """
        lines = Lines(AGAIN if again else "")
        places = asyncio.Semaphore(_MAX_REQUESTS)
        try:
            while data := (await receive(self._connection, 64 << 10, sender=self._peer))[0]:
                for message in lines.feed(data):
                    number = message.get("id")
                    if type(number) is not int:
                        raise HandoffError("a client", f"sent {message!r:.80}, which is no request")
                    await places.acquire()  # a client that asks faster than it can be answered is not read from
                    spawn(self._tasks, self._carry_out(number, message, places))
        finally:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def report(self, error: BaseException) -> None:
        """Send an error that belongs to no request, as soon as the client reads."""
        spawn(self._tasks, self.tell({"error": encode_error(error, private=False)}))

    async def tell(self, message: dict[str, Any]) -> None:
        """Send a line, and wait until the client has read what is before it. Too many that wait are dropped."""
        if self._unsent >= 2 * _MAX_REQUESTS:
            return
        self._unsent += 1
        try:
            async with self._sending:
                with contextlib.suppress(OSError):
                    await asyncio.get_running_loop().sock_sendall(self._connection, line(message))
        finally:
            self._unsent -= 1

    async def _carry_out(self, number: int, message: dict[str, Any], places: asyncio.Semaphore) -> None:
        answer: dict[str, Any] = {"id": number}
        try:
            answer["ok"] = await self._answer(message)
        except Exception as error:
            if not isinstance(error, UffdError | ValueError):
                log.exception("a request could not be carried out")
            answer["error"] = encode_error(error, private=False)
        finally:
            places.release()
        await self.tell(answer)
