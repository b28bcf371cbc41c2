"""A page server: serves the files of a directory over HTTP/1.1 with Range, on asyncio alone.

    python examples/page_server.py                                   # serves a sample file that it makes
    python examples/page_server.py --directory /data --port 8080

Any HTTP server with Range will do; this one is a starting point for your own. lazy_array.py and safetensors_lazy.py map
its files and fetch only what they touch. It supports GET and HEAD, one range for each request, keep-alive, and If-Match
and If-Range with an ETag. It is not a general web server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import email.utils
import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.parse
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["PageServer", "main", "serving"]

_RANGE = re.compile(r"bytes=([0-9]{0,19})-([0-9]{0,19})")
_IDLE = 60.0  # seconds until a connection without a request is closed
_MAX_HEADER = 16 << 10
_CHUNK = 256 << 10


@attrs.frozen
class _Request:
    method: str
    path: str
    headers: dict[str, str]


class _RefusedError(Exception):
    def __init__(self, status: HTTPStatus, headers: dict[str, str] | None = None) -> None:
        super().__init__(status)
        self.status = status
        self.headers = headers or {}


@attrs.define(eq=False)
class PageServer:
    """Serves the regular files below `directory`.

    Attributes:
        directory: no file outside it is served, also not through a link.
        latency: seconds to wait before each answer; plays a distant server.
        ranges: False ignores Range and answers with the whole file, as a server without Range does.
        requests: the number of requests that were answered.
        bytes_sent: the bytes of all bodies.
    """

    directory: Path
    latency: float = 0.0
    ranges: bool = True
    requests: int = 0
    bytes_sent: int = 0

    async def serve(self, host: str, port: int) -> asyncio.Server:
        """Listen; port 0 takes a free one."""
        return await asyncio.start_server(self._connection, host, port, limit=_MAX_HEADER, backlog=256)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        expected = (ConnectionError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError)
        try:
            # The task is canceled only when the loop ends. Before Python 3.12, asyncio reports that as an error.
            with contextlib.suppress(asyncio.CancelledError, *expected):
                while await self._exchange(reader, writer):
                    pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; return whether the connection stays open."""
        async with asyncio.timeout(_IDLE):
            head = await reader.readuntil(b"\r\n\r\n")
        request = _parse(head)
        if request is None:
            self._head(writer, HTTPStatus.BAD_REQUEST, {"Content-Length": "0", "Connection": "close"})
            return False
        if self.latency:
            await asyncio.sleep(self.latency)
        self.requests += 1
        try:
            await self._answer(request, writer)
        except _RefusedError as refused:
            self._head(writer, refused.status, {"Content-Length": "0", **refused.headers})
        await writer.drain()
        return request.headers.get("connection", "").lower() != "close"

    async def _answer(self, request: _Request, writer: asyncio.StreamWriter) -> None:
        if request.method not in ("GET", "HEAD"):
            raise _RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, {"Allow": "GET, HEAD"})
        with self._open(request.path) as file:
            info = os.fstat(file.fileno())
            size = info.st_size
            tag = f'"{info.st_mtime_ns:x}-{size:x}"'
            headers = {
                "Content-Type": "application/octet-stream",
                "ETag": tag,
                "Last-Modified": email.utils.formatdate(info.st_mtime, usegmt=True),
            }
            if request.headers.get("if-match", tag) not in (tag, "*"):
                raise _RefusedError(HTTPStatus.PRECONDITION_FAILED)
            start, end, status = 0, size, HTTPStatus.OK
            if self.ranges:
                headers["Accept-Ranges"] = "bytes"
                if "range" in request.headers and request.headers.get("if-range", tag) == tag:
                    start, end = _range(request.headers["range"], size)
                    status = HTTPStatus.PARTIAL_CONTENT
                    headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
            headers["Content-Length"] = str(end - start)
            self._head(writer, status, headers)
            if request.method == "HEAD" or start == end:
                return
            self.bytes_sent += end - start
            while start < end:  # the length is sent: if the file is truncated now, only closing can tell the client
                data = os.pread(file.fileno(), min(_CHUNK, end - start), start)
                if not data:
                    raise ConnectionAbortedError
                writer.write(data)
                start += len(data)
                await writer.drain()

    def _open(self, target: str) -> BinaryIO:
        path = urllib.parse.unquote(target.partition("?")[0]).lstrip("/")
        root = self.directory.resolve()
        try:
            found = (root / path).resolve(strict=True)
            if not found.is_relative_to(root) or not found.is_file():
                raise _RefusedError(HTTPStatus.NOT_FOUND)
            return found.open("rb")
        except PermissionError:
            raise _RefusedError(HTTPStatus.FORBIDDEN) from None
        except (OSError, ValueError):
            raise _RefusedError(HTTPStatus.NOT_FOUND) from None

    @staticmethod
    def _head(writer: asyncio.StreamWriter, status: HTTPStatus, headers: dict[str, str]) -> None:
        lines = [f"HTTP/1.1 {status.value} {status.phrase}", *(f"{name}: {value}" for name, value in headers.items())]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))


def _parse(head: bytes) -> _Request | None:
    lines = head.decode("latin-1").split("\r\n")
    parts = lines[0].split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        return None
    headers = {}
    for line in filter(None, lines[1:]):
        name, colon, value = line.partition(":")
        if not colon:
            return None
        headers[name.strip().lower()] = value.strip()
    return _Request(parts[0], parts[1], headers)


def _range(value: str, size: int) -> tuple[int, int]:
    """Return [start, end) of a Range header of one range, or refuse it with 416."""
    refused = _RefusedError(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, {"Content-Range": f"bytes */{size}"})
    match = _RANGE.fullmatch(value)
    if match is None or match.groups() == ("", ""):
        raise refused
    first, last = match.groups()
    if first:
        start, end = int(first), min(int(last) + 1, size) if last else size
    else:  # "-N": the last N bytes
        start, end = max(0, size - int(last)), size
    if start >= end:
        raise refused
    return start, end


@contextlib.contextmanager
def serving(directory: Path, *options: str) -> Iterator[str]:
    """Run this program as a process that serves a directory; yield the URL of the directory."""
    command = [sys.executable, __file__, "--directory", str(directory), "--until-eof", *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1]
        finally:
            process.kill()


async def _run(arguments: argparse.Namespace, directory: Path) -> None:
    server = PageServer(directory, arguments.latency_ms / 1000, not arguments.no_range)
    listening = await server.serve(arguments.host, arguments.port)
    host, port = listening.sockets[0].getsockname()[:2]
    print(f"listening on http://{host}:{port}", flush=True)  # a program that starts this one reads the line
    file = "FILE" if arguments.directory else "sample.bin"
    print(f"map a file: python examples/lazy_array.py http://{host}:{port}/{file}", flush=True)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if arguments.until_eof:  # the input ends with the program that started this one, however that program ends

        def heard() -> None:
            if not os.read(0, 4096):
                stop.set()

        loop.add_reader(sys.stdin.fileno(), heard)
    await stop.wait()
    listening.close()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Serve the files of a directory over HTTP with Range.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0 takes a free one (%(default)s)")
    parser.add_argument("--directory", type=Path, help="default: a temporary one with sample.bin, 64 MiB")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="wait before each answer (%(default)s)")
    parser.add_argument("--no-range", action="store_true", help="behave like a server without Range")
    parser.add_argument("--until-eof", action="store_true", help="end when standard input ends")
    arguments = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        directory = arguments.directory
        if directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (directory / "sample.bin").write_bytes(os.urandom(1 << 20) * 64)
        asyncio.run(_run(arguments, directory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
