"""`pager.process.control`: what goes over the socket."""

from __future__ import annotations

import errno
import os
import resource
import socket
from pathlib import Path

import pytest
from scenario import open_descriptors

from aiouffd import errors
from aiouffd.pager.process import control


def test_a_message_arrives_whole_with_its_descriptors() -> None:
    """One packet, one message; the descriptors are new ones of the receiver, close-on-exec."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        fds = [os.memfd_create("a"), os.memfd_create("b")]
        control.send(left, {"op": "x", "n": [1, 2]}, fds)
        control.send(left, {"op": "y"})
        message, received = control.receive(right)
        assert message == {"op": "x", "n": [1, 2]}
        assert [os.fstat(fd).st_ino for fd in received] == [os.fstat(fd).st_ino for fd in fds]
        assert not any(os.get_inheritable(fd) for fd in received)
        assert control.receive(right) == ({"op": "y"}, [])
        for fd in fds + received:
            os.close(fd)


def test_a_large_message_arrives_whole() -> None:
    """Larger than a packet can be: a process of a hundred thousand mappings. No descriptor is left behind."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right, Path(os.devnull).open() as beside:
        before = open_descriptors()
        message = {"mappings": [[number << 12, (number + 1) << 12, number] for number in range(100_000)]}
        control.send(left, message, [beside.fileno()])
        control.send(left, {"op": "next"})
        received, fds = control.receive(right)
        assert received == message
        assert len(fds) == 1
        assert os.fstat(fds[0]).st_rdev == os.fstat(beside.fileno()).st_rdev
        os.close(fds[0])
        assert control.receive(right) == ({"op": "next"}, [])
        assert open_descriptors() == before


def test_the_end_is_told_on_both_sides() -> None:
    """A closed peer is `Closed`, for reading and for writing."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left:
        right.close()
        with pytest.raises(control.Closed):
            control.receive(left)
        with pytest.raises(control.Closed):
            control.send(left, {})


def test_what_is_kept_is_sent_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its descriptors, which their owner has closed meanwhile; one that cannot be sent keeps no other back."""
    sent = control.send

    def send(connection: socket.socket, message: dict[str, object], *rest: object, **wait: bool) -> None:
        if message["op"] == "bad":
            raise OSError(9, "no such descriptor")
        sent(connection, message, *rest, **wait)  # type: ignore[arg-type]

    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        outbox, count = control.Outbox(left), 0
        before = open_descriptors()
        while not outbox:
            outbox.put({"op": "fills"})
            count += 1
        fd = os.memfd_create("a")
        inode = os.fstat(fd).st_ino
        assert [outbox.put({"op": "many"}, most=most) for most in (1, 0)] == [False, False]
        assert outbox.lost == 2
        outbox.put({"op": "bad"})
        outbox.put({"op": "good"}, [fd])
        os.close(fd)
        monkeypatch.setattr(control, "send", send)
        assert outbox.flush() == []
        assert [control.receive(right)[0]["op"] for _ in range(count - 1)] == ["fills"] * (count - 1)
        [(message, error)] = outbox.flush()
        assert (message["op"], error.errno, bool(outbox)) == ("bad", 9, False)
        assert control.receive(right)[0]["op"] == "fills"
        message, [received] = control.receive(right)
        assert (message["op"], os.fstat(received).st_ino) == ("good", inode)
        os.close(received)
        while not outbox:
            outbox.put({"op": "fills"}, [right.fileno()])
        right.shutdown(socket.SHUT_RDWR)
        with pytest.raises(control.Closed):
            outbox.flush()
        assert not outbox
        assert control.receive(right)[1]
    del left, right, outbox
    assert open_descriptors() <= before


def test_a_large_message_that_finds_no_descriptor_keeps_no_other_back() -> None:
    """The worker says by its errors why a thread waits; one whose text is long is no reason to say nothing any more."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        outbox, limits = control.Outbox(left), resource.getrlimit(resource.RLIMIT_NOFILE)
        while not outbox:
            outbox.put({"op": "fills"})
        large = {"op": "large", "text": "x" * (1 << 17)}
        outbox.put(large)
        outbox.put({"op": "next"})
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                control.send(right, large)
            while control.receive(right)[0]["op"] == "fills":
                for message, error in outbox.flush():
                    assert (message, error.errno) == (large, errno.EMFILE)
            assert not outbox
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_errors_keep_type_data_and_cause() -> None:
    """What the worker raises is raised in the application: same type, same attributes, same cause."""
    error = errors.ShortReadError("FileSource('x')", 4096, 8192, "gave 1 byte")
    error.__cause__ = OSError(5, "Input/output error")
    again = errors.decode_error(errors.encode_error(error))
    assert type(again) is errors.ShortReadError
    assert (again.offset, again.length) == (4096, 8192)
    assert str(again) == str(error)
    assert isinstance(again.__cause__, OSError)
    assert again.__cause__.errno == 5


class Strange(Exception):  # noqa: N818
    """Known to nobody else."""


@pytest.mark.parametrize(
    "error",
    [
        Strange("what"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        errors.RangeGoneError("UFFDIO_COPY", 4096, 4096, 2),
        KeyboardInterrupt(),
    ],
)
def test_any_exception_can_be_sent(error: BaseException) -> None:
    """An exception that cannot be rebuilt is a PagerError with its text; none fails to be sent."""
    again = errors.decode_error(errors.encode_error(error))
    assert isinstance(again, Exception)
    assert type(error).__name__ in "".join(again.__notes__)


def test_messages_of_other_processes_are_dropped() -> None:
    """The kernel says who sends: a forked child is not its parent. Its descriptors are closed."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    right.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    with left, right, Path(os.devnull).open() as beside:
        before = open_descriptors()
        sender = control.Sender(right)
        child = os.fork()
        if child == 0:
            control.send(left, {"op": "open"}, [beside.fileno()])
            left.send(b"")  # not to be taken for the end
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        control.send(left, {"op": "mine"}, [beside.fileno()])
        for _ in range(2):
            with pytest.raises(control.StrangerError, match=f"process {child}"):
                control.receive(right, sender)
        message, (fd,) = control.receive(right, sender)
        assert message == {"op": "mine"}
        os.close(fd)
        left.send(b"")
        with pytest.raises(ValueError, match="0 bytes"):
            control.receive(right, sender)
        assert open_descriptors() == before


@pytest.mark.parametrize("packet", [b"x", b"\0" * 5, b"\0\0\0\0\0[]", b"\0\0\0\0\0\xff", b"\0\0\0\0\0nonsense"])
def test_a_packet_that_is_no_message(packet: bytes) -> None:
    """It is told as that, and the next one is read."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        left.send(packet)
        control.send(left, {"op": "next"})
        with pytest.raises(ValueError, match=r"message|JSON|decode|Expecting"):
            control.receive(right)
        assert control.receive(right) == ({"op": "next"}, [])


def test_the_last_message_of_a_side_that_has_not_read_all() -> None:
    """The kernel says ECONNRESET first; what was sent before the end is read all the same."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left:
        control.send(left, {"op": "unread"})
        control.send(right, {"event": "died"})
        right.close()
        assert control.receive(left) == ({"event": "died"}, [])
        with pytest.raises(control.Closed):
            control.receive(left)
