"""Memory for large answers that is used again.

Fresh memory costs a page fault and a write of zeros for each page. Memory that was just copied from is also still in
the processor's caches. A room is one huge page where the kernel has one: it is received into and copied from with fewer
TLB misses.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref

__all__ = ["Rooms"]

_SIZE = 2 << 20  # bytes of a room: the largest read of the engine, and a huge page
_LEAST = _SIZE // 2  # a smaller buffer does not pay for a room
_MOST_KEPT = 32

_Loan = ctypes.c_ubyte * _SIZE


class Rooms:
    """Lends buffers, and lends their memory again when nobody can read it any more. Thread-safe.

    A buffer comes back with the end of the last view of it, whoever has that and however that ends. So there is
    nothing to give back, and nobody sees the bytes of another answer.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def lend(self, length: int) -> memoryview:
        """Return a buffer of `length` bytes. What they hold is not defined."""
        if not _LEAST <= length <= _SIZE:
            return memoryview(bytearray(length))
        room = self._unseen()
        loan = _Loan.from_buffer(room)
        weakref.finalize(loan, self._came_back, room).atexit = False
        # The engine may have moved the page away. The kernel fills a new one with zeros from its first byte on where it
        # is touched at its end: that takes half as long as the other way round (Linux 6.18).
        ctypes.memset(ctypes.addressof(loan) + _SIZE - 1, 0, 1)
        return memoryview(loan).cast("B")[:length]

    def _unseen(self) -> mmap.mmap:
        while True:
            try:
                room = self._free.pop()
            except IndexError:  # also where another thread has taken it
                return _new()
            # The last view may be garbage in a cycle, whose finalizers run after `_came_back`, and may keep it.
            with contextlib.suppress(BufferError):
                room.resize(_SIZE)  # changes nothing
                return room

    def _came_back(self, room: mmap.mmap) -> None:
        if len(self._free) < _MOST_KEPT:
            self._free.append(room)

    def clear(self) -> None:
        """Free the memory that is not lent."""
        self._free.clear()


def _new() -> mmap.mmap:
    room = mmap.mmap(-1, _SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        room.madvise(mmap.MADV_HUGEPAGE)
    return room
