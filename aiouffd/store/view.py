"""The chunks of a source that lie in segments, mapped side by side: the native part copies pages from there.

Addresses are reserved for the whole source, and cannot be read. A chunk that has been checked is mapped in its place.
When its segment goes, the place is made unreadable again: a COPY from there fails, and is not of other bytes.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from typing import TYPE_CHECKING, Final

from aiouffd.kernel import libc
from aiouffd.kernel.memory import MAP_NORESERVE, address_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["View"]

_UNIT: Final = 64 << 10  # bytes of the source, for which the native part has one to mark
_MARKS: Final = 64 << 10  # that are looked at together
_MOST: Final = 16 << 10  # pieces that are mapped in a process: each may take two of its 65,530 mappings
_pieces = [0]  # of all views
_lock = threading.Lock()  # of all views


class View:
    """Thread-safe.

    Args:
        size: of the source, in bytes.

    Attributes:
        address: where the first byte of the source would be.
        marks: the address of a byte for each 64 KiB of the source, which the native part sets to 1 when it copies.

    Raises:
        OSError: there are no addresses for it.
    """

    def __init__(self, size: int) -> None:
        self.length: int = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self._map = mmap.mmap(-1, self.length, flags=flags, prot=0)
        self.address: int = address_of(self._map)
        self._used = mmap.mmap(-1, -(-size // _UNIT), flags=flags & ~MAP_NORESERVE)  # no memory before it is written
        self.marks: int = address_of(self._used)
        self._shown: set[int] = set()
        self._closed = False

    def has(self, offset: int) -> bool:
        """Tell whether the piece that begins there is shown."""
        return offset in self._shown

    def show(self, offset: int, length: int, fd: int, at: int, unit: int = 0) -> None:
        """Map whole pages of a file in their place, if there may be more mappings.

        Args:
            offset: in the source.
            length: in bytes.
            fd: of the file.
            at: where they are in the file.
            unit: bytes of a piece, if they are several, which can be hidden one by one; none of them is shown.
        """
        pieces = range(offset, offset + length, unit or length or 1)
        with contextlib.suppress(OSError):
            with _lock:
                if self._closed or offset in self._shown or _pieces[0] + len(pieces) > _MOST or not length:
                    return
                libc.mmap_fixed(self.address + offset, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, at)
                self._shown.update(pieces)
                _pieces[0] += len(pieces)
            libc.madvise(self.address + offset, length, libc.MADV_POPULATE_READ)  # takes longer than all else

    def hide(self, offset: int, length: int) -> None:
        """Show nothing there any more."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        with _lock:
            if offset in self._shown:
                libc.mmap_fixed(self.address + offset, length, 0, flags)
                self._shown.discard(offset)
                _pieces[0] -= 1

    def used(self) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of what the native part has copied some of, since the last call."""
        for start in range(0, len(self._used), _MARKS):
            marks = self._used[start : start + _MARKS]
            at = marks.find(1)
            while at >= 0:
                self._used[start + at] = 0
                yield (start + at) * _UNIT, _UNIT
                at = marks.find(1, at + 1)

    def close(self) -> None:
        """Give the addresses up."""
        with _lock:
            self._closed = True
            _pieces[0] -= len(self._shown)
            self._shown.clear()
            self._map.close()
