"""Pages from the page server of `criu dump --lazy-pages`, over TCP.

Some facts about that server:

- It accepts one connection, ever, and is done when that ends: there is nothing to connect to again.
- A request is a header; the reply is a header and pages: at most as many as were asked for, since it stops where its
  own run of pages ends. Requests may be sent without waiting; the replies come in order.
- A page or a process that it does not have ends the session (or the server): only lazy pages may be asked for.
- A request is put through a pipe of 4 MiB: larger ones fail.
- The header grew from 24 to 32 bytes with CRIU 4.2, and nothing on the wire tells which it is.
- Until the session ends the dumped processes stay, frozen; a session that is closed in order ends the dump in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import struct
from collections import deque
from typing import Any, cast

from aiouffd.errors import ClosedError, SourceError, SourceTimeoutError

__all__ = ["HEADER_4_1", "HEADER_4_2", "CriuPageServer", "CriuTaskSource"]

HEADER_4_1 = "<IIQQ"
"""cmd, nr_pages, vaddr, pid: up to CRIU 4.1."""
HEADER_4_2 = "<I4xQQQ"
"""The same with 64 bits for nr_pages: from CRIU 4.2 on."""

PAGE_SIZE = 4096
_ADD_F = 6
_GET = 7
_CLOSE = 0x1023
_COMMAND_MASK = 0xFFFF
_MAX_PAGES = 1024
_STATUS = struct.Struct("=i")


class _Request:
    """One GET that was sent: what the reply must be, and where it goes."""

    __slots__ = ("address", "answer", "count", "pid")

    def __init__(self, pid: int, address: int, count: int, answer: asyncio.Future[bytearray]) -> None:
        self.pid = pid
        self.address = address
        self.count = count
        self.answer = answer


class _Replies(asyncio.BufferedProtocol):
    """Takes replies apart; the pages are received into the buffers that the readers get."""

    def __init__(self, name: str, header: str, places: asyncio.Semaphore) -> None:
        self.name = name
        self.places = places
        self.header = struct.Struct(header)
        self.expected: deque[_Request] = deque()
        self.closing: asyncio.Future[int] | None = None
        self.failure: SourceError | None = None
        self.transport: asyncio.Transport | None = None
        self._head = bytearray(max(self.header.size, _STATUS.size))
        self._pages: bytearray | None = None  # of the reply whose header has come
        self._view = memoryview(self._head)
        self._done = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's are none by type

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view[self._done : self._wanted()]

    def buffer_updated(self, nbytes: int) -> None:
        if self._pages is None and not self.expected and self.closing is None:
            self.fail("has sent what nobody has asked for")
            return
        self._done += nbytes
        if self._done < self._wanted():
            return
        self._done = 0
        if self._pages is not None:
            pages, self._pages, self._view = self._pages, None, memoryview(self._head)
            answer = self.expected.popleft().answer
            self.places.release()
            if not answer.done():  # else its reader was canceled: nobody wants them any more
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
        request = self.expected[0]
        if command & _COMMAND_MASK != _ADD_F:
            self.fail(f"has answered with the command {command:#x}; is the header of the right version?")
        elif (address, pid) != (request.address, request.pid):
            self.fail(
                f"was asked for {request.address:#x} of {request.pid}, and has answered {address:#x} of {pid};"
                " is the header of the right version?"
            )
        elif not 0 < count <= request.count:
            self.fail(f"was asked for {request.count} pages at {address:#x}, and sends {count}")
        else:
            self._pages = bytearray(count * PAGE_SIZE)
            self._view = memoryview(self._pages)

    def eof_received(self) -> None:
        self.fail("has closed the connection: see the log of the dump")

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(f"is lost: {exc}" if exc else "is closed")

    def fail(self, reason: str) -> None:
        """End the connection; all who wait are told why."""
        if self.failure is None:
            self.failure = SourceError(self.name, 0, 0, reason)
        if self.transport is not None:
            self.transport.abort()
        while self.expected:
            request = self.expected.popleft()
            self.places.release()
            if not request.answer.done():
                error = SourceError(self.name, request.address, request.count * PAGE_SIZE, self.failure.reason)
                request.answer.set_exception(error)
        if self.closing is not None and not self.closing.done():
            self.closing.set_exception(self.failure)


class CriuPageServer:
    """The lazy pages of all processes of a dump. An async context manager that ends the session in order.

    Used on one loop. Reads may be under way at once; their requests are pipelined. Picklable, as long as only one of
    the copies is connected.

    Args:
        host: where `criu dump --lazy-pages` runs.
        port: its `--port`.
        header: `HEADER_4_1` or `HEADER_4_2`, by the version of that CRIU.
        timeout: seconds to connect, for one reply, and for the end of the session.
        requests: at most so many are under way at once; with `pages` it bounds the memory.
        pages: at most so many in one request.
    """

    retries = 0  # there is no second connection
    """As `Monitor` understands it: a failed read is final."""

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
            raise ValueError(f"1 to {_MAX_PAGES} pages, and at least 1 request")
        if header not in (HEADER_4_1, HEADER_4_2):
            raise ValueError("header is HEADER_4_1 or HEADER_4_2")
        self.host = host
        self.port = port
        self.header = header
        self.timeout = timeout
        self.requests = requests
        self.pages = pages
        self._places = asyncio.Semaphore(requests)
        self._replies: _Replies | None = None
        self._closed = False

    async def connect(self) -> None:
        """Connect; the server begins to serve, and to wait for this connection's end.

        Raises:
            SourceError: it is not there; SourceTimeoutError: it does not answer.
        """
        if self._replies is not None or self._closed:
            raise ClosedError(f"{self!r} was connected already; its server accepts one connection only")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.timeout):
                _, self._replies = await loop.create_connection(
                    lambda: _Replies(repr(self), self.header, self._places), self.host, self.port
                )
        except TimeoutError as error:
            raise SourceTimeoutError(repr(self), 0, 0, f"no connection in {self.timeout} s") from error
        except OSError as error:
            raise SourceError(repr(self), 0, 0, f"cannot be reached: {error}") from error

    async def read(self, pid: int, vaddr: int, nr_pages: int) -> bytearray:
        """Return `nr_pages` pages of a process, from `vaddr` on. All of them must be lazy in its images.

        `vaddr` is the address at the time of the dump. Canceling is safe: the reply is received and dropped.

        Raises:
            SourceError: for good: the session has ended.
            SourceTimeoutError: no reply in time; the session goes on.
            ClosedError: not connected, or closed.
        """
        if nr_pages <= 0 or vaddr % PAGE_SIZE:
            raise ValueError(f"{nr_pages} pages at {vaddr:#x}")
        first = await self._get(pid, vaddr, min(nr_pages, self.pages))
        if len(first) == nr_pages * PAGE_SIZE:
            return first
        while len(first) < nr_pages * PAGE_SIZE:
            done = len(first) // PAGE_SIZE
            first += await self._get(pid, vaddr + len(first), min(nr_pages - done, self.pages))
        return first

    def task(self, pid: int) -> CriuTaskSource:
        """Return one process's memory as a source: its offsets are the addresses at the time of the dump."""
        return CriuTaskSource(self, pid)

    async def aclose(self) -> None:
        """End the session in order, so that the dump ends in order too; wait for its word at most `timeout` seconds.

        What is being read is waited for. Safe to call again.

        Raises:
            SourceError: the dump says that it has failed, or says nothing.
        """
        replies, self._replies, self._closed = self._replies, None, True
        if replies is None:
            return
        try:
            if replies.failure is not None:
                return  # who has read was told
            assert replies.transport is not None
            replies.closing = asyncio.get_running_loop().create_future()
            replies.transport.write(replies.header.pack(_CLOSE, 0, 0, 0))
            async with asyncio.timeout(self.timeout):
                status = await replies.closing
            if status:
                raise SourceError(repr(self), 0, 0, f"has ended the session with the status {status}")
        except TimeoutError as error:
            raise SourceTimeoutError(repr(self), 0, 0, f"has not ended the session in {self.timeout} s") from error
        finally:
            replies.fail("was closed")

    async def __aenter__(self) -> CriuPageServer:
        await self.connect()
        return self

    async def __aexit__(self, *error: object) -> None:
        if error[0] is None:
            await self.aclose()
        else:
            with contextlib.suppress(SourceError):  # the first error is the one to be told
                await self.aclose()

    def __reduce__(self) -> tuple[Any, ...]:
        settings = {name: getattr(self, name) for name in ("header", "timeout", "requests", "pages")}
        return functools.partial(CriuPageServer, self.host, self.port, **settings), ()

    def __repr__(self) -> str:
        return f"CriuPageServer({self.host!r}, {self.port})"

    async def _get(self, pid: int, vaddr: int, nr_pages: int) -> bytearray:
        length = nr_pages * PAGE_SIZE
        try:
            async with asyncio.timeout(self.timeout):
                # Given back when the reply has come, not when its reader goes: else a silent server would have us
                # keep ever more requests.
                await self._places.acquire()
                return await self._send(pid, vaddr, nr_pages)
        except TimeoutError as error:
            raise SourceTimeoutError(repr(self), vaddr, length, f"no answer in {self.timeout} s") from error

    def _send(self, pid: int, vaddr: int, nr_pages: int) -> asyncio.Future[bytearray]:
        replies = self._replies
        if replies is None or replies.failure is not None:
            self._places.release()
            if replies is None:
                raise ClosedError(f"{self!r} is {'closed' if self._closed else 'not connected'}")
            assert replies.failure is not None
            raise SourceError(repr(self), vaddr, nr_pages * PAGE_SIZE, replies.failure.reason)
        assert replies.transport is not None
        answer: asyncio.Future[bytearray] = asyncio.get_running_loop().create_future()
        replies.expected.append(_Request(pid, vaddr, nr_pages, answer))
        replies.transport.write(replies.header.pack(_GET, nr_pages, vaddr, pid))
        return answer


class CriuTaskSource:
    """One process of a `CriuPageServer`: its offsets are addresses, and most of them are not to be read."""

    retries = 0

    def __init__(self, server: CriuPageServer, pid: int) -> None:
        self.server = server
        self.pid = pid
        self.size = 1 << 57

    async def read(self, offset: int, length: int) -> Any:
        """Return the pages; offset and length are multiples of the page size. As `CriuPageServer.read`."""
        return await self.server.read(self.pid, offset, length // PAGE_SIZE)

    def __repr__(self) -> str:
        return f"{self.server!r}.task({self.pid})"
