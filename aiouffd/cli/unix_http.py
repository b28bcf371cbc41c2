"""Requests to the control of a server: JSON by HTTP on its Unix socket."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
from typing import TYPE_CHECKING, Any, Final

import click

from aiouffd.kernel.sockets import connect_within

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DEFAULT_TIMEOUT", "ControlClient"]

DEFAULT_TIMEOUT: Final = 30.0
_SILENCE = 3.0  # seconds
_HELD: Final = (
    "If no server runs, start `aiouffd serve` with the same --control and --hold:"
    " what holds its sessions takes connections, and answers none"
)


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        try:
            connect_within(self.sock, self._path, self.timeout or 0.0)
            self.sock.settimeout(self.timeout)
        except BlockingIOError:
            raise TimeoutError from None
        except OSError as error:
            advice = {
                FileNotFoundError: "no server has made it: start `aiouffd serve --control PATH`, or name its socket",
                ConnectionRefusedError: "nobody listens there any more: start `aiouffd serve --control` again",
                PermissionError: "only root and the server's own user may use it",
            }
            raise click.ClickException(f"{self._path}: {advice.get(type(error), error.strerror)}") from None


class ControlClient:
    """Asks a server.

    Args:
        path: of its control socket.
        timeout: seconds until a server has to answer at all; what it is asked to do may take longer.
    """

    def __init__(self, path: str | os.PathLike[str], timeout: float = DEFAULT_TIMEOUT) -> None:
        self._path = os.fspath(path)
        self._timeout = timeout

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the answer to a request; None if there is none. Blocks until it is there.

        Raises:
            click.ClickException: the request was refused, or there is no server; it says what to do.
        """
        connection = _Connection(self._path, self._timeout)
        try:
            data = self._send(connection, method, path, body).read()
            return json.loads(data) if data else None
        finally:
            connection.close()

    def events(self, after: int | None = None) -> Iterator[dict[str, Any]]:
        """Yield what happens, until the server ends; `after`: first what came behind that number."""
        connection = _Connection(self._path, self._timeout)
        try:
            headers = {} if after is None else {"Last-Event-ID": str(after)}
            response = self._send(connection, "GET", "/v1/events", None, headers)
            for line in response:
                if line.startswith(b"data: "):
                    yield json.loads(line.removeprefix(b"data: "))
        finally:
            connection.close()

    def _send(
        self,
        connection: _Connection,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        headers: dict[str, str] | None = None,
    ) -> http.client.HTTPResponse:
        waiting = f"{self._path}: no answer yet, still waiting. {_HELD}"
        silence = threading.Timer(_SILENCE, click.echo, [waiting], {"err": True})
        silence.daemon = True
        silence.start()
        try:
            if method != "GET":  # it may take its time: a server that answers another question first is there
                connection.request("GET", "/v1/server")
                connection.getresponse().read()
                silence.cancel()
                connection.auto_open = 0  # a new connection could be its holder's
                if connection.sock is not None:
                    connection.sock.settimeout(None)
            connection.request(method, path, None if body is None else json.dumps(body), headers or {})
            sock = connection.sock
            response = connection.getresponse()
            if not response.isclosed():  # events come when they come
                sock.settimeout(None)
        except TimeoutError:
            raise click.ClickException(f"{self._path}: no answer in {self._timeout:g} s. {_HELD}") from None
        except (http.client.HTTPException, OSError) as error:
            reason = f"the server has ended the connection ({error!r}): see its log"
            raise click.ClickException(f"{self._path}: {reason}") from None
        finally:
            silence.cancel()
        if response.status >= 400:
            raise _refused(response)
        return response


def _refused(response: http.client.HTTPResponse) -> click.ClickException:
    try:
        problem = json.loads(response.read())
        where = f"{problem['field']}: " if problem.get("field") else ""
        advice = f" ({problem['advice']})" if problem.get("advice") else ""
        return click.ClickException(f"{where}{problem['detail']}{advice}")
    except (ValueError, KeyError, TypeError):
        return click.ClickException(f"HTTP status {response.status}: is this the control socket of `aiouffd serve`?")
