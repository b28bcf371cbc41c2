"""`criu.socket`: what `criu restore --lazy-pages` sends, and what it never sends."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import stat
import struct
import sys
from typing import TYPE_CHECKING

import pytest
from chance import bytes_by_chance, cases

from aiouffd.criu.socket import SOCKET_NAME, LazyPagesSocket, RestoredTask
from aiouffd.errors import HandoffError
from aiouffd.handoff.receive import receive, require_userfaultfd
from aiouffd.kernel.userfaultfd import Userfaultfd

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

END = struct.pack("=I", 0x52535446)


def pid(number: int) -> bytes:
    """Return what CRIU sends of a pid."""
    return struct.pack("=i", number)


def connect(directory: Path) -> socket.socket:
    """Connect as CRIU does."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    try:
        client.connect(str(directory / SOCKET_NAME))
    except OSError:
        client.close()
        raise
    return client


@contextlib.asynccontextmanager
async def connected(directory: Path, within: float = 60) -> AsyncIterator[tuple[LazyPagesSocket, socket.socket]]:
    """Yield a socket and what has connected to it."""
    async with LazyPagesSocket(directory, timeout=within) as lazy:
        with connect(directory) as client:
            yield lazy, client


def hand_over(client: socket.socket, *descriptors: int, data: bytes = b"\0") -> None:
    """Send descriptors with the byte that carries them."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    client.sendmsg([data], rights)


async def gather(lazy: LazyPagesSocket, into: list[RestoredTask]) -> None:
    """Gather the tasks up to the end mark, or to an error."""
    async with asyncio.timeout(60):
        async for task in lazy.tasks():
            into.append(task)  # noqa: PERF401 - what came before an error counts


async def all_of(lazy: LazyPagesSocket) -> list[RestoredTask]:
    """Return the tasks up to the end mark."""
    tasks: list[RestoredTask] = []
    await gather(lazy, tasks)
    return tasks


def descriptors() -> set[str]:
    """Return what this process has open. Asked ten thousand times, so without a Path for each."""
    found = set()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with contextlib.suppress(FileNotFoundError):
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")  # noqa: PTH115
    return found


@pytest.fixture
def uffd() -> Iterator[Userfaultfd]:
    """One that any user may open."""
    with Userfaultfd(user_mode_only=True) as one:
        yield one


async def test_two_tasks_and_a_zombie(tmp_path: Path, uffd: Userfaultfd) -> None:
    """Each task comes with its descriptor, close-on-exec; a zombie has none; the end mark is the end."""
    async with connected(tmp_path) as (lazy, client):
        client.sendall(pid(10))
        hand_over(client, uffd.fileno())
        client.sendall(pid(-11))
        client.sendall(pid(12))
        hand_over(client, uffd.fileno())
        client.sendall(END)
        tasks = await all_of(lazy)
        assert [task.pid for task in tasks] == [10, 12]
        for task in tasks:
            assert not os.get_inheritable(task.fd)
            require_userfaultfd(task.fd, "peer")
            os.close(task.fd)
        assert lazy.finished
        assert lazy.peer is not None
        assert (lazy.peer.pid, lazy.peer.uid) == (os.getpid(), os.geteuid())
        client.close()
        await lazy.closed()
    assert not lazy.path.exists()


async def test_tasks_come_as_they_are_sent(tmp_path: Path, uffd: Userfaultfd) -> None:
    """A task is given before the next one has sent anything: it may fault before the end mark."""
    async with connected(tmp_path) as (lazy, client):
        tasks = lazy.tasks()
        for number in (5, 6):
            for byte in pid(number):  # however it is cut
                client.sendall(bytes([byte]))
                await asyncio.sleep(0)
            waiting = asyncio.ensure_future(anext(tasks))
            await asyncio.sleep(0)
            assert not waiting.done()
            hand_over(client, uffd.fileno())
            async with asyncio.timeout(60):
                task = await waiting
            assert task.pid == number
            os.close(task.fd)
        assert not lazy.finished
        client.sendall(END)
        with pytest.raises(StopAsyncIteration):
            await anext(tasks)


_BROKEN: dict[str, tuple[list[bytes | str], str]] = {
    "nothing": ([], "before the end mark"),
    "half a pid": ([pid(7)[:2]], r"within a number \(2 bytes\)"),
    "zero": ([pid(0)], "in place of a new pid or the end mark"),
    "beyond all pids": ([pid((1 << 22) + 1)], "in place of a new pid or the end mark"),
    "the least number": ([pid(-(1 << 31))], "in place of a new pid or the end mark"),
    "the same pid twice": ([pid(7), "uffd", pid(7)], "sent 7"),
    "the same zombie twice": ([pid(-7), pid(-7)], "sent -7"),
    "no descriptor": ([pid(7), b"\0"], "no descriptor after the pid 7"),
    "an end behind the pid": ([pid(7)], "nothing after the pid 7"),
    "a pipe": ([pid(7), "pipe"], "pipe:.*not a userfaultfd"),
    "a blocking one": ([pid(7), "blocking"], "without O_NONBLOCK"),
    "two": ([pid(7), "two"], "more than 1 descriptors"),
    "a descriptor with a pid": (["early"], "more than 0 descriptors"),
    "HTTP": ([b"GET / HTTP/1.1\r\n\r\n"], "in place of a new pid or the end mark"),
}


@pytest.mark.parametrize("what", _BROKEN)
async def test_what_is_never_sent(tmp_path: Path, uffd: Userfaultfd, what: str) -> None:
    """Each is a `HandoffError` that says what was wrong, and no descriptor of it stays open."""
    steps, complaint = _BROKEN[what]
    async with LazyPagesSocket(tmp_path, timeout=5) as lazy:
        before = descriptors()
        with connect(tmp_path) as client:
            for step in steps:
                if isinstance(step, bytes):
                    client.sendall(step)
                elif step in ("uffd", "two"):
                    hand_over(client, *([uffd.fileno()] * (2 if step == "two" else 1)))
                elif step == "early":
                    hand_over(client, uffd.fileno(), data=pid(7))
                elif step == "blocking":
                    os.set_blocking(uffd.fileno(), True)
                    hand_over(client, uffd.fileno())
                else:
                    ends = os.pipe()
                    hand_over(client, ends[0])
                    for end in ends:
                        os.close(end)
        given_out: list[RestoredTask] = []
        with pytest.raises(HandoffError, match=complaint):
            await gather(lazy, given_out)
        assert not lazy.finished
        assert len(given_out) == steps.count("uffd")
        for task in given_out:
            os.close(task.fd)
    await asyncio.sleep(0)
    assert {name for name in descriptors() - before if "socket:" not in name} == set()


async def test_silence_behind_a_pid(tmp_path: Path) -> None:
    """A descriptor that does not come, or the rest of a number, is an error in bounded time."""
    for sent, complaint in ((pid(7), "nothing after the pid 7"), (pid(7)[:3], r"nothing for .* within a number")):
        async with connected(tmp_path, within=0.05) as (lazy, client):
            client.sendall(sent)
            with pytest.raises(HandoffError, match=complaint):
                await all_of(lazy)


async def test_more_behind_the_end_mark(tmp_path: Path) -> None:
    """Nothing may come there."""
    async with connected(tmp_path) as (lazy, client):
        client.sendall(END + b"x")
        assert await all_of(lazy) == []
        with pytest.raises(HandoffError, match="after the end mark"):
            await lazy.closed()


async def test_one_connection_only(tmp_path: Path) -> None:
    """The second is refused, and does not wait."""
    async with connected(tmp_path) as (lazy, client):
        client.sendall(END)
        await all_of(lazy)
        with pytest.raises(ConnectionRefusedError):
            connect(tmp_path)


async def test_canceling_loses_nothing(uffd: Userfaultfd) -> None:
    """A wait that is given up leaves no reader behind, and what comes later is received."""
    left, right = socket.socketpair()
    left.setblocking(False)
    with left, right:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await receive(left, 1, 1)
        hand_over(right, uffd.fileno())
        data, found = await receive(left, 1, 1)
        assert data == b"\0"
        os.close(found[0])


async def test_the_socket_file(tmp_path: Path) -> None:
    """Mode 0600; one that was left is replaced, anything else is not; a long path works; closing removes it."""
    async with LazyPagesSocket(tmp_path) as first:
        assert stat.S_IMODE(first.path.stat().st_mode) == 0o600
        with pytest.raises(OSError, match="another server listens there"):
            await LazyPagesSocket(tmp_path).__aenter__()
        connect(tmp_path).close()
    assert not first.path.exists()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(first.path))
    async with LazyPagesSocket(tmp_path):
        connect(tmp_path).close()
    assert not first.path.exists()
    first.path.write_text("mine")
    with pytest.raises(HandoffError, match="in the way"):
        await LazyPagesSocket(tmp_path).__aenter__()
    assert first.path.read_text() == "mine"
    with pytest.raises(FileNotFoundError):
        await LazyPagesSocket(tmp_path / "nowhere").__aenter__()
    deep = tmp_path / ("x" * 120)
    deep.mkdir()
    before = descriptors()
    async with LazyPagesSocket(deep) as far:
        assert stat.S_ISSOCK(far.path.stat().st_mode)
    assert not descriptors() - before  # what other tests have left may be collected meanwhile
    assert not list(deep.iterdir())


async def test_a_second_daemon_costs_the_first_nothing(tmp_path: Path) -> None:
    """The only connection that it takes is CRIU's."""
    async with LazyPagesSocket(tmp_path) as first:
        for _ in range(3):
            with pytest.raises(OSError, match="another server listens there"):
                await LazyPagesSocket(tmp_path).__aenter__()
        with connect(tmp_path) as criu:
            criu.sendall(END)
            assert await all_of(first) == []
        assert first.finished


