"""Memory that is dropped again: pages that were not written become missing, and a touch brings them from the source.

All of it happens in one turn of the loop that also places pages and lifts protections, so nothing can be written
between the look and the drop: a write to a protected page waits for this loop. That holds where another thread drops
while the loop copies other pages, since the loop does nothing else before both are done. Nothing has to be remembered
for a successor. Whether a page was dropped or not, its mapping shows the same offset as before.

Memory of this process is dropped by MADV_DONTNEED, private memory of another by that process, when it is asked. Of a
memfd the pages are punched out of the file, by whoever has its descriptor, for all processes that map it. No event
tells of either.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import logging
import mmap
import weakref
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from aiouffd.engine.apart import Apart
from aiouffd.engine.clock import Clock
from aiouffd.engine.dropping import drop, huge_pages, is_own, under_way
from aiouffd.engine.mappings import Mapping
from aiouffd.engine.owner import Owner
from aiouffd.engine.places import locked
from aiouffd.engine.resolver import Resolver
from aiouffd.engine.runs import Op, Run
from aiouffd.engine.statistics import Counter
from aiouffd.engine.two_threads import two_threads
from aiouffd.errors import ClosedError, LayoutChangingError, PagerError, SourceError
from aiouffd.kernel import abi
from aiouffd.kernel.memory import ProcessMemory, address_of, read_parts
from aiouffd.kernel.pagemap import data_ranges
from aiouffd.ranges import Range, RangeSet, align_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from aiouffd.engine.deferred import Deferred
    from aiouffd.engine.dropping import Outcomes, Part
    from aiouffd.engine.flight import Flights
    from aiouffd.engine.mappings import Mappings
    from aiouffd.engine.protect import WrittenPages
    from aiouffd.engine.readahead import Readahead
    from aiouffd.engine.remainders import Remainders
    from aiouffd.engine.statistics import Counters
    from aiouffd.errors import UffdError
    from aiouffd.kernel.owned_descriptor import OwnedDescriptor

__all__ = ["Bound", "losing"]

log: logging.Logger = logging.getLogger("aiouffd")

T = TypeVar("T")

# An instruction may need four pages at once, and would fault for ever without one of them.
_NEWEST = 3  # blocks that stay
_PASSING = (errno.EAGAIN, errno.ECANCELED, errno.ESRCH)  # the layout is changing; the memory is being left, or gone
_LARGE = 512 << 10  # bytes: while so much is copied, a block is dropped; to begin that takes a tenth of it


class _Space(Protocol):
    """What is needed of a space."""

    uffd: Any
    page_size: int
    counters: Counters
    mappings: Mappings
    readahead: Readahead
    closing: bool
    is_gone: bool
    resolver: Resolver
    bound: Bound | None
    capture: Any
    flights: Flights
    remainders: Remainders
    deferred: Deferred
    retrying: Any
    on_file: Any

    def report(self, error: UffdError) -> None: ...
    def refuse(self) -> None: ...
    def wake_all(self) -> None: ...


class _WriteBack(Protocol):
    """What is needed of `write_back.WriteBack`."""

    def clean_if_due(self) -> None: ...
    def keeps_waiting(self, space: Any, pages: list[int]) -> bool: ...
    async def flush(self, start: int, end: int) -> None: ...
    async def aclose(self) -> None: ...


class Bound:
    """What is resident of the memory that shows one source, in a process and in its forked children.

    Args:
        written: the pages that are not dropped.
        page: bytes of a page.
        limit: bytes that are to be resident at most; None: as many as come. As much as there is at all is no limit.
        counters: where to count.
        file: the memfd of shared memory, from its beginning on; None: private memory.
        owner: a memfd and the pagemap of the process that private memory belongs to, as for `Owner`, which are taken;
            None: this one. That process may be stopped: what it is asked for may take longer than a moment, too.
        foreign: the file is a stranger's, who may hold its lock. All that is done to it is done apart: see `Apart`.
            While that takes longer than a moment, the spaces are not read, and nothing is resolved; other spaces are.
        patience: seconds until that is given up; None: it is not.

    Attributes:
        is_lost: the lock was held for so long that the spaces were given up.

    Raises:
        RuntimeError: no thread can be started.
    """

    def __init__(
        self,
        written: WrittenPages,
        page: int,
        limit: int | None,
        counters: Counters,
        file: OwnedDescriptor | None = None,
        *,
        owner: tuple[int, int] | None = None,
        foreign: bool = False,
        patience: float | None = None,
    ) -> None:
        self.written = written
        self.page = page
        self.limit: int | None = limit if limit is None or limit < len(written) else None
        self.write_back: _WriteBack | None = None
        """Takes written pages to the source; None: they stay."""
        self.end: int = len(written)
        """Where the last whole page of the source ends: what is written behind that stays, or may stay, too."""
        self.noted: int = 0
        """Bytes of pages before the end that were written, as far as that is counted."""
        self.shared: bool = file is not None
        self._words = counters.words
        self._file = file
        self._memory = ProcessMemory.all_if_possible() if file is None and owner is None else None
        self._owner = None if owner is None else Owner(*owner, self._is_gone)
        self._apart = Apart(self._waits, self._stuck, patience) if foreign or owner else None
        self._settled = asyncio.Event()
        self._entered: list[_Space] = []  # whose look is still to come
        self.is_lost: bool = False
        self._spaces: weakref.WeakSet[_Space] = weakref.WeakSet()
        self._clock = Clock(page, self.limit or 1 << 62)
        self._warned: set[str] = set()
        self._evicted = 0  # bytes
        self._is_put_off = False  # the owner could not drop something just now: it is asked again for the same

    @property
    def is_waiting(self) -> bool:
        """Whether something is done to the file just now: nothing may be resolved until that has ended."""
        return self._apart is not None and self._apart.is_waiting and not self.is_lost

    async def settled(self) -> None:
        """Wait until that has ended. Canceling is safe."""
        while self.is_waiting:
            self._settled.clear()
            await self._settled.wait()

    def _call(self, function: Callable[[], T], then: Callable[[T], None]) -> None:
        if self._apart is None:
            then(function())
        elif not self._apart.is_waiting:
            self._apart.call(function, then)

    def _begin(self, parts: list[Part]) -> Callable[[], object]:
        """Have parts begin to be dropped by somebody else; return what the loop must call before it goes on."""
        if self._owner is not None and self._apart is not None:
            return self._owner.begin(parts, self._apart, self._gone)
        work = partial(drop, self._file, parts, self._served())
        if self._apart is not None:
            return self._apart.begin(work, self._gone)
        finish = two_threads.beside(work)
        return lambda: self._gone(finish())

    def _is_gone(self) -> bool:
        return all(space.is_gone or space.closing for space in list(self._spaces))

    def _waits(self, waits: bool) -> None:  # noqa: FBT001 - of a callback
        while self._entered and not self.is_waiting:
            self._look(self._entered.pop())
        for space in [space for space in self._spaces if not space.is_gone]:
            if waits == self.is_waiting and not self.is_lost:  # else what waited has begun another call
                _wait_for_file(space, waits)
        if not self.is_waiting:
            self._settled.set()

    def _stuck(self) -> None:
        """Give up: threads get SIGBUS, or the owner decides; where they are to wait, they do."""
        reason = "its lock is held: a write(2) to it, or a fallocate(2), does not return"
        spaces = [space for space in self._spaces if not space.is_gone and not space.closing]
        self.is_lost = all(space.retrying is None for space in spaces)
        for space in spaces:
            space.report(SourceError("the memory file of a client", 0, 0, reason))
            if self.is_lost:
                _wait_for_file(space, False)
                space.refuse()
                space.deferred.clear()
                space.remainders.clear()
                space.wake_all()  # who waits for what was put off faults again, and is poisoned
        if self.is_lost:
            self._settled.set()

    def note(self, mappings: Mappings, page: int) -> bool:
        """Note that the page at an address is about to be written; False: that is not known now, and is to be asked.

        Not where it is missing: it was dropped while the thread that writes was on its way, which faults again.
        """
        start, _, first = mappings.locate(page)
        offset = first + page - start
        there = first >= 0 and self._is_there(offset, page)
        if there:
            self.noted += self.page * (offset < self.end and offset not in self.written)
            self.written.note(offset)
            if self.write_back is not None:
                self.write_back.clean_if_due()
        return there is not None

    def shows(self, space: Any, page: int) -> bool:
        """Tell whether the page at an address is there; what was emptied is not dropped. No snapshot waits for that."""
        start, _, first = space.mappings.locate(page)
        there = first < 0 or self._is_there(first + page - start, page)
        if there is None:
            space.capture.fail(locked(page, self.page))
        return there is True

    def _is_there(self, offset: int, page: int) -> bool | None:
        """Tell whether a page is there: a predecessor may have brought it since the first look. None: not known yet."""
        if not self._clock.holds(offset) and self.page == mmap.PAGESIZE:
            self._look_up(offset, offset + self.page, [Mapping(page, page + self.page, offset)])
            if self.is_waiting:
                return None
        return self._clock.holds(offset)

    def _found(self, ranges: Iterable[tuple[int, int]]) -> None:
        for start, end in ranges:
            self.came(start, end - start)

    def _look(self, space: _Space) -> None:
        length = len(self.written)
        if self._file is not None and self.page > mmap.PAGESIZE:
            file = self._file.fileno()
            self._call(lambda: list(huge_pages(space, file, length)), self._found)
        else:
            self._look_up(0, length, space.mappings.addresses(0, length))

    def _look_up(self, start: int, end: int, shown: list[Mapping]) -> None:
        """Take note of what of the offsets [start, end) is there, which these mappings show."""
        if self._owner is not None:
            self._call(partial(self._owner.there, shown), self._found)
        elif self._file is not None:
            file = self._file.fileno()
            self._call(lambda: list(data_ranges(file, end, start)), self._found)

    def keeps_waiting(self, space: _Space, faults: list[tuple[int, int, int]]) -> bool:
        """Tell whether there is no room for the pages of faults until some were saved; their threads are woken then."""
        return self.write_back is not None and self.write_back.keeps_waiting(space, [page for page, *_ in faults])

    async def aclose(self) -> None:
        """Save what was written and not saved."""
        if self.write_back is not None:
            await self.write_back.aclose()
            self.write_back = None  # a cycle would keep the source, and with it the lock of its file
        if self._apart is not None and (ended := self._file or self._owner) is not None:
            self._apart.close(ended)

    def count_noted(self) -> None:
        """Count anew what was written: some of it has been saved."""
        self.noted = sum(end - start for start, end in self.written.runs(0, self.end))

    def _served(self) -> list[_Space]:
        return [space for space in self._spaces if not space.closing and not space.is_gone]

    def places(self, start: int, end: int) -> list[tuple[_Space, Mapping]]:
        """Return where the offsets [start, end) are shown."""
        return [(space, shown) for space in self._served() for shown in space.mappings.addresses(start, end)]

    def peek(self, parts: list[tuple[int, int]]) -> list[tuple[int, bytes]]:
        """Return (offset, bytes) of what is shown of (offset, length) that were written; of what was emptied, zeros.

        Of shared memory from any thread. Private memory may move whenever the loop turns: on the loop.

        Raises:
            ClosedError: the memory is private, and served no longer.
            LayoutChangingError: it was unmapped or moved just now, and nobody has told that yet.
        """
        if self._file is not None:
            return read_parts(self._file.fileno(), parts)
        if not self._served():
            raise ClosedError("it is served no longer")
        return [item for start, length in parts for item in self._peek_privately(start, length)]

    def _peek_privately(self, start: int, length: int) -> list[tuple[int, bytes]]:
        found: list[tuple[int, bytes]] = []
        for space, shown in self.places(start, start + length):
            size = min(shown.end - shown.start, start + length - shown.offset)
            data, memory = bytearray(size), self._memory
            gone = not is_own(space, shown.start, shown.start + align_up(size, space.page_size))
            if gone or (memory is not None and memory.read_into(memoryview(data), shown.start)):
                raise LayoutChangingError("a write back", shown.start, size, errno.EAGAIN)
            if memory is None:  # what is not there would end the process
                ctypes.memmove(address_of(data), shown.start, size)  # without the GIL
            found.append((shown.offset, bytes(data)))
        return found

    def order(self) -> list[tuple[int, int]]:
        """Return the blocks that are there, as (start, end), what is to go first first."""
        return self._clock.order()

    def reconsider(self) -> None:
        """Take note that pages may be dropped that could not be."""
        self._clock.reconsider()

    def report(self, error: UffdError) -> None:
        """Tell the owners of the memory."""
        for space in list(self._spaces):
            space.report(error)

    def enter(self, space: _Space) -> Resolver:
        """Have a space be bounded as well; return what resolves its runs.

        What has come before is looked up now: a predecessor may have gone on until this moment.
        """
        self._spaces.add(space)
        self.count_noted()
        if self.is_waiting:
            self._entered.append(space)
        else:
            self._look(space)
        return _Resolver(self, space)

    @property
    def resident(self) -> int:
        """Bytes that are resident, of what shows the source."""
        return self._clock.total

    async def flush(self, start: int, end: int) -> None:
        """Save what was written of the offsets [start, end). Raises as `WriteBack.flush`."""
        if self.write_back is None:
            raise PagerError("the source could not be opened again: nothing can be written to it")
        await self.write_back.flush(start, end)

    def evict(self, start: int, end: int) -> int:
        """Drop what was not written of the offsets [start, end), whole pages; return how many bytes were there."""
        return sum(self._drop(item) for item in self.written.clean(start, end) if not self.is_waiting)

    async def evict_all(self, start: int, end: int) -> int:
        """As `evict`, also where that takes longer than a moment."""
        before = self._evicted
        await self.settled()
        self.evict(start, end)
        while self.is_waiting:
            await self.settled()
            self.evict(start, end)
        return self._evicted - before

    @property
    def staying(self) -> int:
        """Bytes that are resident, and not dropped even if all is saved that can be; but for the last blocks."""
        return self.noted if self.write_back is None else self._clock.total - self.noted

    @property
    def room(self) -> int:
        """Bytes that may come, and nothing is dropped for them."""
        return max((self.limit or 1 << 62) - self._clock.total, 0)

    @property
    def share(self) -> int:
        """Pages that each space may be given, and nothing is dropped for them."""
        return self.room // (self.page * max(len(self._spaces), 1))

    def make_room(self, start: int, length: int) -> None:
        """Drop what came longest ago, before [start, start + length) comes, where it would be too much else."""
        if length <= self.room:
            return
        assert self.limit is not None
        self._is_put_off = False
        enough = self.limit - length - self._clock.block
        # What is spared in one turn goes in a later one: a turn is as short as one block.
        turns = (self._oldest(start, length) for _ in range(_NEWEST + 2))
        for low, high in chain.from_iterable(turns):
            self.evict(low, high)
            self.lost([(low, high)])  # a successor does not know what was emptied
            if self._clock.total <= enough or self.is_waiting or self._is_put_off:
                return
        if length > self.room and self.staying > self.limit // 2:  # else the window is large, or blocks are spared
            text = "max_resident is %d, and %d bytes are there: most of them were written, and stay"
            self._warn(text, self.limit, self._clock.total)

    def make_room_beside(self, start: int, length: int) -> Callable[[], None] | None:
        """Have a block be dropped while [start, start + length) comes, for which there is room, and soon for no more.

        Returns:
            What the loop must call before it does anything else; None: nothing is dropped.
        """
        if length < _LARGE or self.room - length >= self._clock.block or self.room < length:
            return None
        low, high = next(self._oldest(start, length), (0, 0))
        parts = [part for item in self.written.clean(low, high) for part in self._going(item)]
        if not parts:
            self.lost([(low, high)])
            return None
        finish = self._begin(parts)

        def finished() -> None:
            finish()
            self.lost([(low, high)])

        return finished

    def _oldest(self, start: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield the blocks that are to go before [start, start + length) comes, as of a clock."""
        assert self.limit is not None
        newest = _NEWEST if _NEWEST * self._clock.block + length <= self.limit else 0
        return self._clock.oldest(start, start + length, newest)

    def _warn(self, text: str, *details: object) -> None:
        if text not in self._warned:
            self._warned.add(text)
            log.warning(text, *details)

    def lost(self, offsets: Iterable[tuple[int, int]]) -> None:
        """Take note that memory does not show these offsets (start, end) any more: it was emptied or unmapped."""
        if not self._spaces:  # the last was left just now: what it has shown is being saved
            return
        is_kept = self._file is not None and not any(map(len, (space.mappings for space in self._spaces)))
        for start, end in offsets:
            shown = RangeSet(
                Range(mapping.offset, mapping.end - mapping.start)
                for space in self._spaces
                for mapping in space.mappings.addresses(start, end)
            )
            for gap in shown.gaps(start, end):
                self._clock.gone(gap.start, gap.end)
                if not is_kept:  # else nobody maps the file any more: it is as it was, and saved when it is let go
                    self.written.forget(gap.start, gap.end)
        self._words[Counter.RESIDENT] = self._clock.total

    def came(self, start: int, length: int) -> None:
        """Take note that pages have come."""
        self._clock.came(start, length)
        self._words[Counter.RESIDENT] = self._clock.total

    def _drop(self, item: Range) -> int:
        before = self._evicted
        for part in self._going(item):
            if self._owner is not None:
                self._begin([part])()
            else:
                self._call(partial(drop, self._file, [part], self._served()), self._gone)
            if self.is_waiting:
                break
        return self._evicted - before

    def _going(self, item: Range) -> Iterator[Part]:
        """Yield what may be dropped of some offsets; who must know that before is told."""
        spaces = self._served()
        for low, high in _shown(spaces, item):
            places = [(space, shown) for space in spaces for shown in space.mappings.addresses(low, high)]
            for space in spaces:
                space.readahead.forget(low, high)
            for space, shown in places:
                if space.capture is not None:
                    space.capture.dropped(shown.start, shown.end)
            yield low, high, [(shown.start, shown.end) for _, shown in places]

    def _gone(self, outcomes: Outcomes) -> None:
        stay: list[tuple[int, int, list[Mapping]]] = []
        for low, high, error in outcomes:
            if error is None:
                self._dropped([(low, high)])
            elif self.shared:  # a client has sealed its file (EPERM): the pages stay
                self._warn("nothing can be dropped of a memory file: %s", error.strerror)
            elif self._owner is None:
                raise error
            elif error.errno in _PASSING:
                self._is_put_off = True
            else:
                self._warn("pages stay that are locked, pinned, or may not be written to: %s", error.strerror)
                stay.append((low, high, [mapping for _, mapping in self.places(low, high)]))
        if stay and self._owner is not None:
            self._call(partial(self._owner.missing, stay), self._dropped)

    def _dropped(self, ranges: Iterable[tuple[int, int]]) -> None:
        for low, high in ranges:
            self._evicted += (dropped := self._clock.gone(low, high))
            self._words[Counter.PAGES_EVICTED] += dropped // self.page
        self._words[Counter.RESIDENT] = self._clock.total


