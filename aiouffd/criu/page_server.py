"""A client of the page server of `criu dump --lazy-pages`, over TCP.

Some facts about that server:

- It accepts one connection in its life and ends with it. Nobody can connect a second time.
- A request is a header. The reply is a header and pages: as many as were asked for or fewer, since the server stops at
  the end of its own run of pages. A client may send requests without waiting; the replies come in the same order.
- A request for a page or a process that the server does not have ends the session, or the server. Only lazy pages may
  be asked for.
- The server puts a reply through a pipe, which has at least 4 MiB. A larger request fails.
- The header grew from 24 to 32 bytes with CRIU 4.2. Nothing on the wire says which one a server uses, but the images
  do: see `TaskImage.wide_counts`.
- The dumped processes stay frozen until the session ends. Closing a session in order ends the dump in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import struct
from bisect import bisect_right
from collections import deque
from typing import TYPE_CHECKING, Any, cast

import attrs

from aiouffd.errors import ClosedError, SourceError, SourceTimeoutError
from aiouffd.rpc import LAST_REQUEST

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["HEADER_4_1", "HEADER_4_2", "CriuPageServer", "CriuTaskSource"]

HEADER_4_1 = "<IIQQ"
"""cmd, nr_pages, vaddr, pid: up to CRIU 4.1."""
HEADER_4_2 = "<I4xQQQ"
"""The same with 64 bits for nr_pages: from CRIU 4.2 on."""

_ADD_F = 6
_GET = 7
_CLOSE = 0x1023
_COMMAND_MASK = 0xFFFF
_MAX_PAGES = (4 << 20) // mmap.PAGESIZE
_STATUS = struct.Struct("=i")


@attrs.define(eq=False, repr=False)
class _Request:
    """A GET without its reply: what the reply must be about, and the future that gets its pages."""

    pid: int
    address: int
    count: int
    answer: asyncio.Future[bytearray]


class _Replies(asyncio.BufferedProtocol):
    """Parses the replies. Pages are received straight into the buffers that the readers get."""

    def __init__(self, name: str, header: str, permits: asyncio.Semaphore) -> None:
        self.name = name
        self.permits = permits  # one for each request without a reply
        self.header = struct.Struct(header)
        self.expected: deque[_Request] = deque()
        self.closing: asyncio.Future[int] | None = None
        self.failure: SourceError | None = None
        self.transport: asyncio.Transport | None = None
        self._head = bytearray(max(self.header.size, _STATUS.size))
        self._pages: bytearray | None = None  # of the reply whose header has been received
        self._view = memoryview(self._head)
        self._done = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's transports do not inherit from asyncio's

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view[self._done : self._wanted()]

    def buffer_updated(self, nbytes: int) -> None:
        if self._pages is None and not self.expected and self.closing is None:
            self.fail("sent data without a request")
            return
        self._done += nbytes
        if self._done < self._wanted():
            return
        self._done = 0
        if self._pages is not None:
            pages, self._pages, self._view = self._pages, None, memoryview(self._head)
            answer = self.expected.popleft().answer
            self.permits.release()
            if not answer.done():  # done: its reader was canceled
                answer.set_result(pages)
        elif self.expected:
            self._begin(*self.header.unpack_from(self._head))
        else:
            assert self.closing is not None
            if not self.closing.done():
                self.closing.set_result(_STATUS.unpack_from(self._head)[0])

    def _wanted(self) -> int:
        if self._pages is not None:
            return len(self._pages)
        return _STATUS.size if self.closing is not None and not self.expected else self.header.size

    def _begin(self, command: int, count: int, address: int, pid: int) -> None:
        """Check the header of a reply and make room for its pages."""
        request = self.expected[0]
        if command & _COMMAND_MASK != _ADD_F:
            self.fail(f"answered with the command {command:#x}; does the header fit the version of CRIU?")
        elif (address, pid) != (request.address, request.pid):
            self.fail(
                f"was asked for {request.address:#x} of {request.pid} and answered {address:#x} of {pid};"
                " does the header fit the version of CRIU?"
            )
        elif not 0 < count <= request.count:
            self.fail(f"was asked for {request.count} pages at {address:#x} and sent {count}")
        else:
            self._pages = bytearray(count * mmap.PAGESIZE)
            self._view = memoryview(self._pages)

    def eof_received(self) -> None:
        self.fail("closed the connection: see the log of the dump")

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(f"the connection is lost: {exc}" if exc else "the connection is closed")

    def fail(self, reason: str) -> None:
        """Close the connection, and fail all requests with the first reason that was given."""
        if self.failure is None:
            self.failure = SourceError(self.name, 0, 0, reason)
        if self.transport is not None:
            self.transport.abort()
        while self.expected:
            request = self.expected.popleft()
            self.permits.release()
            if not request.answer.done():
                error = SourceError(self.name, request.address, request.count * mmap.PAGESIZE, self.failure.reason)
                request.answer.set_exception(error)
        if self.closing is not None and not self.closing.done():
            self.closing.set_exception(self.failure)


class CriuPageServer:
    """The lazy pages of all processes of a dump. An async context manager that ends the session in order.

    A block that ends by an error, or is canceled, waits two seconds at most for the end of the session.

    Belongs to one event loop. Reads may overlap; their requests are pipelined.

    Args:
        host: where `criu dump --lazy-pages` runs.
        port: its `--port`.
        header: `HEADER_4_1` or `HEADER_4_2`, by the version of that CRIU.
        timeout: seconds to connect, for one reply, and for the end of the session.
        requests: limit of requests without a reply. With `pages` it bounds the memory.
        pages: limit of pages in one request. A request may have 4 MiB.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        header: str = HEADER_4_1,
        timeout: float = 30.0,
        requests: int = 16,
        pages: int = _MAX_PAGES,
    ) -> None:
        if not 0 < pages <= _MAX_PAGES or requests <= 0:
            raise ValueError(f"pages must be 1 to {_MAX_PAGES}, and requests at least 1")
        if header not in (HEADER_4_1, HEADER_4_2):
            raise ValueError("header must be HEADER_4_1 or HEADER_4_2")
        self.host = host
        self.port = port
        self.header = header
        self.timeout: float = timeout
        self.pages = pages
        self._permits = asyncio.Semaphore(requests)
        self._replies: _Replies | None = None
        self._closed = False

    async def connect(self) -> None:
        """Connect. The server begins to serve, and ends when this connection ends.

        Raises:
            SourceError: nobody listens there. SourceTimeoutError: no answer in time.
            ClosedError: `connect` was called before.
        """
        if self._replies is not None or self._closed:
            raise ClosedError(f"{self!r} was connected before; its server accepts one connection only")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.timeout):
                _, self._replies = await loop.create_connection(
                    lambda: _Replies(repr(self), self.header, self._permits), self.host, self.port
                )
        except TimeoutError as error:
            raise SourceTimeoutError(repr(self), 0, 0, f"no connection in {self.timeout} s") from error
        except OSError as error:
            raise SourceError(repr(self), 0, 0, f"cannot be reached: {error}") from error

    async def read(self, pid: int, vaddr: int, nr_pages: int) -> bytearray:
        """Return `nr_pages` pages of a process from `vaddr` on. All of them must be lazy in its images.

        `vaddr` is the address at the time of the dump. Canceling is safe: the reply is received and dropped.

        Raises:
            SourceError: the session has ended.
            SourceTimeoutError: no reply in time; the session goes on.
            ClosedError: not connected, or closed.
        """
        page = mmap.PAGESIZE
        if nr_pages <= 0 or vaddr % page:
            raise ValueError(f"{nr_pages} pages at {vaddr:#x}")
        data = await self._get(pid, vaddr, min(nr_pages, self.pages))
        while len(data) < nr_pages * page:
            left = nr_pages - len(data) // page
            data += await self._get(pid, vaddr + len(data), min(left, self.pages))
        return data

    def task(self, pid: int, runs: Iterable[tuple[int, int]]) -> CriuTaskSource:
        """Return lazy pages of one process as a source; `runs`: (address, length) of each run of them, in bytes."""
        return CriuTaskSource(self, pid, runs)

    async def aclose(self) -> None:
        """End the session in order, so that the dump ends in order. Waits for its status, at most `timeout` seconds.

        Waits for reads that have not ended yet. Safe to call again.

        Raises:
            SourceError: the dump says that it failed, or says nothing.
        """
        replies, self._replies, self._closed = self._replies, None, True
        if replies is None:
            return
        try:
            if replies.failure is not None:
                return  # the readers got it
            assert replies.transport is not None
            replies.closing = asyncio.get_running_loop().create_future()
            replies.transport.write(replies.header.pack(_CLOSE, 0, 0, 0))
            async with asyncio.timeout(self.timeout):
                status = await replies.closing
            if status:
                raise SourceError(repr(self), 0, 0, f"ended the session with the status {status}")
        except TimeoutError as error:
            raise SourceTimeoutError(repr(self), 0, 0, f"did not end the session in {self.timeout} s") from error
        finally:
            replies.fail("was closed")

    async def __aenter__(self) -> CriuPageServer:
        await self.connect()
        return self

    async def __aexit__(self, *error: object) -> None:
        if error[0] is None:
            await self.aclose()
        else:
            self.timeout = min(self.timeout, LAST_REQUEST)
            with contextlib.suppress(SourceError):  # the first error is the one to raise
                await self.aclose()

    def __repr__(self) -> str:
        return f"CriuPageServer({self.host!r}, {self.port})"

    async def _get(self, pid: int, vaddr: int, nr_pages: int) -> bytearray:
        length = nr_pages * mmap.PAGESIZE
        try:
            async with asyncio.timeout(self.timeout):
                # The reply returns the permit, not the reader. Otherwise the requests to a server that never answers
                # would pile up.
                await self._permits.acquire()
                return await self._send(pid, vaddr, nr_pages)
        except TimeoutError as error:
            raise SourceTimeoutError(repr(self), vaddr, length, f"no answer in {self.timeout} s") from error

    def _send(self, pid: int, vaddr: int, nr_pages: int) -> asyncio.Future[bytearray]:
        replies = self._replies
        if replies is None or replies.failure is not None:
            self._permits.release()
            if replies is None:
                raise ClosedError(f"{self!r} is {'closed' if self._closed else 'not connected'}")
            assert replies.failure is not None
            raise SourceError(repr(self), vaddr, nr_pages * mmap.PAGESIZE, replies.failure.reason)
        assert replies.transport is not None
        answer: asyncio.Future[bytearray] = asyncio.get_running_loop().create_future()
        replies.expected.append(_Request(pid, vaddr, nr_pages, answer))
        replies.transport.write(replies.header.pack(_GET, nr_pages, vaddr, pid))
        return answer


