"""`server.entrance`: the socket of a session, and what a server after this one is told of it."""

from __future__ import annotations

import functools
import socket
from typing import TYPE_CHECKING, Any

from aiouffd.errors import PagerDiedError
from aiouffd.server.entrance import Entrance
from aiouffd.server.listener import SocketFile
from aiouffd.server.successor import DRAINING, Left

if TYPE_CHECKING:
    from pathlib import Path


class Pager:
    """Has the notes."""

    def __init__(self) -> None:
        self.holding = self
        self.notes: dict[str, dict[str, Any]] = {}
        self.is_dead = False

    def keep(self, name: str, text: dict[str, Any], fds: Any = ()) -> None:
        """Keep one."""
        if self.is_dead:
            raise PagerDiedError("it is gone")
        self.notes[name] = {**text, "fds": len(fds)}

    def forget(self, name: str) -> None:
        """Keep it no longer."""
        self.notes.pop(name, None)


def entrance(pager: Pager) -> Entrance:
    """Return one of a session."""
    had: Any = pager
    return Entrance("a", had, {"created": 1, "lasting": True})


def test_the_note_of_one_that_was_closed(tmp_path: Path) -> None:
    """It says so, without a socket, and keeps no holder alive; there is one of both at any time, until the end."""
    pager = Pager()
    door = entrance(pager)
    door.bind(functools.partial(SocketFile, tmp_path / "s"))
    listener = door.open({"slot": 3})
    assert (door.state, listener.getblocking()) == ("listening", False)
    assert pager.notes == {"session a": {"created": 1, "lasting": True, "slot": 3, "fds": 1}}
    assert door.close({"slot": 3})
    assert pager.notes == {"drained a": {"created": 1, "slot": 3, "fds": 0}}
    assert (door.state, list(tmp_path.iterdir()), listener.fileno()) == ("draining", [], -1)
    assert not door.close({"slot": 3})
    door.forget()
    assert not pager.notes


def test_a_pager_that_is_no_more(tmp_path: Path) -> None:
    """The socket is closed all the same."""
    pager = Pager()
    door = entrance(pager)
    door.bind(functools.partial(SocketFile, tmp_path / "s"))
    door.open({})
    pager.is_dead = True
    assert door.close({})
    assert not (tmp_path / "s").exists()


def test_what_is_inherited(tmp_path: Path) -> None:
    """The socket, and its file with it; or that there is none; not where there is another one by now."""
    file = SocketFile(tmp_path / "s")
    pager = Pager()
    door = entrance(pager)
    door.inherit(Left({"slot": 1}, file.listener))
    assert (door.state, door.listener) == ("restoring", file.listener)
    for _ in range(2):
        door.bind(functools.partial(SocketFile, tmp_path / "s", made=file.listener))
    door.inherit(Left({"slot": 1}, None))
    assert door.open({}) is file.listener
    door.close({})
    assert not (tmp_path / "s").exists()

    door, pager.notes = entrance(pager), {"session a": {}, "drained a": {}}
    left, other = socket.socketpair()
    door.inherit(Left({"slot": 1, DRAINING: True}, left))
    assert (door.state, pager.notes, other.recv(1)) == ("draining", {"drained a": {}}, b"")
    assert not door.close({})
    other.close()
