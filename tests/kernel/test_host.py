"""A host of guests: sessions of one compressed snapshot in layers behind the cache, an upgrade, and the loss of all."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

import pytest
from pattern import PAGE
from scenario import ended, eventually, play
from served import MIB, Servers

import aiouffd
from aiouffd.cli.unix_http import ControlClient
from aiouffd.engine.mappings import Mapping
from aiouffd.handoff import firecracker
from aiouffd.ranges import RangeSet
from aiouffd.store import create_sync
from examples.microvm import GuestError, MicroVM, hand_over
from examples.page_server import PageServer

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_kvm = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm is missing")
SIZE = 4 * MIB
CHUNK = 64 << 10
LIMITED = SIZE // 2  # bytes of the guest whose session has a limit
RATE = LIMITED // 8  # bytes a second: its limit


def right(size: int) -> int:
    """Return the sum of a guest with so many bytes."""
    return sum((page + 1) & 255 for page in range(size // PAGE))


class Bucket(PageServer):
    """Serves snapshots. It answers so many requests for packs, and holds the others back.

    Attributes:
        allowed: how many are answered.
        begun: how many have been.
        waiting: how many are held back, of those that are still wanted.
        answered: the bytes of each pack that were.
        twice: how many of these were answered again.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.allowed = self.waiting = self.twice = self.begun = 0
        self.answered: dict[str, RangeSet] = {}
        self._readers: dict[Any, asyncio.StreamReader] = {}

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        self._readers[writer] = reader
        return await super()._exchange(reader, writer)

    async def _answer(self, request: Any, writer: asyncio.StreamWriter) -> None:
        if "range" in request.headers and "packs" in request.path:
            self.waiting += 1
            try:
                await self._allowed(self._readers[writer])
            finally:
                self.waiting -= 1
            self.begun += 1
            first, _, last = request.headers["range"].removeprefix("bytes=").partition("-")
            seen = self.answered.setdefault(request.path, RangeSet())
            new = sum(gap.length for gap in seen.gaps(int(first), int(last) + 1))
            self.twice += int(last) + 1 - int(first) - new
            seen.add(int(first), int(last) + 1)
        await super()._answer(request, writer)

    async def _allowed(self, reader: asyncio.StreamReader) -> None:
        """Wait until one more may be answered, who has not died meanwhile: that is looked at last."""
        while True:
            await asyncio.sleep(0.002)  # the loop hears of connections that have ended before it goes on here
            if reader.at_eof() or reader.exception() is not None:
                raise ConnectionAbortedError
            if self.begun < self.allowed:
                return

    @contextlib.contextmanager
    def serving(self) -> Iterator[str]:
        """Serve from a thread; yield the address."""
        address: Queue[Any] = Queue()

        async def main() -> None:
            stop, loop = asyncio.Event(), asyncio.get_running_loop()
            async with await self.serve("127.0.0.1", 0) as listener:
                address.put((listener.sockets[0].getsockname()[1], lambda: loop.call_soon_threadsafe(stop.set)))
                await stop.wait()

        thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
        thread.start()
        port, end = address.get()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            end()
            thread.join()


