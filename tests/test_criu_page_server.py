"""`criu.page_server`: the client against a small server that follows CRIU's protocol, or breaks it."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern import content

from aiouffd.criu import page_server
from aiouffd.criu.page_server import HEADER_4_1, HEADER_4_2, CriuPageServer
from aiouffd.errors import ClosedError, SourceError, SourceTimeoutError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

PAGE = mmap.PAGESIZE
BASE = 0x7F00_0000_0000
PIDS = (10, 11)
FORMATS = pytest.mark.parametrize("header", [HEADER_4_1, HEADER_4_2], ids=["4.1", "4.2"])


class Server:
    """Serves a pattern; `clamp` says how many pages of a request are sent, `reply` may spoil what is."""

    def __init__(self, header: str, *, clamp: int = 1024, status: int = 0) -> None:
        self.header = struct.Struct(header)
        self.clamp = clamp
        self.status = status
        self.requests: list[tuple[int, int, int, int]] = []
        self.reply: Callable[[bytes], bytes | None] = lambda whole: whole
        self.asked = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.connections = 0
        self.port = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer until the client closes."""
        self.connections += 1
        try:
            while True:
                command, count, address, pid = self.header.unpack(await reader.readexactly(self.header.size))
                self.requests.append((command, count, address, pid))
                self.asked.set()
                await self.go_on.wait()
                if command == 0x1023:
                    writer.write(struct.pack("=i", self.status))
                    await reader.read()
                    return
                count = min(count, self.clamp)
                head = self.header.pack(4 << 16 | 6, count, address, pid)
                whole = self.reply(head + content(address - BASE, count * PAGE))
                if whole is None:
                    return
                writer.write(whole)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@contextlib.asynccontextmanager
async def serving(server: Server) -> AsyncIterator[Server]:
    """Run it on a free port."""
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        server.go_on.set()
        listener.close()
        await listener.wait_closed()


@FORMATS
async def test_reads(header: str) -> None:
    """The bytes asked for, of the process asked for; closing says so and waits for the answer."""
    async with serving(Server(header)) as server:
        async with CriuPageServer("127.0.0.1", server.port, header=header) as client:
            assert await client.read(10, BASE, 1) == content(0, PAGE)
            assert await client.read(11, BASE + 5 * PAGE, 3) == content(5 * PAGE, 3 * PAGE)
        assert server.requests == [(7, 1, BASE, 10), (7, 3, BASE + 5 * PAGE, 11), (0x1023, 0, 0, 0)]
        await client.aclose()  # again: nothing


@FORMATS
async def test_requests_are_pipelined(header: str) -> None:
    """Many are sent before the first is answered, at most as many as allowed; each gets its own bytes."""
    async with serving(Server(header)) as server:
        server.go_on.clear()
        async with CriuPageServer("127.0.0.1", server.port, header=header, requests=5) as client:
            reads = [asyncio.ensure_future(client.read(10, BASE + n * PAGE, 1 + n % 3)) for n in range(20)]
            await server.asked.wait()
            server.go_on.set()
            for n, data in enumerate(await asyncio.gather(*reads)):
                assert data == content(n * PAGE, (1 + n % 3) * PAGE)
        assert server.connections == 1


async def test_no_more_than_allowed_is_under_way() -> None:
    """A silent server is sent five requests, not the sixth; who waits is told in time."""
    async with serving(Server(HEADER_4_1)) as server:
        server.go_on.clear()
        client = CriuPageServer("127.0.0.1", server.port, requests=5)
        await client.connect()
        client.timeout = 0.1
        found = await asyncio.gather(*(client.read(10, BASE, 1) for _ in range(9)), return_exceptions=True)
        assert [type(item) for item in found] == [SourceTimeoutError] * 9
        server.go_on.set()
        client.timeout = 10.0
        assert await client.read(10, BASE + 9 * PAGE, 1) == content(9 * PAGE, PAGE)  # what was late is dropped
        await client.aclose()
        assert len(server.requests) == 5 + 1 + 1


