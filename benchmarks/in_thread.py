"""Faults resolved in the faulting thread, beside handlers in processes of their own.

A Python toucher is a loop over `view[offset]`, the same for each contestant.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import threading
import time
from typing import TYPE_CHECKING

import numpy as np

import aiouffd
from aiouffd import native
from benchmarks.contestants import PAGE, Arena, buffer, c_poll, c_spin, monitored, warm
from benchmarks.native import touch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["CONTESTANTS", "entering", "far", "native_touchers", "page_by_page", "python_touchers", "unavailable"]


def unavailable() -> str | None:
    """Return why none of this can run here."""
    return native.reason() or None


@contextlib.contextmanager
def page_by_page(size: int) -> Iterator[Arena]:
    """Ours, in the thread, no readahead."""
    region = aiouffd.Region(size)
    with aiouffd.Monitor(region, buffer(size), engine=aiouffd.InThread(), readahead=0, on_exit="zeros") as monitor:
        yield Arena(region.address, 0, monitor)
        monitor.check()


CONTESTANTS: dict[str, Callable[[int], contextlib.AbstractContextManager[Arena]]] = {
    "C poll": c_poll,
    "C spin": c_spin,
    "the pager": lambda size: monitored(size, readahead=0),
    "aiouffd": page_by_page,
}


def _shuffled(size: int) -> np.ndarray:
    return np.random.default_rng(1).permutation(size // PAGE).astype(np.uint32)


def _touch(view: memoryview, offsets: list[int]) -> int:
    total = 0
    for offset in offsets:
        total += view[offset]
    return total


def touched(address: int, size: int, pages: list[int], threads: int) -> float:
    """Touch pages from Python threads; return the seconds."""
    view = memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
    shares = [[page * PAGE for page in pages[n::threads]] for n in range(threads)]
    totals = [0] * threads

    def work(n: int) -> None:
        totals[n] = _touch(view, shares[n])

    workers = [threading.Thread(target=work, args=(n,)) for n in range(1, threads)]
    before = time.perf_counter()
    for worker in workers:
        worker.start()
    work(0)
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - before
    if sum(totals) != sum((page + 1) & 0xFF for page in pages):
        raise AssertionError("some of the pages had the wrong content")
    return seconds


def python_touchers(name: str, size: int, threads: int) -> Callable[[], float]:
    """Return a contestant: microseconds a page, touched by Python threads in random order."""
    serve, pages = CONTESTANTS[name], _shuffled(size).tolist()

    def once() -> float:
        warm(size)
        with serve(size) as arena:
            return touched(arena.address, size, pages, threads) / len(pages) * 1e6

    return once


def native_touchers(name: str, size: int, threads: int) -> Callable[[], float]:
    """Return a contestant: the same by threads that Python has not made."""
    serve, pages = CONTESTANTS[name], _shuffled(size)

    def once() -> float:
        warm(size)
        with serve(size) as arena:
            return touch(arena.address, pages, threads) / len(pages) * 1e6

    return once


def entering(engine: aiouffd.Pager | aiouffd.InThread) -> Callable[[], float]:
    """Return a contestant: milliseconds to enter and leave a Monitor, on a loop."""
    size = 64 << 20
    source = buffer(size)

    async def once() -> float:
        spent = []
        for _ in range(9 if isinstance(engine, aiouffd.InThread) else 1):
            region = aiouffd.Region(size)
            before = time.perf_counter()
            async with aiouffd.Monitor(region, source, engine=engine, on_exit="zeros"):
                pass
            spent.append(time.perf_counter() - before)
        return sorted(spent)[len(spent) // 2] * 1e3

    return lambda: asyncio.run(once())


def far(source: object, size: int, threads: int, each: int) -> Callable[[], float]:
    """Return a contestant: milliseconds for Python threads, each with so many pages that must be waited for."""
    pages = _shuffled(size).tolist()[: threads * each]

    def once() -> float:
        region = aiouffd.Region(size)
        with aiouffd.Monitor(region, source, engine=aiouffd.InThread(), readahead=0, on_exit="zeros") as monitor:  # type: ignore[call-overload]
            seconds = touched(region.address, size, pages, threads)
            monitor.check()
        return seconds * 1e3

    return once
