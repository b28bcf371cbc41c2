"""Half-open ranges of integers, and sets of them. Pure arithmetic, no I/O."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, NewType, Self, TypeVar

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Address", "Offset", "Range", "RangeSet", "align_down", "align_up", "batched", "joined", "pieces"]

T = TypeVar("T")

_UPPER_HALF = 1 << (47 if os.uname().machine == "aarch64" else 46)
"""The address space of a process ends at twice this. mmap(2) returns addresses of its upper half."""

Address = NewType("Address", int)
"""A place in the address space of the process that owns the memory."""
Offset = NewType("Offset", int)
"""A place in a region or in its source. To use one as an `Address` would corrupt memory: hence two types."""


def align_down(value: int, alignment: int) -> int:
    """Return the largest multiple of `alignment` (a power of two) that is at most `value`."""
    return value & -alignment


def align_up(value: int, alignment: int) -> int:
    """Return the smallest multiple of `alignment` (a power of two) that is at least `value`."""
    return (value + alignment - 1) & -alignment


def pieces(start: int, end: int, alignment: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield (start, length) of [start, end), widened to `alignment`, cut at the multiples of `step`."""
    at, end = align_down(start, alignment), align_up(end, alignment)
    step = max(step, alignment)
    while at < end:
        cut = min(at - at % step + step, end)
        yield at, cut - at
        at = cut


def batched(items: Iterable[T], most: int) -> Iterator[list[T]]:
    """Yield the items in lists of `most`, the last one of what is left. `itertools` has one from Python 3.12 on."""
    rest = iter(items)
    while some := list(islice(rest, most)):
        yield some


def joined(parts: Iterable[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    """Return (start, length) in order of start, where those are one that no more than `gap` lies between."""
    found: list[tuple[int, int]] = []
    for start, length in parts:
        if found and start - sum(found[-1]) <= gap:
            found[-1] = found[-1][0], start + length - found[-1][0]
        else:
            found.append((start, length))
    return found


@attrs.frozen(order=True)
class Range:
    """`length` bytes from `start` on, of offsets or of addresses. `Range.between` takes an end in place of a length.

    Raises:
        ValueError: `start` or `length` is negative, or both are addresses as mmap(2) returns them: an end was passed
            as the length.
    """

    start: int
    length: int

    def __attrs_post_init__(self) -> None:
        if self.start < 0 or self.length < 0 or _UPPER_HALF <= self.start <= self.length < 2 * _UPPER_HALF:
            raise ValueError(
                f"Range({self.start:#x}, {self.length:#x}): start and length must not be negative, and the length no"
                " address. Was an end passed as the length? Range.between(start, end) takes one"
            )

    @classmethod
    def between(cls, start: int, end: int) -> Self:
        """Return the range [start, end)."""
        return cls(start, end - start)

    @property
    def end(self) -> int:
        """The first byte behind the range."""
        return self.start + self.length

    def __contains__(self, value: int) -> bool:
        return self.start <= value < self.start + self.length

    def __str__(self) -> str:
        return f"[{self.start:#x}, {self.end:#x})"


class RangeSet:
    """A set of integers, kept as sorted, disjoint, non-adjacent ranges.

    Adding and removing cost O(log n), and a shift of the lists. A set with a `limit` keeps at most so many ranges: it
    ignores a new one that touches none of them. So it is only a hint.
    """

    __slots__ = ("_ends", "_limit", "_starts")

    def __init__(self, ranges: Iterable[Range] = (), *, limit: int | None = None) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._limit = limit
        for item in ranges:
            self.add(item.start, item.end)

    def add(self, start: int, end: int) -> None:
        """Put [start, end) into the set."""
        if start >= end:
            return
        starts, ends = self._starts, self._ends
        if self._limit is None and (not ends or ends[-1] < start):  # behind all others, as most come
            starts.append(start)
            ends.append(end)
            return
        low = bisect_left(ends, start)  # the first range that ends at or behind `start` touches the new one
        high = bisect_right(starts, end)
        if low < high:
            start = min(start, starts[low])
            end = max(end, ends[high - 1])
        elif self._limit is not None and len(starts) >= self._limit:
            return
        starts[low:high] = [start]
        ends[low:high] = [end]

    def remove(self, start: int, end: int) -> None:
        """Take [start, end) out of the set."""
        if start >= end:
            return
        starts, ends = self._starts, self._ends
        low = bisect_right(ends, start)
        high = bisect_left(starts, end)
        if low >= high:
            return
        left = (starts[low], start) if starts[low] < start else None
        right = (end, ends[high - 1]) if ends[high - 1] > end else None
        kept = [piece for piece in (left, right) if piece is not None]
        starts[low:high] = [piece[0] for piece in kept]
        ends[low:high] = [piece[1] for piece in kept]

    def __contains__(self, value: int) -> bool:
        index = bisect_right(self._starts, value) - 1
        return index >= 0 and value < self._ends[index]

    def touches(self, start: int, end: int) -> bool:
        """Tell whether any of [start, end) is in the set."""
        index = bisect_right(self._ends, start)
        return start < end and index < len(self._starts) and self._starts[index] < end

    def gaps(self, start: int, end: int) -> Iterator[Range]:
        """Yield the parts of [start, end) that are not in the set, in order. The set must not change meanwhile."""
        index = bisect_right(self._ends, start)
        while start < end and index < len(self._starts) and self._starts[index] < end:
            if self._starts[index] > start:
                yield Range.between(start, self._starts[index])
            start = self._ends[index]
            index += 1
        if start < end:
            yield Range.between(start, end)

    def __iter__(self) -> Iterator[Range]:
        for start, end in self.bounds():
            yield Range.between(start, end)

    def bounds(self) -> Iterator[tuple[int, int]]:
        """Yield the start and end of each range, in order: a `Range` of each takes a microsecond."""
        return zip(self._starts, self._ends, strict=True)

    def __len__(self) -> int:
        """Return the number of ranges, not of integers."""
        return len(self._starts)

    @property
    def total(self) -> int:
        """How many integers are in the set."""
        return sum(self._ends) - sum(self._starts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RangeSet) and self._starts == other._starts and self._ends == other._ends

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"RangeSet([{', '.join(map(str, self))}])"
