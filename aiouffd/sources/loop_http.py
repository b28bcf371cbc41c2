"""Ranges of an object over HTTP/1.1 on the event loop itself.

A library with threads of its own wakes the loop for the head of an answer and again for its body, and copies bodies
together. For single pages that is most of their cost. Here an answer is received by the loop, into one buffer, over
connections that are kept. The memory of large answers is used again. What this does not understand (a redirect, a
chunked body, another range than was asked for) it refuses, and obstore is asked from then on.
"""

from __future__ import annotations

import asyncio
import re
import socket
from functools import lru_cache, partial
from urllib.parse import urlsplit

from aiouffd.sources.daemon_threads import DaemonThreads
from aiouffd.sources.http_answer import Answer, Validator, time_of
from aiouffd.sources.rooms import Rooms
from aiouffd.sources.store_errors import Failure, RequestError, from_exception, from_status

__all__ = ["LoopHttp", "head_of"]

_ROOM = 16 << 10  # bytes of a head, and of a body that comes with it: a page takes one system call
_TOGETHER = 1 << 20  # bytes that the kernel gathers, as long as at least as many are to come
_FEW = 64 << 10  # and of what has less to come, none
_CONTENT_RANGE = re.compile(
    r"\r\nContent-Range:[ \t]*bytes (\d+)-(\d+)/(\d+)[ \t]*(?=\r\n|$)", re.IGNORECASE | re.ASCII
)
_OTHER_END = re.compile(rb"\n\r?\n")
_ADDRESS = re.compile(r"[\d.]+|.*:.*")  # no name
_RESOLVERS = 4  # limit of names looked up at once
_CONNECT_TIMEOUT = 5.0  # seconds; as obstore's
_LONGEST_IDLE = 30.0  # seconds: behind it something on the way may have forgotten the connection without a word
_ERROR = 400


def head_of(url: str, pinned: Validator) -> str:
    """Return what is sent to ask for an object, as far as the range."""
    parts = urlsplit(url)
    headers = {"Host": parts.netloc, "User-Agent": "aiouffd", "Accept-Encoding": "identity", **pinned.conditions()}
    target = f"{parts.path}?{parts.query}" if parts.query else parts.path
    lines = [f"GET {target} HTTP/1.1", *map(": ".join, headers.items())]
    return "\r\n".join([*lines, "Range: bytes="])


