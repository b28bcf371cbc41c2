"""A running `aiouffd serve`, and clients of it: what several test modules of the server need."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
from pattern import PAGE, word
from processes import PATIENCE
from scenario import ended, eventually

import aiouffd
from aiouffd.engine.mappings import Mapping
from aiouffd.handoff import firecracker
from examples.page_server import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


ROOT = Path(__file__).parent.parent


VM = ROOT / "examples" / "microvm.py"


MIB = 1 << 20


HUGE = 2 * MIB


_MARK = "AIOUFFD_TEST_SERVER"


class Serve:
    """A running `aiouffd serve`.

    Args:
        directory: for its socket and its log.
        *arguments: as on the command line.
        wait: until it listens.
        socket: where it listens, "": nowhere, before sessions are created.
        program: what is run, as for Python.
        **environment: further variables.
    """

    def __init__(
        self,
        directory: Path,
        *arguments: object,
        wait: bool = True,
        socket: str | None = None,
        program: Sequence[str] = ("-m", "aiouffd"),
        **environment: str,
    ) -> None:
        self.path = directory / "uffd.sock" if socket is None else Path(socket)
        self.log = directory / "serve.log"
        listening = [] if socket == "" else ["--socket", str(self.path)]
        environment[_MARK] = str(self.log)  # its pager's processes have it, too
        command = [sys.executable, *program, "serve", *map(str, arguments), *listening]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **environment}
            )
        if wait:
            # What a takeover waits for has limits of its own, after which it ends; some are longer than PATIENCE.
            eventually(self.says_or_ends("listening"), expected=True, seconds=5 * PATIENCE)
            assert self.process.poll() is None, self.said

    def says(self, text: str) -> None:
        """Wait until it has said so: it may do that after its client has gone on."""
        eventually(self.says_or_ends(text), expected=True)
        assert text in self.said

    def says_or_ends(self, text: str) -> Callable[[], bool]:
        """Return a function that tells whether it has said so, or has ended."""
        return lambda: text in self.said or self.process.poll() is not None

    @property
    def said(self) -> str:
        """Its log."""
        return self.log.read_text()

    @property
    def pager(self) -> int:
        """Return the keeper's pid."""
        return int(self.said.split("pager ", 1)[1].split('"', 1)[0])

    @property
    def worker(self) -> int:
        """Return the worker's pid; wait for it, since the keeper forks it behind the first line of the log."""
        return worker_of(str(self.log))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        keeper = self.pager if "pager " in self.said else 0
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if keeper:
            assert ended(keeper), "the pager has outlived all that it served"

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Have it end, and return its status."""
        self.process.send_signal(number)
        return self.process.wait(60)


def children_of(pid: int) -> list[int]:
    """Return the children of a process, whichever thread has made them."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


class Servers:
    """One server after the other, at the same paths, with what the one before has left."""

    def __init__(self, directory: str, *arguments: object, socket: str = "uffd.sock") -> None:
        self.directory = Path(directory)
        self.arguments = arguments
        self.path = self.directory / socket
        self.socket = socket and str(self.path)
        self.hold = self.directory / "hold.sock"
        self.last: Serve

    def start(self, name: str, *more: object, **options: Any) -> Serve:
        """Start the next."""
        (self.directory / name).mkdir()
        arguments = (*self.arguments, "--hold", self.hold, *more)
        self.last = Serve(self.directory / name, *arguments, socket=self.socket, **options)
        return self.last

    @property
    def pids(self) -> dict[str, int]:
        """Those of the last, once all are there: whoever has made them."""
        found: list[tuple[str, int]] = []

        def complete() -> bool:
            found[:] = self._named()
            return sorted(name for name, _ in found) == ["holder", "keeper", "worker"]

        eventually(complete, expected=True)
        return {"server": self.last.process.pid, **dict(found)}

    def _named(self) -> list[tuple[str, int]]:
        """Return the processes of the last one's pager, and what they are called."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                name, mark = (path / "comm").read_text().strip(), f"{_MARK}={self.last.log}\0"
                if name.startswith("aiouffd-") and mark.encode() in (path / "environ").read_bytes():
                    found.append((name.removeprefix("aiouffd-"), int(path.name)))
        return found

    def lose(self) -> None:
        """Kill all but the holder, at once."""
        pids = [pid for name, pid in self.pids.items() if name != "holder"]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                os.kill(pid, number)
        self.last.process.wait()


def end_server(output: str) -> None:
    """End the server whose pids a scenario has told in its last line, and see that all of it ends."""
    pids = json.loads(output.splitlines()[-1])
    os.kill(pids["server"], signal.SIGTERM)
    assert all(map(ended, pids.values()))


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def metric(port: int, name: str) -> float:
    """Return what Prometheus would read of one metric."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == name)


