"""Several sources as one."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiouffd.sources.base import Source

__all__ = ["ConcatSource"]

_ALIGNMENT = 2 << 20


class ConcatSource:
    """Several sources, one behind the other. Each begins at a multiple of 2 MiB; the gaps must not be read.

    A read, and each question about bytes, goes to the part that they are in. It must not reach behind that part.

    Args:
        parts: at least one. They belong to this source.

    Attributes:
        starts: where each part begins.
        size: in bytes.
    """

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts: list[Source] = list(parts)
        self.starts: list[int] = []
        self.size: int = 0
        for part in self.parts:
            self.starts.append(self.size)
            self.size += (part.size // _ALIGNMENT + 1) * _ALIGNMENT  # a gap behind each part, at least one byte

    @property
    def local(self) -> bool:
        """Whether all parts may have bytes without waiting."""
        quick = (getattr(part, "local", hasattr(part, "locate") or hasattr(part, "read_nowait")) for part in self.parts)
        return all(quick)

    def _find(self, offset: int) -> tuple[Any, int]:
        """Return (part, offset in it)."""
        index = bisect_right(self.starts, offset) - 1
        return self.parts[index], offset - self.starts[index]

    def locate(self, offset: int, length: int) -> int | None:
        """Return the address of the bytes, or None."""
        part, at = self._find(offset)
        locate = getattr(part, "locate", None)
        return None if locate is None else locate(at, length)

    def expect(self, offset: int, length: int) -> None:
        """Pass the hint on to one part."""
        if offset < self.size:
            part, at = self._find(offset)
            expect = getattr(part, "expect", None)
            if expect is not None:
                expect(at, length)

    def page(self, offset: int, length: int) -> int | None:
        """Return the address of the bytes until the next call, or None."""
        part, at = self._find(offset)
        page = getattr(part, "page", None) or getattr(part, "locate", None)
        return None if page is None else page(at, length)

    def blank(self, offset: int, length: int, block: int) -> list[int]:
        """Return where blocks of zeros begin, relative to `offset`."""
        part, at = self._find(offset)
        blank = getattr(part, "blank", None)
        return [] if blank is None else blank(at, length, block)

    def read_nowait(self, offset: int, length: int) -> Any:
        """Return the bytes if they can be had without waiting, or None."""
        part, at = self._find(offset)
        read_nowait = getattr(part, "read_nowait", None)
        return None if read_nowait is None else read_nowait(at, length)

    async def read(self, offset: int, length: int) -> Any:
        """Return the bytes. Errors are those of the part."""
        part, at = self._find(offset)
        return await part.read(at, length)

    async def aclose(self) -> None:
        """Close all parts."""
        for part in self.parts:
            close = getattr(part, "aclose", None)
            if close is not None:
                await close()

    def __repr__(self) -> str:
        return f"ConcatSource({self.parts!r})"
