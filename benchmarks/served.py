"""`aiouffd serve` and `aiouffd lazy-pages` as contestants: processes of their own, as their users run them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import aiouffd
from aiouffd.engine.mappings import Mapping
from aiouffd.handoff import firecracker
from benchmarks.contestants import PAGE, Arena, content

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import criu_rig  # the rig of the tests

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "PERF_FORGETS",
    "Daemon",
    "clients",
    "criu_rig",
    "our_daemon",
    "own_daemon",
    "remembering",
    "restore_unavailable",
    "restoring",
]

MIB = 1 << 20
_CLONE_NEWNS = 0x20000
_PERF_EVENT_OPEN = 298  # the number of the call on x86_64, like everything that there is of CRIU here
PERF_FORGETS = 1.2  # seconds

Daemon = Callable[[criu_rig.Checkpoint], contextlib.AbstractContextManager[subprocess.Popen[bytes]]]


@contextlib.contextmanager
def clients(size: int, count: int) -> Iterator[Arena]:
    """Hand over `size` bytes in `count` parts, each with a descriptor of its own, to one server; page by page."""
    region = aiouffd.Region(size)
    step = size // count & -PAGE
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        path = Path(directory) / "memory.bin"
        path.write_bytes(content(size).map or b"")
        listening = Path(directory) / "uffd.sock"
        command = [sys.executable, "-m", "aiouffd", "serve", str(path), "--socket", str(listening), "--readahead", "0"]
        log = stack.enter_context((Path(directory) / "log").open("w+"))
        server = stack.enter_context(subprocess.Popen(command, stderr=log))
        stack.callback(server.kill)
        criu_rig.until(lambda: "listening" in Path(log.name).read_text(), "server")
        for number in range(count):
            start = region.address + number * step
            end = region.address + size if number == count - 1 else start + step
            uffd = stack.enter_context(aiouffd.Userfaultfd(aiouffd.Feature.EVENT_REMOVE))
            uffd.register(start, end - start, aiouffd.RegisterMode.MISSING)
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.connect(str(listening))
            message = firecracker.encode([Mapping(start, end, start - region.address)], PAGE)
            socket.send_fds(connection, [message], [uffd.fileno()])
        criu_rig.until(lambda: Path(log.name).read_text().count("regions, pages of") == count, "handoffs")
        yield Arena(region.address, server.pid)


def restore_unavailable(*, again: bool) -> str | None:
    """Return why there can be no restore here, or None."""
    try:
        criu_rig.command()
        with perf_kept_on() if again else contextlib.nullcontext():
            return None
    except (criu_rig.UnobtainableError, OSError) as error:
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


@contextlib.contextmanager
def own_daemon(checkpoint: criu_rig.Checkpoint) -> Iterator[subprocess.Popen[bytes]]:
    """`criu lazy-pages`."""
    yield checkpoint.lazy_pages()


@contextlib.contextmanager
def our_daemon(checkpoint: criu_rig.Checkpoint) -> Iterator[subprocess.Popen[bytes]]:
    """`aiouffd lazy-pages`."""
    command = [sys.executable, "-m", "aiouffd", "lazy-pages", "-D", str(checkpoint.images)]
    log = checkpoint.directory / "aiouffd.log"
    with log.open("w") as file, subprocess.Popen(command, stderr=file, env=dict(os.environ)) as daemon:
        try:
            criu_rig.until(lambda: "listening" in log.read_text(), "daemon")
            yield daemon
        finally:
            daemon.kill()
