"""`server.rejection`: a client that is turned away, and never reads why, does not wait for ever."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from pattern import PAGE
from scenario import eventually, play
from served import MIB, Serve, hand_over

import aiouffd
from aiouffd.handoff.receive import Peer
from aiouffd.ranges import Range
from aiouffd.server import rejection

if TYPE_CHECKING:
    from pathlib import Path


def handed_over(path: str, length: int, change: dict[str, Any]) -> tuple[aiouffd.Region, Any, Any]:
    """Hand a region over, with changes to what is said of it; None takes a key away."""
    region = aiouffd.Region(length)
    uffd = aiouffd.Userfaultfd(aiouffd.Feature.EVENT_REMOVE)
    uffd.register(region.address, length, aiouffd.RegisterMode.MISSING)
    item = {"base_host_virt_addr": region.address, "size": length, "offset": 0, "page_size": PAGE} | change
    text = json.dumps([{key: value for key, value in item.items() if value is not None}]).encode()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    socket.send_fds(connection, [text], [uffd.fileno()])
    return region, connection, uffd


def touch(path: str, length: int, change: dict[str, Any]) -> None:
    """Scenario: a client as Firecracker is one, which reads nothing and touches its memory."""
    region, _connection, _uffd = handed_over(path, length, change)
    sys.stdout.write(str(region[length // 2]))


def touching(address: int) -> threading.Thread:
    """Touch a byte in a thread, without the GIL."""
    place, one = ctypes.c_void_p(address), ctypes.c_size_t(1)
    thread = threading.Thread(target=ctypes.CDLL(None).memchr, args=(place, 0, one), daemon=True)
    thread.start()
    return thread


WRONG = {
    "a region behind the end of the source": {"offset": 16 * MIB},
    "a wrong page size": {"page_size": 5000},
    "no size": {"size": None},
    "an offset that is not aligned": {"offset": 17},
    "no JSON that is an array": {"base_host_virt_addr": "x"},
}


@pytest.mark.parametrize("case", WRONG)
def test_a_client_that_is_turned_away_gets_sigbus(image: Path, tmp_path: Path, case: str) -> None:
    """By default: its first touch does not hang, whatever is wrong with its handoff."""
    with Serve(tmp_path, image) as serve:
        play(touch, str(serve.path), MIB, WRONG[case], status=-signal.SIGBUS)
        serve.says("turned away")
        serve.says("are poisoned: a touch is SIGBUS")


def test_a_name_that_no_microvm_can_say(tmp_path: Path) -> None:
    """--source-for with {name} serves our own clients only: a microVM is told so by SIGBUS."""
    (tmp_path / "a.mem").write_bytes(bytes(MIB))
    with Serve(tmp_path, "--source-for", f"{tmp_path}/{{name}}.mem") as serve:
        play(touch, str(serve.path), MIB, {}, status=-signal.SIGBUS)
        serve.says("which is no name")


def test_half_a_handoff(image: Path, tmp_path: Path) -> None:
    """Whose sender stops in the middle, and goes on to touch."""
    with Serve(tmp_path, image, "--handoff-timeout", "0.3") as serve:
        play(half, str(serve.path), status=-signal.SIGBUS)


def half(path: str) -> None:
    """Scenario."""
    region = aiouffd.Region(MIB)
    uffd = aiouffd.Userfaultfd()
    uffd.register(region.address, MIB, aiouffd.RegisterMode.MISSING)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    socket.send_fds(connection, [b'[{"base_host'], [uffd.fileno()])
    sys.stdout.write(str(region[5 * PAGE]))


def present_and_missing(path: str) -> None:
    """Scenario: what is present when the client is turned away stays as it is."""
    region = aiouffd.Region(MIB)
    region[7 * PAGE : 7 * PAGE + 3] = b"abc"
    uffd = aiouffd.Userfaultfd()
    uffd.register(region.address, MIB, aiouffd.RegisterMode.MISSING)
    other = aiouffd.Region(MIB)
    with aiouffd.Userfaultfd() as another:
        another.register(other.address, MIB, aiouffd.RegisterMode.MISSING)
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        socket.send_fds(connection, [b"nonsense]"], [uffd.fileno()])
        assert connection.recv(1) == b""  # when it is done
        assert region[7 * PAGE : 7 * PAGE + 3] == b"abc"
        touching(other.address + PAGE)
        eventually(lambda: bool(another.read()), expected=True)
    sys.stdout.write("as it was\n")
    sys.stdout.flush()
    sys.stdout.write(str(region[8 * PAGE]))


def test_only_what_is_missing_and_registered_with_it_is_poisoned(image: Path, tmp_path: Path) -> None:
    """Present pages keep their bytes; what another userfaultfd of the same process has is left alone."""
    with Serve(tmp_path, image) as serve:
        output, _ = play(present_and_missing, str(serve.path), status=-signal.SIGBUS)
        assert output == "as it was\n"


def test_memory_that_is_not_registered_is_left_alone() -> None:
    """A handoff may name addresses that it has no right to."""
    region = aiouffd.Region(MIB)
    with aiouffd.Userfaultfd() as uffd:
        assert rejection.poison(uffd, Range(region.address, MIB), PAGE) == 0
    assert region[:] == bytes(MIB)


def test_a_client_that_is_killed(image: Path, tmp_path: Path) -> None:
    """--on-reject kill: the process that connected."""
    with Serve(tmp_path, image, "--on-reject", "kill") as serve:
        play(touch, str(serve.path), MIB, {"page_size": 5000}, status=-signal.SIGKILL)
        serve.says("was killed, since it was turned away")


def held(path: str, log: str) -> None:
    """Scenario: the toucher waits; its connection stays open until it closes it."""
    region, connection, _uffd = handed_over(path, MIB, {"page_size": 5000})
    toucher = touching(region.address)
    eventually(lambda: "turned away" in open(log).read(), expected=True)  # noqa: PTH123, SIM115
    connection.settimeout(0.5)
    with pytest.raises(TimeoutError):
        connection.recv(1)
    assert toucher.is_alive()
    os._exit(0)


def test_a_client_that_is_held(image: Path, tmp_path: Path) -> None:
    """--on-reject hold: it waits, and the others are served."""
    with Serve(tmp_path, image, "--on-reject", "hold") as serve:
        play(held, str(serve.path), str(serve.log))
        play(served, str(serve.path))


def served(path: str) -> None:
    """Scenario: a good client."""
    region, _connection, _uffd = hand_over(path)
    assert region[5 * PAGE] == 6


def test_who_only_connects_is_not_killed(image: Path, tmp_path: Path) -> None:
    """A process without a userfaultfd waits for nothing: it is turned away, and that is all."""
    with Serve(tmp_path, image, "--on-reject", "kill") as serve, socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(serve.path))
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n]")
        assert connection.recv(1) == b""


def test_the_pidfd_is_of_the_process_that_connected() -> None:
    """From the kernel (SO_PEERPIDFD, Linux 6.5), and without that: never of one that has the pid by now."""
    ours, theirs = socket.socketpair()
    peer = Peer.of(ours)
    for number in (rejection._SO_PEERPIDFD, 12345):  # the second is no option: as before Linux 6.5
        original, rejection._SO_PEERPIDFD = rejection._SO_PEERPIDFD, number  # type: ignore[misc]
        try:
            pidfd = rejection.peer_pidfd(ours, peer)
            with open(f"/proc/self/fdinfo/{pidfd}") as file:  # noqa: PTH123
                assert f"Pid:\t{os.getpid()}\n" in file.read()
            os.close(pidfd)
        finally:
            rejection._SO_PEERPIDFD = original  # type: ignore[misc]
    rejection._SO_PEERPIDFD = 12345  # type: ignore[misc]
    try:
        with pytest.raises(ProcessLookupError, match="another pid namespace"):
            rejection.peer_pidfd(ours, Peer(0, 0, 0))
        with pytest.raises(ProcessLookupError):  # another user's
            rejection.peer_pidfd(ours, Peer(os.getpid(), 12345, 0))
        theirs.close()
        with pytest.raises(ProcessLookupError):  # it has closed the connection, and may have ended
            rejection.peer_pidfd(ours, peer)
    finally:
        rejection._SO_PEERPIDFD = original  # type: ignore[misc]
        ours.close()


def test_what_a_process_has_registered() -> None:
    """Its ranges, with the size of their pages; and nothing else."""
    with mmap.mmap(-1, 2 * MIB) as memory, aiouffd.Userfaultfd() as uffd:
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert rejection.registered(os.getpid()) == []
        uffd.register(start, MIB, aiouffd.RegisterMode.MISSING)
        assert rejection.registered(os.getpid()) == [(Range(start, MIB), mmap.PAGESIZE)]
        assert rejection.poison(uffd, Range(start + MIB, MIB), PAGE) == 0  # not registered
        assert rejection.poison(uffd, Range(start, MIB), PAGE) == MIB
        assert rejection.poison(uffd, Range(start, MIB), PAGE) == 0  # again: there is nothing missing


def test_a_process_that_has_ended_is_not_killed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """That is said; nobody else is."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        play(connect_and_end, path)
        connection, _ = listener.accept()
        with connection:
            rejection.kill(connection, Peer.of(connection))
    assert "cannot be killed" in caplog.text


def connect_and_end(path: str) -> None:
    """Scenario."""
    socket.socket(socket.AF_UNIX).connect(path)
