"""What an application overrides: coroutines on the events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from aiouffd.engine.runs import FOR_FAULT, Op, Purpose, Run
from aiouffd.engine.statistics import Counter
from aiouffd.kernel.events import PageFault, Remap, Remove, Unmap
from aiouffd.kernel.memory import address_of
from aiouffd.ranges import Range, RangeSet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiouffd.engine.mappings import Mapping
    from aiouffd.engine.space import Space
    from aiouffd.kernel.userfaultfd import Fork

__all__ = ["Batch", "Fault", "Handler", "wants_writes"]


@attrs.frozen
class Fault(PageFault):
    """A `PageFault` together with what the mappings know of it.

    Attributes:
        page: the addresses of the page, aligned to the region's page size.
        offset: the page's place in the region; -1 where it shows zeros because it was removed, or has grown there.
    """

    page: Range
    offset: int

    def __str__(self) -> str:
        access = "write" if self.write else "read"
        who = f" of thread {self.thread_id}" if self.thread_id else ""  # of nobody: a page that is prefetched
        return f"the fault{who} at {self.address:#x} (offset {self.offset:#x}, {access})"


class Batch:
    """What a handler has to be done: carried out together when it returns, with one wake-up.

    Ranges are addresses, as in the events: whole pages of the space that the fault came from. A batch may fill
    more pages than the one that faulted. Pages whose layout has changed since the handler was called are left out.
    """

    def __init__(self, space: Space, purpose: Purpose = FOR_FAULT) -> None:
        self._space = space
        self._purpose = purpose
        self._runs: list[Run] = []
        self._changed = RangeSet()  # addresses that show something else than when the handler was called

    def copy(self, page: Range, data: Any) -> None:
        """Fill `page` with the bytes of a buffer of the same length; it is kept until the batch is done.

        Raises:
            ValueError: the range is not whole pages, or `data` has another length.
        """
        self._check(page)
        size = memoryview(data).nbytes
        if size != page.length:
            raise ValueError(f"{size} bytes for a range of {page.length}: pad the last page of your data with zeros")
        self._add(Op.COPY, page, address_of(data), data)

    def zeropage(self, page: Range) -> None:
        """Fill `page` with zeros."""
        self._check(page)
        for shown in self._shown(page):
            self._runs.extend(self._space.zeros(shown.start, shown.offset, shown.end - shown.start, self._purpose))

    def poison(self, page: Range) -> None:
        """Have every thread that touches `page` get SIGBUS (Linux 6.6)."""
        self._check(page)
        self._add(Op.POISON, page)

    def unprotect(self, page: Range) -> None:
        """Let `page` be written to from now on, and wake the threads that wait for that."""
        self._check(page)
        self._add(Op.UNPROTECT, page)

    def protect(self, page: Range) -> None:
        """Have `Handler.write` called for the next write to `page`, if it is present."""
        self._check(page)
        self._add(Op.PROTECT, page)

    def flush(self) -> None:
        """Carry out now what is in the batch, for a handler that goes on working."""
        runs, self._runs = self._runs, []
        pieces = [piece for run in runs for piece in self._space.valid(run)]
        if not pieces or self._space.is_gone or self._space.closing:
            return
        words = self._space.counters.words
        for piece in pieces:
            if piece.op in (Op.COPY, Op.ZEROPAGE):
                pages = piece.left // self._space.page_size
                words[self._purpose.cause] += pages
                if piece.op == Op.ZEROPAGE:
                    words[Counter.PAGES_ZERO] += pages
                if piece.offset >= 0:
                    self._space.readahead.brought(piece.offset, piece.left)
        self._space.resolve(pieces)

    def _add(self, op: int, page: Range, source: int = 0, owner: object = None) -> None:
        for shown in self._shown(page):
            length = shown.end - shown.start
            at = source + shown.start - page.start
            self._runs.append(Run(op, shown.start, shown.offset, length, at, owner, self._purpose))

    def _shown(self, page: Range) -> Iterator[Mapping]:
        """Yield what is mapped of a range, apart from what has changed since the handler was called.

        The handler's bytes are for what was there then; threads that wait there now have faulted anew.
        """
        for part in self._changed.gaps(page.start, page.end):
            yield from self._space.mappings.runs(part.start, part.end)

    def has_left_out(self, address: int) -> bool:
        """Tell whether the layout has changed at this address since the handler was called."""
        return address in self._changed

    def changed(self, start: int, end: int) -> None:
        """Leave [start, end) out from now on: the layout has changed there."""
        self._changed.add(start, end)

    def _check(self, page: Range) -> None:
        size = self._space.page_size
        if page.start % size or page.length % size or page.length <= 0:
            raise ValueError(f"{page} is not a range of whole pages of {size} bytes")

    def covers(self, address: int) -> bool:
        """Tell whether a run that has not been carried out yet holds this address."""
        return any(run.dst <= address < run.dst + run.left for run in self._runs)

    def poisons(self, address: int) -> bool:
        """Tell whether the last of these runs is a poison."""
        runs = [run for run in self._runs if run.dst <= address < run.dst + run.left]
        return bool(runs) and runs[-1].op == Op.POISON


class Handler:
    """Override what you need. One handler serves a region and, with `fork="serve"`, its forked children.

    Every coroutine runs as a task of the pager's loop; faults run concurrently, layout events one after the
    other. An exception fails the page that it was given, not the pager.
    """

    async def pagefault(self, fault: Fault, batch: Batch) -> None:
        """Fill `fault.page`, by `batch`. By default: with zeros.

        Not asked for pages that were removed (MADV_DONTNEED): these are zeros, as the kernel promises.
        """
        batch.zeropage(fault.page)

    async def write(self, fault: Fault, batch: Batch) -> None:
        """A protected page is about to be written to, for the first time since it came or since it was protected.

        Called only where it is overridden: every page then comes write-protected (Linux 5.7; shared and huge pages
        5.19). The writer waits until this returns; the page can be written to then, unless `batch` protects it
        again, and whatever was raised. What is in the page can be read by other means meanwhile.
        """
        batch.unprotect(fault.page)

    async def fork(self, event: Fork) -> None:
        """A process was forked, and is being served alike; `event.uffd` stays the engine's."""

    async def remap(self, event: Remap) -> None:
        """Memory was moved; the mappings know already."""

    async def remove(self, event: Remove) -> None:
        """Memory was emptied, and reads as zeros from now on."""

    async def unmap(self, event: Unmap) -> None:
        """Memory was unmapped."""

    async def aclose(self) -> None:
        """Serving has ended: close what you have opened in the pager, a session for example. Called once.

        Not where the pager is killed, so nothing may depend on it.
        """


def wants_writes(origin: object) -> bool:
    """Tell whether this is a handler that is to be told of writes."""
    return isinstance(origin, Handler) and type(origin).write is not Handler.write
