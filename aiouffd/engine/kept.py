"""What is known of each page of a snapshot, and the bytes of those that were written before they were read.

The native reader has the same memory. It lets a first write go on without Python, by the rules of `Capture.keeps`. Both
are used in turns by one thread, the loop's; other threads only look at the states.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Final

from aiouffd.kernel.memory import address_of
from aiouffd.native.reader import Keeper, Keeps
from aiouffd.ranges import RangeSet, align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiouffd.engine.mappings import Mapping
    from aiouffd.engine.statistics import Counters
    from aiouffd.kernel.memory import ProcessMemory

__all__ = [
    "ABSENT",
    "DUE",
    "EMPTIED",
    "KEPT",
    "LOOSE",
    "PROTECTED",
    "Granules",
    "Kept",
    "among",
    "becoming",
    "blocks",
    "runs",
]

LOOSE, PROTECTED, DUE, KEPT, EMPTIED, ABSENT = range(6)
"""Of a page: it is missing or may be written; it is protected, and as in the base or read already; it is protected, and
to be read; it may be written, and its bytes are kept; it was emptied since the base; it is missing, or has come since,
and is to be read from the source.

The last is only of pages that are dropped again. These are loose if they were written since the base, and else
protected, there or not."""
_COPIED: Final = 1 << 18  # pages


def among(*states: int) -> bytes:
    """Return a table for `bytes.translate`, of 1 for these states."""
    return bytes(value in states for value in range(256))


def becoming(changes: dict[int, int]) -> bytes:
    """Return a table for `bytes.translate`, of what becomes of each state: those that are not named stay."""
    return bytes(changes.get(value, value) for value in range(256))


def runs(
    states: bytes | bytearray, wanted: bytes, first: int = 0, last: int | None = None
) -> Iterator[tuple[int, int]]:
    """Yield the pages (start, end) of [first, last) whose states are among those wanted, in order; long runs in parts.

    A regular expression takes 30 times as long. States may change meanwhile: a copy is looked at, of a GiB at a time.
    """
    last = len(states) if last is None else last
    for low in range(first, last, _COPIED):
        marks = states[low : min(low + _COPIED, last)].translate(wanted)
        start = marks.find(1)
        while start >= 0:
            end = marks.find(0, start)
            end = len(marks) if end < 0 else end
            yield low + start, low + end
            start = marks.find(1, end)


def blocks(states: bytes | bytearray, wanted: bytes, step: int) -> Iterator[tuple[int, int]]:
    """Yield the blocks (start, end) of `step` pages, joined, that have a page whose state is among those wanted."""
    marks, at = states.translate(wanted), 0
    while (found := marks.find(1, at)) >= 0:
        start = align_down(found, step)
        at = start + step
        while marks.find(1, at, at + step) >= 0:
            at += step
        yield start, min(at, len(states))


_ARE_KEPT: Final = among(KEPT)
_READ_TOGETHER: Final = becoming({PROTECTED: DUE})


class Granules:
    """What differs from the base: whole granules, all of whose pages are to be read.

    Args:
        states: of the pages.
        page: bytes of one.
        granule: bytes, a power of two.

    Attributes:
        found: offsets of the image.
    """

    def __init__(self, states: bytearray, page: int, granule: int) -> None:
        self.found: RangeSet = RangeSet()
        self._states = states
        self._page = page
        self._step = max(granule // page, 1)

    def add(self, first: int, last: int) -> None:
        """Take note that the pages [first, last) may differ: what is protected in the same granules is due."""
        low, high = align_down(first, self._step), min(align_up(last, self._step), len(self._states))
        self.found.add(low * self._page, high * self._page)
        if low < first or last < high:
            self._states[low:high] = self._states[low:high].translate(_READ_TOGETHER)


class Kept:
    """The states of pages, and the bytes of those that are `KEPT`.

    Args:
        shown: the addresses whose writes are let go without Python, and the offset of the first.
        count: of the pages.
        page: bytes of one.
        most: so many bytes are kept at once, or one page.
        counters: where to count.

    Attributes:
        states: a byte for each page, which is changed in place.
        native: what the native reader has.
    """

    def __init__(self, shown: Mapping, count: int, page: int, most: int, counters: Counters) -> None:
        self.states: bytearray = bytearray(count)
        self._page = page
        self._in_use = memoryview(self.states)  # so it can change its size no more
        self._room = max(min(most // page, count), 1)
        self._slots, self._free = (_memory(4 * length) for length in (count, self._room))
        self._slot_of, self._free_slots = (memoryview(part).cast("I") for part in (self._slots, self._free))
        self._area: mmap.mmap | None = None
        self.native: Keeper = Keeper(
            start=shown.start,
            count=(shown.end - shown.start) // page,
            first=shown.offset // page,
            states=address_of(self.states),
            slots=address_of(self._slots),
            free=address_of(self._free),
            words=address_of(counters.words),
            page=page,
        )

    @property
    def pages(self) -> int:
        """How many pages were kept since `begin`."""
        return int(self.native.kept)

    @property
    def is_full(self) -> bool:
        """Whether no further page can be kept before one is taken."""
        return not self.native.left

    def begin(self, memory: ProcessMemory) -> None:
        """Have room for pages, whose bytes the native reader reads from `memory`, until `end`."""
        self._area = _memory(self._room * self._page)
        self.native.area, self.native.memory, self.native.at = address_of(self._area), memory.fileno(), memory.start
        self.native.left = self.native.kept = 0
        for slot in reversed(range(self._room)):
            self._let_go(slot)

    def allow(self, keeps: Keeps) -> None:
        """Say what the native reader may do with a first write."""
        self.native.keeps = keeps

    def keep(self, index: int, data: bytes) -> None:
        """Keep the bytes of a page; there must be room."""
        assert self._area is not None
        self.native.left -= 1
        slot = self._free_slots[self.native.left]
        self._area[slot * self._page : (slot + 1) * self._page] = data
        self._slot_of[index] = slot
        self.states[index] = KEPT
        self.native.kept += 1

    def take(self, first: int, last: int) -> list[tuple[int, bytes]]:
        """Return index and bytes of each page of [first, last) that is kept, which make room; the states stay."""
        found: list[tuple[int, bytes]] = []
        if self._area is None:
            return found
        for run in runs(self.states, _ARE_KEPT, first, last):
            for index in range(*run):
                slot = self._slot_of[index]
                found.append((index, self._area[slot * self._page : (slot + 1) * self._page]))
                self._let_go(slot)
        return found

    def _let_go(self, slot: int) -> None:
        self._free_slots[self.native.left] = slot
        self.native.left += 1

    def end(self) -> None:
        """Keep nothing any more; give the memory back."""
        self.native.left = 0
        if self._area is not None:
            self._area.close()
            self._area = None


def _memory(length: int) -> mmap.mmap:
    """Return memory that costs nothing until it is used."""
    return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
