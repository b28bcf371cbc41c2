"""The face for memory of others: takes handoffs on a Unix socket, and has them served by a pager.

The process that listens does not serve: that is the pager's, which survives its own death and goes on even if the
listener ends. What arrives is checked here, and goes to the pager only when it is right.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
import threading
from time import monotonic
from typing import TYPE_CHECKING, Any, Self

import attrs

from aiouffd.engine.ahead.trace import Recorder, Trace
from aiouffd.engine.assembly import Options, Service
from aiouffd.engine.serve.source import Limits
from aiouffd.engine.statistics import Counters
from aiouffd.errors import HandoffError, UffdError, encode_error
from aiouffd.handoff import firecracker
from aiouffd.handoff.lines import VERSION, Lines, line
from aiouffd.handoff.receive import Peer
from aiouffd.pager.client.client import PagerClient
from aiouffd.pager.client.tenant import Pack, Tenant
from aiouffd.pager.process.travel import Pickles
from aiouffd.server.listener import SocketFile

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine
    from types import TracebackType

    from aiouffd.engine.statistics import Statistics
    from aiouffd.handoff.firecracker import Handoff

__all__ = ["Client", "Server"]

log = logging.getLogger("aiouffd.server")

_HANDOFFS = 64  # that are not complete, at once
_REQUESTS = 256  # of one client, under way at once
_REMINDER = 10.0  # seconds between complaints about the same


@attrs.define(eq=False)
class Client:
    """Somebody whose memory is served.

    Attributes:
        number: counts the handoffs of a server, from 1 on.
        peer: who it is.
        tenant: the memory.
        size: bytes of it.
        since: when it was taken, on the monotonic clock.
    """

    number: int
    peer: Peer
    tenant: Tenant
    size: int
    connection: socket.socket
    link: bool
    since: float = attrs.field(factory=monotonic)
    pidfd: int = -1
    sending: asyncio.Lock = attrs.field(factory=asyncio.Lock)  # a line at a time
    untold: int = 0  # lines that wait for that

    def __str__(self) -> str:
        return f"client {self.number} ({self.peer})"


class Server:
    """Serves whoever hands over a userfaultfd on a socket: Firecracker, and `Monitor(region, server=PATH)`.

    An asynchronous context manager; entering listens, leaving ends. What is served then goes on being served by the
    pager until it is gone, unless `fill` or `release` came before.

    Args:
        source: what all clients see; or a function of (peer, number of the client, name that it asks for) that
            returns it. It runs in a thread, and may raise to turn the client away. Sources that are the same, by their
            `identity` or as objects, are read once for all that are served from them, and let go with the last.
        path: of the socket, which is made; None: `listener` is used.
        listener: a socket that listens already (systemd's).
        mode: of the socket's file.
        uids: the users that may connect, besides root and the server's own.
        readahead: the largest window that a fault brings along, in bytes; 0 serves page by page.
        spin_us: microseconds to look again for faults before sleeping, while faults keep coming.
        background: bytes per second that are brought without being asked for; 0: none.
        record: a file to write the order of first touches to, of all clients together; complete when the server is
            left. Pages are served one by one then, to clients of one source and one page size.
        replay: a recorded file, whose pages are brought ahead for each client.
        timeout: seconds for one read of the source; None: no limit.
        retries: further tries after a failed read. None: 4, and for URLs as many as two thirds of the timeout allow.
        concurrent_reads: source reads under way at once.
        bytes_in_flight: bytes of source reads under way at once.
        handoff_timeout: seconds until a client must have sent its handoff.

    Raises (on entering):
        OSError: the socket cannot be made (EADDRINUSE: another server listens there), or `record` not be written.
        TraceError: `replay` is no recording.
        PagerStartError: the pager did not start.
    """

    def __init__(
        self,
        source: Any,
        path: str | os.PathLike[str] | None = None,
        *,
        listener: socket.socket | None = None,
        mode: int = 0o600,
        uids: Collection[int] = (),
        readahead: int = 2 << 20,
        spin_us: int = 50,
        background: float = 0.0,
        record: str | os.PathLike[str] | None = None,
        replay: str | os.PathLike[str] | None = None,
        timeout: float | None = 30.0,
        retries: int | None = None,
        concurrent_reads: int = 128,
        bytes_in_flight: int = 128 << 20,
        handoff_timeout: float = 5.0,
    ) -> None:
        if (path is None) == (listener is None):
            raise ValueError("either the path of a socket, or one that listens")
        if record is not None and replay is not None:
            raise ValueError("either record or replay: what a replay brings is not seen to be touched")
        self._choose: Callable[[Peer, int, str], Any] = source if callable(source) else lambda *_: source
        self._path = path
        self._listener = listener
        self._file: SocketFile | None = None
        self._mode = mode
        self._uids = {0, os.geteuid(), *uids}
        self._handoff_timeout = handoff_timeout
        self._record = record
        self._replay = replay
        limits = Limits(concurrent_reads, bytes_in_flight, timeout, retries)
        self._options = Options(readahead if record is None else 0, spin_us, background=background, limits=limits)
        self._packs: dict[Any, Pack] = {}  # by source and page size, as long as somebody is served from it
        self._packed: dict[str, int] = {}  # token of a pack -> by how many clients it is used
        self._packing = threading.Lock()
        self._recorder: Recorder | None = None
        self._recorded: Any = None  # source and page size
        self._started = False
        self._numbers = 0
        self.clients: dict[str, Client] = {}  # by the token of their memory
        self.rejected = 0
        self._incomplete: dict[asyncio.Timeout, None] = {}  # handoffs, oldest first
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None
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
            if self._replay is not None:
                Trace.load(self._replay)  # what is wrong with it is said now
            if self._record is not None:
                Recorder.create(self._record, 0, 0).discard()  # the same
            if self._listener is None:
                assert self._path is not None
                self._file = SocketFile(self._path, mode=self._mode)
                self._listener = self._file.listener
            self._listener.setblocking(False)
            await asyncio.to_thread(self._pager.start)
        except BaseException:
            await asyncio.to_thread(self._pager.stop)
            self._close_listener()
            raise
        self._started = True
        self._accepting = self._loop.create_task(self._accept(self._listener))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take no new clients; whom the pager serves it serves on."""
        self.stop_listening()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        served = bool(self.clients)
        for client in list(self.clients.values()):
            alone = "goes on being served by the pager alone"
            self._forget(client, alone if self._death is None else "is served no longer")
        await asyncio.to_thread(self._pager.stop, leave=served)
        if self._recorder is not None:
            await asyncio.to_thread(self._recorder.complete)

    def stop_listening(self) -> None:
        """Take no new clients; those that are served stay."""
        if self._accepting is not None:
            self._accepting.cancel()
            self._accepting = None
            self._close_listener()

    async def wait_clients(self, most: int = 0) -> None:
        """Wait until at most so many clients are left. Canceling is safe."""
        while len(self.clients) > most:
            self._changed.clear()
            await self._changed.wait()

    async def fill(self) -> None:
        """Bring all that the clients miss, and let go each one that has all; what fails stays served."""
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
        if not self._started:  # and it may be scraped already
            return Counters().snapshot()
        return attrs.evolve(self._pager.statistics(), clients=len(self.clients))

    @property
    def pids(self) -> tuple[int, int]:
        """The pager's processes: keeper and worker."""
        return self._pager.pids

    # Clients come

    async def _accept(self, listener: socket.socket) -> None:
        told = -_REMINDER
        while True:
            try:
                connection, _ = await self._loop.sock_accept(listener)
            except OSError as error:  # it has too many files open, most likely; they wait in the backlog
                if monotonic() - told >= _REMINDER:
                    told = monotonic()
                    log.error("no client can be taken: %s", error.strerror)  # noqa: TRY400 - no traceback helps here
                await asyncio.sleep(0.1)
                continue
            connection.setblocking(False)
            self._spawn(self._welcome(connection))

    async def _welcome(self, connection: socket.socket) -> None:
        """Take one handoff. Whatever is wrong with it costs this connection only."""
        taken = False
        try:
            client = await self._take(connection)
            taken = client is not None
        finally:
            if not taken:
                connection.close()
        if client is not None and client.link:
            await self._converse(client)

    async def _take(self, connection: socket.socket) -> Client | None:
        link = False
        try:
            peer = Peer.of(connection)
            self._check_user(peer)
            handoff = await self._receive(connection, peer)
            link = handoff.regions.extra is not None
            client = await self._client(handoff, connection)
            await self._serve(client)
        except (UffdError, OSError, ValueError) as error:
            self.rejected += 1
            log.warning("turned away: %s", error)
            if link:
                with contextlib.suppress(OSError):
                    connection.send(line({"id": 0, "error": encode_error(error, private=False)}))
            return None
        return client

    async def _receive(self, connection: socket.socket, peer: Peer) -> Handoff:
        """Receive a handoff. They arrive whole, in general; so where many are incomplete, the oldest one goes."""
        try:
            async with asyncio.timeout(None) as limit:
                self._incomplete[limit] = None
                if len(self._incomplete) > _HANDOFFS:
                    oldest = next(iter(self._incomplete))
                    del self._incomplete[oldest]
                    oldest.reschedule(self._loop.time())
                try:
                    return await firecracker.receive(connection, self._handoff_timeout)
                finally:
                    self._incomplete.pop(limit, None)
        except TimeoutError:
            raise HandoffError(str(peer), "was slow with its handoff, while many others came") from None

    def _check_user(self, peer: Peer) -> None:
        if peer.uid not in self._uids:
            raise HandoffError(str(peer), "may not use this server")

    async def _client(self, handoff: Handoff, connection: socket.socket) -> Client:
        """Return who it is and what is asked for, once that has been found to be right; else close what has come."""
        regions, peer = handoff.regions, handoff.peer
        try:
            name = _name_asked_for(handoff)
            self._numbers += 1
            number = self._numbers
            pack = await asyncio.to_thread(self._pack, handoff, number, name)
        except BaseException:
            handoff.close()
            raise
        tenant = Tenant(pack, handoff.uffd, list(regions.mappings), regions.page_size, handoff.tether)
        length = sum(mapping.end - mapping.start for mapping in regions.mappings)
        return Client(number, peer, tenant, length, connection, link=regions.extra is not None)

    async def _serve(self, client: Client) -> None:
        self.clients[client.tenant.token] = client
        try:
            await asyncio.wrap_future(self._pager.open(client.tenant))
        except BaseException:
            self._forget(client, "could not be served")
            raise
        with contextlib.suppress(OSError):  # its own process is gone, or of another namespace: the pager finds out
            client.pidfd = os.pidfd_open(client.peer.pid)
            self._loop.add_reader(client.pidfd, self._exited, client)
        tenant = client.tenant
        log.info("%s: %d bytes in %d regions, pages of %d", client, client.size, len(tenant.mappings), tenant.page_size)

    def _pack(self, handoff: Handoff, number: int, name: str) -> Pack:
        """Return what serves a client; what several clients share is made once. In a thread: sources may block."""
        peer, page_size = handoff.peer, handoff.regions.page_size
        try:
            source = self._choose(peer, number, name)
            size = source.size
            firecracker.check_size(handoff.regions, size)
        except (UffdError, OSError):
            raise
        except ValueError as error:
            raise HandoffError(str(peer), str(error)) from error
        except Exception as error:
            log.exception("what finds the source has failed")
            raise HandoffError(str(peer), f"no source could be found for it: {error!r}") from error
        identity = getattr(source, "identity", None)
        key = (id(source) if identity is None else identity, page_size)
        with self._packing:
            pack = self._packs.get(key)
            if pack is None:
                trace = None if self._replay is None else Trace.load(self._replay, page_size)
                pack = Pack(Service(source, self._recording(key, handoff, size), trace), self._options)
                self._packs[key] = pack
            self._packed[pack.token] = self._packed.get(pack.token, 0) + 1
        return pack

    def _recording(self, key: Any, handoff: Handoff, size: int) -> Recorder | None:
        if self._record is None:
            return None
        if self._recorder is None:
            self._recorder, self._recorded = Recorder.create(self._record, handoff.regions.page_size, size), key
        if self._recorded != key:
            raise HandoffError(str(handoff.peer), "a recording is of one source, and one page size: this is another")
        return self._recorder

    def _unpack(self, pack: Pack) -> None:
        """Let go what served a client, if nobody else is served from it."""
        with self._packing:
            self._packed[pack.token] -= 1
            if not self._packed[pack.token]:
                del self._packed[pack.token]
                self._packs = {key: other for key, other in self._packs.items() if other is not pack}
                pack.close()

    # Clients speak

    async def _converse(self, client: Client) -> None:
        """Answer one of our own clients until it leaves."""
        lines = Lines()
        places = asyncio.Semaphore(_REQUESTS)
        try:
            await self._tell(client, {"id": 0, "ok": {"number": client.number}})
            while data := await self._loop.sock_recv(client.connection, 64 << 10):
                for message in lines.feed(data):
                    await places.acquire()  # who asks faster than he can be answered is not read from
                    self._spawn(self._answer(client, message, places))
        except (OSError, ValueError) as error:
            log.warning("%s: %s", client, error)
        if client.tenant.token in self.clients:
            # It has left without a word: a Monitor says so first, and settles what is missing.
            with contextlib.suppress(UffdError):
                await asyncio.wrap_future(self._pager.request("close", client.tenant, poison=True))
            self._forget(client, "has left")
        client.connection.close()

    async def _answer(self, client: Client, message: dict[str, Any], places: asyncio.Semaphore) -> None:
        answer: dict[str, Any] = {"id": message.get("id")}
        try:
            answer["ok"] = await self._do(client, message)
        except (UffdError, ValueError) as error:
            answer["error"] = encode_error(error, private=False)
        finally:
            places.release()
        await self._tell(client, answer)

    async def _tell(self, client: Client, message: dict[str, Any]) -> None:
        """Send a line. One that is not read is waited for, but by nobody else, and not by too many."""
        if client.untold >= 2 * _REQUESTS:
            return
        client.untold += 1
        try:
            async with client.sending:
                with contextlib.suppress(OSError):
                    await self._loop.sock_sendall(client.connection, line(message))
        finally:
            client.untold -= 1

    async def _do(self, client: Client, message: dict[str, Any]) -> Any:
        op = message.get("op")
        if op == "statistics":
            return attrs.asdict(self.statistics())
        if op == "prefetch":
            offset, length = message.get("offset"), message.get("length")
            if type(offset) is not int or type(length) is not int or offset < 0 or not 0 <= length <= 1 << 57:
                raise ValueError("a prefetch has an offset and a length")
            # Its time grows with its length, whatever the client can see of that.
            end = max(mapping.offset + mapping.end - mapping.start for mapping in client.tenant.mappings)
            offset = min(offset, end)
            length = min(length, end - offset)
            request = self._pager.request("prefetch", client.tenant, offset=offset, length=length)
            await asyncio.wrap_future(request)
            return None
        if op == "refuse":  # a Monitor is about to settle what is missing, and closes then
            await asyncio.wrap_future(self._pager.request("refuse", client.tenant))
            return None
        if op == "close":
            await asyncio.wrap_future(self._pager.request("close", client.tenant, poison=message.get("poison") is True))
            self._forget(client, "has left")
            return None
        raise ValueError(f"there is no {op!r:.50}")

    # Clients go

    def _exited(self, client: Client) -> None:
        """Its process has ended; the pager finds out whether somebody else still has the memory."""
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
                if client.link:
                    self._spawn(self._tell(client, {"error": encode_error(error, private=False)}))

    def _forget(self, client: Client, why: str) -> None:
        if self.clients.pop(client.tenant.token, None) is None:
            return
        self._pager.forget(client.tenant)
        if client.pidfd >= 0:
            self._loop.remove_reader(client.pidfd)
            os.close(client.pidfd)
        client.tenant.uffd.close()
        self._unpack(client.tenant.pack)
        if client.tenant.tether >= 0:
            os.close(client.tenant.tether)
        if client.link:
            with contextlib.suppress(OSError):
                client.connection.shutdown(socket.SHUT_RD)  # `_converse` ends, which reads from it
        else:
            client.connection.close()
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
        raise HandoffError(str(handoff.peer), "asks for a source by what is no name")
    return name
