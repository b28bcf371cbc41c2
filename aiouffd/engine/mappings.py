"""Which address holds which offset now. Pure data: layout events in, look-ups out.

A mapping is a run of addresses that shows a run of offsets, or zeros: what was removed (MADV_DONTNEED,
MADV_REMOVE) reads as zeros afterwards, as the man page of madvise(2) promises, and not as the source's data.
An address that is in no mapping but faults all the same belongs to memory that grew: that is zeros, too.
"""

from __future__ import annotations

import itertools
import operator
from array import array
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self, TypeVar

import attrs

from aiouffd.ranges import Range, RangeSet

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["ZEROS", "Mapping", "Mappings"]


class _Mapped(Protocol):
    """What has mappings."""

    mappings: Mappings


_T = TypeVar("_T", bound=_Mapped)

ZEROS = -1
"""In place of an offset: these addresses hold zeros."""

_Left = tuple[int, int, "list[tuple[int, int]] | None"]
"""As `Mappings.left` has it: plain values."""

_MAX_LEFT = 1 << 10  # moves of so many threads at once; UNMAP does not come after MREMAP_DONTUNMAP


class Mapping(NamedTuple):
    """Addresses [start, end) show the offsets from `offset` on, or `ZEROS`."""

    start: int
    end: int
    offset: int


_start_of = operator.attrgetter("start")


@attrs.define(eq=False, repr=False)
class _Index:
    """Mappings by the offsets that they show.

    Attributes:
        generation: of the `Mappings` that this was made of; -1: of none.
        rows: offset, start and end of each that shows offsets, sorted.
        reach: the highest offset that each row or one before it ends at: two mappings may show the same offsets.
    """

    generation: int = -1
    rows: list[tuple[int, int, int]] = attrs.field(factory=list)
    reach: list[int] = attrs.field(factory=list)

    @classmethod
    def of(cls, starts: list[int], ends: list[int], offsets: list[int], generation: int) -> Self:
        """Make one."""
        rows = sorted(row for row in zip(offsets, starts, ends, strict=True) if row[0] != ZEROS)
        reach = list(itertools.accumulate((first + end - start for first, start, end in rows), max))
        return cls(generation, rows, reach)

    def between(self, offset: int, end: int) -> list[tuple[int, int, int]]:
        """Return the rows among which those are that show some of [offset, end)."""
        return self.rows[bisect_right(self.reach, offset) : bisect_left(self.rows, (end,))]


