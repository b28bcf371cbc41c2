"""Which pages have been brought already: a hint, which spares reads. The kernel's EEXIST is the truth. Pure data."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["PresentPages"]

_CHUNK = 512  # pages that are kept together, a byte each
_MAX_CHUNKS = 1 << 13
"""More are not remembered, so that memory stays flat: 16 GiB of small pages, in 5 MiB."""
_ONES = b"\1" * _CHUNK
_ZEROS = bytes(_CHUNK)


class PresentPages:
    """A set of pages, by offset. It grows with what is brought, not with what there is.

    All offsets are multiples of the page size; ranges are half-open.

    Args:
        page: bytes.
    """

    __slots__ = ("_chunks", "_page")

    def __init__(self, page: int) -> None:
        self._page = page
        self._chunks: dict[int, bytearray] = {}  # the oldest first

    def claim(self, at: int, start: int, end: int) -> tuple[int, int]:
        """Add what is missing of [start, end) around the page at `at`, and return its start and length.

        The page itself, which lies in [start, end), counts as missing, whatever was known of it.
        """
        page = self._page
        first, last = start // page, end // page
        number, low = divmod(first, _CHUNK)
        high = low + last - first
        if high > _CHUNK:
            return self._claim_across(at, start, end)
        chunk = self._chunks.get(number)
        if chunk is None:
            chunk = self._new(number)
        else:
            middle = at // page % _CHUNK
            low = max(low, chunk.rfind(1, low, middle) + 1)
            behind = chunk.find(1, middle + 1, high)
            if behind >= 0:
                high = behind
        chunk[low:high] = _ONES[: high - low]
        return (number * _CHUNK + low) * page, (high - low) * page

    def _claim_across(self, at: int, start: int, end: int) -> tuple[int, int]:
        self.remove(at, at + self._page)
        for low, length in self.missing(start, end):
            if low <= at < low + length:
                self.add(low, low + length)
                return low, length
        raise AssertionError(f"{at:#x} is not in [{start:#x}, {end:#x})")

    def add(self, start: int, end: int) -> None:
        """Note that [start, end) is present."""
        first, last = start // self._page, end // self._page
        while first < last:
            number, low = divmod(first, _CHUNK)
            high = min(_CHUNK, low + last - first)
            chunk = self._chunks.get(number)
            if chunk is None:
                chunk = self._new(number)
            chunk[low:high] = _ONES[: high - low]
            first += high - low

    def add_pages(self, offsets: Iterable[int]) -> list[int]:
        """Note that single pages are present; return those of them that were not, in order."""
        size, page, find, found = self._page * _CHUNK, self._page, self._chunks.get, list[int]()
        for offset in offsets:
            chunk = find(offset // size) or self._new(offset // size)
            index = offset % size // page
            if not chunk[index]:
                chunk[index] = 1
                found.append(offset)
        return found

    def remove(self, start: int, end: int) -> None:
        """Note that [start, end) is missing."""
        first, last = start // self._page, end // self._page
        numbers = range(first // _CHUNK, (last + _CHUNK - 1) // _CHUNK)
        for number in [known for known in self._chunks if known in numbers] if len(numbers) > 1 else numbers:
            chunk = self._chunks.get(number)
            if chunk is not None:
                low, high = max(0, first - number * _CHUNK), min(_CHUNK, last - number * _CHUNK)
                chunk[low:high] = _ZEROS[: high - low]

    def missing(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return (start, length) of what is not known to be present of [start, end), in order, joined."""
        page = self._page
        found: list[tuple[int, int]] = []
        first, last = start // page, end // page
        if first < last and first // _CHUNK == (last - 1) // _CHUNK and first // _CHUNK not in self._chunks:
            return [(start, end - start)]
        begin = -1  # of the gap that is being followed
        while first < last:
            number, low = divmod(first, _CHUNK)
            high = min(_CHUNK, low + last - first)
            chunk = self._chunks.get(number, _ZEROS)
            base = first - low
            while low < high:
                if begin < 0:
                    low = chunk.find(0, low, high)
                    if low < 0:
                        break
                    begin = base + low
                low = chunk.find(1, low, high)
                if low < 0:
                    break
                found.append((begin * page, (base + low - begin) * page))
                begin = -1
            first = base + high
        if begin >= 0:
            found.append((begin * page, (last - begin) * page))
        return found

    def __contains__(self, offset: int) -> bool:
        number, index = divmod(offset // self._page, _CHUNK)
        chunk = self._chunks.get(number)
        return chunk is not None and chunk[index] == 1

    def _new(self, number: int) -> bytearray:
        if len(self._chunks) >= _MAX_CHUNKS:
            del self._chunks[next(iter(self._chunks))]
        chunk = self._chunks[number] = bytearray(_CHUNK)
        return chunk
