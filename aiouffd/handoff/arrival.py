"""What arrives on a new connection: the bytes of a handoff, and the descriptors that belong to it."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import select
from typing import TYPE_CHECKING, Final

import attrs

from aiouffd.errors import HandoffError
from aiouffd.handoff import firecracker, nydus
from aiouffd.handoff.memory_file import memory_file
from aiouffd.handoff.own_threads import close_apart, close_foreign, in_own_thread, kind_of
from aiouffd.handoff.receive import Peer, is_userfaultfd, receive
from aiouffd.kernel.abi import Feature
from aiouffd.kernel.memory import address_of, unreadable
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.kernel.userfaultfd import NO_FEATURES, Userfaultfd

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

    from aiouffd.handoff.firecracker import Regions
    from aiouffd.ranges import Range

__all__ = ["Arrival", "Handoff"]

_MAX_BYTES: Final = 1 << 20
_MAX_FDS: Final = 16
_MAX_BLANKS: Final = 256  # that may follow the end of the array
_MAX_ENDS: Final = 16  # so often an array may seem to end within a message
_MAX_STATS: Final = 16  # requests for the size before a handshake


@attrs.frozen
class Handoff:
    """A handed-over address space.

    Attributes:
        peer: who sent it.
        regions: where its memory lies, and what it shows.
        uffd: non-blocking. It is the receiver's.
        tether: the writing end of a pipe of one of our own clients, whose end tells the client that nobody serves it
            any more; -1 for others. It is the receiver's.
        memory: the file that the regions map (a memfd), with the offsets of the regions; it may be written. Closed: the
            client has sent none, or none that is of use. It is the receiver's.
        nydus: what one of nydus' clients wants; None: it is another one.
    """

    peer: Peer
    regions: Regions
    uffd: Userfaultfd
    tether: int = -1
    memory: OwnedDescriptor = attrs.field(factory=OwnedDescriptor)
    nydus: nydus.Handshake | None = None

    def close(self) -> None:
        """Close all descriptors."""
        self.uffd.close()
        close_apart(self.memory)
        if self.tether >= 0:
            os.close(self.tether)


class Arrival:
    """What one connection has brought so far. `close` it: it owns the descriptors that no `Handoff` has taken.

    Args:
        connection: just accepted, non-blocking. It stays the caller's.
        stated: answers nydus' request for the size. None: that is refused.

    Attributes:
        peer: who is at its other end.
    """

    def __init__(self, connection: socket.socket, stated: Callable[[Peer], Awaitable[bytes]] | None = None) -> None:
        self.peer: Peer = Peer.of(connection)
        self._connection = connection
        self._stated = stated
        self._data = bytearray()
        self._stats = 0
        self._fds: list[int] = []

    async def receive(self, timeout: float) -> Handoff:  # noqa: ASYNC109 - of the whole exchange
        """Receive a handoff, within `timeout` seconds.

        Canceling is safe: `close` closes what has arrived.

        Raises:
            HandoffError: `reason` says what is wrong with it.
        """
        try:
            async with asyncio.timeout(timeout):
                found = await self._gather()
                if isinstance(found, nydus.Handshake):
                    uffd, regions = await in_own_thread(_checked, self._userfaultfd(found.regions[0]), *found.regions)
                    return Handoff(self.peer, regions, uffd, nydus=found)
                uffd, regions = await in_own_thread(_checked, self._userfaultfd(found), found)
                return Handoff(self.peer, regions, uffd, self._tether(regions), self._memory(regions))
        except TimeoutError:
            raise HandoffError(str(self.peer), f"sent no complete handoff within {timeout:g} s") from None
        except (ValueError, OSError) as error:
            raise HandoffError(str(self.peer), str(error)) from error

    @property
    def wants_answers(self) -> bool:
        """Whether it is one of our own clients, as far as that is known: such a one reads why it is turned away."""
        return b'"aiouffd"' in self._data

    def claimed(self) -> tuple[Userfaultfd | None, list[Range]]:
        """Take the userfaultfd of a refused handoff, if there is exactly one, and the addresses that it speaks of.

        The descriptor is the caller's then.
        """
        found = [fd for fd in self._fds if is_userfaultfd(fd)]
        if len(found) != 1:
            return None, []
        self._fds.remove(found[0])
        return Userfaultfd.from_fd(found[0]), firecracker.claimed(self._data)

    def close(self) -> None:
        """Close the descriptors. Does not block."""
        fds, self._fds = self._fds, []
        close_foreign(fds)

    async def _gather(self) -> Regions | nydus.Handshake:
        """Receive until the array, or nydus' handshake, is complete."""
        data, ends = self._data, 0
        while True:
            piece, more = await receive(self._connection, 64 << 10, _MAX_FDS)
            self._fds += more
            if len(self._fds) > _MAX_FDS:
                raise ValueError(f"more than {_MAX_FDS} descriptors")
            if not piece:
                raise ValueError(f"closed the connection after {len(data)} bytes of a handoff")
            data += piece
            if len(data) > _MAX_BYTES:
                raise ValueError(f"a handoff of more than {_MAX_BYTES} bytes")
            # What comes byte by byte is not parsed, or copied, for each of them.
            if not data[-_MAX_BLANKS:].rstrip().endswith((b"]", b"}")):
                continue
            if nydus.is_object(data):
                found = await self._objects()
                if found is not None:
                    return found
            else:
                try:
                    return firecracker.parse(data)
                except ValueError:
                    if ends >= _MAX_ENDS or firecracker.is_whole(data):
                        raise
            ends += 1
            if ends > _MAX_ENDS + _MAX_STATS:
                raise ValueError("no JSON, however often it seemed to end")

    async def _objects(self) -> nydus.Handshake | None:
        """Answer what asks for the size; return the handshake, if it is complete."""
        while nydus.is_object(self._data):
            whole = bytes(self._data)  # of a handshake that is refused, `claimed` reads the addresses
            message = nydus.taken(self._data)
            if message is None:
                break
            if not nydus.is_stat(message):
                self._data[:] = whole
                return nydus.Handshake.of(message)
            self._stats += 1
            if self._stated is None or self._stats > _MAX_STATS:
                raise ValueError("asks for the size too often")
            self._connection.send(await self._stated(self.peer))
        return None

    def _userfaultfd(self, regions: Regions) -> Userfaultfd:
        """Return a duplicate of the userfaultfd that has arrived, with the feature that matters to who serves it.

        Raises:
            ValueError: there is none, or there are several.
        """
        found = [fd for fd in self._fds if is_userfaultfd(fd)]
        if len(found) != 1:
            raise ValueError(f"{len(found)} userfaultfds among {len(self._fds)} descriptors; one is needed")
        tracked = regions.extra is not None and regions.extra.get("write_protect") is True
        return Userfaultfd.from_fd(os.dup(found[0]), Feature.WP_ASYNC if tracked else NO_FEATURES)

    def _tether(self, regions: Regions) -> int:
        """Take the pipe that one of our own clients has sent; -1 without one."""
        pipes = [fd for fd in self._fds if kind_of(fd).startswith("pipe:")] if regions.extra is not None else []
        if not pipes:
            return -1
        self._fds.remove(pipes[0])
        return pipes[0]

    def _memory(self, regions: Regions) -> OwnedDescriptor:
        """Take the file behind the regions, where the client has sent it."""
        found = memory_file(self._fds, regions, str(self.peer))
        if found < 0:
            return OwnedDescriptor()
        self._fds.remove(found)
        return OwnedDescriptor(found)


