"""The chunks of a source: where each begins, and what names it in a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from aiouffd.store.codecs import digest

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ChunkNames"]

_SIZE: Final = 64 << 10  # of a source that has none of its own


class ChunkNames:
    """The chunks of one source. Making it may block, and raises as the source's `size`.

    Args:
        source: with `chunk_size` and `chunk_key(number)`, which names a chunk by its hash (None: it is zeros); or with
            `cache_identity`, which says what only the same bytes have (None: the source does not know).

    Attributes:
        size: bytes of the source.
        chunk_size: bytes of a chunk; the last may be shorter.
        known: whether chunks have names.
    """

    def __init__(self, source: Any) -> None:
        self.size: int = source.size
        self._key = getattr(source, "chunk_key", None)
        self.chunk_size: int = _SIZE if self._key is None else source.chunk_size
        identity = getattr(source, "cache_identity", None)
        self.known: bool = self._key is not None or identity is not None
        self._prefix = digest(repr(identity).encode()) if self._key is None and self.known else b""

    def of(self, number: int) -> bytes | None:
        """Return what names a chunk; None: it is zeros."""
        if self._key is not None:
            key: bytes | None = self._key(number)
            return key
        return digest(self._prefix + number.to_bytes(8, "little"))

    def fit(self, number: int, data: Any) -> bool:
        """Tell whether a chunk may be kept under its name: all snapshots that name its hash will get these bytes."""
        return self._key is None or digest(data) == self._key(number)

    def length(self, number: int) -> int:
        """Return the bytes of a chunk; 0 or less: there is none."""
        return min(self.chunk_size, self.size - number * self.chunk_size)

    def range(self, offset: int, length: int) -> range:
        """Return the chunks that [offset, offset + length) lies in."""
        return range(offset // self.chunk_size, -(-(offset + length) // self.chunk_size))

    def pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Yield (chunk, start in it, end in it) of [offset, offset + length)."""
        for number in self.range(offset, length):
            base = number * self.chunk_size
            yield number, max(offset - base, 0), min(offset + length - base, self.chunk_size)

    def runs(self, numbers: list[int], most: int) -> list[list[int]]:
        """Return chunks in groups that follow each other, of at most `most` bytes where there is more than one."""
        limit = max(1, most // self.chunk_size)
        runs: list[list[int]] = []
        for number in numbers:
            if runs and runs[-1][-1] + 1 == number and len(runs[-1]) < limit:
                runs[-1].append(number)
            else:
                runs.append([number])
        return runs
