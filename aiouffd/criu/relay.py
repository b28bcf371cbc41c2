"""A source of one process, read from another over a Unix socket.

For what cannot be opened a second time, such as CRIU's page server. The process with the source outlives the workers
that read from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

from aiouffd.errors import SourceError
from aiouffd.handoff.receive import Peer

if TYPE_CHECKING:
    from aiouffd.sources.base import Source

__all__ = ["Relay", "RelaySource"]

_REQUEST = struct.Struct("=IQQ")  # index of the source, offset, length
_ANSWER = struct.Struct("=?Q")  # whether it is an error, bytes that follow
_CONNECTIONS = 16
_MAX_ERROR = 64 << 10  # bytes of the text of an error


class Relay:
    """Serves sources of this process. An async context manager; `add` returns what another process reads from.

    Answers only processes of the same user and of root: its address is an abstract one, which has no file mode.
    """

    def __init__(self) -> None:
        self._sources: list[Source] = []
        self._server: asyncio.Server
        self._address = b""

    async def __aenter__(self) -> Relay:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind("")  # autobind: the kernel chooses an abstract address
        self._address = listener.getsockname()
        self._server = await asyncio.start_unix_server(self._answer, sock=listener)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()

    def add(self, source: Source) -> RelaySource:
        """Return a source that can be pickled and reads from this one."""
        self._sources.append(source)
        return RelaySource(self._address, len(self._sources) - 1, source.size)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Python 3.11 logs a traceback when the handler of a stream server ends by CancelledError.
        ends = (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.closing(writer), contextlib.suppress(*ends):
            peer = Peer.of(writer.get_extra_info("socket"))
            while peer.uid in (0, os.geteuid()):
                index, offset, length = _REQUEST.unpack(await reader.readexactly(_REQUEST.size))
                failed = False
                try:
                    source = self._sources[index]
                    if offset + length > source.size:
                        raise ValueError(f"it has {source.size} bytes")  # noqa: TRY301 - the peer raises it
                    data = await source.read(offset, length)
                except Exception as error:  # noqa: BLE001 - the peer raises it
                    failed, data = True, str(error).encode()[:_MAX_ERROR]
                writer.write(_ANSWER.pack(failed, len(data)))
                writer.write(data)
                await writer.drain()


class RelaySource:
    """Reads from a `Relay`. Makes up to 16 connections as they are needed, so that reads can overlap."""

    retries = 0
    """A failed read is final: the source behind the relay has its own retries."""

    def __init__(self, address: bytes, index: int, size: int) -> None:
        self.address = address
        self.index = index
        self.size = size
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._permits = asyncio.Semaphore(_CONNECTIONS)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.address, self.index, self.size)

    async def read(self, offset: int, length: int) -> bytes:
        """Return the bytes. Canceling is safe: the connection is closed.

        Raises:
            SourceError: the source failed, or its process has ended.
        """
        async with self._permits:
            try:
                reader, writer = self._free.pop() if self._free else await self._connect()
                try:
                    writer.write(_REQUEST.pack(self.index, offset, length))
                    failed, size = _ANSWER.unpack(await reader.readexactly(_ANSWER.size))
                    if size != length if not failed else size > _MAX_ERROR:
                        raise ConnectionError(f"{size} bytes for {length}")  # noqa: TRY301 - closes the connection
                    data = await reader.readexactly(size)
                except BaseException:
                    writer.close()
                    raise
            except (OSError, asyncio.IncompleteReadError) as error:
                raise SourceError(
                    repr(self), offset, length, f"the process with the source is gone: {error}"
                ) from error
            self._free.append((reader, writer))
        if failed:
            raise SourceError(repr(self), offset, length, data.decode(errors="replace"))
        return data

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connection, self.address)
        except BaseException:
            connection.close()
            raise
        return await asyncio.open_unix_connection(sock=connection, limit=1 << 20)

    async def aclose(self) -> None:
        """Close the connections."""
        while self._free:
            self._free.pop()[1].close()

    def __repr__(self) -> str:
        return f"RelaySource({self.index})"
