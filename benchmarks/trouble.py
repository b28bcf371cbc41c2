"""What others do must not cost: reads that fail, and a process that keeps changing its layout."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.contestants import PAGE, buffer, child, monitored
from benchmarks.native import touch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FAILING", "healthy_pages", "offers"]

FAILING = 4
"""Pages that cannot be read."""
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_mremap = ctypes.CDLL(None).mremap
_mremap.restype = ctypes.c_void_p
_mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]


class Failing:
    """A source whose first pages cannot be read, and whose others take a while."""

    def __init__(self, size: int, latency: float) -> None:
        self.size = size
        self._latency = latency
        self._bytes = buffer(size)

    async def read(self, offset: int, length: int) -> memoryview:
        """Return the bytes, or fail, after a while."""
        await asyncio.sleep(self._latency)
        if offset < FAILING * PAGE:
            raise ConnectionResetError("for the benchmark")
        return self._bytes.read_nowait(offset, length)


def _wait_for(address: int) -> None:
    ctypes.string_at(address, 1)


def healthy_pages(size: int, count: int, *, failing: bool) -> float:
    """Touch pages, one after the other, while other processes wait for those that fail; microseconds a page."""
    source, limits = Failing(size, 0.001), {"readahead": 0, "concurrent_reads": FAILING, "retries": 1_000_000}
    with contextlib.ExitStack() as stack:
        arena = stack.enter_context(monitored(size, source, timeout=None, **limits))
        assert arena.monitor is not None
        if failing:
            for page in range(FAILING):
                stack.enter_context(child(partial(_wait_for, arena.address + page * PAGE)))
            while arena.monitor.statistics().source_retries < FAILING:
                time.sleep(0.001)
        pages = np.arange(2 * FAILING, 2 * FAILING + count, dtype=np.uint32)
        return touch(arena.address, pages) / count * 1e6


@contextlib.contextmanager
def moving(address: int) -> Iterator[None]:
    """Move a page to another place and back, again and again, from a thread."""
    aside = mmap.mmap(-1, PAGE)
    other = ctypes.addressof(ctypes.c_char.from_buffer(aside))
    ended = threading.Event()

    def move() -> None:
        while not ended.wait(0.0005):
            for here, there in ((address, other), (other, address)):
                if _mremap(here, PAGE, PAGE, _MREMAP_MAYMOVE | _MREMAP_FIXED, there) != there:
                    raise OSError(ctypes.get_errno(), "mremap")

    mover = threading.Thread(target=move)
    mover.start()
    try:
        yield
    finally:
        ended.set()
        mover.join()


def offers(source: object, size: int) -> float:
    """Prefetch a region whose last page keeps moving; return how many pages were offered to the kernel, a page."""
    with monitored(size, source) as arena:
        assert arena.monitor is not None
        with moving(arena.address + size - PAGE):
            arena.monitor.prefetch_sync(0, size)
        found = arena.monitor.statistics()
        touch(arena.address, np.arange(size // PAGE - 1, dtype=np.uint32))
    if not found.remaps:
        raise AssertionError("nothing has moved")
    return (found.pages + found.eexist + found.enoent) * PAGE / size
