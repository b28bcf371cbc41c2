"""An HTTP server with one odd habit, in a thread, and what it was asked."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import re
import socket
import ssl
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

from aiouffd.lifetime import Closable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

_Client = TypeVar("_Client", bound=Closable)

DATA = bytes(n * 7 % 251 for n in range(200_003))
_MONDAY, _TUESDAY = "Mon, 02 Nov 2026 10:00:00 GMT", "Tue, 03 Nov 2026 10:00:00 GMT"


class Odd(http.server.ThreadingHTTPServer):
    """Serves `data`.

    Attributes:
        habit: what is odd.
        data: of the object.
        version: 1, or 2 once the object has changed (`change`).
        requests: method and headers of each.
        failures: how many requests are answered with 503, or are dropped.
        retry_after: is said with these.
        times: of the requests, as time.monotonic() has them.
    """

    daemon_threads = True

    def __init__(self, habit: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.habit = habit
        self.data = DATA
        self.version = 1
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.failures = 0
        self.retry_after = ""
        self.times: list[float] = []

    @property
    def url(self) -> str:
        """Of the object."""
        scheme = "https" if isinstance(self.socket, ssl.SSLSocket) else "http"
        return f"{scheme}://127.0.0.1:{self.server_port}/a%20b.bin?signature=hidden"

    def change(self) -> None:
        """Replace the object by another of the same size."""
        self.data = bytes(255 - byte for byte in self.data)
        self.version += 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients may give up."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Odd
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # the head and the body are two writes: 40 ms a request

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def validators(self) -> dict[str, str]:
        habit, version = self.server.habit, self.server.version
        modified = _MONDAY if version == 1 else _TUESDAY
        if habit == "none":
            return {}
        if habit.startswith("modified"):
            return {"Last-Modified": modified}
        if habit == "weak":
            return {"ETag": 'W/"v1"', "Last-Modified": modified}
        if habit == "weak tag":
            return {"ETag": f'W/"v{version}"'}
        return {"ETag": f'"v{version}"'}

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.server.requests.append(("HEAD", {name.lower(): value for name, value in self.headers.items()}))
        habit, data = self.server.habit, self.server.data
        if "head " in habit:
            self.answer(int(habit[-3:]), {})
        else:
            self.answer(200, {**self.validators(), "Content-Length": str(len(data))})

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(("GET", {name.lower(): value for name, value in self.headers.items()}))
        server.times.append(time.monotonic())
        if server.failures:
            server.failures -= 1
            if server.habit == "drops":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            else:
                self.answer(503, {"Retry-After": server.retry_after})
            return
        if server.habit.isdecimal():
            self.answer(int(server.habit), {})
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert found is not None
        start, stop = int(found[1]), min(int(found[2]) + 1, len(server.data))
        if start >= stop:
            self.answer(416, {"Content-Range": f"bytes */{len(server.data)}"})
            return
        validators = self.validators()
        if "ignores" not in server.habit and (
            self.headers.get("If-Match", validators.get("ETag")) != validators.get("ETag")
            or self.headers.get("If-Unmodified-Since", validators.get("Last-Modified"))
            != validators.get("Last-Modified")
        ):
            self.answer(412, {})
            return
        self.ranged(start, stop, validators)

    def ranged(self, start: int, stop: int, headers: dict[str, str]) -> None:
        habit, data = self.server.habit, self.server.data
        body, first, last, total = data[start:stop], start, stop - 1, str(len(data))
        if habit.startswith("short"):
            last = start + min(len(body), 1000) - 1
        elif habit == "aligned":
            first, last = start & -65536, min((stop - 1) | 65535, len(data) - 1)
        elif habit == "wrong offset" and start:
            first, last = 0, stop - start - 1
        elif habit.startswith("star") or (habit == "late star" and start):
            total = "*"
        elif habit == "enormous" or (habit == "other total" and start):
            total = "5" if start else str(1 << 63)
        body = data[first : last + 1]
        headers["Content-Range"] = f"bytes {first}-{last}/{total}"
        if habit == "no content-range":
            del headers["Content-Range"]
        elif habit == "multipart":
            headers["Content-Type"] = "multipart/byteranges; boundary=X"
            headers["Content-Range"] = ""
        elif habit == "empty" and start:
            body = b""
        elif habit == "compressed":
            headers["Content-Encoding"] = "gzip"
        elif habit == "late 200" and start:
            self.answer(200, headers, data)
            return
        elif habit == "ends early" and start:
            headers["Content-Length"] = str(len(body) + 5)
            self.close_connection = True
        elif habit == "trickles":
            headers |= {"Content-Length": str(len(body)), "Content-Range": headers["Content-Range"]}
            self.answer(206, headers)
            with contextlib.suppress(OSError):  # the client has given up
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.05)
            self.close_connection = True
            return
        elif habit == "chunked":
            headers["Content-Length"] = ""
            headers["Transfer-Encoding"] = "chunked"
            body = b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
        self.answer(206, headers, body)


@contextlib.contextmanager
def serving(habit: str = "", tls: ssl.SSLContext | None = None) -> Iterator[Odd]:
    """Run a server with a habit."""
    with Odd(habit) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextlib.asynccontextmanager
async def closing(client: _Client) -> AsyncIterator[_Client]:
    """Yield a client, and close it: its transports are closed in the next turn of the loop."""
    try:
        yield client
    finally:
        client.close()
        await asyncio.sleep(0)


def certified(directory: Path) -> tuple[Path, ssl.SSLContext]:
    """Return the certificate of an authority made for this, and the context of a server that it has certified."""
    extensions = ("subjectAltName=IP:127.0.0.1", "basicConstraints=CA:FALSE", "authorityKeyIdentifier=keyid")
    (directory / "extensions").write_text("\n".join(extensions))
    key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    authority = "-keyout ca.key -out ca.pem -subj /CN=tests -addext basicConstraints=critical,CA:TRUE"
    authority += " -addext keyUsage=critical,keyCertSign"  # demanded since Python 3.13 (VERIFY_X509_STRICT)
    signing = "-CA ca.pem -CAkey ca.key -CAcreateserial -extfile extensions"
    for command in (
        f"openssl req -x509 {key} {authority} -days 30",
        f"openssl req {key} -keyout server.key -out server.csr -subj /CN=server",
        f"openssl x509 -req -in server.csr {signing} -out server.pem -days 30",
    ):
        subprocess.run(command.split(), cwd=directory, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server.pem", directory / "server.key")
    return directory / "ca.pem", context
