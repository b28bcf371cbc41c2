"""Where an image lies in the memory of a process: which address has which offset of it."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from aiouffd.engine.apart import StuckError, at_once
from aiouffd.engine.mappings import Mapping, Mappings
from aiouffd.errors import BusyError
from aiouffd.kernel.pagemap import data_ranges
from aiouffd.ranges import Range, RangeSet

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from aiouffd.kernel.memory import ProcessMemory
    from aiouffd.kernel.pagemap import Pagemap

__all__ = ["Places", "locked"]


class Places:
    """The image of a region, or that of a client's memory file, which may be shown in parts at several addresses.

    What a space's mappings say of these addresses changes; this does not.

    Args:
        rows: (start, end, offset), in whole pages.
        ours: it is one region of this process, which may have grown: that is in no mapping.

    Attributes:
        end: the highest offset that they reach.
    """

    def __init__(self, rows: Iterable[tuple[int, int, int]], *, ours: bool) -> None:
        self._rows = Mappings(Mapping(*row) for row in sorted(rows))
        self._ours = ours
        self.end: int = max(row.offset + row.end - row.start for row in self._rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Places) and list(self._rows) == list(other._rows)

    def __hash__(self) -> int:
        return hash(tuple(self._rows))

    @property
    def largest(self) -> Mapping:
        """The most addresses whose offsets follow each other."""
        return max(self._rows, key=lambda row: row.end - row.start)

    def offset(self, address: int) -> int:
        """Return which offset an address has; negative: none."""
        start, _, first = self._rows.locate(address)
        return first if first < 0 else first + address - start

    def addresses(self, start: int, end: int) -> list[Mapping]:
        """Return where the offsets [start, end) are."""
        return self._rows.addresses(start, end)

    def offsets(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield which offsets (start, end) the addresses [start, end) have."""
        return ((run.offset, run.offset + run.end - run.start) for run in self._rows.runs(start, end))

    def mapped(self, mappings: Mappings) -> list[tuple[int, int]]:
        """Return the addresses (start, end) of what is mapped, joined."""
        runs = RangeSet(Range.between(run.start, run.end) for row in self._rows for run in mappings.runs(*row[:2]))
        found = [(run.start, run.end) for run in runs]
        if not self._ours:
            return found
        (row,) = self._rows
        return [*found[:-1], (found[-1][0] if found else row.start, row.end)]

    def there(
        self,
        memory: ProcessMemory,
        pagemap: Pagemap | None,
        page: int,
        patience: float,
        parts: Iterable[tuple[int, int]] | None = None,
    ) -> list[tuple[int, int]]:
        """Return the offsets of what is in memory. From any thread: 3 ms for a GiB, and 20 ms of a memfd.

        Args:
            memory: of the process.
            pagemap: of private memory; None: the memfd says it.
            page: bytes of a page.
            patience: seconds for which the lock of another process's memfd may be held.
            parts: the offsets that are looked at; None: all.

        Raises:
            BusyError: it is held for longer.
        """
        parts = [(0, self.end)] if parts is None else parts
        if pagemap is None:
            if not self._ours:
                return self._there_apart(memory, patience, list(parts))
            return [span for low, high in parts for span in data_ranges(memory.file, high, low)]
        (row,) = self._rows
        spans = (span for low, high in parts for span in pagemap.spans(row.start + low, high - low, -1, page))
        return [(start - row.start, end - row.start) for start, end in spans]

    def _there_apart(
        self, memory: ProcessMemory, patience: float, parts: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        file = os.dup(memory.file)  # the number stays its own, if the call is left alone

        def look() -> list[tuple[int, int]]:
            try:
                return [span for low, high in parts for span in data_ranges(file, high, low)]
            finally:
                os.close(file)

        try:
            return at_once(look, patience)
        except StuckError:
            raise locked(self.largest.start, self.end) from None

    def mapped_of(self, spans: list[tuple[int, int]], mappings: Mappings) -> Iterable[tuple[int, int]]:
        """Return the parts of some offsets that are mapped."""
        shown = RangeSet()
        for run in self.mapped(mappings):
            for span in self.offsets(*run):
                shown.add(*span)
        return spans if shown == RangeSet([Range(0, self.end)]) else _common(spans, shown)

    def changed(self, mappings: Mappings) -> Iterator[Range]:
        """Yield the offsets that do not show the source's bytes of the same offset."""
        same = RangeSet()
        for run in mappings:
            if run.offset >= 0 and run.offset == self.offset(run.start):
                same.add(run.offset, run.offset + run.end - run.start)
        for row in self._rows:
            yield from same.gaps(row.offset, row.offset + row.end - row.start)

    def missing(self, mappings: Mappings, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield what the offsets [start, end) show where memory has nothing: offset, that of the source, and length.

        What no address has is as in the source; what is not mapped any more, or was emptied, is not yielded.
        """
        rest = RangeSet([Range.between(start, end)])
        for row in self._rows.addresses(start, end):
            rest.remove(row.offset, row.offset + row.end - row.start)
            for run in mappings.runs(row.start, row.end):
                if run.offset >= 0:
                    yield row.offset + run.start - row.start, run.offset, run.end - run.start
        yield from ((gap.start, gap.start, gap.length) for gap in rest)


def locked(start: int, length: int) -> BusyError:
    """Return the error that says that somebody holds the lock of a memory file."""
    return BusyError("lseek of the memory file, whose lock is held,", start, length, errno.EBUSY)


def _common(spans: Iterable[tuple[int, int]], shown: RangeSet) -> Iterator[tuple[int, int]]:
    for low, high in spans:
        hidden = RangeSet(shown.gaps(low, high))
        yield from ((part.start, part.end) for part in hidden.gaps(low, high))
