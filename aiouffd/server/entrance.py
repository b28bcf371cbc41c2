"""Where the clients of a session connect, and the note of it that a server after this one has."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Any, Literal

from aiouffd.errors import UffdError
from aiouffd.server.successor import DRAINING, forget_session, keep_drained, keep_session

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.pager.client.client import PagerClient
    from aiouffd.server.listener import SocketFile
    from aiouffd.server.successor import Left

__all__ = ["Entrance"]


class Entrance:
    """The socket of one session.

    Args:
        name: of the session.
        pager: keeps its note.
        note: what whoever makes the session again needs: plain values.

    Attributes:
        listener: the socket; None: there is none.
        state: `restoring`: it listens, and clients wait in its queue until the session can take them; `listening`; or
            `draining`: no client may come, not yet or not any more.
    """

    def __init__(self, name: str, pager: PagerClient, note: dict[str, Any]) -> None:
        self._name, self._pager, self._note = name, pager, note
        self._file: SocketFile | None = None
        self.listener: socket.socket | None = None
        self.state: Literal["restoring", "listening", "draining"] = "draining"

    def inherit(self, left: Left) -> None:
        """Go on with that of a server before this one, whose note the pager has, unless there is another one by now."""
        if self.listener is not None:
            return
        self.listener = left.listener
        if DRAINING not in left.text:
            self.state = "restoring"
        elif self.listener is not None:  # that server was killed while it closed it
            forget_session(self._pager, self._name)
            self._close()

    def bind(self, listen: Callable[[], socket.socket | SocketFile]) -> None:
        """Have the socket that this makes, unless it was made before. Blocks. Raises what it raises."""
        if self._file is None:
            made = listen()
            self._file, self.listener = (None, made) if isinstance(made, socket.socket) else (made, made.listener)
            self.listener.setblocking(False)

    def open(self, known: dict[str, Any]) -> socket.socket:
        """Return the socket, of which a note is kept from now on, with what is known of the session besides."""
        assert self.listener is not None
        keep_session(self._pager, self._name, self.listener, self._note | known)
        self.forget()
        self.state = "listening"
        return self.listener

    def close(self, known: dict[str, Any]) -> bool:
        """Close the socket: clients that are there stay, and the note says so. Return whether it was open."""
        was_open, self.state = self.state != "draining", "draining"
        if was_open:
            with contextlib.suppress(UffdError):  # the pager is no more
                keep_drained(self._pager, self._name, self._note | known)
            forget_session(self._pager, self._name)
        self._close()
        return was_open

    def forget(self) -> None:
        """Keep no note that it was closed: the session is open, or is no more."""
        forget_session(self._pager, self._name, drained=True)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        elif self.listener is not None:
            self.listener.close()