class LoopHttp:
    """One object behind an http URL without a user, reached without a proxy. It belongs to the loop that runs.

    Args:
        url: of the object; sent as it is.
        timeout: seconds for one request, at most half as much again: one timer looks after all of them.
        pinned: the version that the bytes must be of.
        rooms: memory for answers, where others receive into the same; None: its own.
        loop: another one, in place of the one that runs.

    Attributes:
        rooms: the same.
    """

    def __init__(
        self,
        url: str,
        timeout: float,
        pinned: Validator,
        rooms: Rooms | None = None,
        *,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        parts = urlsplit(url)
        self._address = parts.hostname or "", parts.port or 80
        self._head = head_of(url, pinned)
        self._timeout = timeout
        self._loop = loop or asyncio.get_running_loop()
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()
        self._opening = 0
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self.rooms: Rooms = rooms or Rooms()
        # Not the loop's: its end would wait for a resolver that does not answer.
        self._resolvers = DaemonThreads(_RESOLVERS, "aiouffd-names")

    @property
    def is_here(self) -> bool:
        """Whether it belongs to this loop."""
        return self._loop is asyncio.get_running_loop()

    @property
    def under_way(self) -> int:
        """How many requests have not ended."""
        return len(self._busy) + self._opening

    async def get_async(self, start: int, stop: int, head: str | None = None) -> Answer:
        """Return the bytes [start, stop), or up to the end of the object. Canceling is safe: it ends the connection.

        Args:
            start: offset in the object.
            stop: offset behind the last byte.
            head: of a request for another object of this server: see `head_of`.

        Raises:
            RequestError: with the reason.
        """
        request = f"{head or self._head}{start}-{stop - 1}\r\n\r\n".encode()
        while True:
            connection = self._idle.pop() if self._idle else await self._open()
            self._busy.add(connection)
            if self._timer is None:
                self._watch()
            try:
                return await connection.ask(request, start, stop)
            except RequestError:
                if not connection.was_stale or self._closed:  # else another one is taken, and a new one behind the last
                    raise
            finally:
                self._busy.discard(connection)
                if connection.is_idle and not self._closed:
                    self._idle.append(connection)
                else:
                    connection.close()

    async def _open(self) -> _Connection:
        self._opening += 1
        try:
            async with asyncio.timeout(min(_CONNECT_TIMEOUT, self._timeout)):
                return await self._connect(await self._resolve())
        except OSError as error:
            raise RequestError(from_exception(error, _no_proxy)) from error
        finally:
            self._opening -= 1

    async def _resolve(self) -> list[str]:
        host, port = self._address
        if _ADDRESS.fullmatch(host):
            return [host]
        ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        return [str(address[0]) for *_, address in await self._loop.run_in_executor(self._resolvers, ask)]

    async def _connect(self, hosts: list[str]) -> _Connection:
        make = partial(_Connection, self._loop, self.rooms)
        while True:
            host = hosts.pop(0)
            try:
                _, made = await self._loop.create_connection(make, host, self._address[1])
            except OSError:
                if not hosts:
                    raise
            else:
                return made

    def _watch(self) -> None:
        """End the requests that take too long, and the connections that were not used for long."""
        now = self._loop.time()
        for connection in self._busy:
            if now - connection.since > self._timeout:
                connection.fail(TimeoutError())
        while self._idle and now - self._idle[0].since > _LONGEST_IDLE:  # the last one is used first
            self._idle.pop(0).close()
        if not self._busy:
            self.rooms.clear()
        alive = self._busy or self._idle
        self._timer = self._loop.call_later(min(self._timeout / 2, _LONGEST_IDLE), self._watch) if alive else None

    def close(self) -> None:
        """Close the connections: those that are in use when their requests end. The timer looks after these."""
        self._closed = True
        self._resolvers.shutdown(wait=False)  # a request that waits for one goes on
        for connection in self._idle:
            connection.close()
        self._idle.clear()


class _Connection(asyncio.BufferedProtocol):
    """One connection, with at most one request at a time.

    Attributes:
        is_idle: whether another request may be sent.
        since: the loop's time when the last request was sent.
        was_stale: whether it was kept, and closed before any byte of the last answer came, as servers do.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, rooms: Rooms) -> None:
        self._loop = loop
        self._rooms = rooms
        self._room = bytearray(_ROOM)
        self._view = memoryview(self._room)
        self._filled = 0  # bytes of the head and what follows it, or of the body
        self._body: memoryview | None = None
        # Of the last head: what is before and behind the range that it names, how long that is, and the object.
        self._usual = b"", b"", 0, 0
        self._validator: Validator | None = None
        self._answer: asyncio.Future[Answer] | None = None
        self._asked = 0, 0
        self._awaited = 1  # bytes: less than that are not told by the kernel
        self._keeps = False
        self.is_idle = False
        self.since = 0.0
        self.was_stale = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take note of where to write."""
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]  # uvloop's is no subclass

    def ask(self, request: bytes, start: int, stop: int) -> asyncio.Future[Answer]:
        """Send a request; return what its answer comes in. If that fails or is canceled, it must be closed."""
        self._asked = start, stop
        self.is_idle = False
        self.since = self._loop.time()
        self._answer = answer = self._loop.create_future()
        if self._transport.is_closing():
            self.connection_lost(None)
        else:
            self._transport.write(request)
        return answer

    def close(self) -> None:
        """Close it; what is under way fails."""
        self.is_idle = False
        self._transport.abort()

    # What the loop calls

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes go."""
        return self._view[self._filled :] if self._body is None else self._body[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take note that so many bytes have come."""
        if self._answer is None or self._answer.done():  # nobody has asked for them
            self.close()
            return
        self._filled += nbytes
        try:
            if self._body is None:
                self._take_head()
            elif self._filled == len(self._body):
                self._complete(self._body)
            else:
                self._await_bytes(len(self._body) - self._filled)
        except (RequestError, ValueError, OverflowError) as error:  # the last two: numbers and times that are none
            self._answer.set_exception(error if isinstance(error, RequestError) else _refused(str(error)))
            self.close()  # there may be no room for what comes behind it

    def connection_lost(self, exc: Exception | None) -> None:
        """Take note that the server has closed it."""
        self.was_stale = self._keeps and self._filled == 0 and self._body is None
        self.is_idle = False
        self._body = None
        self.fail(exc if isinstance(exc, OSError) else ConnectionResetError("it was closed in the middle"))

    def fail(self, error: OSError) -> None:
        """Let the request that is under way fail."""
        if self._answer is not None and not self._answer.done():
            failure = RequestError(from_exception(error, _no_proxy))
            failure.__cause__ = error
            self._answer.set_exception(failure)

    # Answers

    def _take_head(self) -> None:
        before, behind, length, total = self._usual
        start, stop = self._asked
        if stop - start == length and stop <= total:
            head = b"%b%d-%d%b" % (before, start, stop - 1, behind)
            if self._room.startswith(head, 0, self._filled):  # as most: nothing of it is to be understood again
                self._keeps = True
                self._take_body(len(head), length)
                return
        end = self._room.find(b"\r\n\r\n", 0, self._filled)
        if end < 0:
            if self._filled == _ROOM:
                raise _refused("a head of more than 16 KiB")
            if _OTHER_END.search(self._room, 0, self._filled):
                raise _refused("lines without a carriage return")
            return
        self._take_body(end + 4, self._understand(self._room[:end].decode("latin-1")))

    def _take_body(self, begin: int, length: int) -> None:
        """Take what has come behind a head of so many bytes."""
        came = self._filled - begin
        if came >= length:
            self._keeps &= came == length  # else bytes that nobody has asked for
            self._complete(bytes(self._view[begin : begin + length]))
            return
        self._body = self._rooms.lend(length)
        self._body[:came] = self._view[begin : self._filled]
        self._filled = came
        self._await_bytes(length - came)

    def _await_bytes(self, count: int) -> None:
        """Have the loop hear of the next bytes when so many have come, or a large part of them, or no more can.

        Each time that it hears of some takes Python, and a processor that sleeps has to be woken.
        """
        awaited = min(count, _TOGETHER) if count >= _FEW else 1
        if awaited != self._awaited:
            # For that many, the kernel also makes room at once (Linux 4.18), and not only when some were received.
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, awaited)
            self._awaited = awaited

    def _understand(self, head: str) -> int:
        """Check the head of an answer; return how many bytes its body has.

        Raises:
            RequestError: it is an error, or not the range that was asked for.
        """
        found = _CONTENT_RANGE.search(head)
        if found is None:
            _others(head, -1)  # an error says more
            raise _refused("no Content-Range")
        first, last, total = int(found[1]), int(found[2]), int(found[3])
        length, self._keeps, self._validator = _others(head[: found.start()] + head[found.end() :], total)
        start, stop = self._asked
        if not (first == start <= last == min(stop, total) - 1 == start + length - 1):
            raise _refused(found[0].strip())
        around = bytes(self._room[: found.start(1)]), bytes(self._room[found.end(2) : len(head) + 4])
        self._usual = *around, length if self._keeps else 0, total
        return length

    def _complete(self, data: object) -> None:
        assert self._answer is not None
        assert self._validator is not None
        self.is_idle = self._keeps
        self._await_bytes(1)  # the next answer may be short
        answer, self._answer = self._answer, None  # it has the bytes, whose memory is wanted for others
        self._filled, self._body = 0, None
        answer.set_result(Answer(data, self._asked[0], self._validator))


