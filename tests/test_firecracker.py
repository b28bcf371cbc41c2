"""`handoff.firecracker`: what is taken, and that nothing else is."""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern import PAGE
from scenario import open_descriptors

import aiouffd
from aiouffd.engine.mappings import Mapping
from aiouffd.errors import HandoffError
from aiouffd.handoff import firecracker
from aiouffd.handoff.receive import Peer

if TYPE_CHECKING:
    from collections.abc import Callable

HUGE = 2 << 20
GOOD = {"base_host_virt_addr": 16 * HUGE, "size": 4 * HUGE, "offset": 0, "page_size": PAGE}


def text(*changes: dict[str, Any]) -> bytes:
    """Return an array of regions, each the good one with changes; None takes a key away."""
    items = [{key: value for key, value in (GOOD | change).items() if value is not None} for change in changes]
    return json.dumps(items).encode()


def test_what_firecracker_sends() -> None:
    """Regions of a machine with a gap below 4 GiB, in either order; unknown keys are ignored."""
    found = firecracker.parse(
        text(
            {"base_host_virt_addr": 1 << 40, "offset": 4 * HUGE, "size": HUGE, "page_size_kib": 9, "new": [{}]},
            {},
        )
    )
    assert found.page_size == PAGE
    assert found.extra is None
    assert found.mappings == (
        Mapping(16 * HUGE, 20 * HUGE, 0),
        Mapping(1 << 40, (1 << 40) + HUGE, 4 * HUGE),
    )


def test_the_older_name_of_the_page_size_holds_bytes_too() -> None:
    """Releases up to 1.10 send only that one."""
    found = firecracker.parse(text({"page_size": None, "page_size_kib": HUGE}))
    assert found.page_size == HUGE


def test_what_is_encoded_is_parsed() -> None:
    """For our own clients."""
    mappings = [Mapping(0x10000, 0x20000, 0x4000), Mapping(0x30000, 0x31000, 0)]
    found = firecracker.parse(firecracker.encode(mappings, PAGE, {"version": 1}))
    assert (list(found.mappings), found.page_size, found.extra) == (mappings, PAGE, {"version": 1})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"{}", "not a JSON array"),
        (b"[]", "not a JSON array"),
        (b"[1]", "not a JSON array"),
        (text(*[{}] * 4097), "more than 4096"),
        (text({"size": None}), "size is None"),
        (text({"size": True}), "size is True"),
        (text({"size": "4096"}), "size is '4096'"),
        (text({"size": 4096.0}), "no natural number"),
        (text({"offset": -PAGE}), "offset is -4096"),
        (text({"size": 0}), "a region of 0 bytes"),
        (text({"size": 1 << 64}), "a region of 18446744073709551616 bytes"),
        (text({"base_host_virt_addr": (1 << 64) - HUGE}), "a region of"),
        (text({"offset": 1 << 63}), "a region of"),
        (text({"size": PAGE + 1}), "not aligned"),
        (text({"base_host_virt_addr": 5}), "not aligned"),
        (text({"offset": 5}), "not aligned"),
        (text({"page_size": HUGE, "base_host_virt_addr": PAGE}), "not aligned"),
        (text({"page_size": 3000}), "a page size of 3000"),
        (text({"page_size": 0}), "a page size of 0"),
        (text({"page_size": 2048}), "a page size of 2048"),
        (text({"page_size": 1 << 40}), "a page size of"),
        (text({"page_size": 1 << 30, "base_host_virt_addr": 1 << 40, "size": 1 << 30}), "4 KiB to 2 MiB"),
        (text({"page_size": None}), "page_size_kib is None"),
        (text({}, {"page_size": HUGE, "base_host_virt_addr": 1 << 30}), "different page sizes"),
        (text({}, {}), "overlap"),
        (text({}, {"base_host_virt_addr": 19 * HUGE}), "overlap"),
        (text({"aiouffd": 7}), "no object"),
    ],
)
def test_what_is_refused(data: bytes, reason: str) -> None:
    """Each with its reason."""
    with pytest.raises(ValueError, match=reason.replace("[", r"\[")):
        firecracker.parse(data)


def test_regions_lie_within_the_source() -> None:
    """Its last page may be a part of one."""
    regions = firecracker.parse(text({"size": 2 * PAGE}))
    firecracker.check_size(regions, 2 * PAGE)
    firecracker.check_size(regions, PAGE + 1)
    with pytest.raises(ValueError, match="reaches to offset 0x2000 of a source of 0x1000 bytes"):
        firecracker.check_size(regions, PAGE)


_value = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.integers(0, 64).map(lambda n: n * PAGE),
    st.sampled_from([0, 1, PAGE, HUGE, 2**64 - 1, 2**64, 2**63]), st.floats(), st.text(max_size=5), st.lists(st.none()),
)  # fmt: skip
_region = st.dictionaries(st.sampled_from([*GOOD, "page_size_kib", "aiouffd", "x"]), _value)


@settings(max_examples=1_000, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.lists(_region, max_size=6).map(lambda items: json.dumps(items).encode())))
def test_any_bytes(data: bytes) -> None:
    """Either a ValueError, or regions that are aligned, disjoint and within any address space."""
    parse_any(data)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@settings(max_examples=100_000)
@given(st.one_of(st.binary(max_size=200), st.lists(_region, max_size=6).map(lambda items: json.dumps(items).encode())))
def test_any_bytes_for_long(data: bytes) -> None:
    """The same, for long."""
    parse_any(data)


def parse_any(data: bytes) -> None:
    """Parse, and check what is accepted."""
    try:
        found = firecracker.parse(data)
    except ValueError:
        return
    last = 0
    for mapping in found.mappings:
        assert last <= mapping.start < mapping.end <= 1 << 57
        assert mapping.offset >= 0
        assert not any(number % found.page_size for number in attrs_of(mapping))
        last = mapping.end


def attrs_of(mapping: Mapping) -> tuple[int, int, int]:
    """Return its numbers."""
    return mapping.start, mapping.end, mapping.offset


# Over a socket


class Wire:
    """A connection, and what the client puts on it."""

    def __init__(self) -> None:
        self.server, self.client = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.server.setblocking(False)
        self.before = open_descriptors()

    async def receive(self, limit: float = 5.0) -> firecracker.Handoff:
        """Be the server."""
        return await firecracker.receive(self.server, limit)

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


async def test_a_handoff_in_pieces_with_a_memfd() -> None:
    """It is complete when it parses, wherever it is cut; what else comes along is closed."""
    wire = Wire()
    memfd = os.memfd_create("guest")
    data = text({"x": "a ] in a string"}, {"base_host_virt_addr": 1 << 40})
    taking = asyncio.create_task(wire.receive())
    with aiouffd.Userfaultfd() as uffd:
        before = open_descriptors()
        socket.send_fds(wire.client, [data[:1]], [memfd, uffd.fileno()])
        for at in range(1, len(data), 37):
            await asyncio.sleep(0)
            wire.client.send(data[at : at + 37])
        handoff = await taking
        assert len(handoff.regions.mappings) == 2
        assert open_descriptors() == before + 1
    handoff.uffd.close()
    os.close(memfd)
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
    "brackets": (lambda: [shaken()], b"]" * 5000, "no JSON"),
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
        await wire.receive(0.1)
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
