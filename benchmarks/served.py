"""`aiouffd serve` and `aiouffd lazy-pages` as contestants: processes of their own, as their users run them."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import aiouffd
from aiouffd.cli.unix_http import ControlClient
from aiouffd.criu.images import read_task
from aiouffd.engine.mappings import Mapping
from aiouffd.handoff import firecracker
from benchmarks.contestants import PAGE, Arena, content
from benchmarks.native import touch

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import criu_rig  # these are of the tests
import debian_packages

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "PERF_FORGETS",
    "Daemon",
    "clients",
    "creating",
    "criu_rig",
    "debian_packages",
    "fetched",
    "handed_over",
    "our_daemon",
    "own_daemon",
    "remembering",
    "restore_unavailable",
    "restoring",
    "serving",
    "upgrading",
]

MIB = 1 << 20
_CLONE_NEWNS = 0x20000
_PERF_EVENT_OPEN = 298  # the number of the call on x86_64, like everything that there is of CRIU here
PERF_FORGETS = 1.2  # seconds

Daemon = Callable[..., contextlib.AbstractContextManager[subprocess.Popen[bytes]]]
"""Takes a `criu_rig.Checkpoint`, and the port of a page server if there is one."""


@contextlib.contextmanager
def clients(size: int, count: int, *options: str, directory: Path | None = None) -> Iterator[Arena]:
    """Hand over `size` bytes in `count` parts, each with a descriptor of its own, to one server with such options."""
    region = aiouffd.Region(size)
    step = size // count & -PAGE
    with contextlib.ExitStack() as stack:
        place = directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (place / "memory.bin").write_bytes(content(size).map or b"")
        server, log = stack.enter_context(_server(place, "log", *options))
        for number in range(count):
            start = region.address + number * step
            end = region.address + size if number == count - 1 else start + step
            stack.enter_context(handed_over(place / "uffd.sock", start, end - start, start - region.address))
        criu_rig.until(lambda: log.read_text().count(", pages of ") == count, "handoffs")
        yield Arena(region.address, server.pid)


@contextlib.contextmanager
def _server(place: Path, name: str, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run a server of the file in a directory until the block is left; yield it, and its log of that name."""
    command = [
        sys.executable,
        "-m",
        "aiouffd",
        "serve",
        str(place / "memory.bin"),
        "--socket",
        str(place / "uffd.sock"),
    ]
    with (place / name).open("w") as log, subprocess.Popen([*command, *options], stderr=log) as server:
        try:
            criu_rig.until(lambda: "listening" in (place / name).read_text(), "server")
            yield server, place / name
        finally:
            server.kill()


def upgrading(size: int, count: int) -> float:
    """Have another server take over so many clients; return the milliseconds that the longest touch of one took."""
    with tempfile.TemporaryDirectory() as directory:
        options = ("--readahead", "0", "--hold", f"{directory}/hold")
        waits = [0]
        ended = threading.Event()

        def touch_now_and_then() -> None:
            latency = np.zeros(1, np.uint32)
            for page in np.arange(size // PAGE, dtype=np.uint32):
                if ended.is_set():
                    return
                touch(arena.address, np.array([page], np.uint32), latencies=latency)
                waits.append(int(latency[0]))
                time.sleep(0.002)

        with clients(size, count, *options, directory=Path(directory)) as arena:
            toucher = threading.Thread(target=touch_now_and_then)
            toucher.start()
            with _server(Path(directory), "next", *options, "--takeover"):
                time.sleep(0.1)  # and what comes right after
                ended.set()
                toucher.join()
        return max(waits) / 1e6


@contextlib.contextmanager
def handed_over(path: Path, start: int, length: int, offset: int = 0) -> Iterator[None]:
    """Hand memory over to a server, as Firecracker does; it is a client's as long as the block runs."""
    with aiouffd.Userfaultfd(aiouffd.Feature.EVENT_REMOVE) as uffd, socket.socket(socket.AF_UNIX) as connection:
        uffd.register(start, length, aiouffd.RegisterMode.MISSING)
        connection.connect(str(path))
        message = firecracker.encode([Mapping(start, start + length, offset)], PAGE)
        socket.send_fds(connection, [message], [uffd.fileno()])
        yield


def restore_unavailable(*, again: bool) -> str | None:
    """Return why there can be no restore here, or None."""
    try:
        criu_rig.command()
        with perf_kept_on() if again else contextlib.nullcontext():
            return None
    except (debian_packages.UnobtainableError, OSError) as error:
        return str(error)


@functools.cache
def remembering() -> None:
    """Have CRIU remember what it has found out about the kernel, as it does wherever /run is a tmpfs (systemd's is).

    Else each restore asks again, for 25 ms or so, which differ more than what is measured. Only this process and its
    children see it: a mount namespace of their own.
    """
    kind = subprocess.run(["stat", "-f", "-c", "%T", "/run"], capture_output=True, text=True, check=True).stdout.strip()
    if kind != "tmpfs" and ctypes.CDLL(None).unshare(_CLONE_NEWNS) == 0:
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", "/run"], check=True)


@contextlib.contextmanager
def serving(place: Path, *options: str, apart: bool = False) -> Iterator[ControlClient]:
    """Run a server without sessions until the block is left, with its socket in a directory; yield what asks it.

    Args:
        place: the directory.
        options: of the command.
        apart: in a session of its own, setsid(2).
    """
    control = place / "control"
    command = [sys.executable, "-m", "aiouffd", "serve", "--control", str(control), *options]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=apart) as server:
        try:
            criu_rig.until(control.exists, "server")
            yield ControlClient(control)
        finally:
            server.kill()


