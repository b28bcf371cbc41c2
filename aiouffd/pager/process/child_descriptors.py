"""Descriptors of forked children, where they outlive the pager: in the queue of a socket that the application has, too.

The kernel gives a child's userfaultfd to the process that reads the event. If the last descriptor closes, the child
reads zeros. A descriptor that was sent, and not received yet, is open. So it costs the application none of its own.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING, Final, Self

from aiouffd.kernel.owned_descriptor import OwnedSocket
from aiouffd.pager.process.handles import close_all
from aiouffd.ranges import batched

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Vault"]

_MOST: Final = 250  # descriptors in a message; SCM_MAX_FD is 253
_SPARE: Final = 64


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
        mark = os.urandom(8).hex()
        self._count = 0
        if self._send(mark, []) and all(map(self._put, batches)):
            count = self._count
            close_all(self.take(mark).values())
            self._count = count
            return True
        taken = self.take()  # there was no room for both
        try:
            return all(map(self._put, batches))
        finally:
            close_all(taken.values())

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

    def take(self, mark: str = "") -> dict[int, int]:
        """Take all out, or what is before a mark: the caller closes them. By number."""
        self._count = 0
        taken: dict[int, int] = {}
        with contextlib.suppress(OSError):
            while True:
                data, fds, _, _ = socket.recv_fds(self.outer, _MOST * 20, _MOST)
                text = data.decode()
                if text in ("", mark):  # nothing: nobody has the other side
                    break
                for number, fd in zip(text.split(","), fds, strict=False):  # not all: too many are open; or a mark
                    if int(number) in taken:
                        os.close(taken[int(number)])
                    taken[int(number)] = fd
        return taken

    def close(self) -> None:
        """Close this side."""
        self.outer.close()
        if self._inner is not None:
            self._inner.close()
