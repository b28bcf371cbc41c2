"""Reads what a file says of itself. Nothing is believed: each place is checked before it is read."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

from aiouffd.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiouffd.kernel.region import Region

__all__ = ["Cursor", "Header", "file_of", "shown"]

_LARGEST: Final = (1 << 63) - 1  # numpy and torch count bytes and elements in 64 bits
_DIMENSIONS: Final = 64  # numpy's limit
_FIRST_BLOCK, _LARGEST_BLOCK = 64 << 10, 2 << 20


def file_of(region: Region) -> str:
    """Return what a region shows, as text."""
    return repr(region if region.monitor is None else region.monitor.origin)


def shown(thing: Any) -> str:
    """Return a text for an error. That of all of it may fill any memory: a pickle can have a thing in itself twice."""
    if isinstance(thing, list | tuple):
        return f"[{', '.join(map(_short, thing[:8]))}]"
    return _short(thing)


def _short(thing: Any) -> str:
    return f"{thing!r:.40}" if thing is None or isinstance(thing, int | float | str) else type(thing).__name__


class Header:
    """The bytes of a region, in pieces that are brought first. Blocks until they have come.

    Args:
        region: of the file.
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        self.size: int = len(region)

    def wrong(self, at: int, reason: str) -> FormatError:
        """Return the error that says what is wrong at an offset."""
        return FormatError(file_of(self.region), at, reason)

    def bring(self, start: int, length: int, what: str) -> None:
        """Have a range present, after looking whether the file has it.

        Raises:
            FormatError: it has not.
            SourceError: it could not be had.
        """
        if start < 0 or length < 0 or start + length > self.size:
            raise self.wrong(start, f"{what} has {length} bytes, and the file ends at {self.size}")
        if length:
            self.region.bring(start, length)

    def take(self, start: int, length: int, what: str) -> bytes:
        """Return a copy of some bytes. Raises as `bring`."""
        self.bring(start, length, what)
        return self.region[start : start + length]

    def size_of(self, at: int, shape: Sequence[Any], bits: int, what: str) -> int:
        """Return how many bytes an array has.

        Raises:
            FormatError: its shape is none, or it is larger than any machine can have.
        """
        if len(shape) > _DIMENSIONS:
            raise self.wrong(at, f"{what} has {len(shape)} dimensions, and {_DIMENSIONS} are the most")
        total, largest = bits, max(bits, 8)
        for number in shape:
            if type(number) is not int or number < 0:
                raise self.wrong(at, f"{what} has the shape {shown(list(shape))}")
            total *= number
            largest *= number or 1  # numpy refuses what would be too large without its zeros
        if largest > 8 * _LARGEST:
            raise self.wrong(at, f"{what} has the shape {list(shape)!r:.80}, which no memory can hold")
        if total % 8:
            raise self.wrong(at, f"{what} has {total} bits, which are no whole bytes")
        return total // 8


class Cursor:
    """Reads a header whose length is not known, from its beginning on, in blocks that grow.

    Args:
        header: the file.
        at: where to begin.
        most: where the header ends at the latest; what claims to reach farther is wrong.
    """

    def __init__(self, header: Header, at: int, most: int) -> None:
        self.at: int = at
        self._header = header
        self._end = min(most, header.size)
        self._there = at

    def skip(self, length: int, what: str) -> int:
        """Go over some bytes, which are present then, and return where they begin."""
        start, end = self.at, self.at + length
        if end > self._end:
            raise self._header.wrong(
                start, f"{what} has {length} bytes, and the header ends at {self._end} at the latest"
            )
        if end > self._there:
            block = min(max(_FIRST_BLOCK, self._there), _LARGEST_BLOCK)
            self._there = min(max(end, self._there + block), self._end)
            self._header.bring(start, self._there - start, what)
        self.at = end
        return start

    def take(self, length: int, what: str) -> bytes:
        """Return the next bytes."""
        start = self.skip(length, what)
        return self._header.region[start : start + length]

    def numbers(self, form: str, count: int, what: str) -> tuple[Any, ...]:
        """Return the next numbers, little-endian, of one struct format."""
        return struct.unpack(f"<{count}{form}", self.take(struct.calcsize(f"<{form}") * count, what))

    def number(self, form: str, what: str) -> Any:
        """Return the next number."""
        return self.numbers(form, 1, what)[0]

    def text(self, most: int, what: str) -> str:
        """Return the next text, whose length (64 bits) stands before it."""
        at = self.at
        length = self.number("Q", what)
        if length > most:
            raise self._header.wrong(at, f"{what} has {length} bytes, and {most} are the most")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self._header.wrong(at, f"{what} is no UTF-8: {error.reason}") from None