def _checked(uffd: Userfaultfd, *choices: Regions) -> tuple[Userfaultfd, Regions]:
    """Return a userfaultfd that can be used, and for which of these regions, which differ in the size of their pages.

    Waits for the lock of its owner's address space.

    Raises:
        ValueError: what is wrong with it. It is closed.
    """
    wrong = ""
    try:
        _check_descriptor(uffd)
        for regions in choices:
            wrong = _wrong_pages(uffd, regions)
            if not wrong:
                return uffd, regions
    except BaseException:
        uffd.close()
        raise
    uffd.close()
    raise ValueError(wrong)


def _check_descriptor(uffd: Userfaultfd) -> None:
    os.set_blocking(uffd.fileno(), False)  # else poll(2) reports POLLERR, and a read would block
    poller = select.poll()
    poller.register(uffd.fileno(), select.POLLIN)
    if any(events & select.POLLERR for _, events in poller.poll(0)):
        raise ValueError("its userfaultfd has not done the UFFDIO_API handshake")
    if uffd.gone():
        raise ValueError("the process that owns the memory has ended")


def _wrong_pages(uffd: Userfaultfd, regions: Regions) -> str:
    """Return why the memory has not the pages that the regions say, as far as it is registered; else "".

    A COPY of larger pages would meet some that are present, again and again. Huge pages take no COPY of smaller ones:
    the kernel looks at that before it reads the source of the copy, so that an unreadable source tells which it is.
    """
    nowhere, size = address_of(unreadable()), regions.page_size
    for mapping in regions.mappings:
        kind = ""
        if uffd.try_copy(mapping.start, nowhere, size, 0) == -errno.EINVAL:
            kind = "larger"
        elif size > mmap.PAGESIZE:
            result = uffd.try_copy(mapping.start, nowhere, mmap.PAGESIZE, 0)
            kind = "smaller" if result in (-errno.EFAULT, -errno.EEXIST) else ""
        if kind:
            return f"the memory at {mapping.start:#x} has {kind} pages than {size} bytes"
    return ""
