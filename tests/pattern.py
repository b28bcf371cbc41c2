"""Sources whose every page can be told: the first eight bytes of page n, and all others, are n + 1."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from aiouffd.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import aiouffd

PAGE = mmap.PAGESIZE

_libc = ctypes.CDLL(None)
_libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def word(page: int) -> bytes:
    """Return the eight bytes that a page consists of."""
    return (page + 1).to_bytes(8, "little")


def content(offset: int, length: int) -> bytes:
    """Return the bytes [offset, offset + length)."""
    first, last = offset // PAGE, (offset + length + PAGE - 1) // PAGE
    data = b"".join(word(page) * (PAGE // 8) for page in range(first, last))
    return data[offset - first * PAGE :][:length]


class Pattern:
    """At hand: answered by `read_nowait`."""

    def __init__(self, size: int) -> None:
        self.size = size

    def read_nowait(self, offset: int, length: int) -> bytes:
        """Return the bytes."""
        return content(offset, length)

    async def read(self, offset: int, length: int) -> bytes:
        """Return the bytes."""
        return content(offset, length)


class Sometimes(Pattern):
    """Fails for its second page."""

    async def read(self, offset: int, length: int) -> bytes:
        """Return the bytes, a little later."""
        await asyncio.sleep(0)
        if offset == PAGE:
            raise SourceError(repr(self), offset, length, "not today")
        return content(offset, length)


class Slow:
    """Far away: every read takes `latency` seconds."""

    def __init__(self, size: int, latency: float = 0.001) -> None:
        self.size = size
        self.latency = latency

    async def read(self, offset: int, length: int) -> bytes:
        """Return the bytes, later."""
        await asyncio.sleep(self.latency)
        return content(offset, length)


class Gated(Slow):
    """Answers when a file is there, whichever process asks."""

    def __init__(self, size: int, gate: str) -> None:
        super().__init__(size)
        self.gate = gate

    async def read(self, offset: int, length: int) -> bytes:
        """Return the bytes, later."""
        while not Path(self.gate).exists():  # noqa: ASYNC110 - a file is no event
            await asyncio.sleep(self.latency)
        return await super().read(offset, length)


PAGES = 2048
"""Of `diffs`."""


def diffs(folder: str) -> tuple[list[str], bytes]:
    """Write a base and two layers over it; return their paths, and what is to be seen."""
    paths = [str(Path(folder) / name) for name in ("base", "monday", "tuesday")]
    model = bytearray(PAGES * PAGE)
    for number, path in enumerate(paths):
        with Path(path).open("wb") as file:
            file.truncate(PAGES * PAGE)
            for page in range(number, PAGES, (1, 3, 70)[number]):
                if page % 16 == 9:  # a hole in all
                    continue
                fill = bytes(PAGE) if page % 5 == 3 and number else bytes([1 + number * 50 + page % 50]) * PAGE
                os.pwrite(file.fileno(), fill, page * PAGE)
                model[page * PAGE : (page + 1) * PAGE] = fill
    return paths, bytes(model)


def peek(address: int, length: int = 8) -> bytes:
    """Read memory without holding the GIL, as a native thread would."""
    buffer = ctypes.create_string_buffer(length)
    _libc.memcpy(buffer, address, length)
    return buffer.raw


def left_while_touched(region: aiouffd.Region, monitor: aiouffd.Monitor) -> None:
    """Leave a Monitor's block while a thread goes on touching, with the GIL held at each page, and wait for its end."""
    touched = threading.Semaphore(0)

    def touch() -> None:
        for offset in range(0, len(region), PAGE):
            _ = region[offset]
            touched.release()

    with monitor:
        thread = threading.Thread(target=touch)
        thread.start()
        for _ in range(50):
            touched.acquire()
        assert thread.is_alive()
    thread.join()


class Touchers:
    """Threads that touch pages without the GIL and compare each with what it must be.

    Attributes:
        wrong: (page, bytes) of each page that held something else.
        worst: the longest wait for one page, in seconds.
    """

    def __init__(self, address: int, shares: Sequence[Iterable[int]], *, may_be_zero: bool = False) -> None:
        self.address = address
        self.wrong: list[tuple[int, bytes]] = []
        self._allowed = {bytes(8)} if may_be_zero else set()
        self.threads = [threading.Thread(target=self._touch, args=(share,)) for share in shares]
        for thread in self.threads:
            thread.start()

    def _touch(self, pages: Iterable[int]) -> None:
        for page in pages:
            got = peek(self.address + page * PAGE)
            if got != word(page) and got not in self._allowed:
                self.wrong.append((page, got))

    @property
    def alive(self) -> bool:
        """Whether any of them still touches."""
        return any(thread.is_alive() for thread in self.threads)

    def join(self) -> None:
        """Wait for all."""
        for thread in self.threads:
            thread.join()
