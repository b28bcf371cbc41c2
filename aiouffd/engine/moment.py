"""The image of a memory at a moment, as threads read it while its own threads write on."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

from aiouffd.ranges import align_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiouffd.engine.capture import Capture
    from aiouffd.kernel.memory import ProcessMemory
    from aiouffd.ranges import Range

__all__ = ["Moment"]


class Moment:
    """What `store.image.Image` is. Each byte is read once, in whole pages, by any thread but the loop's.

    Args:
        capture: whose moment has been.
        memory: reads it; stays the caller's.
        size: bytes of the image, which ends within the last page perhaps.
        rate: bytes in a second that are read at most; None: as fast as it goes.
        extents: of the capture.
        lifts: the pages that were read may be written unnoticed.
        changed: what alone is read; None: all that may not be zeros.

    Attributes:
        bytes_read: how many bytes were read.
        total: how many are to be read, or some more.
    """

    def __init__(
        self,
        capture: Capture,
        memory: ProcessMemory,
        size: int,
        rate: float | None,
        *,
        extents: list[Range],
        lifts: bool,
        changed: list[Range] | None = None,
    ) -> None:
        self.size = size
        self.bytes_read: int = 0
        self._capture = capture
        self._memory = memory
        self._loop = asyncio.get_running_loop()
        self._extents = extents
        self.total: int = sum(item.length for item in (extents if changed is None else changed))
        self._rate = rate
        self._lock = threading.Lock()
        self._next = time.monotonic()
        self._lifts = lifts

    def extents(self) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of what may not be zeros, in order."""
        return ((item.start, min(item.end, self.size)) for item in self._extents if item.start < self.size)

    def read(self, offset: int, length: int) -> Any:
        """Return these bytes. Blocks.

        Raises:
            LayoutChangingError, ClosedError: there is no such moment any more.
            SourceError: missing pages could not be read.
        """
        page, capture = self._capture.page, self._capture
        self._pace(length)
        first, last = offset // page, align_up(offset + length, page) // page
        data = bytearray((last - first) * page)
        view = memoryview(data)
        lost: list[int] = []
        for low, high in capture.to_read(first, last):
            part = view[(low - first) * page : (high - first) * page]
            lost += (at // page for at in self._memory.read_into(part, low * page))
        for at, found in self._ask(capture.read(first, last, lost, lifts=self._lifts)):
            piece = memoryview(found).cast("B")
            view[at - first * page : at - first * page + len(piece)] = piece
        with self._lock:
            self.bytes_read += length
        return view[:length]

    def close(self) -> None:
        """Raise if the image is of no moment: as `read`."""
        self._ask(self._check())

    async def _check(self) -> None:
        self._capture.check()

    def _ask(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _pace(self, length: int) -> None:
        if self._rate is None:
            return
        with self._lock:
            self._next = until = max(self._next, time.monotonic()) + length / self._rate
        while (left := until - time.monotonic()) > 0 and self._capture.failure is None:
            time.sleep(min(left, 0.05))
