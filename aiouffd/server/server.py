"""The face for memory of other processes: takes handoffs on a Unix socket, and has a pager serve them.

The process that listens does not serve. The pager does: it survives its own death, and goes on when the listener ends.
What arrives is checked here, and goes to the pager only when it is right.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
from collections import Counter as Tally
from typing import TYPE_CHECKING, Any, Self

import attrs

from aiouffd.engine.options import Options
from aiouffd.engine.serve.bounds import Limits
from aiouffd.engine.statistics import Counters
from aiouffd.errors import HandoffError, UffdError
from aiouffd.handoff.json_lines import VERSION, ranges_of
from aiouffd.handoff.own_threads import in_own_thread
from aiouffd.lifetime import uninterrupted
from aiouffd.pager.client.client import PagerClient
from aiouffd.pager.process.serialization import Pickles
from aiouffd.server.clients import Client, Conversation, Handed
from aiouffd.server.listener import SocketFile
from aiouffd.server.prefilled import zeros_before_handoff
from aiouffd.server.reception import Reception
from aiouffd.server.services import Services

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine
    from types import TracebackType

    from aiouffd.engine.statistics import Statistics
    from aiouffd.handoff.arrival import Handoff
    from aiouffd.pager.client.tenant import Tenant
    from aiouffd.server.rejection import Policy

__all__ = ["Client", "Server"]

log: logging.Logger = logging.getLogger("aiouffd.server")

_MAX_OF_PROCESS = 1024  # clients of one process
_LAST_ANSWER = 2.0  # seconds for the pager to say whether a client is served, when the server is left


class Server:
    """Serves the processes that hand over a userfaultfd on a socket: Firecracker, and Monitors with `ServedBy(path)`.

    An asynchronous context manager. Entering it starts listening. Leaving it ends the listener; the pager goes on
    serving each client until it is gone, unless `fill` came before.

    Args:
        origin: a source or a handler for all clients; or a function of (peer, number of the client, name that it asks
            for) that returns one. The function runs in a thread, and may raise an error to turn the client away. Equal
            sources (by their `identity`, else the same object) are read once for all their clients, and closed with
            the last one.
        path: of the socket, which is made; None: `listener` is used.
        listener: a socket that listens already (systemd's).
        mode: of the socket's file.
        uids: the users that may connect, besides root and the server's own.
        on_reject: what becomes of a client that is turned away after it has sent its userfaultfd, and does not read
            why: `poison` makes its missing pages SIGBUS (Linux 6.6), `kill` ends the process that connected, `hold`
            lets it wait.
        readahead: the largest window that one fault brings, in bytes; 0 serves page by page.
        spin_us: microseconds to poll for further faults before sleeping, while faults keep coming.
        background: bytes per second to fill without a fault; 0: none.
        record: a file for the order of first touches of all clients together. It is complete when the server is left.
            Pages are served one by one then, to clients of one source and one page size.
        replay: a recorded file, whose pages are prefetched for each client.
        timeout: seconds for opening a source, and for each read of it; None: no limit.
        retries: further tries after a failed read. None: 4, and for URLs as many as two thirds of the timeout allow.
        concurrent_reads: the most reads of sources at once.
        bytes_in_flight: the most bytes of these reads together.
        client_events: the most events per second (faults, layout events) that are read for the memory of one process,
            its forked children included. Who exceeds them waits, and nobody else. None: no limit.
        client_bytes: the most bytes per second that are placed for it: with its faults, ahead of them, or to fill it.
            None: no limit. Up to one second's worth of either may come at once.
        handoff_timeout: seconds that a client has to send its handoff.

    Raises on entering:
        OSError: the socket cannot be made (EADDRINUSE: another server listens there), or `record` cannot be written.
        TraceError: `replay` is not a recording.
        PagerStartError: the pager did not start.
    """

    def __init__(
        self,
        origin: Any,
        path: str | os.PathLike[str] | None = None,
        *,
        listener: socket.socket | None = None,
        mode: int = 0o600,
        uids: Collection[int] = (),
        on_reject: Policy = "poison",
        readahead: int = 2 << 20,
        spin_us: int = 50,
        background: float = 0.0,
        record: str | os.PathLike[str] | None = None,
        replay: str | os.PathLike[str] | None = None,
        timeout: float | None = 30.0,
        retries: int | None = None,
        concurrent_reads: int = 128,
        bytes_in_flight: int = 128 << 20,
        client_events: float | None = None,
        client_bytes: float | None = None,
        handoff_timeout: float = 5.0,
    ) -> None:
        if (path is None) == (listener is None):
            raise ValueError("give either the path of a socket, or one that listens")
        if record is not None and replay is not None:
            raise ValueError("give either record or replay: a recording does not see pages that a replay brings")
        self._path = path
        self._listener = listener
        self._file: SocketFile | None = None
        self._mode = mode
        uids = {0, os.geteuid(), *uids}
        self._reception = Reception(self._serve, uids=uids, timeout=handoff_timeout, on_reject=on_reject)
        limits = Limits(
            *(concurrent_reads, bytes_in_flight, timeout, retries),
            client_events=client_events,
            client_bytes=client_bytes,
        )
        options = Options(readahead if record is None else 0, spin_us, background=background, limits=limits)
        self._services = Services(origin, options, record=record, replay=replay)
        self._started = False
        self._numbers = 0
        self.clients: dict[str, Client] = {}  # by the token of their memory
        self._of_process: Tally[int] = Tally()  # clients, by the pid of their peer
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._dead = asyncio.Event()
        self._death: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop
        self._pager: PagerClient

    # Life

    async def __aenter__(self) -> Self:
        """Listen, and start the pager."""
        self._loop = asyncio.get_running_loop()
        self._pager = PagerClient(
            on_error=lambda tenant, error: self._soon(self._failed, tenant, error),
            on_gone=lambda tenant: self._soon(self._gone, tenant),
            pickles=Pickles.ALWAYS,
        )
        try:
            await uninterrupted(self._prepare)
        except BaseException:
            await asyncio.to_thread(self._pager.stop)
            self._close_listener()
            raise
        self._started = True
        assert self._listener is not None
        self._reception.open(self._listener)
        return self

    def _prepare(self) -> None:
        """Do what blocks of entering."""
        self._services.check()
        if self._listener is None:
            assert self._path is not None
            self._file = SocketFile(self._path, mode=self._mode)
            self._listener = self._file.listener
        self._listener.setblocking(False)
        self._pager.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take no new clients; the pager goes on serving those that are there."""
        self.stop_listening()
        await self._reception.aclose()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        served = bool(self.clients)
        for client in list(self.clients.values()):
            alone = "goes on being served by the pager alone"
            self._forget(client, alone if self._death is None else "is served no longer")
        await asyncio.to_thread(self._pager.stop, leave=served)
        await asyncio.to_thread(self._services.complete)

    def stop_listening(self) -> None:
        """Take no new clients; those that are served stay."""
        self._reception.close()
        self._close_listener()

    async def wait_clients(self, most: int = 0) -> None:
        """Wait until at most so many clients are left. Canceling is safe."""
        while len(self.clients) > most:
            self._changed.clear()
            await self._changed.wait()

    async def fill(self) -> None:
        """Fill all missing pages of the clients, and release each client that has all. One that fails stays served."""
        await asyncio.gather(*(self._fill(client) for client in list(self.clients.values())))

    async def _fill(self, client: Client) -> None:
        try:
            await asyncio.wrap_future(self._pager.request("release", client.tenant))
        except UffdError as error:
            log.warning("%s cannot be filled: %s", client, error)
        else:
            self._forget(client, "has all its pages")

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
        if not self._started:
            return Counters().snapshot()
        return attrs.evolve(self._pager.statistics(), clients=len(self.clients))

    @property
    def rejected(self) -> int:
        """How many clients were turned away."""
        return self._reception.rejected

    @property
    def pids(self) -> tuple[int, int]:
        """The pager's processes: keeper and worker."""
        return self._pager.pids

    # Clients come

    async def _serve(self, handoff: Handoff, connection: socket.socket) -> None:
        """Have a handed-over memory served; where that fails, the handoff and the connection stay the caller's."""
        regions, peer = handoff.regions, handoff.peer
        name = _name_asked_for(handoff)
        if peer.pid and self._of_process[peer.pid] >= _MAX_OF_PROCESS:
            raise HandoffError(str(peer), f"is served {_MAX_OF_PROCESS} times already")
        self._numbers += 1
        number = self._numbers
        self._of_process[peer.pid] += 1
        try:
            if regions.extra is None:  # a Monitor sees to that itself
                await self._examine(handoff)
            pack = await self._services.take(handoff, number, name)
            tenant = Handed(pack, handoff.uffd, list(regions.mappings), regions.page_size, handoff.tether, peer=peer)
            client = Client(number, peer, tenant, regions.length, connection)
            if regions.extra is not None:
                client.conversation = Conversation(connection, functools.partial(self._answer, client))
            self.clients[tenant.token] = client
            await self._open(client)
        except BaseException:
            self._of_process[peer.pid] -= 1
            raise
        count, page_size = len(tenant.mappings), tenant.page_size
        log.info("%s: %d bytes in %d regions, pages of %d", client, client.length, count, page_size)
        if client.conversation is not None:
            self._spawn(self._converse(client, client.conversation))

    async def _examine(self, handoff: Handoff) -> None:
        """Say if a client's memory was filled with zeros before it was handed over."""
        with contextlib.suppress(OSError):
            filled = await in_own_thread(zeros_before_handoff, handoff.peer.pid, handoff.regions)
            if filled:
                how = "%s: %d bytes of its memory are zeros already, and are never fetched (mlockall? MAP_POPULATE?)"
                log.warning(how, handoff.peer, filled)

    async def _open(self, client: Client) -> None:
        opening = asyncio.wrap_future(self._pager.open(client.tenant))
        try:
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
                self._pager.forget(client.tenant)
                self._services.release(client.tenant.pack)
            raise
        if client.tenant.token not in self.clients:  # it has ended meanwhile
            return
        with contextlib.suppress(OSError):  # its process has ended, or is in another namespace: the pager finds out
            client.pidfd = os.pidfd_open(client.peer.pid)
            self._loop.add_reader(client.pidfd, self._exited, client)

    # Clients speak

    async def _converse(self, client: Client, conversation: Conversation) -> None:
        """Answer one of our own clients until it leaves."""
        try:
            await conversation.tell({"id": 0, "ok": {"number": client.number}})
            await conversation.run()
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
            end = max(mapping.offset + mapping.end - mapping.start for mapping in client.tenant.mappings)
            ranges = ranges_of(message, end)
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
            self._forget(client, "has ended")

    def _gone(self, tenant: Tenant) -> None:
        client = self.clients.get(tenant.token)
        if client is not None:
            self._forget(client, "has ended")

    def _failed(self, tenant: Tenant | None, error: BaseException) -> None:
        if tenant is None:
            self._death = error
            self._dead.set()
        for client in list(self.clients.values()):
            if tenant is None or client.tenant is tenant:
                log.error("%s: %s", client, error)
                if client.conversation is not None:
                    client.conversation.report(error)

    def _forget(self, client: Client, why: str) -> None:
        if self.clients.pop(client.tenant.token, None) is None:
            return
        self._pager.forget(client.tenant)
        if client.pidfd >= 0:
            self._loop.remove_reader(client.pidfd)
            os.close(client.pidfd)
        client.tenant.uffd.close()
        if client.tenant.tether >= 0:
            os.close(client.tenant.tether)
        self._services.release(client.tenant.pack)
        self._of_process[client.peer.pid] -= 1
        if not self._of_process[client.peer.pid]:
            del self._of_process[client.peer.pid]
        if client.conversation is None:
            client.disconnect()
        else:
            with contextlib.suppress(OSError):
                client.connection.shutdown(socket.SHUT_RD)  # the conversation ends, which reads from it
        self._changed.set()
        log.info("%s %s; %d left", client, why, len(self.clients))

    # Helpers

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _soon(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(functools.partial(function, *arguments))

    def _close_listener(self) -> None:
        if self._file is not None:
            self._file.close()
        elif self._listener is not None:
            self._listener.close()


def _name_asked_for(handoff: Handoff) -> str:
    extra = handoff.regions.extra or {}
    version, name = extra.get("version", VERSION), extra.get("name", "")
    if version != VERSION:
        raise HandoffError(str(handoff.peer), f"speaks version {version!r:.20}; this server speaks {VERSION}")
    if not isinstance(name, str):
        raise HandoffError(str(handoff.peer), "asks for a source by a name that is not a string")
    return name
