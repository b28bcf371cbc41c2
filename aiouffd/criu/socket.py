"""The socket `lazy-pages.socket`: how `criu restore --lazy-pages` hands its processes over to a daemon.

Some facts about the protocol, which has no version and no answers:

- The socket lies in CRIU's work directory; the daemon listens, and CRIU connects once. All processes that are being
  restored send over that connection, in turn.
- For each process: its pid as a native int32, then a byte of no meaning with the userfaultfd. For a zombie the pid is
  negative and nothing follows. The pid is the one of the images.
- When all are restored: 0x52535446, which is above every pid. The end of the connection before that means that the
  restore has failed; after it, nothing.
- A process registers its ranges after it has sent the descriptor, and closes its own copy then. It may fault before
  the end mark: whoever waits for the mark before it serves may wait for ever.
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
from aiouffd.server.listener import SocketFile

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator
    from types import TracebackType

__all__ = ["SOCKET_NAME", "LazyPagesSocket", "RestoredTask"]

SOCKET_NAME = "lazy-pages.socket"
_FINISHED = 0x52535446
_PID = struct.Struct("=i")
_MAX_PID = 1 << 22  # PID_MAX_LIMIT


@attrs.frozen
class RestoredTask:
    """A process that is being restored.

    Attributes:
        pid: as in the names of the images. In another pid namespace it has another number.
        fd: its userfaultfd, non-blocking and close-on-exec, with the features FORK, REMAP, UNMAP and REMOVE. It
            belongs to the receiver. The process is about to close its own copy: if this one is closed then, what
            is missing reads as **zeros**.
    """

    pid: int
    fd: int


class LazyPagesSocket:
    """Listens for one `criu restore --lazy-pages`. A context manager that closes and removes the socket.

    Args:
        directory: CRIU's work directory (its `-W`, or else `-D`). A socket that was left there is replaced, unless
            somebody listens on it.
        timeout: seconds between a pid and its descriptor, which CRIU sends at once.
        mode: of the socket; CRIU connects as root.

    Raises:
        HandoffError: there is something else of that name.
        OSError: one cannot listen there; EADDRINUSE: another daemon does.
    """

    def __init__(self, directory: str | os.PathLike[str], *, timeout: float = 10.0, mode: int = 0o600) -> None:
        self.path = Path(directory) / SOCKET_NAME
        self.peer: Peer | None = None
        """Who has connected."""
        self.finished = False
        """Whether the end mark has come: everything is restored and runs."""
        self._timeout = timeout
        self._connection: socket.socket | None = None
        try:
            self._file = SocketFile(self.path, mode=mode, backlog=1)
        except FileExistsError as error:
            raise HandoffError(str(self.path), error.strerror or str(error)) from None

    async def tasks(self) -> AsyncIterator[RestoredTask]:
        """Wait for CRIU, and yield the processes as they come; end at the end mark.

        Canceling, or leaving the loop, is safe between two processes. To be called once.

        Raises:
            HandoffError: CRIU has ended before the end mark, or has sent what it never sends.
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
                raise self._wrong(f"has sent {number} where a pid or the end mark belongs")
            seen.add(pid)
            if number > 0:
                yield RestoredTask(pid, await self._descriptor(connection, pid))

    async def closed(self) -> None:
        """Wait until CRIU has closed the connection behind the end mark: it sends no more.

        Raises:
            HandoffError: it does.
        """
        if self._connection is not None:
            data = b""
            with contextlib.suppress(ConnectionError):
                data, _ = await receive(self._connection, 1)
            if data:
                raise self._wrong("has sent more behind the end mark")

    def close(self) -> None:
        """Close the connection and the listener, and remove the socket."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<LazyPagesSocket {str(self.path)!r}>"

    async def _accept(self) -> socket.socket:
        connection, _ = await asyncio.get_running_loop().sock_accept(self._file.listener)
        connection.setblocking(False)
        self._file.listener.close()  # a second one shall be refused, not wait
        self._connection = connection
        self.peer = Peer.of(connection)
        if self.peer.uid not in (0, os.geteuid()):
            raise self._wrong("is not of this user, nor root")
        return connection

    async def _number(self, connection: socket.socket) -> int:
        """Receive a pid or the mark: exactly its four bytes, since behind them is a byte with a descriptor."""
        data = b""
        while len(data) < _PID.size:
            try:
                more, _ = await receive(connection, _PID.size - len(data))
            except ConnectionError:
                more = b""
            if not more:
                inside = f" within a number ({len(data)} bytes)" if data else ""
                raise self._wrong(f"has closed the connection before the end mark{inside}: see the log of the restore")
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
            raise self._wrong(f"has sent {what} behind the pid {pid} where its userfaultfd belongs")
        try:
            require_userfaultfd(descriptors[0], str(self.peer))
        except HandoffError:
            os.close(descriptors[0])
            raise
        return descriptors[0]

    def _wrong(self, reason: str) -> HandoffError:
        return HandoffError(f"criu restore, {self.peer}", reason)