class Mappings:
    """Sorted, disjoint mappings of one address space.

    Args:
        mappings: what is shown.
        left: as `left` of another one.

    Attributes:
        generation: goes up with each change.
    """

    __slots__ = ("_ends", "_index", "_left", "_offsets", "_starts", "generation")

    def __init__(self, mappings: Iterable[Mapping] = (), left: Iterable[_Left] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._offsets: list[int] = []
        self._index = _Index()
        # What was moved away, and is to be told of once more; the oldest first. Of shared memory, which stays where it
        # was until UNMAP: what of it is still shown there.
        self._left: dict[tuple[int, int], RangeSet | None] = {
            (start, end): None if shown is None else RangeSet(Range.between(*each) for each in shown)
            for start, end, shown in left
        }
        self.generation: int = 0
        for mapping in mappings:
            if not self._ends or mapping.start > self._ends[-1]:  # in order, as most come: nothing to look for
                self._starts.append(mapping.start)
                self._ends.append(mapping.end)
                self._offsets.append(mapping.offset)
            else:
                self.add(mapping.start, mapping.end, mapping.offset)

    def find(self, address: int) -> Mapping | None:
        """Return the mapping that `address` is in."""
        index = bisect_right(self._starts, address) - 1
        if index < 0 or address >= self._ends[index]:
            return None
        return Mapping(self._starts[index], self._ends[index], self._offsets[index])

    def locate(self, address: int) -> tuple[int, int, int]:
        """Return (start, end, offset of start) of the mapping around `address`; (0, 0, ZEROS) where none is.

        The same as `find`, for the hot path: no object is made.
        """
        index = bisect_right(self._starts, address) - 1
        if index < 0 or address >= self._ends[index]:
            return (0, 0, ZEROS)
        return (self._starts[index], self._ends[index], self._offsets[index])

    def runs(self, start: int, end: int) -> Iterator[Mapping]:
        """Yield the parts of [start, end) that are mapped, in order, each cut to the range."""
        index = max(bisect_right(self._starts, start) - 1, 0)
        while index < len(self._starts) and self._starts[index] < end:
            low, high = max(start, self._starts[index]), min(end, self._ends[index])
            if low < high:
                yield Mapping(low, high, self._shifted(index, low))
            index += 1

    def addresses(self, offset: int, end: int) -> list[Mapping]:
        """Return where the offsets [offset, end) are shown, in order of address.

        The first look after a change sorts all mappings by their offsets; the next ones look at few.
        """
        if self._index.generation != self.generation:
            self._index = _Index.of(self._starts, self._ends, self._offsets, self.generation)
        found = []
        for first, start, stop in self._index.between(offset, end):
            low, high = max(offset, first), min(end, first + stop - start)
            if low < high:
                found.append(Mapping(start + low - first, start + high - first, low))
        return found if len(found) < 2 else sorted(found, key=_start_of)

    def alike(self, start: int, end: int, others: Iterable[_T]) -> list[tuple[_T, int, int]]:
        """Return where others show the offsets that [start, end) shows: (which, start, end) of each place.

        Args:
            start: an address.
            end: likewise.
            others: that show the same image.
        """
        spans = [(run.offset, run.offset + run.end - run.start) for run in self.runs(start, end) if run.offset != ZEROS]
        return [
            (other, shown.start, shown.end)
            for other in others
            for low, high in spans
            for shown in other.mappings.addresses(low, high)
        ]

    def add(self, start: int, end: int, offset: int) -> None:
        """Show `offset` (or ZEROS) at [start, end), in place of whatever was shown there."""
        self._cut(start, end)
        index = bisect_right(self._starts, start)
        starts, ends, offsets = self._starts, self._ends, self._offsets
        starts.insert(index, start)
        ends.insert(index, end)
        offsets.insert(index, offset)
        # Merging keeps a balloon that gives back page by page from growing the list without end.
        if index + 1 < len(starts) and self._continues(index):
            ends[index] = ends[index + 1]
            del starts[index + 1], ends[index + 1], offsets[index + 1]
        if index > 0 and self._continues(index - 1):
            ends[index - 1] = ends[index]
            del starts[index], ends[index], offsets[index]

    def unmapped(self, start: int, end: int) -> None:
        """UNMAP: nothing is at [start, end) any more.

        A move is told by REMAP, and then by UNMAP of its old place. Another thread may have moved other memory there
        before that, and its REMAP comes first: so what REMAP has told is not told again by UNMAP.
        """
        if (start, end) not in self._left:
            self.unmap(start, end)
        elif (shown := self._left.pop((start, end))) is not None:
            for low, high in list(shown.bounds()):
                self.unmap(low, high)

    def unmap(self, start: int, end: int) -> None:
        """Show nothing at [start, end) any more: what was there has gone, or something else comes there."""
        for shown in filter(None, self._left.values()):
            shown.remove(start, end)
        self._cut(start, end)

    def _cut(self, start: int, end: int) -> None:
        self.generation += 1
        low = bisect_right(self._ends, start)
        starts, ends, offsets = self._starts, self._ends, self._offsets
        high = low
        kept: list[tuple[int, int, int]] = []
        while high < len(starts) and starts[high] < end:
            if starts[high] < start:
                kept.append((starts[high], start, offsets[high]))
            if ends[high] > end:
                kept.append((end, ends[high], self._shifted(high, end)))
            high += 1
        if low < high:
            starts[low:high] = [item[0] for item in kept]
            ends[low:high] = [item[1] for item in kept]
            offsets[low:high] = [item[2] for item in kept]

    def remove(self, start: int, end: int) -> None:
        """REMOVE: what is mapped of [start, end) holds zeros from now on."""
        for run in list(self.runs(start, end)):
            if run.offset != ZEROS:
                self.add(run.start, run.end, ZEROS)
        self.generation += 1

    def remap(self, source: int, destination: int, length: int, *, shared: bool = False) -> None:
        """REMAP: [source, source + length) was moved to `destination`, over whatever was there.

        Shared memory stays where it was as well, if no UNMAP comes (MREMAP_DONTUNMAP): the old place shows the same
        file, and what is missing there is missing in the file. Private memory is zeros there.
        """
        end, moved = source + length, list(self.runs(source, source + length))
        if not shared:
            self.unmap(source, end)
        self.unmap(destination, destination + length)
        if len(self._left) == _MAX_LEFT:
            del self._left[next(iter(self._left))]
        self._left[source, end] = RangeSet(Range.between(run.start, run.end) for run in moved) if shared else None
        for run in moved:
            start = run.start - source + destination
            self.add(start, start + run.end - run.start, run.offset)

    @property
    def left(self) -> list[_Left]:
        """What was moved away and UNMAP has not told of, for `__init__`: start, end, and what of it is still shown."""
        return [
            (start, end, None if shown is None else list(shown.bounds())) for (start, end), shown in self._left.items()
        ]

    def pack(self, start: int, most: int) -> tuple[bytes, int]:
        """Return mappings from the address `start` on, at most so many, as bytes for `unpack`; and where they end.

        A mapping that begins below `start` is cut there.
        """
        index = bisect_right(self._ends, start)
        starts, ends, offsets = (
            array("q", column[index : index + most]) for column in (self._starts, self._ends, self._offsets)
        )
        if starts and starts[0] < start:
            starts[0], offsets[0] = start, self._shifted(index, start)
        return b"".join(column.tobytes() for column in (starts, ends, offsets)), ends[-1] if ends else start

    def unpack(self, data: bytes) -> None:
        """Add what `pack` has returned."""
        count = len(data) // 24
        numbers = memoryview(data).cast("q")
        starts, ends, offsets = (numbers[at * count : (at + 1) * count].tolist() for at in range(3))
        if not count:
            return
        if not self._ends or starts[0] >= self._ends[-1]:
            # In order, as most come: only the first may continue a mapping.
            self.add(starts[0], ends[0], offsets[0])
            self._starts += starts[1:]
            self._ends += ends[1:]
            self._offsets += offsets[1:]
        else:
            for start, end, offset in zip(starts, ends, offsets, strict=True):
                self.add(start, end, offset)

    def copy(self) -> Self:
        """FORK: return the child's mappings, equal and independent."""
        return type(self)(self)

    def __iter__(self) -> Iterator[Mapping]:
        for start, end, offset in zip(self._starts, self._ends, self._offsets, strict=True):
            yield Mapping(start, end, offset)

    def __len__(self) -> int:
        return len(self._starts)

    def __repr__(self) -> str:
        inside = ", ".join(
            f"[{m.start:#x}, {m.end:#x}) {'zeros' if m.offset == ZEROS else f'at {m.offset:#x}'}" for m in self
        )
        return f"Mappings({inside})"

    def _shifted(self, index: int, address: int) -> int:
        offset = self._offsets[index]
        return offset if offset == ZEROS else offset + address - self._starts[index]

    def _continues(self, index: int) -> bool:
        """Tell whether the mapping behind `index` goes on where this one ends."""
        if self._ends[index] != self._starts[index + 1]:
            return False
        return self._offsets[index + 1] == self._shifted(index, self._ends[index])
