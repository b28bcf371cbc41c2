"""What becomes of a client that is turned away: its threads would wait for their pages for ever.

Firecracker never reads the socket on which it has sent its handoff, and keeps its own duplicate of the userfaultfd. So
neither an answer nor the end of the connection tells it anything, and the first touch of its memory hangs. Three things
can be done about that:

- poison: UFFDIO_POISON (Linux 6.6) on all that is registered. The first touch is SIGBUS.
- kill: SIGKILL, by a pidfd of the peer.
- hold: nothing. The connection and the descriptor stay open until the peer closes the connection.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import re
import select
import signal
import socket
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Final, Literal

from aiouffd.errors import UffdError
from aiouffd.handoff.own_threads import close_foreign, in_own_thread
from aiouffd.kernel.abi import RegisterMode
from aiouffd.kernel.userfaultfd import is_registered
from aiouffd.ranges import Range

if TYPE_CHECKING:
    from aiouffd.handoff.receive import Peer
    from aiouffd.kernel.userfaultfd import Userfaultfd

__all__ = ["Policy", "Rejections", "kill", "on_error_of", "peer_pidfd", "poison", "registered"]

log: logging.Logger = logging.getLogger("aiouffd.server")

Policy = Literal["kill", "poison", "hold"]

_SO_PEERPIDFD: Final = 77  # Linux 6.5; Python's socket module does not name it
_MAX_HELD: Final = 256  # connections that are kept for `hold`
_MAX_EAGAIN: Final = 1000
_HEADER = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ")


def on_error_of(policy: Policy) -> Literal["sigbus", "retry", "hold"]:
    """Return what a pager is to do about a page that cannot be had, where the policy is that of `on_failure`."""
    return {"poison": "sigbus", "kill": "retry", "hold": "hold"}[policy]  # type: ignore[return-value]


class Rejections:
    """Applies a policy to clients that are turned away."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._held: list[tuple[socket.socket, Userfaultfd]] = []

    async def reject(self, connection: socket.socket, peer: Peer, uffd: Userfaultfd, claimed: list[Range]) -> None:
        """Do to a client what the policy says. Takes the connection and the descriptor.

        Canceling is safe: what has begun goes on in its thread.

        Args:
            connection: of the client.
            peer: who is at its other end.
            uffd: of its memory.
            claimed: the addresses that its handoff speaks of.
        """
        if self._policy == "hold":
            self._hold(connection, uffd)
            return
        try:
            if self._policy == "kill":
                kill(connection, peer)
                uffd.close()
            else:
                # Poisoning 1 TiB takes a while, and waits for the lock of the client's address space.
                await in_own_thread(_poison_all, peer, uffd, claimed)
        finally:
            close_foreign([connection.detach()])

    def close(self) -> None:
        """Let the held clients go: their threads go on waiting."""
        while self._held:
            self._release(self._held[0])

    def _hold(self, connection: socket.socket, uffd: Userfaultfd) -> None:
        poller = select.poll()
        for held, _ in self._held:
            poller.register(held, 0)  # POLLHUP
        ended = {fd for fd, _ in poller.poll(0)}
        for item in [item for item in self._held if item[0].fileno() in ended]:
            self._release(item)
        if len(self._held) >= _MAX_HELD:
            self._release(self._held[0])
        self._held.append((connection, uffd))

    def _release(self, item: tuple[socket.socket, Userfaultfd]) -> None:
        self._held.remove(item)
        item[1].close()
        close_foreign([item[0].detach()])


def kill(connection: socket.socket, peer: Peer, why: str = "it was turned away") -> None:
    """Send SIGKILL to the peer of a connection; never to another process that has its pid by now."""
    try:
        pidfd = peer_pidfd(connection, peer)
    except OSError as error:
        log.error("%s cannot be killed: %s", peer, error.strerror)  # noqa: TRY400 - no traceback helps here
        return
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        log.warning("%s was killed, since %s", peer, why)
    except OSError as error:
        log.error("%s cannot be killed: %s", peer, error.strerror)  # noqa: TRY400 - no traceback helps here
    finally:
        os.close(pidfd)


def peer_pidfd(connection: socket.socket, peer: Peer) -> int:
    """Return a pidfd of the process that connected (SO_PEERPIDFD; before Linux 6.5, pidfd_open and checks).

    Raises:
        OSError: it has ended, or cannot be seen.
    """
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
    if not peer.pid:
        raise ProcessLookupError(errno.ESRCH, "its process is in another pid namespace")
    pidfd = os.pidfd_open(peer.pid)
    # The pid may have been given to another process since. That one has another user, or the connection has ended.
    poller = select.poll()
    poller.register(connection, 0)
    try:
        same = not poller.poll(0) and Path(f"/proc/{peer.pid}").stat().st_uid == peer.uid
    except OSError:
        same = False
    if not same:
        os.close(pidfd)
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    return pidfd


def _poison_all(peer: Peer, uffd: Userfaultfd, claimed: list[Range]) -> None:
    try:
        ranges = registered(peer.pid)
    except OSError:  # of another user, or in another pid namespace
        ranges = []
    try:
        done = sum(poison(uffd, item, page) for item, page in ranges or [(item, mmap.PAGESIZE) for item in claimed])
    except UffdError as error:
        log.error("%s waits for its pages for ever: %s", peer, error)  # noqa: TRY400 - no traceback helps here
    else:
        log.warning("%s: its missing pages (%d bytes) are poisoned: a touch is SIGBUS", peer, done)
    finally:
        uffd.close()


def registered(pid: int) -> list[tuple[Range, int]]:
    """Return what a process has registered in mode MISSING (`um` in its smaps), with the size of its pages.

    Raises:
        OSError: it has ended, or may not be looked at.
    """
    found = []
    here, page_size = Range(0, 0), mmap.PAGESIZE
    with Path(f"/proc/{pid}/smaps").open() as file:
        for text in file:
            if match := _HEADER.match(text):
                start, end = (int(number, 16) for number in match.groups())
                here = Range(start, end - start)
            elif text.startswith("KernelPageSize:"):
                page_size = int(text.split()[1]) << 10
            elif text.startswith("VmFlags:") and "um" in text.split():
                found.append((here, page_size))
    return found


def poison(uffd: Userfaultfd, where: Range, page_size: int) -> int:
    """Poison the missing pages of a range, so that a touch is SIGBUS; return how many bytes were missing.

    What is not registered with this descriptor is left alone.

    Raises:
        UnsupportedError, OperationError: the kernel has no POISON (before Linux 6.6), or refuses it.
    """
    if not is_registered(uffd, where.start, page_size):
        return 0
    try:
        # The kernel lets a userfaultfd poison what another one of its process has registered. Registering again what is
        # registered changes nothing, and is EBUSY where another one has it.
        uffd.register(where.start, where.length, RegisterMode.MISSING)
    except UffdError:
        return 0
    at, end, done, refusals = where.start, where.end, 0, 0
    while at < end:
        result = uffd.try_poison(at, end - at, 0)
        if result > 0:
            done += result
            at += result
            refusals = 0
        elif result == -errno.EEXIST:
            uffd.try_wake(at, page_size)
            at += page_size
        elif result == -errno.EAGAIN and refusals < _MAX_EAGAIN:
            refusals += 1
            with contextlib.suppress(UffdError, OSError):
                uffd.read()  # an unread layout event makes the kernel refuse
            sleep(0.001)
        else:
            done += uffd.poison(at, end - at)  # raises, with the reason
            break
    return done