def image() -> bytes:
    """Return the memory of a guest, which compresses to half."""
    noise, data = random.Random(4), bytearray()
    for page in range(SIZE // PAGE):
        data += bytes([(page + 1) & 255]) + noise.randbytes(PAGE // 2) + bytes(PAGE - PAGE // 2 - 1)
    return bytes(data)


def write_snapshot(directory: Path) -> str:
    """Write three layers, each of which compresses to half; return the name of the upper one."""
    data, above = image(), None
    for number, end in enumerate((SIZE // 4, SIZE // 2, SIZE)):
        place = directory / f"{number}.snap"
        create_sync(data[:end] + bytes(SIZE - end), place, base=above, chunk_size=CHUNK)
        above = place
    return place.name


class Guest:
    """A machine of one session, which adds up its memory in a thread of its own.

    Attributes:
        outcome: the sum, or the error.
        begun: when, on the monotonic clock.
        seconds: how long it took.
    """

    def __init__(self, path: Path, size: int = SIZE) -> None:
        self.region = aiouffd.Region(size)
        self._path = str(path)
        self._connection: socket.socket
        self._uffd = self._hand_over()
        self.outcome: int | GuestError | None = None
        self.begun, self.seconds = time.monotonic(), 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with MicroVM((self.region.address, len(self.region))) as vm:
            try:
                self.outcome = vm.run()
            except GuestError as error:
                self.outcome = error
        self.seconds = time.monotonic() - self.begun

    def again(self) -> bool:
        """Hand the memory over again, if that has got lost: the connection has ended; tell whether it was so."""
        try:
            lost = not self._connection.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except ConnectionError:
            lost = True
        if lost:
            self._connection.close()
            self._connection = self._connect()
            mapping = Mapping(self.region.address, self.region.address + len(self.region), 0)
            with contextlib.suppress(ConnectionError):  # it is lost once more, and is handed over again later
                socket.send_fds(self._connection, [firecracker.encode([mapping], PAGE)], [self._uffd.fileno()])
        return lost

    def _hand_over(self) -> aiouffd.Userfaultfd:
        while True:
            self._connection = self._connect()
            try:
                return hand_over(self._connection, (self.region.address, len(self.region)), PAGE)
            except ConnectionError:  # the server was killed since
                self._connection.close()

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._path)
        return connection

    def join(self) -> None:
        """Wait until it is done; then its memory may go."""
        self._thread.join()
        self._connection.close()
        self._uffd.close()


class Machines:
    """A host: its servers, one after the other, and sessions that all have the same source."""

    def __init__(self, directory: str, url: str) -> None:
        self.directory, self.url = Path(directory), url
        control = self.directory / "control.sock"
        self.cache = aiouffd.ChunkCache(self.directory / "cache", 1 << 30)
        cache = ("--cache", self.cache.path, "--cache-size", self.cache.max_bytes)
        self.servers = Servers(directory, "--control", control, *cache, socket="")
        self._control = ControlClient(control)

    def create(self, name: str, **settings: Any) -> None:
        """Create a session."""
        new = {"name": name, "source": self.url, "socket": str(self.path(name)), "readahead": CHUNK, **settings}
        self._control.ask("POST", "/v1/sessions", new)

    def path(self, name: str) -> Path:
        """Return the socket of a session."""
        return self.directory / f"{name}.sock"

    def counted(self, name: str) -> dict[str, int]:
        """Return what a session has counted."""
        counted: dict[str, int] = self._control.ask("GET", f"/v1/sessions/{name}")["statistics"]
        return counted


def twenty_guests(directory: str) -> None:
    """Scenario: no guest can be done before all was upgraded once, and lost once."""
    snapshots = Path(directory) / "snapshots"
    bucket = Bucket(snapshots)
    upper = write_snapshot(snapshots)
    broken = Path(directory) / "broken.bin"
    broken.write_bytes(b"".join(bytes([1]) * PAGE for _ in range(SIZE // PAGE)))
    with bucket.serving() as url:
        host = Machines(directory, f"{url}/{upper}")
        host.servers.start("first")
        names = [f"vm{number}" for number in range(18)]
        for name in names:
            host.create(name)
        host.create("limited", bytes_per_second=RATE)
        host.create("broken", source=str(broken), retries=0)
        os.truncate(broken, SIZE // 2)
        guests = {name: Guest(host.path(name)) for name in (*names, "broken")}
        guests["limited"] = Guest(host.path("limited"), LIMITED)
        total = SIZE // CHUNK

        def fetch(chunks: int) -> None:
            """Have so many be in the cache, and the next ones be asked for: none of it is lost with who has asked."""
            bucket.allowed = chunks
            eventually(lambda: bucket.waiting > 0 and host.cache.statistics()["chunks"], expected=chunks)

        fetch(total // 3)
        host.servers.start("second", "--takeover")
        fetch(total // 3 * 2)
        assert all(guests[name].outcome is None for name in names)
        host.servers.lose()
        host.servers.start("third")
        bucket.allowed = 1 << 30
        for guest in guests.values():
            guest.join()
        assert [guests[name].outcome for name in names] == [right(SIZE)] * len(names)
        assert guests["limited"].outcome == right(LIMITED)
        # Of each server a second's worth at once, and what a read that was begun has more than was left.
        assert guests["limited"].seconds >= (LIMITED - 5 * RATE) / RATE  # 2 s without the limit
        assert host.counted("limited")["slowed"] > 0
        assert isinstance(guests["broken"].outcome, GuestError)
        assert host.counted("broken")["pages_poisoned"] == 1
        assert (bucket.begun, bucket.twice) == (total, 0)
        os.kill(host.servers.last.process.pid, signal.SIGTERM)
        print(json.dumps(host.servers.pids))


@needs_kvm
def test_twenty_guests(tmp_path: Path) -> None:
    """Right sums, the limit held, the broken source costs only its own guest, and each byte is fetched once."""
    output, _ = play(twenty_guests, str(tmp_path))
    assert all(map(ended, json.loads(output).values()))


def machine(path: str, digest: str) -> None:
    """Scenario: a guest in a process of its own, which hands its memory over again where that has got lost."""
    guest, again = Guest(Path(path)), 0
    while guest.outcome is None:
        again += guest.again()
        time.sleep(0.1)
    guest.join()
    assert guest.outcome == right(SIZE), guest.outcome
    assert sha256(guest.region).hexdigest() == digest
    print(again)


class Soak:
    """Guests that come and go, while processes are killed by chance.

    Args:
        directory: of the host.
        url: of its snapshot.
        data: what that has.
        seed: of what happens.
    """

    def __init__(self, directory: str, url: str, bucket: Bucket, data: bytes, seed: int) -> None:
        self.host, self.bucket, self.digest = Machines(directory, url), bucket, sha256(data).hexdigest()
        self.chance = random.Random(seed)
        self.guests: list[Future[tuple[str, str]]] = []
        self._threads = ThreadPoolExecutor(8)
        self.done: Counter[str] = Counter()
        self._starts = 0
        self.start()
        for number in range(6):
            self.host.create(f"vm{number}", **({"bytes_per_second": 8 * MIB} if number == 5 else {}))

    def start(self, *options: str) -> None:
        """Start the next server."""
        self._starts += 1
        self.host.servers.start(f"server-{self._starts}", *options)

    def upgrade(self) -> None:
        """Have the next server take over."""
        before = self.host.servers.last
        self.start("--takeover")
        assert before.process.wait(60) == 0, before.said

    def lose(self) -> None:
        """Kill all but the holder, and start the next server, perhaps a little later."""
        self.host.servers.lose()
        time.sleep(self.chance.choice([0.0, 0.3]))
        self.start()

    def kill(self, *names: str) -> None:
        """Kill some processes of the server at once."""
        pids = self.host.servers.pids
        for name in names:
            os.kill(pids[name], signal.SIGKILL)

    def starve(self) -> None:
        """Have no answer of the bucket for a while."""
        self.bucket.allowed = 0
        time.sleep(self.chance.uniform(0.1, 1.0))
        self.bucket.allowed = 1 << 30

    def happen(self) -> None:
        """Have something happen, by chance."""
        what = self.chance.choices(
            ["worker", "keeper", "both", "upgrade", "lose", "starve", "evict"], [4, 4, 2, 2, 2, 1, 1]
        )[0]
        self.done[what] += 1
        if what in {"worker", "keeper"}:
            self.kill(what)
        elif what == "both":
            self.kill("worker", "keeper")
        elif what == "evict":
            shutil.rmtree(self.host.directory / "cache", ignore_errors=True)
        else:
            getattr(self, what)()

    def look(self, most: int = 8) -> None:
        """Take the guests that are done out, and have others in their place.

        Each is a process, as a machine is: a client is served until its process has ended.
        """
        for guest in [guest for guest in self.guests if guest.done()]:
            output, _ = guest.result()
            self.guests.remove(guest)
            self.done["guests"] += 1
            self.done["handed over again"] += int(output)
        while len(self.guests) < most:
            path = self.host.path(f"vm{self.chance.randrange(6)}")
            self.guests.append(self._threads.submit(play, machine, str(path), self.digest, deadline=90))


def soak(directory: str, seconds: float, seed: int) -> None:
    """Scenario."""
    snapshots = Path(directory) / "snapshots"
    upper = write_snapshot(snapshots)
    bucket = Bucket(snapshots)
    bucket.allowed = 1 << 30
    with bucket.serving() as url:
        test = Soak(directory, f"{url}/{upper}", bucket, image(), seed)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            test.look()
            if test.chance.random() < 0.2:
                test.happen()
            time.sleep(0.1)
        while test.guests:
            time.sleep(0.1)
            test.look(0)
        print(dict(test.done), file=sys.stderr)
        pids = test.host.servers.pids
        os.kill(pids["server"], signal.SIGTERM)
        print(json.dumps(pids))


@pytest.mark.nightly
@pytest.mark.timeout(2100)
@needs_kvm
def test_soak_30_min(tmp_path: Path) -> None:
    """Half an hour: no guest has a wrong byte, and none waits for ever."""
    output, errors = play(soak, str(tmp_path), 1800.0, random.randrange(1000), deadline=2000)
    print(errors)
    assert all(map(ended, json.loads(output).values()))
