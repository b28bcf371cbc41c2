"""Runs of pages that one operation fills. Pure data."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

from aiouffd.engine.mappings import ZEROS
from aiouffd.engine.statistics import Counter
from aiouffd.kernel.memory import address_of, zeros

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiouffd.engine.mappings import Mappings
    from aiouffd.errors import UffdError

__all__ = ["FOR_FAULT", "Given", "Op", "Purpose", "Run", "merge", "still_valid", "zero_runs"]

_ZEROS_COPIED_AT_ONCE = 256 << 10


class Op:
    """What is done to a run; the values index `Resolver`'s tables."""

    COPY = 0
    ZEROPAGE = 1
    CONTINUE = 2
    POISON = 3
    UNPROTECT = 4
    PROTECT = 5


_NAMES = ("COPY", "ZEROPAGE", "CONTINUE", "POISON", "WRITEPROTECT", "WRITEPROTECT")


class Purpose:
    """Why pages are brought. What is brought for one purpose shares one object.

    Attributes:
        cause: the counter in which these pages are counted.
        errors: where a caller that waits for them finds why some could not be had; None: only touchers wait, and
            what cannot be had is poisoned.
        retries: of each read; None: the usual ones.
    """

    __slots__ = ("cause", "errors", "retries")

    def __init__(self, cause: Counter, errors: list[UffdError] | None = None, retries: int | None = None) -> None:
        self.cause: Counter = cause
        self.errors: list[UffdError] | None = errors
        self.retries: int | None = retries


FOR_FAULT = Purpose(Counter.PAGES_READAHEAD)
"""Of a window: the page that faulted is counted as PAGES_FAULT in place of this, before the window is resolved."""


class Given:
    """Owns a buffer that nobody else reads any more: its memory may be moved away."""

    __slots__ = ("buffer",)

    def __init__(self, buffer: object) -> None:
        self.buffer: object = buffer


class Run:
    """Contiguous pages that one operation fills. Moves forward as it is worked off.

    Attributes:
        op: one of `Op`.
        dst: address of the next page.
        offset: what `dst` showed when the run was made, or ZEROS: if it shows another offset when the run can go
            on, the run is out of date.
        src: address of its bytes in this process (COPY only).
        left: bytes still to do, a multiple of the page size.
        owner: kept alive as long as the run is: the buffer that `src` points into, or the same as `Given`. None: memory
            of the source's own.
        purpose: what its pages were counted for; None: they were not counted.
    """

    __slots__ = ("dst", "left", "offset", "op", "owner", "purpose", "src")

    def __init__(
        self,
        op: int,
        dst: int,
        offset: int,
        length: int,
        src: int = 0,
        owner: object = None,
        purpose: Purpose | None = None,
    ) -> None:
        self.op: int = op
        self.dst: int = dst
        self.offset: int = offset
        self.src: int = src
        self.left: int = length
        self.owner: object = owner
        self.purpose: Purpose | None = purpose

    def advance(self, length: int) -> None:
        """Take `length` bytes as done."""
        self.dst += length
        self.src += length
        if self.offset >= 0:
            self.offset += length
        self.left -= length

    def part(self, begin: int, length: int) -> Run:
        """Return a run of the bytes [begin, begin + length) of this one."""
        offset = self.offset if self.offset < 0 else self.offset + begin
        return Run(self.op, self.dst + begin, offset, length, self.src + begin, self.owner, self.purpose)

    def covers(self, other: Run) -> bool:
        """Tell whether this run does all that `other` does."""
        return self.op == other.op and self.dst <= other.dst and other.dst + other.left <= self.dst + self.left

    @property
    def name(self) -> str:
        """The operation, as the kernel calls it."""
        return f"UFFDIO_{_NAMES[self.op]}"

    def __repr__(self) -> str:
        return f"<Run {self.name} [{self.dst:#x}, {self.dst + self.left:#x})>"


_by_address = operator.attrgetter("dst")


def merge(runs: list[Run]) -> list[Run]:
    """Sort runs by address and join those that continue each other, target and source alike."""
    runs.sort(key=_by_address)
    merged = runs[:1]
    for run in runs[1:]:
        last = merged[-1]
        shown = last.offset if last.offset < 0 else last.offset + last.left
        joins = run.op == last.op and run.dst == last.dst + last.left and run.offset == shown
        if (
            joins
            and run.purpose is last.purpose
            and (run.op != Op.COPY or (run.src == last.src + last.left and run.owner is last.owner))
        ):
            last.left += run.left
        else:
            merged.append(run)
    return merged


def still_valid(run: Run, mappings: Mappings, page_size: int) -> list[Run]:
    """Cut a run down to the parts whose addresses still show what they showed when it was made."""
    start, stop, first = mappings.locate(run.dst)
    if run.dst + run.left <= stop and run.offset == (first if first < 0 else first + run.dst - start):
        return [run]  # nearly always
    parts: list[Run] = []
    at = run.dst
    end = run.dst + run.left
    while at < end:
        start, stop, first = mappings.locate(at)
        if stop == 0:  # memory that grew, or nothing: as zeros, page by page
            stop, shown = at + page_size, ZEROS
        else:
            stop, shown = min(stop, end), first if first < 0 else first + at - start
        part = run.part(at - run.dst, stop - at)
        if shown == part.offset:
            parts.append(part)
        at = stop
    return parts


def zero_runs(start: int, offset: int, length: int, page_size: int, purpose: Purpose, *, mapped: bool) -> Iterator[Run]:
    """Yield the runs that fill [start, start + length) with zeros.

    Args:
        start: address of the first page.
        offset: what it shows.
        length: bytes.
        page_size: bytes.
        purpose: what the pages are counted for.
        mapped: by ZEROPAGE, which costs no memory and a seventh of a COPY; else zeros are copied.
    """
    if mapped:
        yield Run(Op.ZEROPAGE, start, offset, length, purpose=purpose)
        return
    memory = zeros(max(page_size, _ZEROS_COPIED_AT_ONCE))
    source, step = address_of(memory), len(memory)
    for at in range(0, length, step):
        part = min(step, length - at)
        yield Run(Op.COPY, start + at, offset if offset < 0 else offset + at, part, source, memory, purpose)
