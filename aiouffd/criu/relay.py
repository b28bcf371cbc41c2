"""A source in one process, read from another: over a Unix socket, by whoever holds its address.

For what cannot be opened a second time, such as CRIU's page server: the process that holds it outlives the workers
that need it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

from aiouffd.errors import SourceError

if TYPE_CHECKING:
    from aiouffd.sources.base import Source

__all__ = ["Relay", "RelaySource"]

_REQUEST = struct.Struct("=IQQ")  # which source, offset, length
_ANSWER = struct.Struct("=?Q")  # whether it is an error, bytes that follow
_CREDENTIALS = struct.Struct("=iII")
_CONNECTIONS = 16


class Relay:
    """Answers for sources of this process. An async context manager; `add` gives what another process reads from.

    Only processes of this user, or root, are answered: the address is an abstract one, which has no mode.
    """

    def __init__(self) -> None:
        self._sources: list[Source] = []
        self._server: asyncio.Server
        self._address = b""

    async def __aenter__(self) -> Relay:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind("")  # autobind: the kernel finds an abstract address
        self._address = listener.getsockname()
        self._server = await asyncio.start_unix_server(self._answer, sock=listener)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()

    def add(self, source: Source) -> RelaySource:
        """Return a source that can be pickled, and reads from this one."""
        self._sources.append(source)
        return RelaySource(self._address, len(self._sources) - 1, source.size)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A handler of a stream server that ends as canceled is told as a traceback (Python 3.11).
        ends = (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.closing(writer), contextlib.suppress(*ends):
            _, uid, _ = _CREDENTIALS.unpack(
                writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            )
            while uid in (0, os.geteuid()):
                index, offset, length = _REQUEST.unpack(await reader.readexactly(_REQUEST.size))
                failed = False
                try:
                    data = await self._sources[index].read(offset, length)
                except Exception as error:  # noqa: BLE001 - it is told to whoever asked
                    failed, data = True, str(error).encode()
                writer.write(_ANSWER.pack(failed, len(data)))
                writer.write(data)
                await writer.drain()


class RelaySource:
    """The other end: reads from a `Relay`. Reads are spread over connections, which are made as needed."""

    retries = 0
    """Whoever has the source retries."""

    def __init__(self, address: bytes, index: int, size: int) -> None:
        self.address = address
        self.index = index
        self.size = size
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._places = asyncio.Semaphore(_CONNECTIONS)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.address, self.index, self.size)

    async def read(self, offset: int, length: int) -> bytes:
        """Ask for the bytes. Canceling is safe: the connection is given up."""
        async with self._places:
            try:
                reader, writer = self._free.pop() if self._free else await self._connect()
                try:
                    writer.write(_REQUEST.pack(self.index, offset, length))
                    failed, size = _ANSWER.unpack(await reader.readexactly(_ANSWER.size))
                    data = await reader.readexactly(size)
                except BaseException:
                    writer.close()
                    raise
            except (OSError, asyncio.IncompleteReadError) as error:
                raise SourceError(repr(self), offset, length, f"whoever has it is gone: {error}") from error
            self._free.append((reader, writer))
        if failed:
            raise SourceError(repr(self), offset, length, data.decode())
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