@pytest.mark.skipif(os.geteuid() != 0, reason="to be another user needs root")
async def test_another_user(open_to_all: Path) -> None:
    """Whoever can connect is still not the restore, unless it is root, or this user."""
    async with LazyPagesSocket(open_to_all, mode=0o666) as lazy:
        code = "import os, socket, sys; os.setuid(65534); socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(lazy.path))
        with pytest.raises(HandoffError, match="is neither of this user nor of root"):
            await gather(lazy, [])
        assert await process.wait() == 0


_STEPS = (pid(1), pid(-2), pid(3), END, b"\0", b"", b"\xff" * 5)


def client_by_chance(rng: random.Random) -> list[bytes | str]:
    """Draw what a client sends: bytes, and now and then a descriptor."""
    drawn = (rng.choice((rng.choice(_STEPS), bytes_by_chance(rng, 9), "uffd")) for _ in range(rng.randint(0, 8)))
    return list(drawn)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that is empty again after each example."""
    return tmp_path_factory.mktemp("socket")


async def answer(steps: list[bytes | str], place: Path) -> None:
    """Play a client; whatever it sends ends in the end mark or in a `HandoffError`."""
    async with connected(place, within=5) as (lazy, client):
        with client, Userfaultfd(user_mode_only=True) as one:
            for step in steps:
                if isinstance(step, bytes):
                    client.sendall(step)
                else:
                    hand_over(client, one.fileno())
        taken: list[RestoredTask] = []
        try:
            await gather(lazy, taken)
        except HandoffError:
            assert not lazy.finished
        else:
            assert lazy.finished
        for task in taken:
            os.close(task.fd)


async def survives(steps: list[bytes | str], place: Path) -> None:
    """Play it; no descriptor is left open."""
    before = descriptors()
    await answer(steps, place)
    assert not descriptors() - before  # what other tests have left may be collected meanwhile


@pytest.mark.long
async def test_any_client_is_survived(place: Path) -> None:
    """5,000 of them."""
    for case in cases(5_000, client_by_chance):
        with case as steps:
            await survives(steps, place)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
async def test_any_client_is_survived_at_length(place: Path) -> None:
    """100,000 of them."""
    for case in cases(100_000, client_by_chance):
        with case as steps:
            await survives(steps, place)
