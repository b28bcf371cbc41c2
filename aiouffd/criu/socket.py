"""The socket `lazy-pages.socket`: `criu restore --lazy-pages` hands its processes over to a daemon through it.

Some facts about the protocol, which has no version and no answers:

- The socket is in CRIU's work directory. The daemon listens, CRIU connects once. All processes that CRIU restores
  send over that connection, one after the other.
- For each process: its pid as a native int32, then one byte of no meaning together with its userfaultfd. For a zombie
  the pid is negative and nothing follows. The pid is that of the images.
- When all processes are restored: 0x52535446, which is above every pid. If the connection ends before that, the
  restore has failed. After it the end means nothing.
- A process sends the descriptor, then registers its ranges, then closes its own copy. It may fault before the end
  mark. A daemon that waits for the mark before it serves may wait for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Self

import attrs

from aiouffd.errors import HandoffError
from aiouffd.handoff.receive import Peer, receive, require_userfaultfd
from aiouffd.lifetime import uninterrupted
from aiouffd.server.listener import SocketFile

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator

__all__ = ["SOCKET_NAME", "LazyPagesSocket", "RestoredTask"]

SOCKET_NAME = "lazy-pages.socket"
_FINISHED = 0x52535446
_PID = struct.Struct("=i")
_MAX_PID = 1 << 22  # PID_MAX_LIMIT


@attrs.frozen
class RestoredTask:
    """A process that CRIU restores.

    Attributes:
        pid: as in the names of the images. In another pid namespace the process has another pid.
        fd: its userfaultfd, non-blocking and close-on-exec, with the features FORK, REMAP, UNMAP and REMOVE. It
            belongs to the receiver. The process is about to close its own copy: if the receiver closes this one
            then, missing pages read as **zeros**.
    """

    pid: int
    fd: int


class LazyPagesSocket:
    """Listens for one `criu restore --lazy-pages`. An async context manager that makes and removes the socket.

    Args:
        directory: CRIU's work directory (its `-W`, or else `-D`). Replaces a socket that nobody listens on.
        timeout: seconds between a pid and its descriptor. CRIU sends both at once.
        mode: of the socket. CRIU connects as root.

    Attributes:
        path: of the socket.
        peer: the process that connected; None before that.
        finished: whether the end mark was received: all processes are restored and run.

    """

    def __init__(self, directory: str | os.PathLike[str], *, timeout: float = 10.0, mode: int = 0o600) -> None:
        self.path: Path = Path(directory) / SOCKET_NAME
        self.peer: Peer | None = None
        self.finished: bool = False
        self._timeout = timeout
        self._mode = mode
        self._file: SocketFile | None = None
        self._connection: socket.socket | None = None

    async def __aenter__(self) -> Self:
        """Listen. Canceling is safe.

        Raises:
            HandoffError: the name belongs to something that is no socket.
            OSError: the socket cannot be made. EADDRINUSE: another daemon listens there.
        """
        try:
            await uninterrupted(self._listen)
        except BaseException:
            self.close()
            raise
        return self

    def _listen(self) -> None:
        try:
            self._file = SocketFile(self.path, mode=self._mode, backlog=1)
        except FileExistsError as error:
            raise HandoffError(str(self.path), error.strerror or str(error)) from None

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def tasks(self) -> AsyncIterator[RestoredTask]:
        """Wait for CRIU and yield each process as it is sent, until the end mark. Call it once.

        Canceling, or leaving the loop, is safe between two processes.

        Raises:
            HandoffError: CRIU ended before the end mark, or sent something that the protocol does not allow.
        """
        connection = await self._accept()
        seen: set[int] = set()
        while True:
            number = await self._number(connection)
            if number == _FINISHED:
                self.finished = True
                return
            pid = abs(number)
            if not 0 < pid <= _MAX_PID or pid in seen:
                raise self._invalid(f"sent {number} in place of a new pid or the end mark")
            seen.add(pid)
            if number > 0:
                yield RestoredTask(pid, await self._descriptor(connection, pid))

    async def closed(self) -> None:
        """Wait until CRIU closes the connection after the end mark. Canceling is safe.

        Raises:
            HandoffError: CRIU sent something after the end mark.
        """
        if self._connection is not None:
            data = b""
            with contextlib.suppress(ConnectionError):
                data, _ = await receive(self._connection, 1)
            if data:
                raise self._invalid("sent data after the end mark")

    def close(self) -> None:
        """Close the connection and the listener, and remove the socket."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        if self._file is not None:
            self._file.close()

    def __repr__(self) -> str:
        return f"<LazyPagesSocket {str(self.path)!r}>"

    async def _accept(self) -> socket.socket:
        assert self._file is not None
        connection, _ = await asyncio.get_running_loop().sock_accept(self._file.listener)
        connection.setblocking(False)
        self._file.listener.close()  # so that a second connection is refused and does not wait
        self._connection = connection
        self.peer = Peer.of(connection)
        if self.peer.uid not in (0, os.geteuid()):
            raise self._invalid("is neither of this user nor of root")
        return connection

    async def _number(self, connection: socket.socket) -> int:
        """Receive a pid or the mark: not more than its four bytes, since a descriptor comes with the next byte."""
        data = b""
        while len(data) < _PID.size:
            inside = f" within a number ({len(data)} bytes)" if data else ""
            try:
                async with asyncio.timeout(self._timeout if data else None):
                    more, _ = await receive(connection, _PID.size - len(data))
            except ConnectionError:
                more = b""
            except TimeoutError:
                raise self._invalid(f"sent nothing for {self._timeout} s{inside}") from None
            if not more:
                raise self._invalid(f"closed the connection before the end mark{inside}: see the log of the restore")
            data += more
        number: int = _PID.unpack(data)[0]
        return number

    async def _descriptor(self, connection: socket.socket, pid: int) -> int:
        try:
            async with asyncio.timeout(self._timeout):
                data, descriptors = await receive(connection, 1, 1)
        except (ConnectionError, TimeoutError):
            data, descriptors = b"", []
        if not data or not descriptors:
            what = "nothing" if not data else "no descriptor"
            raise self._invalid(f"sent {what} after the pid {pid} in place of its userfaultfd")
        try:
            require_userfaultfd(descriptors[0], str(self.peer))
        except HandoffError:
            os.close(descriptors[0])
            raise
        return descriptors[0]

    def _invalid(self, reason: str) -> HandoffError:
        return HandoffError(f"criu restore, {self.peer}", reason)
