"""Requests to the control of a server: JSON by HTTP on its Unix socket."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ControlClient"]

_LONG: Final = ("/complete", "/drain", "/prefetch", "/snapshot")  # what may take its time
_SILENCE = 3.0  # seconds
_SILENT: Final = (
    "{}: no answer yet, still waiting. If no server runs, start `aiouffd serve` with the same --control and --hold:"
    " what holds its sessions takes connections, and answers none"
)


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        try:
            self.sock.connect(self._path)
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
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the answer to a request; None if there is none. Blocks until it is there.

        Raises:
            click.ClickException: the request was refused, or there is no server; it says what to do.
        """
        connection = _Connection(self._path)
        try:
            response = self._send(connection, method, path, body)
            data = response.read()
            return json.loads(data) if data else None
        finally:
            connection.close()

    def events(self, after: int | None = None) -> Iterator[dict[str, Any]]:
        """Yield what happens, until the server ends; `after`: first what came behind that number."""
        connection = _Connection(self._path)
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
        silence = threading.Timer(_SILENCE, click.echo, [_SILENT.format(self._path)], {"err": True})
        silence.daemon = True
        if not path.endswith(_LONG):
            silence.start()
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers or {})
            response = connection.getresponse()
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
