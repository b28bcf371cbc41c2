"""Takes the connections of a listener, receives a handoff on each, and turns away what cannot be served."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from socket import send_fds
from time import monotonic
from typing import TYPE_CHECKING

from aiouffd.errors import HandoffError, UffdError, encode_error
from aiouffd.handoff.arrival import Arrival
from aiouffd.handoff.json_lines import line
from aiouffd.handoff.own_threads import close_apart, close_foreign
from aiouffd.loops import require_room
from aiouffd.ranges import Range
from aiouffd.server.rejection import Policy, Rejections

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Collection

    from aiouffd.handoff.arrival import Handoff
    from aiouffd.handoff.receive import Peer

__all__ = ["Reception"]

log: logging.Logger = logging.getLogger("aiouffd.server")

_MAX_INCOMPLETE = 64  # handoffs that are being received at once
_ROOM = 24  # descriptors: a connection, a handoff's, and a few that others take at the same time
_REMINDER = 10.0  # seconds between two messages about the same


class Reception:
    """Receives handoffs. What is wrong with one costs its own connection only.

    Args:
        serve: serves a handoff, and takes it and the connection; or raises, and leaves both.
        uids: the users that may connect.
        timeout: seconds that a client has to send its handoff.
        on_reject: what becomes of a client that is turned away; see `Server`.
        greeting: returns what each client is sent first, and a descriptor; None: nothing is.
        on_rejected: called with who was turned away, and why.
        stated: answers nydus' request for the size.
        session: whose clients they are, for the log; empty: it is the only one.

    Attributes:
        rejected: how many were turned away.
    """

    def __init__(
        self,
        serve: Callable[[Handoff, socket.socket], Awaitable[None]],
        *,
        uids: Collection[int],
        timeout: float,
        on_reject: Policy,
        greeting: Callable[[], tuple[bytes, int] | None] = lambda: None,
        on_rejected: Callable[[Peer, BaseException], None] = lambda *_: None,
        stated: Callable[[Peer], Awaitable[bytes]] | None = None,
        session: str = "",
    ) -> None:
        self._of = session and f"session {session}: "
        self._serve = serve
        self._greeting = greeting
        self._on_rejected = on_rejected
        self._stated = stated
        self._uids = uids
        self._timeout = timeout
        self._rejections = Rejections(on_reject)
        self.rejected: int = 0
        self._incomplete: dict[asyncio.Timeout, None] = {}  # handoffs, oldest first
        self._accepting: asyncio.Task[None] | None = None
        self._admissions: set[asyncio.Task[None]] = set()

    def open(self, listener: socket.socket) -> None:
        """Begin to take connections of a listening, non-blocking Unix socket. It stays the caller's."""
        self.close()
        self._accepting = asyncio.get_running_loop().create_task(self._accept(listener))

    def close(self) -> None:
        """Take no more connections; handoffs that are being received go on."""
        if self._accepting is not None:
            self._accepting.cancel()
            self._accepting = None

    @property
    def admitting(self) -> int:
        """How many handoffs are being received, or about to be served."""
        return len(self._admissions)

    async def settled(self) -> None:
        """Wait until each connection that was taken is served or turned away. Canceling is safe."""
        while self._admissions:
            await asyncio.wait(self._admissions)

    async def aclose(self) -> None:
        """Give up the handoffs that are being received, and let the held clients go."""
        self.close()
        for task in list(self._admissions):
            task.cancel()
        await asyncio.gather(*self._admissions, return_exceptions=True)
        self._rejections.close()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        told = -_REMINDER
        while True:
            try:
                await _readable(listener.fileno())
                require_room(_ROOM)  # else what a client hands over is lost, and it waits for ever
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:  # too many open files, most likely; connections wait in the backlog
                if monotonic() - told >= _REMINDER:
                    told = monotonic()
                    log.error("%sno client can be taken: %s", self._of, error.strerror)  # noqa: TRY400 - no traceback helps here
                await asyncio.sleep(0.1)
                continue
            connection.setblocking(False)
            task = loop.create_task(self._admit(connection))
            self._admissions.add(task)
            task.add_done_callback(self._admissions.discard)

    async def _admit(self, connection: socket.socket) -> None:
        """Receive a handoff and have it served; else turn the client away. The connection is taken in any case."""
        arrival, handoff = Arrival(connection, self._stated), None
        try:
            handoff = await self._receive(arrival, connection)
            await self._serve(handoff, connection)
        except Exception as error:
            self.rejected += 1
            if isinstance(error, UffdError | OSError | ValueError):
                log.warning("%sturned away: %s", self._of, error)
            else:
                log.exception("%sturned away: %s", self._of, arrival.peer)
            self._on_rejected(arrival.peer, error)
            await self._turn_away(arrival, handoff, connection, error)
        except BaseException:  # canceled
            close_foreign([connection.detach()])
            if handoff is not None:
                handoff.close()
            raise
        finally:
            arrival.close()

    async def _receive(self, arrival: Arrival, connection: socket.socket) -> Handoff:
        """Receive a handoff. In general they arrive whole; so where many are incomplete, the oldest is turned away."""
        if arrival.peer.uid not in self._uids:
            raise HandoffError(str(arrival.peer), "may not use this server")
        if (greeting := self._greeting()) is not None:
            with contextlib.suppress(OSError):  # it has sent all, and closed the connection
                send_fds(connection, [greeting[0]], [greeting[1]])
        try:
            async with asyncio.timeout(None) as limit:
                self._incomplete[limit] = None
                if len(self._incomplete) > _MAX_INCOMPLETE:
                    oldest = next(iter(self._incomplete))
                    del self._incomplete[oldest]
                    oldest.reschedule(asyncio.get_running_loop().time())
                try:
                    return await arrival.receive(self._timeout)
                finally:
                    self._incomplete.pop(limit, None)
        except TimeoutError:
            raise HandoffError(str(arrival.peer), "was slow with its handoff, while many others came") from None

    async def _turn_away(
        self, arrival: Arrival, handoff: Handoff | None, connection: socket.socket, error: BaseException
    ) -> None:
        """End a connection: tell one of our own clients why; do to another one what `on_reject` says."""
        if handoff is None:
            uffd, ranges = arrival.claimed()
        else:
            uffd = handoff.uffd
            ranges = [Range(mapping.start, mapping.end - mapping.start) for mapping in handoff.regions.mappings]
            close_apart(handoff.memory)
            if handoff.tether >= 0:
                os.close(handoff.tether)
        if arrival.wants_answers:
            with contextlib.suppress(OSError):
                connection.send(line({"id": 0, "error": encode_error(error, private=False)}))
        elif uffd is not None and not uffd.closed:
            await self._rejections.reject(connection, arrival.peer, uffd, ranges)
            return
        if uffd is not None:
            uffd.close()
        close_foreign([connection.detach()])


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)