def _shown(spaces: Iterable[_Space], item: Range) -> list[tuple[int, int]]:
    """Return what may be dropped of some offsets: what each of the spaces shows, and is not being brought.

    The rest was emptied, and is no copy of the source. What is there, and yet on its way, was written and saved
    after its bytes were read: they would be placed in the room that it leaves.
    """
    shown = RangeSet([item] if spaces else ())
    for space in spaces:
        here = RangeSet()
        for mapping in space.mappings.addresses(item.start, item.end):
            skew = mapping.offset - mapping.start
            here.add(mapping.offset, mapping.end + skew)
            for start, end in under_way(space, mapping.start, mapping.end):
                here.remove(start + skew, end + skew)
        for gap in here.gaps(item.start, item.end):
            shown.remove(gap.start, gap.end)
    return [(part.start, part.end) for part in shown]


@contextlib.contextmanager
def losing(space: _Space, start: int, end: int) -> Iterator[None]:
    """Within the block, the addresses [start, end) of a space are emptied or unmapped."""
    bound = space.bound
    shown = [] if bound is None else [run for run in space.mappings.runs(start, end) if run.offset >= 0]
    yield
    if bound is not None:
        bound.lost((run.offset, run.offset + run.end - run.start) for run in shown)


def _wait_for_file(space: _Space, waits: bool) -> None:  # noqa: FBT001 - of a callback
    if space.on_file is not None:
        space.on_file(space, waits)


