"""What a client has asked of its pager, and has no answer to yet."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, InvalidStateError
from typing import Any

import attrs

__all__ = ["FIRST", "Request", "fail"]

FIRST = ("takeover", "open")
"""These go before whatever speaks of what they bring."""


@attrs.define(eq=False)
class Request:
    """What was asked for, and is not answered yet: it is sent again to a worker that succeeds a dead one."""

    message: dict[str, Any]
    fds: list[int]
    future: Future[Any] = attrs.field(factory=Future)

    @property
    def rank(self) -> int:
        """Where it stands among those that are sent together."""
        op = self.message["op"]
        return FIRST.index(op) if op in FIRST else len(FIRST)


def fail(future: Future[Any], error: BaseException) -> None:
    """Set the exception of a future, unless it was canceled."""
    with contextlib.suppress(InvalidStateError):  # canceled
        future.set_exception(error)