def creating(count: int) -> float:
    """Have one server create so many sessions, one after the other; return the milliseconds for one."""
    with tempfile.TemporaryDirectory() as directory, serving(Path(directory)) as client:
        image = Path(directory) / "image"
        with image.open("wb") as file:
            file.truncate(64 << 20)
        began = time.perf_counter()
        for number in range(count):
            new = {"name": f"s{number}", "socket": f"{directory}/s{number}", "source": str(image)}
            client.ask("POST", "/v1/sessions", new)
        return (time.perf_counter() - began) / count * 1e3


@contextlib.contextmanager
def perf_kept_on() -> Iterator[None]:
    """Count the time of this process, so that there is a perf event."""
    attributes = ctypes.create_string_buffer(struct.pack("=IIQ", 1, 112, 1), 112)  # PERF_COUNT_SW_TASK_CLOCK
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(_PERF_EVENT_OPEN, attributes, 0, -1, -1, 0)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "perf_event_open")
    try:
        yield
    finally:
        os.close(fd)


def restoring(daemon: Daemon, size: int, *, again: bool) -> Callable[[], float]:
    """Return a contestant: milliseconds from the start of `criu restore` until the process has read all its memory.

    CRIU sets a breakpoint in a process that it dumps or restores, which is a perf event. When there was none, the
    kernel waits for a grace period of RCU first: 8 ms on idle CPUs, 20 ms where one of them copies pages. For a second
    after the last one it does not. A benchmark that restores right after its dump is on this side of that second or on
    the other, by chance.

    Args:
        daemon: serves the pages.
        size: bytes of the process's memory.
        again: right after the dump, while this process has a perf event. Else the first one in a while: also the
            processors have slept, and a host may have taken back what was free.
    """

    def once() -> float:
        remembering()
        with (
            tempfile.TemporaryDirectory() as directory,
            criu_rig.Checkpoint(Path(directory)) as checkpoint,
            perf_kept_on() if again else contextlib.nullcontext(),
        ):
            checkpoint.start("scan", size // MIB)
            checkpoint.dump()
            with daemon(checkpoint):
                if not again:
                    time.sleep(PERF_FORGETS)
                checkpoint.go()
                began = time.perf_counter()
                restore = checkpoint.restore()
                checkpoint.results()
                seconds = time.perf_counter() - began
                checkpoint.finish(restore)
        return seconds * 1e3

    return once


def fetched(daemon: Daemon, size: int, latency: float) -> float:
    """Restore a process whose lazy pages are with a page server so far away; return the bytes fetched a lazy byte."""
    with criu_rig.large_pipes(), tempfile.TemporaryDirectory() as directory:
        with criu_rig.Checkpoint(Path(directory)) as checkpoint, socket.create_server(("127.0.0.1", 0)) as chosen:
            port = chosen.getsockname()[1]
            chosen.close()
            checkpoint.start("scan", size // MIB)
            checkpoint.dump_to_server(port)
            lazy = sum(run.length for run in read_task(checkpoint.images, checkpoint.pid).lazy())
            with far_away(port, latency) as (relay, passed), daemon(checkpoint, relay):
                checkpoint.go()
                restore = checkpoint.restore()
                checkpoint.results()
                checkpoint.finish(restore)
        return passed() / lazy


@contextlib.contextmanager
def far_away(port: int, latency: float) -> Iterator[tuple[int, Callable[[], int]]]:
    """Relay connections to a port, each byte later by `latency`; yield a port, and who says what came from there."""
    passed = 0

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, back: bool) -> None:
        nonlocal passed
        loop = asyncio.get_running_loop()
        while data := await reader.read(1 << 20):
            passed += len(data) * back
            loop.call_later(latency, writer.write, data)
        loop.call_later(latency, writer.close)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, here = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(asyncio.CancelledError):  # at the end of the block
            await asyncio.gather(pump(reader, here, back=False), pump(there, writer, back=True))

    async def main(ready: Future[int]) -> None:
        async with await asyncio.start_server(relay, "127.0.0.1", 0) as server:
            ready.set_result(server.sockets[0].getsockname()[1])
            await stop.wait()

    ready: Future[int] = Future()
    stop = asyncio.Event()
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        thread = threading.Thread(target=runner.run, args=(main(ready),))
        thread.start()
        yield ready.result(), lambda: passed
        loop.call_soon_threadsafe(stop.set)
        thread.join()


@contextlib.contextmanager
def own_daemon(checkpoint: criu_rig.Checkpoint, port: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """`criu lazy-pages`."""
    yield checkpoint.lazy_pages(*(("--page-server", "--address", "127.0.0.1", "--port", str(port)) if port else ()))


@contextlib.contextmanager
def our_daemon(checkpoint: criu_rig.Checkpoint, port: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """`aiouffd lazy-pages`."""
    command = [sys.executable, "-m", "aiouffd", "lazy-pages", "-D", str(checkpoint.images)]
    command += ["--page-server", "127.0.0.1", "--port", str(port)] if port else []
    log = checkpoint.directory / "aiouffd.log"
    with log.open("w") as file, subprocess.Popen(command, stderr=file, env=dict(os.environ)) as daemon:
        try:
            criu_rig.until(lambda: "listening" in log.read_text(), "daemon")
            yield daemon
        finally:
            daemon.kill()
