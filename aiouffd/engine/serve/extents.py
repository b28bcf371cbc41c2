"""What a source says of its bytes without waiting, and the runs that bring them."""

from __future__ import annotations

import contextlib
import mmap
from typing import TYPE_CHECKING, Any

from aiouffd.engine.runs import Given, Op, Run
from aiouffd.engine.serve.common import is_far
from aiouffd.engine.serve.zeros import BLOCK, cut
from aiouffd.engine.statistics import Counter
from aiouffd.kernel.memory import address_of, zero_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aiouffd.engine.flight import Flight
    from aiouffd.engine.one_copy import OneCopy
    from aiouffd.engine.plain import PlainSource
    from aiouffd.engine.runs import Purpose
    from aiouffd.engine.space import Space
    from aiouffd.engine.statistics import Counters
    from aiouffd.sources.base import Source

__all__ = ["Extents"]


class Extents:
    """The optional methods of a source: see `aiouffd.sources.base.Source`.

    Args:
        source: its size is taken now.
        counters: where to count.
        kept: returns bytes that were read for others, if they are kept still.
        one_copy: the file that all spaces map, which may have the bytes.
    """

    def __init__(
        self,
        source: Source,
        counters: Counters,
        kept: Callable[[int, int], Any] = lambda *_: None,
        one_copy: OneCopy | None = None,
    ) -> None:
        self._one_copy = one_copy
        self.size: int = source.size
        self._words = counters.words
        self.locate: Callable[[int, int], int | None] | None = getattr(source, "locate", None)
        self._page: Callable[[int, int], int | None] | None = getattr(source, "page", self.locate)
        self._read_nowait: Callable[[int, int], Any] | None = getattr(source, "read_nowait", None)
        memory = getattr(source, "memory", None)
        self._memory: Callable[[], tuple[int, int, int, int] | None] = memory if callable(memory) else lambda: None
        self._hole: Callable[[int, int], int] | None = getattr(source, "hole", None)
        self._blank: Callable[[int, int, int], list[int]] | None = getattr(source, "blank", None)
        if not getattr(source, "sparse", True):
            self._hole = None
        self._holes_are_told = self._hole is None or getattr(source, "plain", False)
        # Of the file that all map a page is plain once it is there, whatever has brought it.
        self._locate_plain = self._page if one_copy is None else None
        self._plain: dict[tuple[int, int, bool, bool], PlainSource] = {}
        self.local: bool = not is_far(source)
        self._kept: list[Callable[[int, int], Any]] = [kept]

    @contextlib.contextmanager
    def has(self, kept: Callable[[int, int], Any]) -> Iterator[None]:
        """Within the block, also take bytes that this returns for (offset, length); None: it has not all of them."""
        self._kept.append(kept)
        try:
            yield
        finally:
            self._kept.remove(kept)

    @property
    def may_be_plain(self) -> bool:
        """Whether faults may be served as `engine.plain` does."""
        return self._one_copy is not None or (self._page is not None and self._holes_are_told)

    def plain_source(self, space: Space) -> PlainSource:
        """Return what `engine.plain` needs to serve the faults of a space; the same tuple for spaces alike."""
        key = space.page_size, space.resolver.mode, space.readahead.limit > 0, space.maps_zeros
        known = self._plain.get(key)
        if known is None:
            blank = self._blank if space.maps_zeros else None
            where = self._memory() if self._one_copy is None else self._one_copy
            known = self._plain[key] = (self._locate_plain, self.size, *key[:3], blank, where)
        return known

    def split(self, offset: int, length: int, page: int) -> tuple[str, int]:
        """Split a window where it changes: ("zeros", "data" or "tail": the source's last, partial page; bytes)."""
        kind, part = self._split(offset, length, page)
        return (kind, part) if self._one_copy is None else self._one_copy.split(kind, offset, part)

    def _split(self, offset: int, length: int, page: int) -> tuple[str, int]:
        if offset >= self.size:
            return "zeros", length
        if self._hole is not None and (hole := self._hole(offset, min(length, self.size - offset)) & -page):
            return "zeros", hole
        if offset + length <= self.size:
            return "data", length
        whole = (self.size - offset) & -page
        return ("data", whole) if whole else ("tail", page)

    def data(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of what may not be zeros of [offset, end), in order; in whole pages."""
        while offset < end:
            kind, length = self.split(offset, end - offset, mmap.PAGESIZE)
            if kind != "zeros":
                yield offset, offset + length
            offset += length

    def add_at_hand(
        self, space: Space, address: int, offset: int, length: int, runs: list[Run], purpose: Purpose
    ) -> bool:
        """Add runs for bytes that need no waiting; False: they must be waited for, and nothing was added."""
        if self._one_copy is not None and self._one_copy.has(offset):
            runs.append(Run(Op.CONTINUE, address, offset, length, purpose=purpose))
            return True
        available = min(length, self.size - offset)
        source: int | None = None
        if available == length and self.locate is not None:
            source = self.locate(offset, length)
        if source is not None:
            zeros = self._blank(offset, length, BLOCK) if self._blank is not None and space.maps_zeros else []
            self._add(space, Run(Op.COPY, address, offset, length, source, None, purpose), zeros, runs)
            self._words[Counter.BYTES_FETCHED] += available
            return True
        data, counter = None, Counter.BYTES_FETCHED
        if self._read_nowait is not None:
            data = self._read_nowait(offset, available)
        if data is None:
            counter = Counter.BYTES_SHARED
            for kept in self._kept:
                if (data := kept(offset, available)) is not None:
                    break
        if data is None or not _holds(data, available):  # too little: `read` is asked, whose errors are reported
            return False
        self.add_data(space, Run(Op.COPY, address, offset, length, purpose=purpose), data, runs)
        self._words[counter] += available
        return True

    def add_data(self, space: Space, run: Run, data: Any, runs: list[Run], *, given: bool = False) -> None:
        """Add runs for the bytes of a buffer of ours: `run` says where they go; `given`: nobody else reads it."""
        available = min(run.left, self.size - run.offset)
        zeros: list[int] = []
        if available < run.left:  # the tail of the last page is zeros
            whole = bytearray(run.left)
            whole[:available] = memoryview(data).cast("B")[:available]
            data = whole
        elif space.maps_zeros:
            zeros = zero_blocks(memoryview(data).cast("B"), BLOCK)
        run.owner, run.src = Given(data) if given else data, address_of(data)
        self._add(space, run, zeros, runs)

    def add_parts(self, space: Space, flight: Flight, data: Any, runs: list[Run], *, given: bool) -> None:
        """Add runs for what has come with a flight, as `add_data`."""
        is_one = len(flight.parts) == 1
        for low, high in flight.parts:
            run = Run(Op.COPY, low, flight.offset + low - flight.start, high - low, purpose=flight.purpose)
            part = data if is_one else memoryview(data).cast("B")[low - flight.start : high - flight.start]
            self.add_data(space, run, part, runs, given=given)

    def _add(self, space: Space, run: Run, zeros: list[int], runs: list[Run]) -> None:
        """Add a run, in parts where it has blocks of zeros."""
        if not zeros:
            runs.append(run)
            return
        assert run.purpose is not None
        for begin, length, blank in cut(run.left, zeros):
            if blank:
                self.add_zeros(space, run.dst + begin, run.offset + begin, length, runs, run.purpose)
            else:
                runs.append(run.part(begin, length))

    def add_zeros(
        self, space: Space, address: int, offset: int, length: int, runs: list[Run], purpose: Purpose
    ) -> None:
        """Add runs that fill a range with zeros."""
        self._words[Counter.PAGES_ZERO] += length // space.page_size
        runs.extend(space.zeros(address, offset, length, purpose))


def _holds(data: Any, length: int) -> bool:
    """Tell whether a buffer is of this length, and in one piece: its address is what is copied from."""
    view = memoryview(data)
    return view.nbytes == length and view.c_contiguous
