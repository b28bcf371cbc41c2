"""`kernel.owned_descriptor`: a descriptor is closed once, whatever ends its object."""

from __future__ import annotations

import gc
import os
import socket
from typing import TYPE_CHECKING

import pytest

from aiouffd.kernel.owned_descriptor import OwnedDescriptor, OwnedSocket
from aiouffd.pager.process.handles import is_open

if TYPE_CHECKING:
    from collections.abc import Callable


class Pipe(OwnedDescriptor):
    """Owns one end of a pipe."""

    def __init__(self) -> None:
        self.other, fd = os.pipe()
        super().__init__(fd)

    @property
    def fd(self) -> int:
        """The descriptor."""
        return self._fd


@pytest.mark.parametrize("how", ["close", "with", "last reference"])
def test_each_way_of_closing(how: str) -> None:
    """By `close()`, by leaving the block, by dropping it."""
    pipe = Pipe()
    fd, other = pipe.fd, pipe.other
    assert not pipe.closed
    if how == "with":
        with pipe:
            assert is_open(fd)
        assert pipe.closed
    elif how == "close":
        pipe.close()
    else:
        del pipe
        gc.collect()
    assert not is_open(fd)
    os.close(other)


def test_another_descriptor_of_the_same_number_stays_open() -> None:
    """`close()` a second time, and the end of the object, close nothing."""
    pipe = Pipe()
    number = pipe.fd
    pipe.close()
    again = os.dup2(pipe.other, number)
    pipe.close()
    other = pipe.other
    del pipe
    gc.collect()
    assert is_open(again)
    os.close(again)
    os.close(other)


def test_an_object_that_was_never_made_owns_nothing() -> None:
    """Its constructor raised before there was a descriptor."""
    made = OwnedDescriptor.__new__(OwnedDescriptor)
    assert made.closed
    made.close()


def whole(each: OwnedDescriptor | OwnedSocket) -> bool:
    """Ask anew."""
    return each.intact


def replaced(number: int) -> int:
    """Close a descriptor, and have its number be another file's; return what is written there by others."""
    reading, writing = os.pipe()
    os.dup2(reading, number)
    os.close(reading)
    return writing


@pytest.mark.parametrize("how", ["close", "last reference"])
def test_a_number_that_is_another_file_by_now(how: str) -> None:
    """It is not closed: a program may close what it has not opened, and open files of its own."""
    pipe = Pipe()
    number = pipe.fd
    assert whole(pipe)
    writing = replaced(number)
    assert not whole(pipe)
    other = pipe.other
    if how == "close":
        pipe.close()
        assert pipe.closed
    del pipe
    gc.collect()
    assert is_open(number)
    for fd in (number, writing, other):
        os.close(fd)


def test_a_number_that_is_nobodys_by_now() -> None:
    """There is nothing to be closed, and that is no error."""
    pipe = Pipe()
    os.close(pipe.fd)
    assert not whole(pipe)
    pipe.close()
    os.close(pipe.other)
    assert OwnedDescriptor().closed
    assert not OwnedDescriptor().intact


def test_a_socket_of_ones_own() -> None:
    """Until it is closed it is a socket as any other."""
    one, other = OwnedSocket.pair(socket.SOCK_SEQPACKET)
    number = one.fileno()
    with one:
        one.sendall(b"a")
        one.sendmsg([b"b"])
        assert (other.recv(9), other.recvmsg(9)[0]) == (b"a", b"b")
        one.shutdown(socket.SHUT_WR)
        assert other.recv(9) == b""
        assert whole(one)
    assert not is_open(number)
    assert not whole(one)
    number = other.fileno()
    del other
    gc.collect()
    assert not is_open(number)


@pytest.mark.parametrize(
    "use",
    [
        lambda each: each.sendall(b"a"),
        lambda each: each.sendmsg([b"a"]),
        lambda each: each.recv(9),
        lambda each: each.recvmsg(9),
        lambda each: each.setblocking(False),
        lambda each: each.shutdown(socket.SHUT_RDWR),
    ],
)
def test_a_socket_whose_number_is_another_file_by_now(use: Callable[[OwnedSocket], object]) -> None:
    """It is neither used nor closed."""
    one, other = OwnedSocket.pair(socket.SOCK_STREAM)
    number = one.fileno()
    theirs, far = socket.socketpair()
    os.dup2(theirs.fileno(), number)
    far.send(b"theirs")
    with pytest.raises(ConnectionResetError):
        use(one)
    one.close()
    assert theirs.recv(9) == b"theirs"
    theirs.send(b"answer")
    assert far.recv(9) == b"answer"
    os.close(number)
    for each in (other, theirs, far):
        each.close()