@lru_cache(16)
def _others(head: str, total: int) -> tuple[int, bool, Validator]:
    """Check all of a head but its Content-Range: the same in most answers, so that few are looked at.

    Returns:
        Bytes of the body; whether the connection can be used again; the version.
    """
    first_line, *lines = head.split("\r\n")
    version, _, status = first_line.partition(" ")
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip()
        if name == "etag" and name in headers:
            raise _refused("two versions")
        headers[name] = value if name not in headers else f"{headers[name]}, {value}"
    code = int(status[:3]) if status[:3].isdecimal() else 0
    if code >= _ERROR:
        raise RequestError(from_status(code, status, headers.get("retry-after")))
    length = headers.get("content-length", "")
    if code != 206 or "content-range" in headers or not length.isdecimal():
        raise _refused(first_line)
    if "transfer-encoding" in headers or headers.get("content-encoding", "identity") != "identity":
        raise _refused("an encoded body")
    validator = Validator(total, headers.get("etag"), time_of(headers.get("last-modified")))
    return int(length), version == "HTTP/1.1" and headers.get("connection", "").lower() != "close", validator


def _refused(what: str) -> RequestError:
    return RequestError(Failure(f"not understood: {what}", answer_refused=True))


def _no_proxy() -> None:
    """Return no proxy."""