class _Resolver(Resolver):
    """Makes room before pages come, and takes note of them; and of writes, before their protection is lifted.

    A lifting that the kernel has put off is noted again: meanwhile the page may have been saved.
    """

    __slots__ = ("_bound", "_mappings")

    def __init__(self, bound: Bound, space: _Space) -> None:
        super().__init__(space.uffd, space.page_size, space.counters, abi.COPY_MODE_WP)
        self._bound = bound
        self._mappings = space.mappings

    def resolve(self, run: Run, *, wake: bool) -> int:
        """As of any resolver."""
        bound = self._bound
        if bound.is_waiting:
            return -errno.EAGAIN
        if bound.is_lost:
            if run.op == Op.POISON:
                super().resolve(Run(Op.UNPROTECT, run.dst, -1, run.left), wake=False)
            return super().resolve(run, wake=wake)
        if run.op == Op.POISON:  # EEXIST where shared memory was protected before it was dropped: a marker is left
            self.resolve(Run(Op.UNPROTECT, run.dst, -1, run.left), wake=False)
        if run.op == Op.UNPROTECT and not bound.note(self._mappings, run.dst):
            return -errno.EAGAIN
        if run.op > Op.CONTINUE or run.offset < 0:
            return super().resolve(run, wake=wake)
        start, left = run.offset, run.left
        bound.make_room(start, left)
        if self._bound.is_waiting:
            return -errno.EAGAIN
        # What comes for no fault has room, or stops: nothing that threads have touched goes for it.
        faulted = run.purpose is not None and run.purpose.errors is None
        finish = bound.make_room_beside(start, left) if faulted else None
        large = left >= _LARGE and run.op == Op.COPY and run.owner is None
        try:
            return (self._resolve_by_two if large else super().resolve)(run, wake=wake)
        finally:
            if finish is not None:
                finish()
            bound.came(start, left - run.left)

    def _resolve_by_two(self, run: Run, *, wake: bool) -> int:
        """Resolve a COPY by two threads: into a file it takes twice as long as into private memory.

        Each part wakes who waits for it. Where one cannot come now, the next try finds what has come behind it.
        """
        parts, _ = self.copy_by_two([run], wake=wake)
        for part, _ in parts:
            result = super().resolve(part, wake=wake) if part.left else 0
            run.advance(part.dst - run.dst)
            if result:
                for other, done in parts:
                    self._bound.came(other.offset - done, done)
                return result
        return 0