@FORMATS
async def test_short_replies(header: str) -> None:
    """A reply of fewer pages is followed by a request for the rest."""
    async with (
        serving(Server(header, clamp=3)) as server,
        CriuPageServer("127.0.0.1", server.port, header=header, pages=5) as client,
    ):
        assert await client.read(10, BASE + PAGE, 11) == content(PAGE, 11 * PAGE)
        assert [count for _, count, _, _ in server.requests] == [5, 5, 5, 2]


async def test_canceling_keeps_the_session() -> None:
    """The reply of a canceled read is dropped; the next read gets its own."""
    async with serving(Server(HEADER_4_1)) as server, CriuPageServer("127.0.0.1", server.port) as client:
        server.go_on.clear()
        canceled = asyncio.ensure_future(client.read(10, BASE, 4))
        await server.asked.wait()
        canceled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await canceled
        server.go_on.set()
        assert await client.read(10, BASE + 7 * PAGE, 2) == content(7 * PAGE, 2 * PAGE)


async def test_a_task_is_a_source() -> None:
    """Its runs follow each other, with a page between them."""
    async with (
        serving(Server(HEADER_4_2)) as server,
        CriuPageServer("127.0.0.1", server.port, header=HEADER_4_2) as client,
    ):
        task = client.task(11, [(BASE, 3 * PAGE), (BASE + 40 * PAGE, 2 * PAGE)])
        assert task.offsets == [0, 4 * PAGE]
        assert task.size == 7 * PAGE
        assert await task.read(PAGE, 2 * PAGE) == content(PAGE, 2 * PAGE)
        assert await task.read(5 * PAGE, PAGE) == content(41 * PAGE, PAGE)
        assert [request[2:] for request in server.requests] == [(BASE + PAGE, 11), (BASE + 41 * PAGE, 11)]


_SPOILED: dict[str, tuple[Callable[[bytes], bytes | None], str]] = {
    "end": (lambda _: None, "closed the connection"),
    "end within the header": (lambda whole: whole[:7], "no answer"),
    "command": (lambda whole: struct.pack("<I", 7) + whole[4:], "with the command 0x7; does the header"),
    "no pages": (lambda whole: whole[:4] + bytes(4) + whole[8:], "sent 0"),
    "too many": (lambda whole: whole[:4] + struct.pack("<I", 3) + whole[8:], "asked for 2 pages .* sent 3"),
    "all pages": (lambda whole: whole[:4] + b"\xff" * 4 + whole[8:], "sent 4294967295"),
    "another address": (lambda whole: whole[:8] + bytes(8) + whole[16:], "answered 0x0 of 10"),
    "another process": (lambda whole: whole[:16] + struct.pack("<Q", 11) + whole[24:], "of 11; does the header"),
    "text": (lambda _: b"HTTP/1.1 400 Bad Request\r\n\r\n", "with the command 0x"),
}


@pytest.mark.parametrize("what", _SPOILED)
async def test_spoiled_replies(what: str) -> None:
    """Each is an error for all who wait and for all who come, and closing then is quiet."""
    spoil, complaint = _SPOILED[what]
    async with serving(Server(HEADER_4_1)) as server:
        server.reply = spoil
        client = CriuPageServer("127.0.0.1", server.port, timeout=10)
        await client.connect()
        client.timeout = 0.2 if complaint == "no answer" else 10
        found = await asyncio.gather(*(client.read(10, BASE, 2) for _ in range(3)), return_exceptions=True)
        assert all(isinstance(error, SourceError) for error in found)
        assert isinstance(found[0], SourceError)
        with pytest.raises(SourceError, match=complaint):
            raise found[0]
        if complaint != "no answer":
            with pytest.raises(SourceError, match=complaint):
                await client.read(10, BASE, 2)
            await client.aclose()
        else:
            with pytest.raises(SourceError):
                await client.aclose()