@contextlib.contextmanager
def on_the_web(image: Path) -> Iterator[str]:
    """Serve a file by HTTP; yield its URL."""
    with serving(image.parent) as url:
        yield f"{url}/{image.name}"


def client(path: str, size: int, *, kill: str = "") -> None:
    """Scenario: a Monitor that is served by a server; somebody is killed in the middle."""
    region = aiouffd.Region(size)
    pages = list(range(size // PAGE))
    random.Random(3).shuffle(pages)
    with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path)) as monitor:
        monitor.prefetch_sync(0, MIB)
        assert monitor.pids == ()
        if not kill:  # by more requests than one, if there are 4,096 pages
            monitor.prefetch_sync(aiouffd.Range(page * PAGE, PAGE) for page in range(MIB // PAGE, size // PAGE, 2))
            assert sum(each.length for each in monitor.residency()) == (size + MIB) // 2
        for number, page in enumerate(pages):
            assert region[page * PAGE : page * PAGE + 8] == word(page)
            if number == 500 and kill:
                os.kill(int(kill), signal.SIGKILL)
        # A new keeper's counters begin at zero, until its worker has those of the dead one.
        eventually(lambda: monitor.statistics().pages_prefetch >= 256, expected=True)
        region.madvise(mmap.MADV_DONTNEED, 0, 16 * PAGE)
        assert region[: 16 * PAGE] == bytes(16 * PAGE)
        with pytest.raises(ValueError, match="not within the region"):
            monitor.prefetch_sync(size, 1)
        monitor.check()
    assert region[20 * PAGE] == 21


def touch_all(path: str, size: int) -> None:
    """Scenario: touch each page, in order."""
    region, _connection, _uffd = hand_over(path, size)
    for page in range(size // PAGE):
        assert region[page * PAGE] == (page + 1) & 255


def hand_over(
    path: str | Path,
    length: int = MIB,
    *,
    shared: bool = False,
    protected: bool = False,
    first: bytes = b"",
    of: aiouffd.Region | None = None,
) -> tuple[aiouffd.Region, socket.socket, aiouffd.Userfaultfd]:
    """Hand over a region as Firecracker does; keep all that is returned.

    Args:
        path: of the server's socket.
        length: of the region.
        shared: with the memfd that it maps.
        protected: the region is registered for write protection, too.
        first: what is there already, at its beginning.
        of: another client's region that is shared: it maps that memfd.
    """
    region = aiouffd.Region(length, shared=shared) if of is None else aiouffd.Region.from_fd(of.fd)
    shared = shared or of is not None
    region[: len(first)] = first
    features, modes = aiouffd.Feature.EVENT_REMOVE, aiouffd.RegisterMode.MISSING
    if shared:
        features, modes = features | aiouffd.Feature.MINOR_SHMEM, modes | aiouffd.RegisterMode.MINOR
    if protected:
        features |= aiouffd.Feature.PAGEFAULT_FLAG_WP | aiouffd.Feature.WP_HUGETLBFS_SHMEM
        modes |= aiouffd.RegisterMode.WP
    uffd = aiouffd.Userfaultfd(features)
    uffd.register(region.address, region.mapped_length, modes)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.fspath(path))
    mapping = Mapping(region.address, region.address + region.mapped_length, 0)
    fds = [uffd.fileno(), *([region.fd] if shared else [])]
    socket.send_fds(connection, [firecracker.encode([mapping], PAGE)], fds)
    return region, connection, uffd


def worker_of(log: str) -> int:
    """Return the pid of the worker that is there now; wait for it."""
    keeper = int(Path(log).read_text().split("pager ", 1)[1].split('"', 1)[0])
    children = Path(f"/proc/{keeper}/task/{keeper}/children")
    eventually(lambda: bool(children.read_text().split()), expected=True)
    return int(children.read_text().split()[0])


def descriptors(serve: Serve) -> int:
    """Return how many the listener and the pager have open."""
    return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in (serve.process.pid, serve.worker))