class CriuTaskSource:
    """The lazy pages of one process of a `CriuPageServer`, as a source.

    The runs follow each other, with one page between two of them that must not be read: so no window of readahead
    reaches from one run into the next.

    Args:
        server: connected when the first read comes.
        pid: as in the images.
        runs: (address, length) of each, at the time of the dump; in bytes, whole pages.

    Attributes:
        offsets: where each run begins in this source.
        size: in bytes.
    """

    retries = 0
    """A failed read is final: nobody can connect to the server a second time."""

    def __init__(self, server: CriuPageServer, pid: int, runs: Iterable[tuple[int, int]]) -> None:
        self.server = server
        self.pid = pid
        self.offsets: list[int] = []
        self._addresses: list[int] = []
        self.size: int = 0
        for address, length in runs:
            self.offsets.append(self.size)
            self._addresses.append(address)
            self.size += length + mmap.PAGESIZE

    async def read(self, offset: int, length: int) -> Any:
        """Return pages of one run; offset and length are multiples of the page size. As `CriuPageServer.read`."""
        run = bisect_right(self.offsets, offset) - 1
        address = self._addresses[run] + offset - self.offsets[run]
        return await self.server.read(self.pid, address, length // mmap.PAGESIZE)

    def __repr__(self) -> str:
        return f"{self.server!r}.task({self.pid})"
