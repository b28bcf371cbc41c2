"""`server.reception`: who is taken as a client, and whoever sends nonsense."""

from __future__ import annotations

import array
import contextlib
import ctypes
import json
import os
import resource
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from chance import bytes_by_chance, cases
from pattern import PAGE, Pattern
from scenario import eventually, play
from served import HUGE, MIB, Serve, client, descriptors, touch_all

import aiouffd
from aiouffd.engine.mappings import Mapping
from aiouffd.handoff import firecracker

if TYPE_CHECKING:
    import random


def no_server(path: str) -> None:
    """Scenario."""
    region = aiouffd.Region(MIB)
    with pytest.raises(aiouffd.PagerStartError, match="is `aiouffd serve` running there"):
        aiouffd.Monitor(region, engine=aiouffd.ServedBy(path + ".no")).__enter__()
    with pytest.raises(aiouffd.HandoffError, match="reaches to offset") as caught:
        aiouffd.Monitor(aiouffd.Region(32 * MIB), engine=aiouffd.ServedBy(path)).__enter__()
    # What is said to clients is the reason, and not where in the server it came from, or from what.
    assert not getattr(caught.value, "__notes__", [])
    assert caught.value.__cause__ is None
    assert region.monitor is None
    with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path)):
        assert region[0] == 1
    with pytest.raises(ValueError, match="takes no source or handler: these are"):
        aiouffd.Monitor(region, Pattern(MIB), engine=aiouffd.ServedBy(path))  # type: ignore[call-overload]


def test_a_monitor_that_is_turned_away(image: Path, tmp_path: Path) -> None:
    """The reason arrives as a typed error, and the region can be served after all."""
    with Serve(tmp_path, image) as serve:
        play(no_server, str(serve.path))
        serve.says("turned away")


def other_pages(path: str, claimed: int, real: int, present: bool) -> None:
    """Scenario: a client whose memory has other pages than it says."""
    region = aiouffd.Region(2 * HUGE, page_size=real) if real > PAGE else aiouffd.Region(2 * HUGE + HUGE)
    start = (region.address + HUGE - 1) & -HUGE
    if present:
        ctypes.memset(start, 1, 1)
    with aiouffd.Userfaultfd() as uffd, socket.socket(socket.AF_UNIX) as connection:
        uffd.register(start, 2 * HUGE, aiouffd.RegisterMode.MISSING)
        connection.settimeout(10)
        connection.connect(path)
        message = firecracker.encode([Mapping(start, start + 2 * HUGE, 0)], claimed)
        socket.send_fds(connection, [message], [uffd.fileno()])
        assert connection.recv(1) == b""


@pytest.mark.usefixtures("huge_pages")
def test_pages_of_another_size_than_is_said(image: Path, tmp_path: Path) -> None:
    """Turned away, before a page is copied that would meet what is there."""
    with Serve(tmp_path, image) as serve:
        for present in (False, True):
            play(other_pages, str(serve.path), HUGE, PAGE, present)
        assert serve.said.count("has smaller pages than 2097152 bytes") == 2
        play(other_pages, str(serve.path), PAGE, HUGE, False)
        play(other_pages, str(serve.path), 2 * PAGE, HUGE, False)
        for size in (PAGE, 2 * PAGE):
            serve.says(f"has larger pages than {size} bytes")


def slow_ones(path: str) -> None:
    """Scenario: a crowd that sends no handoff, or half of one, and keeps its connections open; and a good client."""
    silent = []
    for number in range(300):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        if number % 2:
            connection.send(b'[{"base_host')
        silent.append(connection)
    client(path, MIB)


def test_slow_senders_hold_up_nobody(image: Path, tmp_path: Path) -> None:
    """However many they are, and however long they may take: the slowest are turned away, the good one is served."""
    with Serve(tmp_path, image, "--handoff-timeout", "600") as serve:
        play(slow_ones, str(serve.path))
        serve.says("was slow with its handoff, while many others came")


def test_no_room_for_the_descriptors_of_a_handoff(image: Path, tmp_path: Path) -> None:
    """A client that could be neither served nor made to end is not taken until there is room for it."""
    with Serve(tmp_path, image) as serve, ThreadPoolExecutor() as threads:
        play(client, str(serve.path), MIB)
        pid = serve.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        highest = max(int(fd.name) for fd in Path(f"/proc/{pid}/fd").iterdir())
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 2, before[1]))
        served = threads.submit(play, touch_all, str(serve.path), MIB)
        serve.says("no client can be taken: Too many open files")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        served.result()
        assert "turned away" not in serve.said


def connect_as_nobody(path: str) -> None:
    """Scenario."""
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        assert connection.recv(1) == b""


def test_the_socket_is_its_users_own(image: Path, tmp_path: Path, open_to_all: Path) -> None:
    """Mode 0600 unless asked otherwise; another user is turned away by the kernel, or by the peer's uid."""
    with Serve(tmp_path, image) as serve:
        assert serve.path.stat().st_mode & 0o777 == 0o600
    with Serve(open_to_all, image, "--mode", "666") as serve:
        assert serve.path.stat().st_mode & 0o777 == 0o666
        play(connect_as_nobody, str(serve.path))
        serve.says("of user 65534: may not use this server")


