"""Who serves: each is a context manager that gives the address of lazy memory, with a handler in another process.

All memory shows the same: the words of page n are n + 1, so that a benchmark that serves something else fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import mmap
import os
import signal
import struct
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import uvloop

import aiouffd
from aiouffd.engine.assembly import make_backend, make_readahead
from aiouffd.engine.dispatcher import Dispatcher
from aiouffd.engine.mappings import Mapping, Mappings
from aiouffd.engine.options import Options, Service
from aiouffd.engine.space import Space
from aiouffd.engine.statistics import Counters
from aiouffd.kernel.memory import SealedMemory, address_of
from benchmarks.native import library

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = 4096
PR_SET_PDEATHSIG = 1


@cache
def content(size: int) -> SealedMemory:
    """Return the bytes that are served, in a memfd."""
    words = np.repeat(np.arange(1, size // PAGE + 1, dtype=np.uint64), PAGE // 8)
    return SealedMemory.from_buffer(words)


@cache
def buffer(size: int) -> aiouffd.BufferSource:
    """Return them as a source; it travels in that memfd."""
    memory = content(size)
    assert memory.map is not None
    source = aiouffd.BufferSource(memory.map)
    source._sealed = memory  # noqa: SLF001 - no second copy
    return source


def warm(size: int) -> None:
    """Touch so much memory and free it: pages that the host must find first cost up to 12 us each."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
    memory.close()


@attrs.define
class Arena:
    """Lazy memory, and the process that fills it."""

    address: int
    pid: int
    monitor: aiouffd.Monitor | None = None

    def cpu(self) -> float:
        """Return the seconds of processor time that the process and its children have used, user and system."""
        used, pids = 0, [str(self.pid)]
        for pid in pids:
            for task in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ends just now
                    used += int((task / "schedstat").read_text().split()[0])
                    pids += (task / "children").read_text().split()
        return used / 1e9


@contextlib.contextmanager
def child(serve: Callable[[], None]) -> Iterator[int]:
    """Run a function in a forked process until the block is left, or this process ends."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == parent:
                serve()
        finally:
            os._exit(0)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextlib.contextmanager
def foreign(size: int, serve: Callable[[int, int, int], Any]) -> Iterator[Arena]:
    """Memory whose faults `serve(descriptor, source address, base address)` resolves in a process of its own."""
    memory = content(size)
    source = address_of(memory.map)
    region = aiouffd.Region(size)
    with aiouffd.Userfaultfd() as uffd:
        uffd.register(region.address, size, aiouffd.RegisterMode.MISSING)
        with child(lambda: serve(uffd.fileno(), source, region.address)) as pid:
            yield Arena(region.address, pid)


def c_poll(size: int) -> contextlib.AbstractContextManager[Arena]:
    """The man page's program."""
    return foreign(size, lambda fd, source, base: library().handle(fd, source, base, 0))


def c_spin(size: int) -> contextlib.AbstractContextManager[Arena]:
    """The same without sleeping: the limit for a handler in another thread."""
    return foreign(size, lambda fd, source, base: library().handle(fd, source, base, 1))


def _bare(fd: int, source: int, base: int) -> None:
    message, unpack = bytearray(32), struct.Struct("=16xQ8x").unpack
    buffers, pack, skew = [message], struct.Struct("=QQQQq").pack, source - base
    while True:
        try:
            os.readv(fd, buffers)
        except BlockingIOError:
            continue
        (page,) = unpack(message)
        fcntl.ioctl(fd, 0xC028AA03, bytearray(pack(page, page + skew, PAGE, 0, 0)))


def bare(size: int) -> contextlib.AbstractContextManager[Arena]:
    """A spinning loop in Python that does nothing else: the floor for ours."""
    return foreign(size, _bare)


@contextlib.contextmanager
def monitored(size: int, source: Any = None, **options: Any) -> Iterator[Arena]:
    """Serve with aiouffd, as an application does: Monitor, a fresh pager, defaults but for the options."""
    region = aiouffd.Region(size)
    options = {"engine": aiouffd.Pager(), "on_exit": "zeros", **options}
    with aiouffd.Monitor(region, source or buffer(size), **options) as monitor:
        yield Arena(region.address, monitor.pids[1], monitor)
        monitor.check()


@contextlib.contextmanager
def many(size: int, count: int) -> Iterator[Arena]:
    """Serve one range of addresses that is registered in `count` pieces, each with a descriptor, on one loop."""
    memory = content(size)
    region = aiouffd.Region(size)
    step = size // count & -PAGE
    uffds = []
    for number in range(count):
        end = size if number == count - 1 else (number + 1) * step
        uffd = aiouffd.Userfaultfd()
        uffd.register(region.address + number * step, end - number * step, aiouffd.RegisterMode.MISSING)
        uffds.append((uffd, number * step, end))

    async def main() -> None:
        assert memory.map is not None
        counters, options = Counters(), Options(readahead=0)
        dispatcher = Dispatcher(asyncio.get_running_loop(), counters)
        backend = make_backend(Service(aiouffd.BufferSource(memory.map)), counters, options)
        for identity, (uffd, start, end) in enumerate(uffds):
            mappings = Mappings([Mapping(region.address + start, region.address + end, start)])
            readahead = make_readahead(PAGE, options, local=True)
            dispatcher.add(
                Space(
                    uffd,
                    mappings,
                    page_size=PAGE,
                    on_error=print,
                    backend=backend,
                    counters=counters,
                    readahead=readahead,
                    identity=identity,
                )
            )
        await asyncio.Event().wait()

    with child(lambda: uvloop.run(main())) as pid:
        yield Arena(region.address, pid)
    for uffd, _, _ in uffds:
        uffd.close()
