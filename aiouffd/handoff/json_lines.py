"""Lines of JSON: what our own clients and the server send on the connection after the handoff.

- The server's first line says that the memory is served: `{"id": 0, "ok": {...}}`.
- The client asks: `{"id": 1, "op": "prefetch", "offset": 0, "length": 4096}`.
- The server answers: `{"id": 1, "ok": ...}` or `{"id": 1, "error": {...}}`.
- The server reports each page that cannot be fetched: `{"error": {...}}`, without an `id`.

The end of the connection tells the server that the client has left. It tells the client that the server has ended and
answers no more; its pager may go on serving.

Beside the userfaultfd the client sends the writing end of a pipe, which server and pager hold. Its end tells the client
that nobody serves the memory any more.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["VERSION", "Lines", "line"]

VERSION: Final = 1
_MAX_LINE: Final = 64 << 10


def line(message: dict[str, Any]) -> bytes:
    """Return a message as it is sent."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Lines:
    """Splits what arrives into messages."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Yield the messages that are complete now.

        Raises:
            ValueError: a line is too long, or not a JSON object.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE:
            raise ValueError(f"a line of more than {_MAX_LINE} bytes")
        for item in lines:
            try:
                message = json.loads(item)
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict):
                raise ValueError(f"{item[:50]!r} is not a JSON object")  # noqa: TRY004 - no argument has a wrong type
            yield message
