"""Descriptors of forked children, where they outlive the pager: in the queue of a socket that the application has, too.

The kernel gives a child's userfaultfd to the process that reads the event. If the last descriptor closes, the child
reads zeros. A descriptor that was sent, and not received yet, is open. So it costs the application none of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import socket
from array import array
from typing import TYPE_CHECKING, Final, Self

from aiouffd.kernel.owned_descriptor import OwnedSocket
from aiouffd.pager.process.handles import close_all
from aiouffd.ranges import batched

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Vault"]

log: logging.Logger = logging.getLogger("aiouffd")

_MOST: Final = 250  # descriptors in a message; SCM_MAX_FD is 253
_SPARE: Final = 64
_FD: Final = 4  # bytes of a descriptor's number
_TEXT: Final = _MOST * 20  # bytes of a message
_MARK: Final = "="  # what a message begins with that has no descriptors


class Vault:
    """A queue of descriptors, each with a number. Nothing blocks.

    Args:
        outer: where they are taken out; the vault's from now on.
        inner: where they are put in; -1: nothing is.
    """

    def __init__(self, outer: int, inner: int = -1) -> None:
        self.outer: OwnedSocket = OwnedSocket(socket.socket(fileno=outer))
        self._inner = socket.socket(fileno=inner) if inner >= 0 else None
        self._count = 0
        self._is_left = False
        self.outer.setblocking(False)

    @classmethod
    def create(cls) -> Self:
        """Return an empty one."""
        inner, outer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        outer.shutdown(socket.SHUT_WR)
        inner.setblocking(False)
        return cls(outer.detach(), inner.detach())

    def keep(self, number: int, fd: int, living: int) -> bool:
        """Put one in; tell whether there was room. `living`: how many of those that are in it are still of use."""
        return self._count <= 2 * living + _SPARE and self._put([(number, fd)])

    def renew(self, items: Iterable[tuple[int, int]]) -> bool:
        """Have these (number, descriptor) pairs in it, and no others; tell whether there was room.

        They are in it before the old ones are taken out: whoever is killed meanwhile has left them there.
        """
        batches = list(batched(items, _MOST))
        mark = _MARK + os.urandom(8).hex()
        self._count = 0
        if self._send(mark, []) and all(map(self._put, batches)):
            self._discard(mark)
            return True
        self._discard()  # there was no room for both
        self._count = 0
        return all(map(self._put, batches))

    def _put(self, items: list[tuple[int, int]]) -> bool:
        done = self._send(",".join(str(number) for number, _ in items), [fd for _, fd in items])
        self._count += len(items) * done
        return done

    def _send(self, text: str, fds: list[int]) -> bool:
        assert self._inner is not None
        try:
            socket.send_fds(self._inner, [text.encode()], fds)
        except OSError:  # no room; or ETOOMANYREFS: more than RLIMIT_NOFILE are under way
            return False
        return True

    def _discard(self, mark: str = "") -> None:
        """Take all out, or what is before a mark, which takes no room for descriptors here."""
        with contextlib.suppress(OSError):
            while self.outer.recv(_TEXT).decode() not in ("", mark):  # nothing: nobody has the other side
                pass

    def take(self) -> dict[int, int]:
        """Take all out: the caller closes them. By number.

        What finds no room in the table of descriptors stays in it, also when it is closed: a child whose last
        descriptor is closed reads zeros. The kernel closes what finds no room, so messages are looked at first.
        """
        self._count = 0
        taken: dict[int, int] = {}
        with contextlib.suppress(OSError):
            while not self._is_left:
                text, fds = self._look()
                if not text:  # nobody has the other side
                    break
                numbers = [] if text.startswith(_MARK) else [int(number) for number in text.split(",")]
                if len(fds) < len(numbers):
                    close_all(fds)
                    self._is_left = True
                    log.error("forked children wait for ever: too many files are open here (RLIMIT_NOFILE)")
                    break
                self.outer.recv(1)  # takes out what was looked at
                close_all(taken[number] for number in taken.keys() & set(numbers))
                taken |= zip(numbers, fds, strict=True)
        return taken

    def _look(self) -> tuple[str, list[int]]:
        """Return the next message, which stays there, and its descriptors, if there is room for all of them."""
        room, how = socket.CMSG_SPACE(_MOST * _FD), socket.MSG_PEEK | socket.MSG_CMSG_CLOEXEC
        for more in (contextlib.nullcontext(), _more_files()):
            with more:
                data, parts, flags, _ = self.outer.recvmsg(_TEXT, room, how)
            fds = array("i", b"".join(part[: len(part) - len(part) % _FD] for _, _, part in parts))
            if not flags & socket.MSG_CTRUNC:
                return data.decode(), fds.tolist()
            close_all(fds)
        return data.decode(), []

    def close(self) -> None:
        """Close this side, unless something has been left in it."""
        if self._is_left:
            self.outer.detach()
        else:
            self.outer.close()
        if self._inner is not None:
            self._inner.close()


@contextlib.contextmanager
def _more_files() -> Iterator[None]:
    """Within the block this process may have as many files open as it may allow itself."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))
