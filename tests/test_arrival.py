"""`handoff.arrival`: a handoff that comes over a socket, in pieces, with the right and the wrong descriptors."""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import socket
from typing import TYPE_CHECKING

import pytest
from pattern import PAGE
from processes import PATIENCE
from scenario import open_descriptors
from test_firecracker import text

import aiouffd
from aiouffd.errors import HandoffError
from aiouffd.handoff.arrival import Arrival, Handoff
from aiouffd.handoff.receive import Peer

if TYPE_CHECKING:
    from collections.abc import Callable


class Wire:
    """A connection, and what the client puts on it."""

    def __init__(self) -> None:
        self.server, self.client = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.server.setblocking(False)
        self.before = open_descriptors()

    async def receive(self, limit: float = 5.0) -> Handoff:
        """Be the server."""
        arrival = Arrival(self.server)
        try:
            return await arrival.receive(limit)
        finally:
            arrival.close()

    def close(self) -> None:
        """Close both ends."""
        self.server.close()
        self.client.close()


async def test_a_handoff_in_one_message() -> None:
    """The descriptor arrives, non-blocking and close-on-exec; who sent it is known from the kernel."""
    wire = Wire()
    with aiouffd.Userfaultfd() as uffd:
        socket.send_fds(wire.client, [text({})], [uffd.fileno()])
        handoff = await wire.receive()
    assert handoff.peer == Peer(os.getpid(), os.getuid(), os.getgid())
    assert not os.get_inheritable(handoff.uffd.fileno())
    assert not os.get_blocking(handoff.uffd.fileno())
    handoff.uffd.close()
    wire.close()


async def test_objects_of_nydus() -> None:
    """A request for the size, answered at once, and a handshake behind it; then what is none, and too many requests."""
    region = {"base_host_virt_addr": 1 << 40, "size": 4 * PAGE, "offset": 0, "page_size": 16 * PAGE}
    handshake = json.dumps({"type": 0, "regions": [region], "policy": 1, "note": "}"}).encode()
    stat = json.dumps({"type": 2}).encode()

    async def stated(_: Peer) -> bytes:
        return b"stated"

    wire = Wire()
    with aiouffd.Userfaultfd() as uffd:
        socket.send_fds(wire.client, [stat + handshake[:-20]], [uffd.fileno()])
        arrival = Arrival(wire.server, stated)
        receiving = asyncio.create_task(arrival.receive(5.0))
        await asyncio.sleep(0)
        wire.client.send(handshake[-20:])
        handoff = await receiving
        arrival.close()
    assert wire.client.recv(100) == b"stated"
    assert (handoff.regions.page_size, handoff.nydus and handoff.nydus.window) == (PAGE, 16 * PAGE)
    handoff.uffd.close()
    wire.close()
    for sent, reason in (
        (b'{"regions": }', "not JSON"),
        (b"{}", "no array"),
        (stat * 17, "too often"),
        (stat, "often"),
    ):
        wire = Wire()
        wire.client.send(sent)
        with pytest.raises(HandoffError, match=reason):
            await Arrival(wire.server, None if sent == stat else stated).receive(5.0)
        wire.close()


async def test_a_handoff_in_pieces_with_a_memfd() -> None:
    """It is complete when it parses, wherever it is cut; the memfd is kept with it, what else comes along is closed."""
    wire = Wire()
    memfd, bitmap = os.memfd_create("guest"), os.memfd_create("bitmap")
    os.ftruncate(memfd, (1 << 40) + (1 << 30))
    data = text({"x": "a ] in a string"}, {"base_host_virt_addr": 1 << 40, "offset": 1 << 40})
    taking = asyncio.create_task(wire.receive())
    with aiouffd.Userfaultfd() as uffd:
        before = open_descriptors()
        socket.send_fds(wire.client, [data[:1]], [memfd, uffd.fileno(), bitmap])
        for at in range(1, len(data), 37):
            await asyncio.sleep(0)
            wire.client.send(data[at : at + 37])
        handoff = await taking
        assert len(handoff.regions.mappings) == 2
        assert open_descriptors() == before + 2
        assert os.path.sameopenfile(handoff.memory.fileno(), memfd)
        handoff.close()
        assert open_descriptors() == before
    os.close(memfd)
    os.close(bitmap)
    wire.close()


