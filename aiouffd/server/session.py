"""One socket, and the clients that are served from it.

A session takes handoffs on its own socket, checks them, and has the server's pager serve them. All that a client may
have, and what brings its pages, is the session's. What arrives is checked here, and goes to the pager only when it is
right.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from array import array
from collections import Counter as Tally
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import attrs

from aiouffd.engine.flight import spawn
from aiouffd.engine.statistics import Counter, Counters, told
from aiouffd.errors import HandlerError, HandoffError, OperationError, SourceError, UffdError
from aiouffd.handoff.json_lines import AGAIN, VERSION, ranges_of
from aiouffd.handoff.receive import enabled_features
from aiouffd.kernel.abi import Feature
from aiouffd.kernel.owned_descriptor import name_of
from aiouffd.report.words import several
from aiouffd.server.clients import Client, Conversation, Handed
from aiouffd.server.entrance import Entrance
from aiouffd.server.mapped import MappedClients
from aiouffd.server.prefilled import warn_of_zeros
from aiouffd.server.reception import Reception
from aiouffd.server.recordings import Recordings
from aiouffd.server.rejection import kill, peer_pidfd
from aiouffd.server.residence import evict, fill, prefetch
from aiouffd.server.services import Services, Settings
from aiouffd.server.snapshots import Snapshots
from aiouffd.server.successor import keep_client

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.engine.statistics import Statistics
    from aiouffd.handoff.arrival import Handoff
    from aiouffd.pager.client.client import PagerClient
    from aiouffd.pager.client.tenant import Tenant
    from aiouffd.server.listener import SocketFile
    from aiouffd.server.rejection import Rejections
    from aiouffd.server.successor import Left

__all__ = ["Session"]

log: logging.Logger = logging.getLogger("aiouffd.server")

_MAX_OF_PROCESS = 1024  # clients of one process
_LOST = (SourceError, HandlerError)  # a page cannot be had
_LAST_ANSWER = 2.0  # seconds for the pager to say whether a client is served, when the server is left


class Session:
    """Takes the clients of one socket.

    Args:
        origin: a source or a handler for all clients, or a function that chooses one for each; see `Server`. None: it
            comes with `serve`.
        settings: how they are taken and served.
        pager: serves them. It stays the caller's.
        name: of the session, for the log; empty: it is the only one.
        note: what whoever makes it again needs: plain values.
        tell: called with what happens, and its details.

    Attributes:
        name, settings: as they were given.
        clients, snapshots: those that are served, by the token of their memory; of that memory.
        mapped: those that map files, in place of being served their pages.
        entrance, recordings: where clients come from, and whether they may; what is recorded.
        source: what brings the pages, for people.
        slow: the last fault that took long: `time`, seconds since 1970, and what is told of it; empty: there was none.
    """

    def __init__(
        self,
        origin: Any,
        settings: Settings,
        pager: PagerClient,
        *,
        name: str = "",
        note: dict[str, Any] | None = None,
        tell: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        self._pager, self._tell = pager, tell
        self.name: str = name
        self.settings: Settings = settings
        self._reception = Reception(
            self._serve,
            uids={0, os.geteuid(), *settings.uids},
            timeout=settings.handoff_timeout,
            on_reject=settings.on_reject,
            greeting=lambda: self._services.greeting,
            on_rejected=lambda peer, error: tell("client.rejected", pid=peer.pid, uid=peer.uid, reason=str(error)),
            stated=lambda peer: self.mapped.stated(peer, self._numbers + 1),
            session=name,
        )
        self.clients: dict[str, Client] = {}
        limits = settings.options.limits
        self.recordings: Recordings = Recordings(pager, name, settings.given(recorded=False), tell, limits)
        self._services = Services(origin, settings, self.recordings)
        noted = partial(keep_client, pager)
        self.mapped: MappedClients = MappedClients(settings, self._services, self.clients, name, noted, tell)
        self.snapshots: Snapshots = Snapshots(name, pager, tell)
        self.source: str = str(self._services)
        self.entrance: Entrance = Entrance(name, pager, note or {})
        self._slot = self._numbers = 0
        self._counted = Counters().words.tolist()  # when the last client had left
        self._arriving: Tally[int] = Tally()  # handoffs that are being served, by the pid of their peer
        self._tasks: set[asyncio.Task[None]] = set()  # conversations, and last questions
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop
        self.slow: dict[str, Any] = {}

    # Life

    def adopt(self, left: Left) -> None:
        """Go on with such a session of a server before this one: its clients are served on; none comes before `open`.

        Args:
            left: of that session; the pager of its server is this one's now.
        """
        self._loop = asyncio.get_running_loop()
        if left.text:
            self._slot = left.text["slot"]
            self._counted = self._pager.journal.counters_of(self._slot).words.tolist()
        for client, ours in left.clients:
            self._adopt(client, ours=ours)
        self.entrance.inherit(left)

    def prepare(self, listen: Callable[[], socket.socket | SocketFile], left: Left | None = None) -> None:
        """Check what clients will need, before one comes, and make the socket. Blocks.

        Args:
            listen: makes it. It is the session's.
            left: of such a session of a server before this one: what it records goes on.

        Raises:
            OSError, TraceError: the socket cannot be made, a recording cannot be written, or none be replayed.
        """
        self._services.check()
        self.recordings.prepare(self.settings.record, left)
        self.entrance.bind(listen)

    def serve(self, origin: Any) -> None:
        """Have this serve the clients that come. Blocks. Raises as `prepare`; ValueError: it cannot serve them."""
        self._services.serve(origin)
        self._services.check()
        self.source = str(self._services)

    def open(self, left: Left | None = None) -> None:
        """Begin to take clients; left: as for `adopt`."""
        if left is not None:
            self.adopt(left)
        self._loop = asyncio.get_running_loop()
        self._slot = self._slot or self._pager.take_slot()
        self._reception.open(self.entrance.open(self._known))
        self._tell("session.created")

    @property
    def _known(self) -> dict[str, Any]:
        """What a server after this one is to know."""
        return {"slot": self._slot, "record": self.recordings.wanted}

    async def pause(self) -> None:
        """Take no client and answer none, until `go_on`; what has begun is done when this returns."""
        self._reception.close()
        await self._reception.settled()
        await self._hush()

    async def go_on(self) -> None:
        """End a pause, which may be half done."""
        await self._hush()
        if self.state == "listening" and self.entrance.listener is not None:
            self._reception.open(self.entrance.listener)
        for client in self.clients.values():
            self._talk(client, again=True)

    def stop_listening(self) -> None:
        """Take no new clients; those that are served stay."""
        if self.entrance.close(self._known):
            self._tell("session.draining", clients=self.served)
        self._reception.close()

    async def give_up(self, rejections: Rejections) -> None:
        """Take no new clients, and serve those that are there no longer: they are turned away."""
        self.stop_listening()
        await asyncio.gather(*(self._give_up(client, rejections) for client in list(self.clients.values())))

    async def _give_up(self, client: Client, rejections: Rejections) -> None:
        turned_away = client.turned_away()
        with contextlib.suppress(UffdError):
            await asyncio.wrap_future(self._pager.request("close", client.tenant, poison=False))
        await rejections.reject(*turned_away)
        self._forget(client, "is given up")

    async def aclose(self, why: str) -> None:
        """Take no new clients, and let go those that are there, whom the pager serves on; why: for the log."""
        self.stop_listening()
        await self._reception.aclose()
        await self.mapped.aclose()
        await self._hush()
        for client in list(self.clients.values()):
            self._forget(client, why)
        self.entrance.forget()
        self._pager.slots.give_back(self._slot)
        self._slot = 0
        self._services.close()
        await self.recordings.stop()

    async def _hush(self) -> None:
        """End all conversations."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def drained(self) -> None:
        """Wait until it serves nobody, and nobody is about to be served. Canceling is safe."""
        while not self.is_idle:
            await self._reception.settled()
            while self.clients:
                self._changed.clear()
                await self._changed.wait()
            await self.mapped.wait()

    async def fill(self) -> dict[int, str]:
        """Bring all that the clients miss, and release each that has all. Canceling is safe; as `residence.fill`."""
        limit = self.settings.options.max_resident
        return await fill(self._pager, self.clients, limit, lambda client: self._forget(client, "has all its pages"))

    async def prefetch(self, offset: int, length: int) -> None:
        """Bring a range of the source to each client. Canceling is safe. Raises as `residence.prefetch`."""
        await prefetch(self._pager, list(self.clients.values()), offset, length, self.settings.options.max_resident)

    async def evict(self, offset: int, length: int) -> int:
        """Drop what was not written of it, of each client; return how many bytes. Raises as `residence.evict`."""
        limit = self.settings.options.max_resident
        return await evict(self._pager, list(self.clients.values()), offset, length, limit, self.name)

    def statistics(self) -> Statistics:
        """Return what the pager has counted for the clients of this session, those that have gone included."""
        return attrs.evolve(Counters(array("Q", self.counted)).snapshot(), clients=self.served)

    def told(self) -> dict[str, int]:
        """Return the same as plain values, without what is zero."""
        return {**told(self.counted), "clients": self.served}

    @property
    def served(self) -> int:
        """How many clients there are, with those that map files."""
        return len(self.clients) + len(self.mapped)

    @property
    def state(self) -> Literal["restoring", "listening", "draining"]:
        """Whether clients may come, in a word."""
        return self.entrance.state

    @property
    def counted(self) -> list[int]:
        """The words of these counters."""
        live = self.clients and self._slot
        return self._pager.journal.counters_of(self._slot).words.tolist() if live else self._counted

    @property
    def is_idle(self) -> bool:
        """Whether it serves nobody, and nobody is about to be served."""
        return not self.served and not self._reception.admitting

    @property
    def rejected(self) -> int:
        """How many clients were turned away."""
        return self._reception.rejected

    # Clients come

    async def _serve(self, handoff: Handoff, connection: socket.socket) -> None:
        """Have a handed-over memory served; where that fails, the handoff and the connection stay the caller's."""
        regions, peer = handoff.regions, handoff.peer
        name = _name_asked_for(handoff)
        served = self._arriving[peer.pid] + self.mapped.of_process(peer.pid)
        served += sum(client.peer.pid == peer.pid for client in self.clients.values())
        _check(handoff, served, stored=self._pager.holding.store is not None)
        self._numbers = number = self._numbers + 1
        if handoff.nydus is not None and await self.mapped.takes(handoff, connection, number):
            return
        self._arriving[peer.pid] += 1
        try:
            if regions.extra is None:  # a Monitor sees to that itself
                await warn_of_zeros(handoff)
            pack = await self._services.take(handoff, number, name)
            tenant = Handed(pack, handoff.uffd, list(regions.mappings), regions.page_size, handoff.tether, peer=peer)
            tenant.slot, tenant.counts = self._slot, self._counted
            tenant.file = name_of(handoff.memory.fileno())
            tenant.payer = f"session {self.name}" if self.name else ""
            client = Client(number, peer, tenant, regions.length, connection, session=self.name)
            client.places, client.nydus = list(regions.mappings), handoff.nydus is not None
            if regions.extra is not None:
                client.conversation = Conversation(client.connection, partial(self._answer, client))
        finally:  # it is counted once: now it is a client
            self._arriving = self._arriving - Tally((peer.pid,))  # without those of which none is left
        self.clients[tenant.token] = client
        await self._open(client)
        if tenant.token not in self.clients:  # it has ended meanwhile
            client.disconnect()
            return
        count = several(len(tenant.mappings), "region")
        log.info("%s: %d bytes in %s, pages of %d", client, client.length, count, tenant.page_size)
        self._tell("client.served", client=number, pid=peer.pid, uid=peer.uid, size=client.length)
        self._talk(client) if handoff.nydus is None else self.mapped.listen(client)

    def _adopt(self, client: Client, *, ours: bool) -> None:
        """Go on with a client that another server has taken."""
        self._services.adopt(client.tenant.pack)
        self._numbers = max(self._numbers, client.number)
        self.clients[client.tenant.token] = client
        client.connection.setblocking(False)
        if ours:
            client.conversation = Conversation(client.connection, partial(self._answer, client))
        self._watch(client)
        self.mapped.listen(client) if client.nydus else self._talk(client, again=True)
        log.info("%s is served on", client)

    async def _open(self, client: Client) -> None:
        try:
            keep_client(self._pager, client)
            opening = asyncio.wrap_future(self._pager.open(client.tenant))
            try:
                await asyncio.shield(opening)
            except asyncio.CancelledError:
                # The server is being left. The pager may serve this client by now, and its answer be on the way.
                await asyncio.wait([opening], timeout=_LAST_ANSWER)
                if not opening.done():
                    raise
                opening.result()
        except BaseException:
            if self.clients.pop(client.tenant.token, None) is not None:
                client.tenant.slot = 0  # it is the session's
                self._pager.forget(client.tenant)
                self._services.release(client.tenant.pack)
            raise
        if client.tenant.token in self.clients:  # else it has ended meanwhile
            self._watch(client)

    def _watch(self, client: Client) -> None:
        with contextlib.suppress(OSError):  # its process has ended, or is in another namespace: the pager finds out
            client.pidfd = peer_pidfd(client.connection, client.peer)
            self._loop.add_reader(client.pidfd, self._exited, client)

    # Clients speak

    def _talk(self, client: Client, *, again: bool = False) -> None:
        if client.conversation is not None:
            spawn(self._tasks, self._converse(client, client.conversation, again=again))

    async def _converse(self, client: Client, conversation: Conversation, *, again: bool) -> None:
        """Answer one of our own clients until it leaves."""
        try:
            await conversation.tell({"id": 0, "ok": {"number": client.number, **({AGAIN: True} if again else {})}})
            await conversation.run(again=again)
        except (UffdError, OSError, ValueError) as error:
            log.warning("%s: %s", client, error)
        if client.tenant.token in self.clients:
            # It has left without a word. A Monitor says so first, and decides what missing pages become.
            with contextlib.suppress(UffdError):
                await asyncio.wrap_future(self._pager.request("close", client.tenant, poison=True))
            self._forget(client, "has left")
        client.disconnect()

    async def _answer(self, client: Client, message: dict[str, Any]) -> Any:
        op = message.get("op")
        if op == "statistics":
            return attrs.asdict(self.statistics())
        if op == "prefetch":
            # The time that it takes grows with their length, whatever the client maps of that.
            ranges = ranges_of(message, client.end)
            await asyncio.wrap_future(self._pager.request("prefetch", client.tenant, ranges=ranges))
        elif op == "refuse":  # a Monitor is about to decide what missing pages become, and closes then
            await asyncio.wrap_future(self._pager.request("refuse", client.tenant))
        elif op == "close":
            poison = message.get("poison") is True
            await asyncio.wrap_future(self._pager.request("close", client.tenant, poison=poison))
            self._forget(client, "has left")
        else:
            raise ValueError(f"there is no request {op!r:.50}")
        return None

    # Clients go

    def _exited(self, client: Client) -> None:
        """Its process has ended; the pager finds out whether another process still has the memory."""
        self._loop.remove_reader(client.pidfd)
        if client.tenant.uffd.gone():
            spawn(self._tasks, self._ended(client))

    async def _ended(self, client: Client) -> None:
        """Forget a client that has ended, once the pager has said what it has to say of it: why, perhaps."""
        with contextlib.suppress(UffdError, TimeoutError):
            async with asyncio.timeout(_LAST_ANSWER):
                await asyncio.wrap_future(self._pager.ping())
        self._forget(client, "has ended")

    def gone(self, tenant: Tenant) -> None:
        """Take note that a tenant's memory is gone; nothing happens if it is another session's."""
        client = self.clients.get(tenant.token)
        if client is not None:
            self._forget(client, "has ended")

    def landed(self, tenant: Tenant, told: dict[str, Any]) -> Client | None:
        """Tell of a fault that took long; return whose flight it was, or None: of another session."""
        client = self.clients.get(tenant.token)
        if client is not None and "slow" in told:
            self.slow = {"time": time.time(), **told["slow"]}
            self._tell("client.slow", client=client.number, **told["slow"])
        return client

    def failed(self, tenant: Tenant | None, error: BaseException) -> None:
        """Tell an error to the client that it concerns, if it is one of this session's; None: to all of them."""
        for client in list(self.clients.values()):
            if tenant is None or client.tenant is tenant:
                log.error("%s: %s", client, error)
                self._tell("client.failed", client=client.number, reason=str(error))
                if self.settings.on_failure == "kill" and (tenant is None or _is_lost(error)):
                    kill(client.connection, client.peer, "a page cannot be had, or its pager is lost")
                if client.conversation is not None:
                    client.conversation.report(error)

    def _forget(self, client: Client, why: str) -> None:
        if self.clients.pop(client.tenant.token, None) is None:
            return
        if self._slot and not self.clients:
            self._counted = self._pager.journal.counters_of(self._slot).words.tolist()
            self._counted[Counter.RESIDENT] = 0
        client.tenant.slot = 0  # it is the session's
        self._pager.forget(client.tenant)
        if client.pidfd >= 0:
            self._loop.remove_reader(client.pidfd)
            os.close(client.pidfd)
        client.tenant.uffd.close()
        if client.tenant.tether >= 0:
            os.close(client.tenant.tether)
        self._services.release(client.tenant.pack)
        if client.conversation is None:
            client.disconnect()
        else:
            with contextlib.suppress(OSError):
                client.connection.shutdown(socket.SHUT_RD)  # the conversation ends, which reads from it
        self._changed.set()
        self._tell("client.gone", client=client.number, pid=client.peer.pid, reason=why)
        log.info("%s %s; %d left", client, why, self.served)


def _is_lost(error: BaseException) -> bool:
    """Tell whether a page cannot be had, or all of them: since nobody can read what is asked for."""
    return isinstance(error, _LOST) or (isinstance(error, OperationError) and error.operation == "read")


def _check(handoff: Handoff, served: int, *, stored: bool) -> None:
    """Refuse what cannot be kept by systemd, where that is to be so, and too many clients of one process."""
    peer = str(handoff.peer)
    if stored and Feature.EVENT_FORK in enabled_features(handoff.uffd.fileno()):
        raise HandoffError(peer, "has its forks told: systemd's store cannot keep a child; use --hold PATH")
    if handoff.peer.pid and served >= _MAX_OF_PROCESS:
        raise HandoffError(peer, f"is served {_MAX_OF_PROCESS} times already")


def _name_asked_for(handoff: Handoff) -> str:
    extra = handoff.regions.extra or {}
    version, name = extra.get("version", VERSION), extra.get("name", "")
    if version != VERSION:
        raise HandoffError(str(handoff.peer), f"speaks version {version!r:.20}; this server speaks {VERSION}")
    if not isinstance(name, str):
        raise HandoffError(str(handoff.peer), "asks for a source by a name that is not a string")
    return name
