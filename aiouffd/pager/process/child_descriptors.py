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
        """Have these (number, descriptor) pairs in it, and no others; tell whether there was room."""
        for fd in self.take().values():
            os.close(fd)
        return all(map(self._put, batched(items, _MOST)))

    def _put(self, items: list[tuple[int, int]]) -> bool:
        assert self._inner is not None
        text = ",".join(str(number) for number, _ in items).encode()
        try:
            socket.send_fds(self._inner, [text], [fd for _, fd in items])
        except OSError:  # no room; or ETOOMANYREFS: more than RLIMIT_NOFILE are under way
            return False
        self._count += len(items)
        return True

    def take(self) -> dict[int, int]:
        """Take all out: the caller closes them. By number."""
        self._count = 0
        taken: dict[int, int] = {}
        with contextlib.suppress(OSError):
            while True:
                text, fds, _, _ = socket.recv_fds(self.outer, _MOST * 20, _MOST)
                if not text:
                    break
                for number, fd in zip(text.decode().split(","), fds, strict=False):  # not all: too many are open
                    if int(number) in taken:
                        os.close(taken[int(number)])
                    taken[int(number)] = fd
        return taken

    def close(self) -> None:
        """Close this side."""
        self.outer.close()
        if self._inner is not None:
            self._inner.close()
