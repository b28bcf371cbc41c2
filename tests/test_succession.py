"""`client.succession`: what a server's holder gives to the next server, and journals of other versions."""

from __future__ import annotations

import os
import socket
import threading
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from aiouffd.errors import PagerStartError
from aiouffd.pager.client.succession import Estate, HolderLostError, Predecessor
from aiouffd.pager.process import control
from aiouffd.pager.process.journal import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = 4096


def journal_of(version: int, *, said: int | None = None) -> int:
    """Return a memfd with the journal that a pager of that version has written; `said`: the version that it names."""
    data = zlib.decompress((Path(__file__).parent / "journals" / f"version-{version}.zlib").read_bytes())
    fd = os.memfd_create("journal")
    os.write(fd, data)
    if said is not None:
        os.pwrite(fd, said.to_bytes(8, "little"), 8)
    return fd


def numbers(*old: int) -> dict[int, int]:
    """Return descriptors of this process for those that a journal speaks of."""
    return {number: os.open("/dev/null", os.O_RDONLY) for number in old}


def test_the_version_before_is_read() -> None:
    """Its layout messages are applied; descriptors have this process's numbers, and close with the estate."""
    number_of = numbers(20, 21, 22, 23, 24)
    estate = Estate(journal_of(VERSION - 1), number_of)
    parent, child = estate.state.spaces.values()
    assert [(mapping.start // PAGE, mapping.end // PAGE, mapping.offset // PAGE) for mapping in parent.mappings] == [
        (16, 17, -1), (17, 20, 1), (21, 32, 5), (64, 65, 4),
    ]  # fmt: skip
    assert [(mapping.start // PAGE, mapping.end // PAGE) for mapping in child.mappings] == [(16, 17), (17, 32)]
    assert (parent.fd, parent.tether, child.fd, child.is_child) == (number_of[22], number_of[23], number_of[24], True)
    assert (parent.payer, parent.replayed, parent.filled) == ("session a", 3, 4)
    assert estate.state.origins[1]["config"] == number_of[20]
    assert estate.state.origins[1]["fds"] == [number_of[21]]
    assert estate.state.notes == {}
    assert estate.journal.counters_of(1).words[0] == 77
    taken = estate.take(parent.fd)
    estate.close()
    os.close(taken)  # this one was still open
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(child.fd)


def test_a_later_version_is_refused() -> None:
    """Nothing stays open."""
    fd = journal_of(VERSION - 1, said=VERSION + 1)
    with pytest.raises(PagerStartError, match=f"journal of version {VERSION + 1}.*is older"):
        Estate(fd, {})
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def asked(path: Path, answer: Callable[[socket.socket, dict[str, Any]], None]) -> Predecessor:
    """Return a predecessor whose holder is a function here, which answers one question."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            answer(connection, control.receive(connection)[0])

    threading.Thread(target=serve, daemon=True).start()
    predecessor = Predecessor.at(path)
    assert predecessor is not None
    return predecessor


def test_a_holder_is_asked(tmp_path: Path) -> None:
    """It gives, refuses, or ends in the middle; where nobody listens, there is none."""
    assert Predecessor.at(tmp_path / "none") is None
    (tmp_path / "left").touch()
    with pytest.raises(OSError, match="Not a directory"):
        Predecessor.at(tmp_path / "left" / "below")
    heard: list[dict[str, Any]] = []

    def gives(connection: socket.socket, question: dict[str, Any]) -> None:
        heard.append(question)
        journal, fds = journal_of(VERSION - 1), numbers(20, 21, 22, 23, 24)
        control.send(connection, {"numbers": list(fds), "owned": True}, [journal, *fds.values()])
        for fd in (journal, *fds.values()):
            os.close(fd)

    giving = asked(tmp_path / "gives", gives)
    estate = giving.take(over=True, journal=0)
    assert estate.owned
    assert heard == [{"op": "take", "over": True}]
    estate.close()
    refusing = asked(tmp_path / "refuses", lambda connection, _: control.send(connection, {"refused": "not now"}))
    with pytest.raises(OSError, match="not now"):
        refusing.look()
    ending = asked(tmp_path / "ends", lambda *_: None)
    with pytest.raises(HolderLostError, match="has ended"):
        ending.look()
    for predecessor in (giving, refusing, ending):
        predecessor.close()
