"""`ObjectSource` against a server that misbehaves on demand: a typed error or the right bytes, never others."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import socket
from typing import TYPE_CHECKING

import attrs
import pytest
from loops import run

import aiouffd
from aiouffd.sources.resolve import as_source

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

BODY = bytes(range(256)) * 64


@attrs.define
class Server:
    """Answers GET and HEAD with `BODY`, in the way that a test sets."""

    url: str = ""
    body: bytes = BODY
    headers: dict[str, str] = attrs.field(factory=lambda: {"ETag": '"1"'})
    status: str = ""
    ranges: bool = True
    short: int = 0
    silent: bool = False
    head: bool = True
    requests: list[str] = attrs.field(factory=list)

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection; If-Match is not looked at, as by many servers."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                self.requests.append(lines[0])
                if self.silent:
                    await asyncio.get_running_loop().create_future()
                wanted = {line.partition(":")[0].lower(): line.partition(": ")[2] for line in lines[1:]}
                is_head = lines[0].startswith("HEAD")
                writer.write(self.answer(wanted.get("range"), is_head=is_head))
                await writer.drain()
        writer.close()

    def answer(self, wanted: str | None, *, is_head: bool) -> bytes:
        """Build one answer."""
        start, end, status = 0, len(self.body), "200 OK"
        headers = dict(self.headers)
        if wanted and self.ranges:
            first, last = map(int, wanted.partition("=")[2].split("-"))
            start, end, status = first, min(last + 1, end) - (self.short if last else 0), "206 Partial Content"
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(self.body)}"
            if start >= end:
                start = end = 0
                status, headers["Content-Range"] = "416 Range Not Satisfiable", f"bytes */{len(self.body)}"
        status = "403 Forbidden" if is_head and not self.head else self.status or status
        body = b"" if self.status else self.body[start:end]
        headers["Content-Length"] = str(len(body))
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + (b"" if is_head else body)


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    """Run a server on the test's loop."""
    server = Server()
    listening = await asyncio.start_server(server.connection, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listening.close()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"ETag": '"1"'}, {"ETag": '"2"'}),
        ({"ETag": 'W/"1"'}, {"ETag": 'W/"2"'}),
        (
            {"Last-Modified": "Tue, 24 Nov 2026 09:00:00 GMT"},
            {"Last-Modified": "Tue, 24 Nov 2026 09:00:01 GMT"},
        ),
    ],
)
@run
async def test_a_change_is_noticed_without_if_match(before: dict[str, str], after: dict[str, str]) -> None:
    """A server that does not look at If-Match, or has no strong ETag, still gives no mixture of two versions."""
    async with serving() as server:
        server.headers = before
        source = aiouffd.ObjectSource(f"{server.url}/x")
        assert bytes(await source.read(0, 4096)) == BODY[:4096]
        assert bytes(await source.read(4096, 100)) == BODY[4096:4196]
        server.headers = after
        with pytest.raises(aiouffd.SourceError, match="has changed"):
            await source.read(0, 4096)


@run
async def test_a_change_is_noticed_by_the_size_alone() -> None:
    """Without ETag and time, an object that has grown or shrunk is another."""
    async with serving() as server:
        server.headers = {}
        source = aiouffd.ObjectSource(f"{server.url}/x")
        await source.prepare()
        for body in (BODY + b"more", BODY[:5000], BODY[:10]):
            server.body = body
            with pytest.raises(aiouffd.SourceError, match="has changed|gave"):
                await source.read(4096, 4096)


@run
async def test_a_tag_that_turns_strong_is_the_same_version() -> None:
    """Apache's tag of a file that was just written is weak for a second, and strong then."""
    async with serving() as server:
        server.headers = {"ETag": 'W/"1"'}
        source = aiouffd.ObjectSource(f"{server.url}/x")
        await source.prepare()
        server.headers = {"ETag": '"1"'}
        assert bytes(await source.read(1, 2)) == BODY[1:3]


@run
async def test_the_version_travels() -> None:
    """A pickled source asks no second time, and holds on to the version."""
    async with serving() as server:
        source = aiouffd.ObjectSource(f"{server.url}/x")
        await source.prepare()
        asked = len(server.requests)
        again = pickle.loads(pickle.dumps(source))
        assert again.size == len(BODY)
        assert len(server.requests) == asked
        server.headers = {"ETag": '"2"'}
        with pytest.raises(aiouffd.SourceError, match="has changed"):
            await again.read(0, 1)