def not_shaken() -> int:
    """Return a userfaultfd without a handshake."""
    from aiouffd.kernel import abi, libc

    return libc.syscall(abi.SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)


CASES: dict[str, tuple[Callable[[], list[int]], bytes, str]] = {
    "no descriptor": (list, text({}), "0 userfaultfds among 0 descriptors"),
    "a pipe": (lambda: list(os.pipe()), text({}), "0 userfaultfds among 2"),
    "a memfd": (lambda: [os.memfd_create("x")], text({}), "0 userfaultfds among 1"),
    "two": (lambda: [shaken(), shaken()], text({}), "2 userfaultfds among 2"),
    "too many": (lambda: [os.memfd_create("x") for _ in range(30)], text({}), "more than 16 descriptors"),
    "no handshake": (lambda: [not_shaken()], text({}), "has not done the UFFDIO_API handshake"),
    "overlapping": (lambda: [shaken()], text({}, {}), "overlap"),
    "half": (lambda: [shaken()], text({})[:-5], "sent no complete handoff within 0.1 s"),
    "half of a string": (lambda: [shaken()], text({})[:5] + b"]", "sent no complete handoff within 0.1 s"),
    "brackets": (lambda: [shaken()], b"]" * 5000, "not JSON"),
    "too long": (lambda: [shaken()], b"[" + b" " * (1 << 20), "more than 1048576 bytes"),
    "nothing": (list, b"", "sent no complete handoff within 0.1 s"),
}


def shaken() -> int:
    """Return a userfaultfd after the handshake."""
    with aiouffd.Userfaultfd() as uffd:
        return os.dup(uffd.fileno())


@pytest.mark.parametrize("case", CASES)
async def test_a_bad_handoff(case: str) -> None:
    """The peer and the reason are named, and nothing is left open."""
    make, data, reason = CASES[case]
    before = open_descriptors()
    wire = Wire()
    fds = make()

    def send() -> None:
        try:
            if fds:
                socket.send_fds(wire.client, [data or b" "], fds)
            wire.client.sendall(data[1:] if fds and len(data) > 100_000 else b"" if fds else data)
        except BrokenPipeError:  # it has been turned away before it was done
            pass

    sending = asyncio.create_task(asyncio.to_thread(send))
    with pytest.raises(HandoffError, match=reason) as caught:
        await wire.receive(0.1 if "within 0.1 s" in reason else PATIENCE)
    assert caught.value.peer == f"process {os.getpid()} of user {os.getuid()}"
    wire.server.close()
    await sending
    wire.close()
    for fd in fds:
        os.close(fd)
    assert open_descriptors() == before


async def test_a_client_that_closes_at_once() -> None:
    """It says how far the handoff had come."""
    wire = Wire()
    wire.client.send(b"[{")
    wire.client.close()
    with pytest.raises(HandoffError, match="closed the connection after 2 bytes"):
        await wire.receive()
    wire.close()


async def test_canceling_closes_what_has_arrived() -> None:
    """A server that is left in the middle leaks nothing."""
    wire = Wire()
    fds = [os.memfd_create("x")]
    socket.send_fds(wire.client, [b"["], fds)
    before = open_descriptors()
    task = asyncio.create_task(wire.receive())
    await asyncio.sleep(0)  # it waits for the connection
    await asyncio.sleep(0.01)
    assert open_descriptors() == before + 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert open_descriptors() == before
    os.close(fds[0])
    wire.close()


async def test_a_process_that_has_ended() -> None:
    """Its memory is gone, and so is all need."""
    wire = Wire()
    pid = os.fork()
    if pid == 0:
        memory = mmap.mmap(-1, PAGE)
        uffd = aiouffd.Userfaultfd()
        socket.send_fds(wire.client, [text({})], [uffd.fileno()])
        del memory
        os._exit(0)
    await asyncio.to_thread(os.waitpid, pid, 0)
    with pytest.raises(HandoffError, match="has ended"):
        await wire.receive()
    wire.close()
