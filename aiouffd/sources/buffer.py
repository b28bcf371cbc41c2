"""Bytes in memory."""

from __future__ import annotations

from typing import Any

from aiouffd.kernel.memory import SealedMemory, address_of, zero_blocks
from aiouffd.sources.base import Descriptor

__all__ = ["BufferSource"]


class BufferSource:
    """The bytes of any contiguous buffer, which must not change while it is served.

    Served in this process, only the pages themselves are copied. To a pager the bytes travel in a sealed memfd: one
    copy, made once, which all pagers share.

    Raises:
        ValueError: the buffer is not C-contiguous.
    """

    def __init__(self, data: Any) -> None:
        view = memoryview(data)
        if not view.c_contiguous:
            raise ValueError("a BufferSource takes a C-contiguous buffer")
        self.size: int = view.nbytes
        # A bytearray with a view refuses to be resized, which would change its address.
        self._view = view.cast("B") if self.size else memoryview(b"")
        self._address = address_of(view) if self.size else 0
        self._sealed: SealedMemory | None = None

    @classmethod
    def from_sealed(cls, descriptor: Descriptor) -> BufferSource:
        """Map the bytes of a sealed memfd."""
        sealed = SealedMemory(descriptor.detach())
        source = cls(sealed.map if sealed.map is not None else b"")
        source._sealed = sealed
        return source

    def locate(self, offset: int, length: int) -> int | None:
        """Return the address of the bytes."""
        return self._address + offset

    def blank(self, offset: int, length: int, block: int) -> list[int]:
        """Return where blocks of zeros begin, relative to `offset`."""
        return zero_blocks(self._view[offset : offset + length], block)

    def memory(self) -> tuple[int, int, int, int]:
        """Return (address, size, -1, 0)."""
        return self._address, self.size, -1, 0

    def read_nowait(self, offset: int, length: int) -> memoryview:
        """Return a view of the bytes."""
        return self._view[offset : offset + length]

    def sample(self, offset: int, length: int) -> bytes:
        """Return some bytes, to tell this buffer from others."""
        return bytes(self._view[offset : offset + length])

    async def read(self, offset: int, length: int) -> memoryview:
        """Return a view of the bytes."""
        return self.read_nowait(offset, length)

    def travel(self) -> tuple[Any, tuple[Any, ...]]:
        """Return what makes this source from its sealed memfd."""
        if self._sealed is None:
            self._sealed = SealedMemory.from_buffer(self._view)
        return BufferSource.from_sealed, (Descriptor(self._sealed.fd),)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return BufferSource, (bytes(self._view),)

    def __repr__(self) -> str:
        return f"BufferSource({self.size} bytes)"
