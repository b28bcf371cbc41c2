"""Clients of nydus' policy `zerocopy`: a fault is answered with descriptors of files, which the client maps.

The server does this itself. Nothing of it must survive: such a client connects again when its connection ends, hands
its memory over again, and each thread that waits then faults again.

A part of memory that the client has mapped is not registered any more, and no fault on it is told. The client may have
written to it, on this connection or one before it. So an answer gives only what is still registered, and nothing twice
on a connection, unless the client has left a fault on it for a while.

What a client has given back is registered, and may be written since. It is known as long as this server is there, also
for the connection after it. A client that another server may have known is given no page but those that it touches.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import logging
import mmap
import os
import select
import socket
import sys
import termios
from array import array
from bisect import bisect_left, bisect_right
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from aiouffd.engine.flight import spawn
from aiouffd.errors import HandoffError, SourceError, UffdError
from aiouffd.handoff import nydus
from aiouffd.handoff.own_threads import close_foreign, in_own_thread
from aiouffd.handoff.receive import enabled_features, receive
from aiouffd.kernel import abi
from aiouffd.kernel.abi import Feature
from aiouffd.kernel.events import PageFault, Remove
from aiouffd.kernel.memory import address_of, unreadable
from aiouffd.kernel.owned_descriptor import OwnedDescriptor, inode
from aiouffd.ranges import RangeSet, align_down, align_up, batched
from aiouffd.server.prefilled import PagemapOf
from aiouffd.server.rejection import kill

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from aiouffd.engine.mappings import Mapping
    from aiouffd.handoff.arrival import Handoff
    from aiouffd.handoff.receive import Peer
    from aiouffd.kernel.userfaultfd import Userfaultfd
    from aiouffd.server.clients import Client
    from aiouffd.server.services import Services, Settings

__all__ = ["MappedClient", "MappedClients", "answer_sizes"]

log: logging.Logger = logging.getLogger("aiouffd.server")

_AGAIN: Final = 0.5  # seconds after which a fault is looked at again
_LAYOUT: Final = 0.001  # seconds after which the kernel is asked again that has refused for now
_ZEROS: Final = 8 << 20  # bytes of zeros that are placed in one turn of the loop
_MAX_OBJECT: Final = 64 << 10
_MOST_LEFT: Final = 1024  # clients that have gone, and may connect again
_UNREADABLE: Final = unreadable()
_UNKNOWN: Final = Feature.EVENT_FORK | Feature.EVENT_REMAP  # such memory would have to be followed


async def answer_sizes(connection: socket.socket, stated: Callable[[], Awaitable[bytes]]) -> None:
    """Answer each request for the size until the client ends the connection. Canceling is safe.

    Args:
        connection: non-blocking.
        stated: returns the answer.

    Raises:
        ValueError, UffdError, OSError: it sends something else, or the connection is broken.
    """
    data = bytearray()
    while piece := (await receive(connection, _MAX_OBJECT))[0]:
        data += piece
        if len(data) > _MAX_OBJECT:
            raise ValueError(f"an object of more than {_MAX_OBJECT} bytes")
        while data.strip():
            message = nydus.taken(data)
            if message is None:
                break
            if not nydus.is_stat(message):
                raise ValueError(f"sent {message!r:.80} after its handshake")
            await _send(connection, await stated(), [])


async def _send(connection: socket.socket, data: bytes, fds: list[int]) -> None:
    """Send bytes, and descriptors with the first of them. A client that does not read is waited for."""
    loop = asyncio.get_running_loop()
    while data:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        try:
            sent = connection.sendmsg([data], rights, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            ready = loop.create_future()
            loop.add_writer(connection, lambda ready=ready: ready.done() or ready.set_result(None))  # type: ignore[misc]
            try:
                await ready
            finally:
                loop.remove_writer(connection)
            continue
        data, fds = data[sent:], []


class MappedClient:
    """One client. It takes the handoff, and the connection.

    Args:
        handoff: with a handshake of policy zerocopy.
        connection: non-blocking.
        origin: a source with `mappable`.
        files: for each descriptor of it, another one that is opened anew, and may be shown.
        answers: what precedes them.
        failed: called with why a page cannot be had.
        zeros: offsets that it has given back before, as far as that is known; they are noted there.
        is_known: it has given back no others.
        session: the name of the session that it came to.

    Attributes:
        number: of the client in its session.
        peer: who it is.
        identity: of its userfaultfd.
        since: when it was taken, on the monotonic clock.
        zeros: as given.
        has_lost: a page of it could not be had, and is poisoned.
        has_memory: whether it has handed over the file behind its memory, which would be of no use.
    """

    has_memory: Final = False

    def __init__(
        self,
        handoff: Handoff,
        connection: socket.socket,
        origin: Any,
        files: dict[int, OwnedDescriptor],
        number: int,
        answers: nydus.Answers,
        failed: Callable[[MappedClient, SourceError], bool],
        *,
        zeros: RangeSet,
        is_known: bool,
        session: str,
    ) -> None:
        assert handoff.nydus is not None
        self.number: int = number
        self.peer: Peer = handoff.peer
        self.identity: tuple[int, int] | None = _identity(handoff.uffd)
        self.since: float = monotonic()
        self._uffd, self._regions, self._connection = handoff.uffd, handoff.regions, connection
        self._starts = [mapping.start for mapping in self._regions.mappings]
        self._window = max(handoff.nydus.window, self._regions.page_size)
        self._prefault = handoff.nydus.prefault
        self._origin, self._files, self._answers, self._failed = origin, files, answers, failed
        self._end = align_up(origin.size, mmap.PAGESIZE)  # of what a file has: behind it are zeros
        self._answered = RangeSet()  # offsets
        self.zeros: RangeSet = zeros
        self.has_lost: bool = False
        self._is_known, self._session = is_known, session
        self._outgoing: asyncio.Queue[list[nydus.Part]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._timers: set[asyncio.TimerHandle] = set()
        self._looked_at: set[int] = set()  # pages that are answered again, or found to be mapped, before long

    def __str__(self) -> str:
        return f"{self._session and f'session {self._session}, '}client {self.number} ({self.peer}), which maps files"

    @property
    def length(self) -> int:
        """Bytes of its memory."""
        return self._regions.length

    async def run(self) -> str:
        """Answer until the client leaves, and return why it has ended. Canceling is safe.

        Raises:
            ValueError, UffdError, OSError: what is wrong with what it sends.
        """
        sending = self._loop.create_task(self._send_all())
        self._loop.add_reader(self._uffd.fileno(), self._read)
        try:
            if self._prefault and self._is_known:
                for mapping in self._regions.mappings:
                    if self._is_registered(mapping.start, mapping.end):  # else it was mapped before, and may be written
                        self._answer(mapping.offset, min(mapping.offset + mapping.end - mapping.start, self._end))
            for mapping in self._regions.mappings:  # of a server before this one, it may wait for answers
                self._uffd.try_wake(mapping.start, mapping.end - mapping.start)
            await answer_sizes(self._connection, self._stated)
        finally:
            self._loop.remove_reader(self._uffd.fileno())
            for timer in self._timers:
                timer.cancel()
            sending.cancel()
            await asyncio.wait([sending])
            self._uffd.close()
            for file in self._files.values():
                file.close()
            close_foreign([self._connection.detach()])
        return "has ended, or its connection has"

    async def _stated(self) -> bytes:
        return nydus.stated(self._origin.size, self._answers)

    def leave(self) -> None:
        """Have `run` return: nothing that the client sends is read any more."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RD)

    def replace(self) -> None:
        """As `leave`, at once: another connection of it is there, which reads its faults from now on."""
        self._loop.remove_reader(self._uffd.fileno())
        self.leave()

    # Faults

    def _read(self) -> None:
        try:
            events = self._uffd.read()
        except (UffdError, OSError) as error:
            log.warning("%s: %s", self, error)
            self.leave()
            return
        for event in events:  # faults come first, although what was given back before them reads as zeros
            if isinstance(event, Remove):
                for mapping, start, end in self._shown(event.start, event.end):
                    self.zeros.add(mapping.offset + start - mapping.start, mapping.offset + end - mapping.start)
        for event in events:
            if isinstance(event, PageFault):
                self._fault(event.address)

    def _shown(self, start: int, end: int) -> Iterator[tuple[Mapping, int, int]]:
        for mapping in self._regions.mappings:
            if mapping.start < end and start < mapping.end:
                yield mapping, max(start, mapping.start), min(end, mapping.end)

    def _fault(self, address: int) -> None:
        index = bisect_right(self._starts, address) - 1
        if index < 0 or address >= self._regions.mappings[index].end:
            log.warning("%s: a fault at %#x, which it has not handed over", self, address)
            return
        mapping, page = self._regions.mappings[index], align_down(address, self._regions.page_size)
        offset = mapping.offset + page - mapping.start
        if offset in self.zeros or offset >= self._end:
            self._zero(page, page + self._regions.page_size)
            return
        window = self._window if self._is_known else self._regions.page_size
        low = max(align_down(offset, window), mapping.offset)
        high = min(align_down(offset, window) + window, mapping.offset + mapping.end - mapping.start)
        if offset in self._answered:
            if page in self._looked_at:  # a thread that is woken again and again
                return
            self._looked_at.add(page)
            self._later(_AGAIN, self._again, page, offset, low, high)
        else:
            gap = next(gap for gap in self._answered.gaps(low, high) if offset < gap.end)
            self._give(page, offset, gap.start, gap.end)

    def _give(self, page: int, offset: int, low: int, high: int) -> None:
        """Answer a fault with what is registered around it within [low, high)."""
        size = self._regions.page_size
        if not self._is_registered(page, page + size):  # it is mapped, or the kernel refuses for now
            self._uffd.try_wake(page, size)
            return
        before, after = range(1, (offset - low) // size + 1), range(2, (high - offset) // size + 1)
        below = bisect_left(before, True, key=lambda pages: not self._is_registered(page - pages * size, page))
        above = bisect_left(after, True, key=lambda pages: not self._is_registered(page, page + pages * size))
        self._try_answer(page, offset - below * size, offset + (above + 1) * size)

    def _try_answer(self, page: int, low: int, high: int) -> None:
        try:
            self._answer(low, min(high, self._end))
        except SourceError as error:
            self._lost(page, error)

    def _answer(self, low: int, high: int) -> None:
        """Have the client map what files have of [low, high), but for what it has given back; the rest is zeros."""
        parts = []
        for gap in self.zeros.gaps(low, high):
            at = gap.start
            for start, end, fd, place in self._origin.mappable(gap.start, min(gap.end, self._origin.size)) or ():
                self._zero_offsets(at, start)
                at = align_up(end, mmap.PAGESIZE)
                parts.append(nydus.Part(start, at - start, self._files[fd].fileno(), place))
            self._zero_offsets(at, gap.end)
        self._answered.add(low, high)
        for some in batched(parts, nydus.MOST_RANGES):
            self._outgoing.put_nowait(some)

    def _again(self, page: int, offset: int, low: int, high: int) -> None:
        """Look at a fault on a window that was answered: it has come before the client had mapped it, or ever since.

        What is registered around it is given once more. The rest of the window may be written.
        """
        unread = fcntl.ioctl(self._connection, termios.TIOCOUTQ, bytes(4))
        if self._outgoing.qsize() or int.from_bytes(unread, sys.byteorder):
            self._later(_AGAIN, self._again, page, offset, low, high)
        else:
            self._looked_at.discard(page)
            self._give(page, offset, low, high)

    def _is_registered(self, start: int, end: int) -> bool:
        """Tell whether all of it is in one registered mapping: the kernel checks that before it reads the source."""
        return _is_registered(self._uffd, start, end) is True

    def _zero_offsets(self, low: int, high: int) -> None:
        for mapping in self._regions.mappings if low < high else ():
            start = max(low, mapping.offset)
            end = min(high, mapping.offset + mapping.end - mapping.start)
            if start < end:
                self._zero(start - mapping.offset + mapping.start, end - mapping.offset + mapping.start)

    def _zero(self, start: int, end: int) -> None:
        until = start + _ZEROS
        while start < end:
            if start >= until:  # others have a turn
                self._later(0.0, self._zero, start, end)
                return
            done = self._uffd.try_zeropage(start, min(end, until) - start, 0)
            if done == -errno.EAGAIN:
                self._later(_LAYOUT, self._zero, start, end)
                return
            if done == -errno.EEXIST:
                self._uffd.try_wake(start, self._regions.page_size)
            elif done < 0:  # mapped by now, or gone
                return
            start += done if done > 0 else self._regions.page_size

    def _lost(self, page: int, error: SourceError) -> None:
        if not self._failed(self, error):
            self._later(1.0, self._fault, page)
            return
        self.has_lost = True
        if self._uffd.try_poison(page, self._regions.page_size, 0) < 0:
            self._uffd.try_wake(page, self._regions.page_size)
            log.error("%s: its page at %#x waits for ever (no UFFDIO_POISON before Linux 6.6)", self, page)

    def _later(self, seconds: float, function: Callable[..., None], *arguments: Any) -> None:
        def run() -> None:
            self._timers.discard(timer)
            function(*arguments)

        timer = self._loop.call_later(seconds, run)
        self._timers.add(timer)

    async def _send_all(self) -> None:
        try:
            while True:
                parts = await self._outgoing.get()
                await _send(self._connection, nydus.ranges(parts, self._answers), [part.fd for part in parts])
        except OSError:  # it has gone; that is seen by who reads
            self.leave()


class MappedClients:
    """The clients of a session that map files, and what others of nydus' clients ask for.

    Args:
        settings: of the session.
        services: finds the source of a client.
        clients: of the session that are served their pages.
        session: its name.
        keep: notes one of these again, whose connection is another one.
        tell: called with what happens, and its details.
    """

    def __init__(
        self,
        settings: Settings,
        services: Services,
        clients: dict[str, Client],
        session: str,
        keep: Callable[[Client], None],
        tell: Callable[..., None],
    ) -> None:
        self._settings, self._services, self._copied = settings, services, clients
        self._session, self._keep, self._tell = session, keep, tell
        self._left: dict[tuple[int, int], RangeSet] = {}  # what was given back, by the identity of who connects again
        self._clients: dict[MappedClient, socket.socket] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._listening: dict[Client, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._clients)

    @property
    def have_lost(self) -> bool:
        """Whether one that is there has a page that could not be had."""
        return any(client.has_lost for client in self._clients)

    def __iter__(self) -> Iterator[MappedClient]:
        return iter(list(self._clients))

    def of_process(self, pid: int) -> int:
        """Return how many of them a process has."""
        return sum(client.peer.pid == pid for client in self._clients)

    async def stated(self, peer: Peer, number: int) -> bytes:
        """Return the answer to a process that asks how much it would be served, as the client of this number."""
        return nydus.stated(await self._services.size(peer, number), self._settings.nydus_answers)

    async def takes(self, handoff: Handoff, connection: socket.socket, number: int) -> bool:
        """Take a handoff and its connection, and return whether that is so; or raise, and leave both.

        False: the client wants its pages copied, and is not known.

        Raises:
            UffdError, OSError: it cannot be served, and why.
        """
        assert handoff.nydus is not None
        if not handoff.nydus.zerocopy:
            return self._connected_again(handoff, connection)
        origin = await self._services.origin(handoff, number)
        files = await in_own_thread(_files_of, origin)
        is_known = await _is_new(handoff)
        why = self._services.unmappable  # behind all that was awaited: a recording may have begun
        if not why and enabled_features(handoff.uffd.fileno()) & _UNKNOWN:
            why = "its forks or moves are told, and memory that files are mapped into cannot be followed"
        if not why and files is None:
            why = f"{origin!r:.200} is no file, or not in whole pages"
        if why or files is None:
            raise HandoffError(str(handoff.peer), f"wants to map files (policy 0): {why}; policy 1 copies")
        identity = _identity(handoff.uffd)
        before = [other for other in self._clients if identity is not None and other.identity == identity]
        zeros = before[0].zeros if before else self._left.pop(identity, None) if identity is not None else None
        client = MappedClient(
            *(handoff, connection, origin, files, number, self._settings.nydus_answers, self._failed),
            zeros=RangeSet() if zeros is None else zeros,
            is_known=is_known or zeros is not None,
            session=self._session,
        )
        for other in before:
            other.replace()
        self._clients[client] = connection
        log.info("%s: %d bytes", client, client.length)
        self._tell("client.served", client=number, pid=client.peer.pid, uid=client.peer.uid, size=client.length)
        spawn(self._tasks, self._run(client))
        return True

    def _connected_again(self, handoff: Handoff, connection: socket.socket) -> bool:
        """Go on with a client that has lost its connection, and is served: what it has given back stays known."""
        identity = _identity(handoff.uffd)
        for client in self._copied.values():
            tenant = client.tenant
            if identity is not None and _identity(tenant.uffd) == identity and client.conversation is None:
                client.disconnect()
                client.connection, client.nydus = connection, True
                self._keep(client)
                self.listen(client)
                for mapping in handoff.regions.mappings:
                    handoff.uffd.try_wake(mapping.start, mapping.end - mapping.start)
                handoff.close()
                log.info("%s has connected again", client)
                return True
        return False

    def listen(self, client: Client) -> None:
        """Answer a client whose pages are copied when it asks for the size, as long as it has its connection."""
        before = self._listening.get(client)
        if before is not None:
            before.cancel()
        self._listening[client] = spawn(self._tasks, self._listen(client))

    async def _listen(self, client: Client) -> None:
        try:  # the connection's end says nothing: the client may live, and connect again
            connection = client.connection.dup()
            try:
                await answer_sizes(connection, functools.partial(self.stated, client.peer, client.number))
            finally:
                close_foreign([connection.detach()])
        except (UffdError, OSError, ValueError) as error:
            log.warning("%s: %s", client, error)
        finally:
            if self._listening.get(client) is asyncio.current_task():
                del self._listening[client]

    async def aclose(self) -> None:
        """End all connections: the clients connect again, to the next server."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def wait(self) -> None:
        """Wait until none is left. Canceling is safe."""
        while self._clients:
            self._changed.clear()
            await self._changed.wait()

    async def _run(self, client: MappedClient) -> None:
        why = "is left to the next server"
        try:
            why = await client.run()
        except (UffdError, OSError, ValueError) as error:
            why = str(error)
        finally:
            del self._clients[client]
            if client.identity is not None and all(other.identity != client.identity for other in self._clients):
                self._left[client.identity] = client.zeros
                while len(self._left) > _MOST_LEFT:
                    del self._left[next(iter(self._left))]
            self._changed.set()
            log.info("%s: %s; %d left", client, why, len(self._clients) + len(self._copied))
            self._tell("client.gone", client=client.number, pid=client.peer.pid, reason=why)

    def _failed(self, client: MappedClient, error: SourceError) -> bool:
        """Note that a page cannot be had; return whether it is given up."""
        log.error("%s: %s", client, error)
        self._tell("client.failed", client=client.number, reason=str(error))
        if self._settings.on_failure == "kill":
            kill(self._clients[client], client.peer, "a page cannot be had")
        return self._settings.on_failure != "hold"


def _is_registered(uffd: Userfaultfd, start: int, end: int) -> bool | None:
    """Tell whether all of it is in one registered mapping; None: the kernel does not say, since the layout changes."""
    result = uffd.try_copy(start, address_of(_UNREADABLE), end - start, 0)
    return None if result == -errno.EAGAIN else result == -errno.EFAULT


def _identity(uffd: Userfaultfd) -> tuple[int, int] | None:
    """Return what tells a userfaultfd from others; None: nothing does. Before Linux 5.12 all have the same inode."""
    found = inode(uffd.fileno())
    with select.epoll() as other:
        return None if found == inode(other.fileno()) else found


async def _is_new(handoff: Handoff) -> bool:
    """Tell whether a client has given back no page, or none that would be told: no server has known it."""
    uffd, mappings = handoff.uffd, handoff.regions.mappings
    if Feature.EVENT_REMOVE not in enabled_features(uffd.fileno()):
        return True
    registered = {_is_registered(uffd, mapping.start, mapping.end) for mapping in mappings}
    has_pages = await in_own_thread(_has_pages, handoff)
    return False not in registered and (None not in registered if has_pages is None else not has_pages)


def _has_pages(handoff: Handoff) -> bool | None:
    """Tell whether a page of a client is there; what was given back is, if it was touched since. None: unknown."""
    anyof = abi.PAGE_IS_PRESENT | abi.PAGE_IS_SWAPPED
    try:
        with PagemapOf(handoff.peer.pid) as pagemap:
            found = (pagemap.scan(each.start, each.end - each.start, anyof=anyof) for each in handoff.regions.mappings)
            return any(map(any, found))
    except OSError:  # its process may not be looked at, or the kernel has no PAGEMAP_SCAN (before Linux 6.7)
        return None


def _files_of(origin: Any) -> dict[int, OwnedDescriptor] | None:
    """Open the files of a source anew: a client that has an open file could lock it, or change its flags, for all."""
    mappable = getattr(origin, "mappable", None)
    try:
        parts = None if mappable is None else mappable(0, origin.size)
    except SourceError:
        return None
    if parts is None:
        return None
    flags = os.O_RDONLY | os.O_CLOEXEC
    return {fd: OwnedDescriptor(os.open(f"/proc/self/fd/{fd}", flags)) for fd in {fd for _, _, fd, _ in parts}}
