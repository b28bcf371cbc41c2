"""Bytes from far away: an object behind HTTP on the loopback interface, and a source that takes its time."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import socket
import time
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import obstore
import uvloop

import aiouffd
from benchmarks.contestants import PAGE, child, content, monitored, warm
from benchmarks.native import library, touch
from benchmarks.row import shuffled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.contestants import Arena

__all__ = [
    "at_random",
    "filled",
    "in_order",
    "obstore_alone",
    "plain_thread",
    "prefetched",
    "random_pages",
    "served",
    "web",
]

_STEP = 2 << 20  # bytes that the plain thread receives before it copies them: with less it uses more processor time
_TOUCHERS = 64

Spent = tuple[float, float]
"""Seconds, and seconds of processor time of who brings the bytes."""


@contextlib.contextmanager
def served(file: int, size: int, delay: float = 0.0, port: int = 0) -> Iterator[int]:
    """Serve a file by HTTP, from a process of its own, each answer after some seconds; yield the port (0: any)."""
    with (
        socket.create_server(("127.0.0.1", port), backlog=256) as listening,
        child(lambda: library().serve_http(listening.fileno(), file, size, round(delay * 1e6))),
    ):
        yield listening.getsockname()[1]


def web(size: int) -> contextlib.AbstractContextManager[int]:
    """Serve the content."""
    return served(content(size).fd, size)


@contextlib.contextmanager
def _served(size: int, **options: int) -> Iterator[Arena]:
    warm(size)
    with web(size) as port, monitored(size, aiouffd.ObjectSource(f"http://127.0.0.1:{port}/file"), **options) as arena:
        yield arena


def _in_order(size: int) -> np.ndarray:
    return np.arange(size // PAGE, dtype=np.uint32)


def prefetched(size: int) -> Spent:
    """Ours: a prefetch of all."""
    with _served(size) as arena:
        assert arena.monitor is not None
        before, used = time.perf_counter(), arena.cpu()
        arena.monitor.prefetch_sync(0, size)
        spent = time.perf_counter() - before, arena.cpu() - used
        touch(arena.address, _in_order(size))
    return spent


def in_order(size: int) -> Spent:
    """Ours: touched in order, with defaults."""
    with _served(size) as arena:
        used = arena.cpu()
        seconds = touch(arena.address, _in_order(size))
        return seconds, arena.cpu() - used


def plain_thread(size: int) -> Spent:
    """One request, one buffer: receive and COPY."""
    warm(size)
    region = aiouffd.Region(size)
    with web(size) as port, aiouffd.Userfaultfd() as uffd:
        uffd.register(region.address, size, aiouffd.RegisterMode.MISSING)
        before, used = time.perf_counter(), time.thread_time()
        if not library().receive_http(port, uffd.fileno(), region.address, size, _STEP):
            raise ConnectionError("the plain thread has not received everything")
        spent = time.perf_counter() - before, time.thread_time() - used
        touch(region.address, _in_order(size))
    return spent


def random_pages(size: int, pages: np.ndarray) -> float:
    """Ours: single pages for many touchers; seconds."""
    with _served(size, readahead=0) as arena:
        return touch(arena.address, pages, _TOUCHERS)


def obstore_alone(size: int, pages: np.ndarray) -> float:
    """The same pages by obstore alone, as many at once, on uvloop; their bytes are dropped. Seconds."""
    # In a process of its own, as the pager is, and not a forked one: this one may have threads of obstore.
    context = multiprocessing.get_context("spawn")
    with web(size) as port, ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_get, port, pages.tolist()).result()


def _get(port: int, pages: list[int]) -> float:
    async def main() -> float:
        options: obstore.store.ClientConfig = {"allow_http": True}
        store = obstore.store.HTTPStore.from_url(f"http://127.0.0.1:{port}", client_options=options)
        await obstore.get_range_async(store, "file", start=0, length=PAGE)
        left = iter(pages)

        async def work() -> None:
            for page in left:
                await obstore.get_range_async(store, "file", start=page * PAGE, length=PAGE)

        before = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(_TOUCHERS)))
        return time.perf_counter() - before

    return uvloop.run(main())


def filled(size: int, source: Callable[[], object], *, background: bool) -> float:
    """Ours: all that a source has, by the background fill or by a prefetch; seconds."""
    warm(size)
    with monitored(size, source(), background=background) as arena:
        assert arena.monitor is not None
        before = time.perf_counter()
        if not background:
            arena.monitor.prefetch_sync(0, size)
        while arena.monitor.statistics().pages_background * PAGE < size and background:
            time.sleep(0.001)
        return time.perf_counter() - before


def at_random(size: int, *, background: bool) -> float:
    """Ours: each page touched at random by 8 threads, while all is filled or after a prefetch, 2 ms away."""
    warm(size)
    with (
        served(content(size).fd, size, 0.002) as port,
        monitored(size, aiouffd.ObjectSource(f"http://127.0.0.1:{port}/file"), background=background) as arena,
    ):
        assert arena.monitor is not None
        before = time.perf_counter()
        if not background:
            arena.monitor.prefetch_sync(0, size)
        touch(arena.address, shuffled(size), 8)
        return time.perf_counter() - before
