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
from aiouffd.handoff import firecracker
from aiouffd.handoff.memory_file import memory_file
from aiouffd.handoff.own_threads import close_foreign, in_own_thread, kind_of
from aiouffd.handoff.receive import Peer, is_userfaultfd, receive
from aiouffd.kernel.abi import Feature
from aiouffd.kernel.memory import address_of, unreadable
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.kernel.userfaultfd import NO_FEATURES, Userfaultfd

if TYPE_CHECKING:
    import socket

    from aiouffd.handoff.firecracker import Regions
    from aiouffd.ranges import Range

__all__ = ["Arrival", "Handoff"]

_MAX_BYTES: Final = 1 << 20
_MAX_FDS: Final = 16
_MAX_BLANKS: Final = 256  # that may follow the end of the array
_MAX_ENDS: Final = 16  # so often an array may seem to end within a message


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
    """

    peer: Peer
    regions: Regions
    uffd: Userfaultfd
    tether: int = -1
    memory: OwnedDescriptor = attrs.field(factory=OwnedDescriptor)

    def close(self) -> None:
        """Close all descriptors."""
        self.uffd.close()
        self.memory.close()
        if self.tether >= 0:
            os.close(self.tether)


class Arrival:
    """What one connection has brought so far. `close` it: it owns the descriptors that no `Handoff` has taken.

    Args:
        connection: just accepted, non-blocking. It stays the caller's.

    Attributes:
        peer: who is at its other end.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.peer: Peer = Peer.of(connection)
        self._connection = connection
        self._data = bytearray()
        self._fds: list[int] = []

    async def receive(self, timeout: float) -> Handoff:  # noqa: ASYNC109 - of the whole exchange
        """Receive a handoff, within `timeout` seconds.

        Canceling is safe: `close` closes what has arrived.

        Raises:
            HandoffError: `reason` says what is wrong with it.
        """
        try:
            async with asyncio.timeout(timeout):
                regions = await self._gather()
                uffd = await in_own_thread(_checked, self._userfaultfd(regions), regions)
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

    async def _gather(self) -> Regions:
        """Receive until the array is complete."""
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
            # An array that comes byte by byte is not parsed, or copied, for each of them.
            if not data[-_MAX_BLANKS:].rstrip().endswith(b"]"):
                continue
            try:
                return firecracker.parse(data)
            except ValueError:
                ends += 1
                if ends > _MAX_ENDS or firecracker.is_whole(data):
                    raise

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


def _checked(uffd: Userfaultfd, regions: Regions) -> Userfaultfd:
    """Return a userfaultfd that can be used for these regions. Waits for the lock of its owner's address space.

    Raises:
        ValueError: what is wrong with it. It is closed.
    """
    try:
        _check_descriptor(uffd)
        _check_pages(uffd, regions)
    except BaseException:
        uffd.close()
        raise
    return uffd


def _check_descriptor(uffd: Userfaultfd) -> None:
    os.set_blocking(uffd.fileno(), False)  # else poll(2) reports POLLERR, and a read would block
    poller = select.poll()
    poller.register(uffd.fileno(), select.POLLIN)
    if any(events & select.POLLERR for _, events in poller.poll(0)):
        raise ValueError("its userfaultfd has not done the UFFDIO_API handshake")
    if uffd.gone():
        raise ValueError("the process that owns the memory has ended")


def _check_pages(uffd: Userfaultfd, regions: Regions) -> None:
    """Check that the memory has pages of the size that the array says, as far as it is registered.

    A COPY of larger pages would meet some that are present, again and again. Huge pages take no COPY of smaller ones:
    the kernel looks at that before it reads the source of the copy, so that an unreadable source tells which it is.

    Raises:
        ValueError: it has others.
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
            raise ValueError(f"the memory at {mapping.start:#x} has {kind} pages than {size} bytes")
