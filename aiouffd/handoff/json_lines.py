"""Lines of JSON: what our own clients and the server send on the connection after the handoff.

- The server's first line says that the memory is served: `{"id": 0, "ok": {...}}`.
- The client asks: `{"id": 1, "op": "prefetch", "ranges": [[0, 4096]]}`; a line has at most `MOST_RANGES`.
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

from aiouffd.ranges import RangeSet

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["AGAIN", "MOST_RANGES", "VERSION", "Lines", "line", "ranges_of"]

VERSION: Final = 1
AGAIN: Final = "again"
"""What a client is told when another process answers from now on: it says so too, and asks again what is unanswered."""
MOST_RANGES: Final = 1000
"""Of one prefetch."""

_MAX_LINE: Final = 64 << 10


def line(message: dict[str, Any]) -> bytes:
    """Return a message as it is sent."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def ranges_of(message: dict[str, Any], end: int) -> list[tuple[int, int]]:
    """Return the (offset, length) ranges that a client asks for, below `end`; each byte once.

    Raises:
        ValueError: they are none.
    """
    asked, found = message.get("ranges"), RangeSet()
    if not isinstance(asked, list) or len(asked) > MOST_RANGES:
        raise ValueError(f"a prefetch has at most {MOST_RANGES} ranges")
    for each in asked:
        if not isinstance(each, list) or len(each) != 2 or any(type(part) is not int or part < 0 for part in each):
            raise ValueError(f"{each!r:.80} is no range: [offset, length]")
        found.add(min(each[0], end), min(sum(each), end))
    return [(each.start, each.length) for each in found]


class Lines:
    """Splits what arrives into messages.

    Args:
        after: the `op` of a message before which everything is dropped; empty: nothing is. Who reads on where another
            process has read may begin in the middle of a line, and has not seen what that process left unanswered.
    """

    def __init__(self, after: str = "") -> None:
        self._rest = b""
        self._after = after

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
            if self._after:
                if isinstance(message, dict) and message.get("op") == self._after:
                    self._after = ""
                continue
            if not isinstance(message, dict):
                raise ValueError(f"{item[:50]!r} is not a JSON object")  # noqa: TRY004 - no argument has a wrong type
            yield message
