"""`sources.loop_http`: ranges on the event loop itself."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import fcntl
import socket
import sys
import termios
import threading
from typing import TYPE_CHECKING

import odd_http
import pytest

from aiouffd.kernel.memory import address_of
from aiouffd.sources import loop_http, rooms
from aiouffd.sources.http_answer import Validator
from aiouffd.sources.loop_http import LoopHttp
from aiouffd.sources.store_errors import RequestError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

SIZE = len(odd_http.DATA)
PINNED = Validator(SIZE, '"v1"')
HEAD = "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-9/10\r\nContent-Length: 10\r\n"
BODY = "0123456789"
_LARGE = 1000  # such an answer is sent in one piece


def client_of(url: str, seconds: float = 10.0) -> AbstractAsyncContextManager[LoopHttp]:
    """Return a client, to be closed by `async with`."""
    return odd_http.closing(LoopHttp(url, seconds, PINNED))


@contextlib.asynccontextmanager
async def scripted(answers: Callable[[int, int], str | None]) -> AsyncIterator[tuple[str, list[int]]]:
    """Serve what `answers(connection, request)` returns, None: close; yield the URL and the requests by connection."""
    asked: list[int] = []
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(asked)
        asked.append(0)
        writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                asked[number] += 1
                answer = answers(number, asked[number])
                if answer is None:
                    break
                size = 1 if len(answer) < _LARGE else len(answer)  # in as many pieces as possible
                for at in range(0, len(answer), size):
                    writer.write(answer[at : at + size].encode())
                    await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x", asked
    finally:
        server.close()
        for writer in writers:
            writer.close()
        await asyncio.sleep(0)


@pytest.mark.parametrize(("start", "stop"), [(5, 9), (0, SIZE), (SIZE - 3, SIZE + 9), (100, 70_000)])
async def test_answers(start: int, stop: int) -> None:
    """The bytes and their version, in small answers and in large ones, by one connection."""
    with odd_http.serving() as server:
        async with client_of(server.url) as client:
            for _ in range(2):
                answer = await client.get_async(start, stop)
                assert bytes(answer.data) == odd_http.DATA[start:stop]
                assert (answer.start, answer.validator) == (start, PINNED)
            headers = server.requests[0][1]
            assert headers["if-match"] == '"v1"'
            assert headers["host"] == f"127.0.0.1:{server.server_port}"
            assert headers["accept-encoding"] == "identity"


async def test_connections_are_kept() -> None:
    """One after the other needs one; several at once need several; an answer may come byte by byte."""
    async with scripted(lambda _, __: f"{HEAD}\r\n{BODY}") as (url, asked), client_of(url) as client:
        for _ in range(3):
            assert bytes((await client.get_async(0, 10)).data) == BODY.encode()
        assert asked == [3]
        await asyncio.gather(*(client.get_async(0, 10) for _ in range(4)))
        assert sum(asked) == 7
        assert len(asked) == 4


@pytest.mark.parametrize("last", ["Connection: close\r\n", "Connection: Close\r\n"])
async def test_a_connection_that_the_server_closes_is_not_used_again(last: str) -> None:
    """As its answer says."""
    async with scripted(lambda _, __: f"{HEAD}{last}\r\n{BODY}") as (url, asked), client_of(url) as client:
        await client.get_async(0, 10)
        await client.get_async(0, 10)
        assert asked == [1, 1]


async def test_a_connection_that_was_closed_meanwhile_costs_no_error() -> None:
    """A server closes kept connections at any time: another one is taken. A new one that is closed is an error."""

    def answers(connection: int, request: int) -> str | None:
        return f"{HEAD}\r\n{BODY}" if request == 1 and connection < 2 else None

    async with scripted(answers) as (url, asked), client_of(url) as client:
        await client.get_async(0, 10)
        assert bytes((await client.get_async(0, 10)).data) == BODY.encode()
        assert asked == [2, 1]
        with pytest.raises(RequestError) as caught:
            await client.get_async(0, 10)
        assert caught.value.failure.may_pass
        assert asked == [2, 2, 1]


@pytest.mark.parametrize(
    "answer",
    [
        HEAD.replace("0-9/10", "0-9/*"),
        HEAD.replace("0-9", "1-10"),
        HEAD.replace("0-9", "0-4"),
        HEAD.replace("0-9", "1-9").replace("Length: 10", "Length: 9"),
        HEAD.replace("Length: 10", "Length: 11"),
        HEAD.replace("Content-Length: 10", "Transfer-Encoding: chunked"),
        HEAD + "Content-Length: 10\r\n",
        HEAD.replace("Length: 10", f"Length: {'9' * 5000}"),
        HEAD.replace("0-9/10", f"0-9/{'9' * 5000}"),
        HEAD.replace("0-9/10", "0--1/10").replace("Length: 10", "Length: 0"),
        HEAD.replace("\r\n", "\n") + "\n" + BODY,
        HEAD + "\n" + BODY,
        HEAD + 'ETag: "a"\r\nETag: "b"\r\n',
        HEAD + "Last-Modified: Mon, 02 Nov 99999999999 10:00:00 GMT\r\n",
        HEAD + "Content-Range: bytes 1-10/20\r\n",
        HEAD.replace("Content-Range", "X-Content-Range"),
        HEAD + "Transfer-Encoding: chunked\r\n",
        HEAD + "Content-Encoding: gzip\r\n",
        HEAD + "Last-Modified: yesterday\r\n",
        HEAD + "X: " + "x" * 20_000,
        "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n",
        "HTTP/1.1 302 Found\r\nLocation: /y\r\nContent-Length: 0\r\n",
        "nonsense\r\n",
    ],
)
async def test_what_is_not_understood_is_refused(answer: str) -> None:
    """It may be valid: another client is to be asked."""
    async with scripted(lambda _, __: f"{answer}\r\n{BODY}") as (url, asked), client_of(url) as client:
        with pytest.raises(RequestError) as caught:
            await client.get_async(0, 10)
        assert caught.value.failure.answer_refused
        assert asked == [1]


@pytest.mark.parametrize(
    ("start", "head", "total", "understood"),
    [
        (10, "bytes 10-19/30\r\nContent-Length: 10\r\n", 30, 1),
        (0, "bytes 0-9/30\r\nContent-Length: 10\r\n", 30, 1),
        (10, "bytes 0-9/30\r\nContent-Length: 10\r\n", None, 2),
        (10, "bytes 10-19/40\r\nContent-Length: 10\r\n", 40, 2),
        (10, "bytes 10-19/30\r\nContent-Length: 11\r\n", None, 2),
        (25, "bytes 25-34/30\r\nContent-Length: 10\r\n", None, 2),
        (10, "bytes 10-19/30\r\nContent-Length: 10\r\nConnection: close\r\n", 30, 2),
    ],
)
async def test_a_head_as_the_one_before(
    monkeypatch: pytest.MonkeyPatch, start: int, head: str, total: int | None, understood: int
) -> None:
    """Only its range is looked at; whatever else is another is understood anew."""
    heads: list[str] = []
    understand = loop_http._Connection._understand

    def noted(self: loop_http._Connection, head: str) -> int:
        heads.append(head)
        return understand(self, head)

    monkeypatch.setattr(loop_http._Connection, "_understand", noted)
    first = "HTTP/1.1 206 Partial Content\r\nContent-Range: "
    answers = [f"{first}bytes 0-9/30\r\nContent-Length: 10\r\n\r\n{BODY}", f"{first}{head}\r\n{BODY[::-1]}"]
    async with scripted(lambda _, number: answers[number - 1]) as (url, asked), client_of(url) as client:
        await client.get_async(0, 10)
        with contextlib.nullcontext() if total else pytest.raises(RequestError, match="not understood"):
            answer = await client.get_async(start, start + 10)
            assert (bytes(answer.data), answer.start) == (BODY[::-1].encode(), start)
            assert answer.validator == Validator(total)
        assert (asked, len(heads)) == ([2], understood)
        assert len(client._idle) == ("close" not in head and total is not None)


@pytest.mark.parametrize("what", ["Content-Length: " + "9" * 5000, "X: " + "x" * 200_000])
async def test_a_refusal_is_no_error_of_the_loop(what: str) -> None:
    """Nothing is logged, and what comes behind a head that is too long finds no room."""
    errors: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    async with scripted(lambda _, __: f"{HEAD}{what}\r\n\r\n{BODY}") as (url, _), client_of(url) as client:
        with pytest.raises(RequestError, match="not understood"):
            await client.get_async(0, 10)
    assert not errors


@pytest.mark.parametrize("zone", ["GMT", "-0000", "", "+0000"])
async def test_times_are_utc(zone: str) -> None:
    """As obstore reads them, so that they are comparable."""
    last = f"Last-Modified: Mon, 02 Nov 2026 10:00:00 {zone}\r\n"
    async with scripted(lambda _, __: f"{HEAD}{last}\r\n{BODY}") as (url, _), client_of(url) as client:
        answer = await client.get_async(0, 10)
        assert answer.validator.modified == dt.datetime(2026, 11, 2, 10, tzinfo=dt.UTC)


async def test_errors_of_the_server() -> None:
    """By their status."""
    for status, may_pass in ((503, True), (404, False), (412, False)):
        head = f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n"
        async with scripted(lambda _, __, head=head: head) as (url, _), client_of(url) as client:  # type: ignore[misc]
            with pytest.raises(RequestError) as caught:
                await client.get_async(0, 10)
            assert (caught.value.failure.status, caught.value.failure.may_pass) == (status, may_pass)


@pytest.mark.parametrize("more", ["more", "x" * _LARGE])
async def test_bytes_that_nobody_has_asked_for(more: str) -> None:
    """They are no part of the next answer, whether they come with the last one or behind it."""
    async with scripted(lambda _, __: f"{HEAD}\r\n{BODY}{more}") as (url, asked), client_of(url) as client:
        for _ in range(2):
            assert bytes((await client.get_async(0, 10)).data) == BODY.encode()
            assert not any(connection.is_idle for connection in client._idle) or len(more) < _LARGE
        assert sum(asked) == 2


async def test_a_server_that_does_not_answer() -> None:
    """The request ends, also where nobody else has a limit."""
    async with scripted(lambda _, __: "HTTP/1.1 206") as (url, _), client_of(url, 0.1) as client:
        with pytest.raises(RequestError) as caught:
            await client.get_async(0, 10)
        assert caught.value.failure.timed_out


async def test_a_request_ends_also_behind_close() -> None:
    """The client was given up because of another answer meanwhile."""
    came = asyncio.Event()

    def answers(_: int, __: int) -> str:
        came.set()
        return "HTTP/1.1 206"

    async with scripted(answers) as (url, _), client_of(url, 0.2) as client:
        task = asyncio.create_task(client.get_async(0, 10))
        await came.wait()
        client.close()
        await asyncio.wait([task], timeout=10)
        assert task.done()
        assert isinstance(task.exception(), RequestError)


async def test_canceling_ends_the_connection() -> None:
    """What comes late is no part of another answer."""
    came = asyncio.Event()

    def answers(connection: int, _: int) -> str:
        came.set()
        return "HTTP/1.1 206" if connection == 0 else f"{HEAD}\r\n{BODY}"

    async with scripted(answers) as (url, asked), client_of(url) as client:
        task = asyncio.create_task(client.get_async(0, 10))
        await came.wait()
        task.cancel()
        await asyncio.wait([task])
        assert bytes((await client.get_async(0, 10)).data) == BODY.encode()
        assert asked == [1, 1]


async def test_idle_connections_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is between may forget them without a word."""
    monkeypatch.setattr(loop_http, "_LONGEST_IDLE", 0.02)
    async with scripted(lambda _, __: f"{HEAD}\r\n{BODY}") as (url, asked), client_of(url) as client:
        await client.get_async(0, 10)
        timer = client._timer
        while client._timer is timer or client._idle:  # noqa: ASYNC110 - it has no event for this
            await asyncio.sleep(0.01)
        await client.get_async(0, 10)
        assert asked == [1, 1]