async def test_words_without_a_question() -> None:
    """A server that speaks first is not one; neither is one that sends more than was asked for."""
    async with serving(Server(HEADER_4_1)) as server:
        server.reply = lambda whole: whole + b"more" * 8  # behind the pages, or in place of the next header
        client = CriuPageServer("127.0.0.1", server.port)
        await client.connect()
        found = await asyncio.gather(*(client.read(10, BASE, 1) for _ in range(2)), return_exceptions=True)
        assert isinstance(found[0], bytearray)
        assert found[0] == content(0, PAGE)
        assert isinstance(found[1], SourceError)
        await client.aclose()


@FORMATS
async def test_the_other_version(header: str) -> None:
    """The wrong header is an error in bounded time: no wrong byte, no hang."""
    other = HEADER_4_2 if header == HEADER_4_1 else HEADER_4_1
    async with serving(Server(other)) as server:
        server.reply = lambda whole: whole
        client = CriuPageServer("127.0.0.1", server.port, header=header)
        await client.connect()
        client.timeout = 0.3
        with pytest.raises(SourceError):
            await client.read(10, BASE, 1)
        with contextlib.suppress(SourceError):
            await client.aclose()


async def test_states_and_arguments() -> None:
    """Before connecting, after closing, twice; nonsense in the arguments; nobody there; a bad status."""
    async with serving(Server(HEADER_4_1, status=-1)) as server:
        client = CriuPageServer("127.0.0.1", server.port)
        with pytest.raises(ClosedError, match="not connected"):
            await client.read(10, BASE, 1)
        await client.connect()
        with pytest.raises(ClosedError, match="one connection only"):
            await client.connect()
        for address, count in ((BASE + 1, 1), (BASE, 0)):
            with pytest.raises(ValueError, match="pages at"):
                await client.read(10, address, count)
        with pytest.raises(SourceError, match="the status -1"):
            await client.aclose()
        with pytest.raises(ClosedError, match="closed"):
            await client.read(10, BASE, 1)
    with pytest.raises(SourceError, match="cannot be reached"):
        await CriuPageServer("127.0.0.1", server.port).connect()
    for wrong in ({"pages": (4 << 20) // PAGE + 1}, {"pages": 0}, {"requests": 0}, {"header": "<Q"}):
        with pytest.raises(ValueError, match=r"1 to \d+, |header"):
            CriuPageServer("127.0.0.1", 1, **wrong)


@pytest.mark.parametrize("silent", [False, True])
async def test_the_first_error_is_the_one_told(silent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving by an error does not put the session's end in its place, and waits no reader's time for that."""
    monkeypatch.setattr(page_server, "LAST_REQUEST", 0.1 if silent else 1000.0)
    async with serving(Server(HEADER_4_1, status=3)) as server, asyncio.timeout(60):
        if silent:
            server.go_on.clear()
        with pytest.raises(KeyError, match="mine"):
            async with CriuPageServer("127.0.0.1", server.port, timeout=1000.0):
                raise KeyError("mine")


async def answer(garbage: bytes) -> None:
    """Answer the first request with anything."""
    async with serving(Server(HEADER_4_1)) as server:

        def once(whole: bytes) -> bytes:
            return garbage if len(server.requests) == 1 else whole

        server.reply = once
        client = CriuPageServer("127.0.0.1", server.port)
        await client.connect()
        client.timeout = 0.05  # of the answers
        for _ in range(2):
            with contextlib.suppress(SourceError):
                assert len(await client.read(10, BASE, 1)) == PAGE
        with contextlib.suppress(SourceError):
            await client.aclose()


_heads = st.tuples(st.sampled_from([6, 4 << 16 | 6, 7]), st.integers(0, 2), st.just(BASE), st.just(10))


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.binary(max_size=80), _heads.map(lambda head: struct.pack(HEADER_4_1, *head) + b"x" * 50)))
async def test_any_answer_is_survived(garbage: bytes) -> None:
    """Bytes or a `SourceError`, in bounded time."""
    await answer(garbage)
