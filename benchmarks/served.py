"""`aiouffd serve` and `aiouffd lazy-pages` as contestants: processes of their own, as their users run them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import aiouffd
from aiouffd.engine.mappings import Mapping
from aiouffd.handoff import firecracker
from benchmarks.contestants import PAGE, Arena, content

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import criu_rig  # the rig of the tests

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
_CLONE_NEWNS = 0x20000


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


def restore_unavailable() -> str | None:
    """Return why there can be no restore here, or None."""
    try:
        criu_rig.command()
    except criu_rig.UnobtainableError as error:
        return str(error)
    return None


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


def restoring(
    daemon: Callable[[criu_rig.Checkpoint], contextlib.AbstractContextManager[None]], size: int
) -> Callable[[], float]:
    """Return a contestant: milliseconds from the start of `criu restore` until the process has read all its memory."""

    def once() -> float:
        remembering()
        with tempfile.TemporaryDirectory() as directory, criu_rig.Checkpoint(Path(directory)) as checkpoint:
            checkpoint.start("scan", size // MIB)
            checkpoint.dump()
            with daemon(checkpoint):
                checkpoint.go()
                began = time.perf_counter()
                restore = checkpoint.restore()
                checkpoint.results()
                seconds = time.perf_counter() - began
                checkpoint.finish(restore)
        return seconds * 1e3

    return once


@contextlib.contextmanager
def own_daemon(checkpoint: criu_rig.Checkpoint) -> Iterator[None]:
    """`criu lazy-pages`."""
    checkpoint.lazy_pages()
    yield


@contextlib.contextmanager
def our_daemon(checkpoint: criu_rig.Checkpoint) -> Iterator[None]:
    """`aiouffd lazy-pages`."""
    command = [sys.executable, "-m", "aiouffd", "lazy-pages", "-D", str(checkpoint.images)]
    log = checkpoint.directory / "aiouffd.log"
    with log.open("w") as file, subprocess.Popen(command, stderr=file, env=dict(os.environ)) as daemon:
        try:
            criu_rig.until(lambda: "listening" in log.read_text(), "daemon")
            yield
        finally:
            daemon.kill()