async def test_the_memory_of_large_answers_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """When nobody has a part of one any more; a connection that is kept has none."""
    monkeypatch.setattr(rooms, "_LEAST", _LARGE)
    with odd_http.serving() as server:
        async with client_of(server.url) as client:
            part = memoryview((await client.get_async(0, SIZE)).data)[100:200]
            await asyncio.sleep(0)  # the loop has had the answer
            other = await client.get_async(5, SIZE)
            assert bytes(other.data) == odd_http.DATA[5:]
            assert bytes(part) == odd_http.DATA[100:200]
            place = address_of(other.data)
            del other
            await asyncio.sleep(0)
            assert address_of((await client.get_async(0, SIZE)).data) == place


@pytest.mark.parametrize("last", ["an error", "its end"])
async def test_the_loop_hears_of_large_parts(last: str) -> None:
    """Of a large body; what is less is heard of where no more is to come, and of other answers."""
    size, part, last_part = 3 << 19, 900 << 10, 100 << 10
    head = f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-{size - 1}/{size}\r\nContent-Length: {size}\r\n\r\n"
    requests: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await reader.readuntil(b"\r\n\r\n"):
                requests.put_nowait(writer)

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x"
        async with client_of(url) as client:
            asking = asyncio.create_task(client.get_async(0, size))
            writer = await requests.get()
            writer.write(head.encode() + bytes(part))
            while not any(connection._body for connection in client._busy):  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.001)
            (connection,) = client._busy
            heard = connection._filled
            writer.write(bytes(size - last_part - part))
            while connection._filled == heard:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.001)
            # What is left over is less than a large part; how much it is, is up to the kernel.
            writer.write(b"0123456789" * (last_part // 10))
            assert bytes((await asking).data) == bytes(size - last_part) + b"0123456789" * (last_part // 10)

            asking = asyncio.create_task(client.get_async(0, size))
            await requests.get()
            writer.write(head.encode() + b"a")
            while connection._body is None:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.001)
            writer.write(bytes(part))
            descriptor = connection._transport.get_extra_info("socket").fileno()
            while connection._filled == 1 and waiting(descriptor) < part:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.01)
            assert connection._filled == 1
            if last == "its end":
                writer.close()
                with pytest.raises(RequestError, match="closed in the middle"):
                    await asking
                return
            writer.write(bytes(size - 1 - part))
            await asking
            asking = asyncio.create_task(client.get_async(0, size))
            await requests.get()
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            with pytest.raises(RequestError, match="404"):
                await asking
            writer.close()


def waiting(descriptor: int) -> int:
    """Return how many bytes a socket has received that nobody has read."""
    return int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)), sys.byteorder)