@pytest.mark.parametrize(
    "target", ["/a%20b/c%20d%25.bin", "/f.bin?signature=a%2Fb&expires=1", "/f%20f/g.bin?a=b", "/f.bin"]
)
@run
async def test_the_url_arrives_as_it_was_given(target: str) -> None:
    """Escapes are not escaped again, and a query (a signed URL) stays one; a server that refuses HEAD will do."""
    async with serving() as server:
        server.head = False
        source = aiouffd.ObjectSource(server.url + target)
        await source.prepare()
        assert source.size == len(BODY)
        assert bytes(await source.read(5, 5)) == BODY[5:10]
        assert set(server.requests) == {f"GET {target} HTTP/1.1"}


@pytest.mark.parametrize("ranges", [True, False])
@run
async def test_an_empty_object(*, ranges: bool) -> None:
    """Its size is 0, though no range of it can be had."""
    async with serving() as server:
        server.body, server.ranges = b"", ranges
        source = aiouffd.ObjectSource(f"{server.url}/x")
        await source.prepare()
        assert source.size == 0


@run
async def test_a_server_without_ranges() -> None:
    """It is told when the size is asked for, and never taken for the range."""
    async with serving() as server:
        source = aiouffd.ObjectSource(f"{server.url}/x")
        await source.prepare()
        server.ranges = False
        with pytest.raises(aiouffd.SourceError, match="without Range"):
            await source.read(4096, 4096)
        with pytest.raises(aiouffd.SourceError, match="without Range"):
            await aiouffd.ObjectSource(f"{server.url}/x").prepare()


@run
async def test_fewer_bytes_than_asked_for() -> None:
    """A range that ends early is a ShortReadError."""
    async with serving() as server:
        source = aiouffd.ObjectSource(f"{server.url}/x")
        await source.prepare()
        server.short = 1
        with pytest.raises(aiouffd.ShortReadError):
            await source.read(4096, 4096)


@pytest.mark.parametrize(
    ("status", "reason"),
    [("404 Not Found", "404"), ("401 Unauthorized", "credentials"), ("403 Forbidden", "credentials")],
)
@run
async def test_refusals(status: str, reason: str) -> None:
    """Each says what to do, and none shows the secret of a signed URL."""
    async with serving() as server:
        server.status = status
        with pytest.raises(aiouffd.SourceError, match=reason) as caught:
            await aiouffd.ObjectSource(f"{server.url}/x?signature=secret").prepare()
        assert "secret" not in str(caught.value)


@run
async def test_a_server_that_does_not_answer() -> None:
    """SourceTimeoutError after `timeout` seconds."""
    async with serving() as server:
        server.silent = True
        with pytest.raises(aiouffd.SourceTimeoutError, match=r"0\.3 s"):
            await aiouffd.ObjectSource(f"{server.url}/x", timeout=0.3).prepare()


@run
async def test_nobody_listens() -> None:
    """The refused connection is named."""
    with socket.socket() as bound:  # bound and not listening: nobody else takes the port meanwhile
        bound.bind(("127.0.0.1", 0))
        source = aiouffd.ObjectSource(f"http://127.0.0.1:{bound.getsockname()[1]}/x")
        with pytest.raises(aiouffd.SourceError, match="refuses connections"):
            await source.prepare()


@run
async def test_canceling_a_read() -> None:
    """It ends at once, and the next read is right."""
    async with serving() as server:
        source = aiouffd.ObjectSource(f"{server.url}/x")
        await source.prepare()
        server.silent = True
        asked = len(server.requests)
        read = asyncio.ensure_future(source.read(0, 10))
        while len(server.requests) == asked:
            await asyncio.sleep(0)
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read
        server.silent = False
        assert bytes(await source.read(0, 10)) == BODY[:10]


@run
async def test_to_be_recognized_it_is_not_asked() -> None:
    """`as_source` of one sends no request: it may be called on a loop."""
    async with serving() as server:
        source = aiouffd.ObjectSource(f"{server.url}/x")
        assert as_source(source) is source
        assert not server.requests
