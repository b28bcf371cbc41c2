"""A descriptor that belongs to an object.

A program may close descriptors that it has not opened, as daemons do when they start. Their numbers are those of other
files then, which this package must neither read, write nor close. So what owns a descriptor remembers the inode behind
it. Sockets, pipes and memfds have one each, userfaultfds since Linux 5.12, pidfds since 6.9; all others of an older
kernel look the same, as all eventfds and epolls do.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING, Any, Self

from aiouffd.lifetime import until_exit

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["OwnedDescriptor", "OwnedSocket", "inode", "name_of"]


def inode(fd: int) -> tuple[int, int] | None:
    """Return device and inode of what a descriptor is; None: it is none."""
    try:
        found = os.fstat(fd)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def name_of(fd: int) -> str:
    """Return what names the file behind a descriptor, as long as anybody has it open; empty: there is none."""
    return "-".join(map(str, inode(fd) or ()))


class OwnedDescriptor:
    """Closes its descriptor at the end of a `with` block, by `close()`, or when nobody refers to it any more.

    Args:
        fd: belongs to this object from now on; -1: none.
    """

    _fd: int = -1
    _inode: tuple[int, int] | None = None

    def __init__(self, fd: int = -1) -> None:
        self._own(fd)

    def _own(self, fd: int) -> None:
        self._fd, self._inode = fd, inode(fd)

    def fileno(self) -> int:
        """Return the descriptor; it stays this object's. -1: there is none."""
        return self._fd

    def close(self) -> None:
        """Close the descriptor, unless its number is another file's by now. A second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0 and inode(fd) == self._inode:
            os.close(fd)

    @property
    def closed(self) -> bool:
        """Whether it has no descriptor any more."""
        return self._fd < 0

    @property
    def intact(self) -> bool:
        """Whether it has a descriptor that nobody else has closed."""
        return self._fd >= 0 and inode(self._fd) == self._inode

    @property
    def lost(self) -> bool:
        """Whether somebody else has closed its descriptor."""
        fd = self._fd
        return fd >= 0 and inode(fd) != self._inode and fd == self._fd  # not closed just now

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @until_exit
    def __del__(self) -> None:
        if self._fd >= 0:
            self.close()


class OwnedSocket(socket.socket):
    """A socket whose messages, and whose end, are never those of another file: it seems to be reset then.

    Args:
        taken: a socket, which is detached.
    """

    _inode: tuple[int, int] | None = None

    def __init__(self, taken: socket.socket) -> None:
        super().__init__(taken.family, taken.type, taken.proto, fileno=taken.detach())
        self._inode = inode(self.fileno())

    @classmethod
    def pair(cls, kind: socket.SocketKind) -> tuple[Self, Self]:
        """Return two that are connected, of the family AF_UNIX."""
        one, other = socket.socketpair(socket.AF_UNIX, kind)
        return cls(one), cls(other)

    @property
    def intact(self) -> bool:
        """As `OwnedDescriptor.intact`."""
        return self.fileno() >= 0 and inode(self.fileno()) == self._inode

    @property
    def lost(self) -> bool:
        """As `OwnedDescriptor.lost`."""
        fd = self.fileno()
        return fd >= 0 and inode(fd) != self._inode and fd == self.fileno()

    def _check(self) -> None:
        if not self.intact:
            raise ConnectionResetError(errno.ECONNRESET, "this process has closed the connection's descriptor")

    def sendmsg(self, *args: Any) -> int:
        """As `socket.sendmsg`."""
        self._check()
        return super().sendmsg(*args)

    def recvmsg(self, *args: Any) -> tuple[bytes, list[tuple[int, int, bytes]], int, Any]:
        """As `socket.recvmsg`."""
        self._check()
        return super().recvmsg(*args)

    def sendall(self, *args: Any) -> None:
        """As `socket.sendall`."""
        self._check()
        super().sendall(*args)

    def recv(self, *args: Any) -> bytes:
        """As `socket.recv`."""
        self._check()
        return super().recv(*args)

    def setblocking(self, flag: bool, /) -> None:  # noqa: FBT001 - the standard library's
        """As `socket.setblocking`: the flag is the open file's."""
        self._check()
        super().setblocking(flag)

    def shutdown(self, how: int, /) -> None:
        """As `socket.shutdown`."""
        self._check()
        super().shutdown(how)

    def close(self) -> None:
        """Close the socket, unless its number is another file's by now."""
        if self.intact:
            super().close()
        elif self.fileno() >= 0:
            self.detach()

    @until_exit
    def __del__(self) -> None:
        self.close()