@pytest.mark.parametrize("how", ["canceled", "late"])
async def test_memory_of_answers_that_do_not_come_is_used_again(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Its connection is closed."""
    monkeypatch.setattr(rooms, "_LEAST", _LARGE)
    size = 3 * _LARGE
    head = f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-{size - 1}/{size}\r\nContent-Length: {size}\r\n\r\n"
    async with scripted(lambda _, __: head + _LARGE * "x") as (url, _), client_of(url) as client:
        task = asyncio.create_task(client.get_async(0, size))
        while not any(connection._body for connection in client._busy):  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.001)
        assert not client.rooms._free
        if how == "canceled":
            task.cancel()
        else:
            client._busy.pop().fail(TimeoutError())
        await asyncio.wait([task])
        while not client.rooms._free:  # noqa: ASYNC110 - as long as the loop needs to close a connection
            await asyncio.sleep(0.001)


async def test_memory_is_kept_as_long_as_there_is_use_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while nothing is asked."""
    monkeypatch.setattr(rooms, "_LEAST", _LARGE)
    with odd_http.serving() as server:
        async with client_of(server.url, 0.05) as client:
            await client.get_async(0, SIZE)
            await asyncio.sleep(0)
            assert client.rooms._free
            while client.rooms._free:  # noqa: ASYNC110 - it has no event for this
                await asyncio.sleep(0.01)


async def test_a_resolver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop can end."""
    asked, answers = threading.Event(), threading.Event()

    def resolve(*_: object, **__: object) -> list[object]:
        asked.set()
        answers.wait()
        return []

    async def give_up() -> None:
        async with client_of("http://a.example/x") as client:
            task = asyncio.create_task(client.get_async(0, 10))
            while not asked.is_set():  # noqa: ASYNC110 - a thread sets it
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.wait([task])

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    loop = threading.Thread(target=lambda: asyncio.run(give_up()), daemon=True)
    loop.start()
    try:
        await asyncio.to_thread(loop.join, 10)
        assert not loop.is_alive()
    finally:
        answers.set()


async def test_requests_that_wait_for_a_name_go_on_behind_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another request's answer was refused meanwhile. There are more of them than resolvers."""
    answers = threading.Event()
    real = socket.getaddrinfo

    def resolve(_: str, port: int, **__: object) -> object:
        answers.wait()
        return real("127.0.0.1", port, type=socket.SOCK_STREAM)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    async with (
        scripted(lambda _, __: f"{HEAD}\r\n{BODY}") as (url, _),
        client_of(url.replace("127.0.0.1", "a.example")) as client,
    ):
        tasks = [asyncio.create_task(client.get_async(0, 10)) for _ in range(9)]
        await asyncio.sleep(0)
        client.close()
        answers.set()
        assert [bytes((await task).data) for task in tasks] == [BODY.encode()] * 9


async def test_a_name_with_several_addresses() -> None:
    """The first that answers is taken."""
    async with scripted(lambda _, __: f"{HEAD}\r\n{BODY}") as (url, _), client_of(url) as client:
        (await client._connect(["127.0.0.2", "127.0.0.1"])).close()  # the first refuses
    async with (
        scripted(lambda _, __: f"{HEAD}\r\n{BODY}") as (url, _),
        client_of(url.replace("127.0.0.1", "localhost")) as client,
    ):
        assert bytes((await client.get_async(0, 10)).data) == BODY.encode()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_refused_connections(host: str) -> None:
    """The server is not there."""
    async with scripted(lambda _, __: None) as (url, _):
        pass
    async with client_of(url.replace("127.0.0.1", host)) as client:
        with pytest.raises(RequestError, match="refuses connections"):
            await client.get_async(0, 10)
