"""`examples/page_server.py`: what a client of ranges relies on."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest
from chance import bytes_by_chance, cases

from examples.page_server import PageServer, _parse, _range, _RefusedError

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator
    from pathlib import Path

DATA = bytes(range(256)) * 100


@contextlib.asynccontextmanager
async def serving(directory: Path, **options: bool) -> AsyncIterator[int]:
    """Serve a directory with one file; give the port."""
    (directory / "x.bin").write_bytes(DATA)
    (directory / "empty").write_bytes(b"")
    server = await PageServer(directory, **options).serve("127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def ask(port: int, *requests: str) -> list[tuple[int, dict[str, str], bytes]]:
    """Send requests on one connection; return (status, headers, body) of each answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answers = []
    for request in requests:
        writer.write(request.replace("\n", "\r\n").encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        body = b"" if request.startswith("HEAD") else await reader.readexactly(int(headers["content-length"]))
        answers.append((int(head[0].split()[1]), headers, body))
    writer.close()
    await writer.wait_closed()
    return answers


async def test_ranges(tmp_path: Path) -> None:
    """First, middle, open and last bytes are 206 with Content-Range; beyond the end is 416; keep-alive throughout."""
    cases = {
        "0-0": (0, 1),
        "100-199": (100, 200),
        "25000-": (25000, 25600),
        "-7": (25593, 25600),
        "25590-99999": (25590, 25600),
    }
    async with serving(tmp_path) as port:
        answers = await ask(port, *(f"GET /x.bin HTTP/1.1\nRange: bytes={case}\n\n" for case in cases))
        for (start, end), (status, headers, body) in zip(cases.values(), answers, strict=True):
            assert status == 206
            assert body == DATA[start:end]
            assert headers["content-range"] == f"bytes {start}-{end - 1}/25600"
        for wrong in ("25600-", "9-1", "-", "x-y", "0-1,5-6", "-0"):
            ((status, headers, _),) = await ask(port, f"GET /x.bin HTTP/1.1\nRange: bytes={wrong}\n\n")
            assert (status, headers["content-range"]) == (416, "bytes */25600")


async def test_whole_files_and_heads(tmp_path: Path) -> None:
    """GET, HEAD, an empty file; ETag and Accept-Ranges are told."""
    async with serving(tmp_path) as port:
        whole, head, empty = await ask(
            port, "GET /x.bin HTTP/1.1\n\n", "HEAD /x.bin?a=b HTTP/1.1\n\n", "GET /empty HTTP/1.1\n\n"
        )
        assert (whole[0], whole[2], empty[2]) == (200, DATA, b"")
        assert head[1]["content-length"] == "25600"
        assert head[1]["etag"] == whole[1]["etag"]
        assert head[1]["accept-ranges"] == "bytes"


async def test_preconditions(tmp_path: Path) -> None:
    """If-Match of another version is 412, If-Range of one gives the whole file."""
    async with serving(tmp_path) as port:
        ((_, headers, _),) = await ask(port, "HEAD /x.bin HTTP/1.1\n\n")
        tag = headers["etag"]
        lines = (f"If-Match: {tag}", 'If-Match: "other"', f"If-Range: {tag}", 'If-Range: "other"')
        answers = await ask(port, *(f"GET /x.bin HTTP/1.1\nRange: bytes=0-9\n{line}\n\n" for line in lines))
        assert [status for status, _, _ in answers] == [206, 412, 206, 200]


@pytest.mark.parametrize("path", ["/../secret", "/..%2fsecret", "/nothing", "/", "/link", "/%00"])
async def test_nothing_outside_is_served(tmp_path: Path, path: str) -> None:
    """Neither by dots, nor encoded, nor by a link."""
    (tmp_path / "secret").write_text("secret")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path / "secret")
    async with serving(inside) as port:
        ((status, _, body),) = await ask(port, f"GET {path} HTTP/1.1\n\n")
        assert (status, body) == (404, b"")


async def test_methods_and_garbage(tmp_path: Path) -> None:
    """POST is 405; what is no HTTP is 400 and the end of that connection only."""
    async with serving(tmp_path) as port:
        ((status, headers, _),) = await ask(port, "POST /x.bin HTTP/1.1\n\n")
        assert (status, headers["allow"]) == (405, "GET, HEAD")
        ((status, _, _),) = await ask(port, "garbage\n\n")
        assert status == 400
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"x" * 100_000)
        assert await reader.read() == b""
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        assert (await ask(port, "GET /x.bin HTTP/1.1\n\n"))[0][0] == 200


async def test_without_range(tmp_path: Path) -> None:
    """As servers that do not know it: the whole file, and no word of ranges."""
    async with serving(tmp_path, ranges=False) as port:
        ((status, headers, body),) = await ask(port, "GET /x.bin HTTP/1.1\nRange: bytes=0-9\n\n")
        assert (status, body) == (200, DATA)
        assert "accept-ranges" not in headers


_HEADS = (b"GET ", b"HEAD /x.bin HTTP/1.1", b"\r\n", b"\n", b":", b"Range: ", b" ", b"\t", b"?", b"%2f")


def head_by_chance(rng: random.Random) -> bytes:
    """Draw the head of a request: random bytes, and what a head is made of."""
    return b"".join(rng.choice((rng.choice(_HEADS), bytes_by_chance(rng, 40))) for _ in range(rng.randint(0, 8)))


def test_any_head_is_parsed_or_refused() -> None:
    """No input of 5,000 is an exception; what is parsed has a method, a path and lower-case names."""
    for case in cases(5_000, head_by_chance):
        with case as head:
            request = _parse(head)
            if request is not None:
                assert all(name == name.lower() for name in request.headers)


def range_by_chance(rng: random.Random) -> tuple[str, int]:
    """Draw a range as it is asked for, or another text, and a file's size."""
    numbers = ["".join(rng.choices("0123456789", k=rng.choice((0, 1, 2, 10, 12, 13, 30)))) for _ in range(2)]
    text = "".join(rng.choices("bytes=-, 0129\0\u0661\u00b2\U0001d7d8x", k=rng.randint(0, 20)))
    return rng.choice(("bytes={}-{}".format(*numbers), text, f"bytes={text}")), rng.getrandbits(rng.randint(0, 40))


def test_any_range_is_within_the_file_or_refused() -> None:
    """A range is part of the file, or 416."""
    for case in cases(5_000, range_by_chance):
        with case as (value, size):
            try:
                start, end = _range(value, size)
            except _RefusedError as refused:
                assert refused.status == 416  # noqa: PT017 - either outcome is right
            else:
                assert 0 <= start < end <= size