def lingering_socket() -> tuple[socket.socket, socket.socket]:
    """Return a TCP socket whose close(2) waits five minutes for its unsent data, and its other end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = socket.create_connection(listener.getsockname())
        receiver, _ = listener.accept()
    sender.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sender.send(bytes(1 << 16))
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 300))
    sender.setblocking(True)  # a non-blocking socket does not linger
    return sender, receiver


def lingers(path: str, how: str) -> None:
    """Scenario: a client sends a descriptor whose close(2) blocks, in one of the ways there are; others go on."""
    sender, receiver = lingering_socket()
    region = aiouffd.Region(MIB)
    uffd = aiouffd.Userfaultfd(aiouffd.Feature.EVENT_REMOVE)
    uffd.register(region.address, MIB, aiouffd.RegisterMode.MISSING)
    mapping = Mapping(region.address, region.address + MIB, 0)
    extra = {"version": 1, "name": ""} if how in ("beside our own", "in a request") else None
    text = firecracker.encode([mapping], PAGE, extra)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    if how == "of a client that is turned away":
        socket.send_fds(connection, [b"nonsense]"], [uffd.fileno(), sender.fileno()])
    elif how == "too many":
        socket.send_fds(connection, [text], [uffd.fileno(), *[sender.fileno()] * 30])
    elif how in ("behind a handoff", "in a request"):
        socket.send_fds(connection, [text], [uffd.fileno()])
        if extra is not None:
            assert b'"ok"' in connection.recv(4096)
        socket.send_fds(connection, [b'{"id": 1, "op": "statistics"}\n'], [sender.fileno()])
    else:
        socket.send_fds(connection, [text], [uffd.fileno(), sender.fileno()])
    threading.Thread(target=sender.close, daemon=True).start()
    connection.close()
    uffd.close()
    for _ in range(3):
        client(path, MIB)
    receiver.close()
    os._exit(0)


@pytest.mark.parametrize(
    "how",
    [
        *("beside a handoff", "beside our own", "of a client that is turned away"),
        *("too many", "behind a handoff", "in a request"),
    ],
)
def test_a_descriptor_whose_close_blocks(image: Path, tmp_path: Path, how: str) -> None:
    """It costs the others nothing, however it comes."""
    with Serve(tmp_path, image, "--readahead", "0") as serve:
        play(lingers, str(serve.path), how, deadline=60)
        assert "Traceback" not in serve.said


_ODD = (b"[", b"[]", b"[{}]", b'[{"size": 18446744073709551616}]', b"]" * 100)
_VALUES = {
    "base_host_virt_addr": (0, 1, PAGE, 2**47, 2**64 - PAGE, 2**64),
    "size": (0, 1, PAGE, MIB, 2**63, 2**64),
    "offset": (0, 1, PAGE, 2**63),
    "page_size": (0, 1, PAGE, HUGE, 2**64),
    "aiouffd": (None, {}, {"version": 1, "name": []}, {"version": 7}, 3),
}


def handoff_by_chance(rng: random.Random) -> tuple[bytes, str, str]:
    """Draw a handoff, what comes with it, and what comes after it."""
    regions = [
        {name: rng.choice(values) for name, values in _VALUES.items() if rng.random() < 0.5}
        for _ in range(rng.randint(0, 3))
    ]
    data = rng.choice((bytes_by_chance(rng, 300, 1), rng.choice(_ODD), json.dumps(regions).encode()))
    beside = rng.choice(("nothing", "pipe", "memfd", "uffd", "two"))
    return data, beside, rng.choice(("close", "wait", "line", "garbage"))


def bombard(path: str, examples: int, number: int) -> None:
    """Scenario: a process that sends malformed handoffs, and among them some that are good by chance."""
    uffds = [aiouffd.Userfaultfd() for _ in range(2)]
    one, two = (uffd.fileno() for uffd in uffds)
    beside = {
        "nothing": [],
        "pipe": [*os.pipe()],
        "memfd": [os.memfd_create("x")],
        "uffd": [one],
        "two": [one, two],
    }

    def sent(data: bytes, kind: str, after: str) -> None:
        fds = array.array("i", beside[kind])
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(0.2)  # one that is good by chance is served, in silence
            connection.connect(path)
            with contextlib.suppress(ConnectionError, TimeoutError):
                connection.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else [])
                if after == "line":
                    connection.sendall(b'{"id": 1, "op": "prefetch", "ranges": [[0, 18446744073709551616]]}\n')
                elif after == "garbage":
                    connection.sendall(b"\0" * 100_000)
                if after != "close":
                    while connection.recv(4096):
                        pass

    for case in cases(examples, handoff_by_chance, number):
        with case as drawn:
            sent(*drawn)


_SENDERS = 4


def survives(image: Path, directory: Path, examples: int) -> None:
    """Have a server be sent so many malformed handoffs; then be served by it."""
    with Serve(directory, image, "--handoff-timeout", "0.05", "--readahead", "0") as serve:
        play(client, str(serve.path), MIB)
        before = descriptors(serve)
        # From several processes: most of the time goes by waiting for the server to be tired of half a handoff.
        with ThreadPoolExecutor() as pool:
            share, deadline = examples // _SENDERS, 30 + examples / 50
            done = [
                pool.submit(play, bombard, str(serve.path), share, number, deadline=deadline, measured=False)
                for number in range(_SENDERS)
            ]
            for each in done:
                each.result()
        eventually(lambda: descriptors(serve) <= before, expected=True, seconds=20.0)
        rss = int(Path(f"/proc/{serve.process.pid}/statm").read_text().split()[1]) * PAGE
        assert rss < 200 * MIB
        play(client, str(serve.path), MIB)
        assert serve.process.poll() is None
        assert "Traceback" not in serve.said
        assert "is replaced" not in serve.said


@pytest.mark.long
@pytest.mark.unmeasured
def test_malformed_handoffs(image: Path, tmp_path: Path) -> None:
    """5,000 of them, with the wrong descriptors and what not: the server still serves, and leaks nothing."""
    survives(image, tmp_path, 5000)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_malformed_handoffs_for_long(image: Path, tmp_path: Path) -> None:
    """100,000 of them."""
    survives(image, tmp_path, 100_000)
