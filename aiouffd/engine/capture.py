"""The memory of one moment, while its threads write on: which pages are read when.

In this order:

1. The loop write-protects what the base does not have: what was written or has come since. A first write to a
   protected page is let go at once, and that page is protected again later, until few were written meanwhile.
2. From now on such writes are held back. Those few pages are protected. The last turn of the loop looks at what has
   come meanwhile, and protects that: this is the moment. The writes go on. How long this takes depends on what was
   written and has come in step 1 alone.
3. At the first write to a page that is still to be read, the bytes of the page are kept, and the protection is lifted
   then: by the native reader, where it can (`kept`). Where too many bytes are kept, the write waits.
4. Threads read the memory (`moment`), and ask the loop behind each read: it has the bytes of pages that were written
   in between, and takes note of what was read. Missing pages are read from the source: it has their bytes.
5. In the end the protection is lifted; or it stays, and tells what was written since: also since the base of one that
   has failed.

From the moment on, a page that is to be read is protected, or its bytes are kept. All of this is on one loop. It is
lost with the process of that loop: whoever serves then lifts a protection when a thread wants to write.

Pages are known by their offset in the image: in the region, or in the memory file of a client, which may show parts of
it at several addresses. What nothing shows is in the image as the source has it.

Where pages are dropped and written back (`bound`), the source changes after the moment, too. But each page comes
protected there. So a missing page is as good as a protected one: the source has its bytes until its first write, and
before that they are kept. What is dropped was saved, and is missing from then on. A protection is lifted by `bound`
alone, which notes each write before.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import weakref
from itertools import pairwise
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from aiouffd.engine.arming import NEITHER, Arming
from aiouffd.engine.kept import (
    ABSENT,
    DUE,
    EMPTIED,
    KEPT,
    LOOSE,
    PROTECTED,
    Granules,
    Kept,
    among,
    becoming,
    blocks,
    runs,
)
from aiouffd.engine.statistics import Counter
from aiouffd.errors import ClosedError, LayoutChangingError
from aiouffd.lifetime import uninterrupted
from aiouffd.native.reader import Keeps
from aiouffd.ranges import Range, RangeSet, align_down, align_up, pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from aiouffd.engine.bound import Bound
    from aiouffd.engine.mappings import Mappings
    from aiouffd.engine.places import Places
    from aiouffd.engine.resolver import Resolver
    from aiouffd.engine.statistics import Counters
    from aiouffd.kernel.memory import ProcessMemory
    from aiouffd.kernel.pagemap import Pagemap

__all__ = ["Capture", "Phase"]

_Item = TypeVar("_Item")

_OPEN = among(LOOSE, EMPTIED)
_TO_READ = among(DUE, KEPT)
_NEW = among(EMPTIED)
_WITH_BASE = becoming({PROTECTED: DUE, EMPTIED: LOOSE})
_HELD = becoming({EMPTIED: LOOSE})
_MISSING = becoming(dict.fromkeys((LOOSE, DUE, EMPTIED), ABSENT))
_READ = becoming({DUE: PROTECTED, KEPT: LOOSE, ABSENT: PROTECTED})
_NOT_WRITTEN = becoming(dict.fromkeys((DUE, KEPT, ABSENT), EMPTIED))  # what differs from the base still
_PLACING = Counter.COPIES, Counter.ZEROPAGES, Counter.CONTINUES
_PIECE = 8 << 20  # bytes that are protected at once
_BLOCK = 1 << 20  # bytes that are looked at together for what has come
_TURN_NS = 500_000  # after so long the loop gets a turn
_FEW, _TRIES = 16, 8  # pages that are protected while writes are held back; how often it is tried to have no more
_MOST_KEPT = 64 << 20
_RETRY = 0.001  # seconds
_PATIENCE = 2.0  # seconds until a memory file is given up whose lock is held
_MOMENT = 0.1  # the same, where all wait for that


class Phase(enum.Enum):
    """What is done at the moment."""

    IDLE = 0
    PROTECTING = 1
    HOLDING = 2
    READING = 3
    LIFTING = 4  # no page is read any more


_NATIVE = {Phase.IDLE: Keeps.NONE_DUE, Phase.READING: Keeps.DUE_KEPT, Phase.LIFTING: Keeps.NONE_DUE}


class _Turns:
    """Of the loop, in the midst of long work on it: faults go first."""

    def __init__(self) -> None:
        self._until = perf_counter_ns() + _TURN_NS

    async def before(self, item: _Item) -> _Item:
        """Return an item of work; if a turn is due, the loop has it before."""
        if perf_counter_ns() > self._until:
            await asyncio.sleep(0)
            self._until = perf_counter_ns() + _TURN_NS
        return item


class _Space(Protocol):
    """What is needed of a space."""

    uffd: Any
    page_size: int
    counters: Counters
    mappings: Mappings
    backend: Any
    resolver: Resolver
    closing: bool
    is_gone: bool
    on_changed: set[Callable[[int, int], None]]
    bound: Bound | None
    fast_path: Any
    capture: Any


def _snapshot_of(source: Any) -> str | None:
    """Return the name of the snapshot that a source is."""
    kind, *name = getattr(source, "identity", None) or [""]  # of a file there are more parts
    return str(name[0]) if kind == "snapshot" else None


def _joined(pages: Iterable[int], page: int) -> list[tuple[int, int]]:
    """Return the offsets (start, end) of runs of pages."""
    found = sorted(set(pages))
    cuts = [0, *(at for at, (one, other) in enumerate(pairwise(found), 1) if other - one > 1), len(found)]
    return [(found[low] * page, (found[high - 1] + 1) * page) for low, high in pairwise(cuts) if low < high]


def _placed(space: _Space) -> int:
    """Return a number that changes with each page that comes, where nobody else places any."""
    return sum(space.counters.words[at] for at in _PLACING)


def _is_shown(bound: Bound, was: Iterable[tuple[int, int, int]]) -> bool:
    """Tell whether memory shows still what was at some offsets: it was moved, and writes to it are saved."""
    return any(bool(bound.places(at, at + length)) for _, at, length in was)


def _weak(method: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """Return what calls a method as long as its object is there; a cycle would keep the spaces, and the source."""
    known = weakref.WeakMethod(method)

    def call(start: int, end: int) -> None:
        if (found := known()) is not None:
            found(start, end)

    return call


class Capture:
    """Snapshots of one memory, one after the other, and what was written between them. Used on one loop.

    Args:
        spaces: the memory's; and those of forked children that share it, at the same addresses.
        places: which address has which offset of the image, for good.
        modes: of the registration, to which write protection is added; None: another process has registered that.
        quiet: keeps away others that place pages beside the loop, inside the block.

    Attributes:
        arming: of the memory.
        pause_ns: for so long writes to protected pages were held back until the moment.
    """

    def __init__(
        self,
        spaces: Sequence[_Space],
        places: Places,
        modes: int | None,
        quiet: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        self.arming: Arming = Arming(spaces, places, modes, _weak(self._changed))
        self._places = places
        self.page: int = spaces[0].page_size
        self._kept = Kept(places.largest, places.end // self.page, self.page, _MOST_KEPT, spaces[0].counters)
        self._states = self._kept.states
        self.phase = Phase.IDLE
        self.pause_ns: int = 0
        self.base: str | None = None  # names the snapshot since which `_states` tells what was written
        self.failure: BaseException | None = None
        self._quiet = quiet
        self._alone = quiet is contextlib.nullcontext
        self._bound = spaces[0].bound
        self._seen = 0
        self._again: list[int] = []
        self._granules: Granules | None = None  # before a moment, where what differs from the base is known
        self._held: list[tuple[_Space, int, int, int]] = []
        self._came = RangeSet()
        self._fetching = set[asyncio.Task[Any] | None]()
        self._memory: ProcessMemory
        self._pagemap: Pagemap | None
        self._shown: Mappings
        self._followed: str | None = None  # `base` until now, if it is that of this snapshot
        self._differing = RangeSet()
        self._laid_out = list[tuple[int, int]]()  # offsets whose layout has changed: before the moment, and then since

    @classmethod
    def of(
        cls,
        spaces: Sequence[_Space],
        places: Places,
        modes: int | None,
        quiet: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> Self:
        """Return that of a memory, which is known since an earlier snapshot; or another, if it lies elsewhere now."""
        known: Self | None = spaces[0].capture
        if known is None or (known.phase is Phase.IDLE and known._places != places):  # noqa: SLF001
            if known is not None:
                known.arming.leave()
            known = cls(spaces, places, modes, quiet)
        there = known.arming.spaces
        there += [each for each in spaces if each not in there]  # children that were forked meanwhile
        for space in spaces:
            space.capture = known
        return known

    @property
    def phase(self) -> Phase:
        """What is done at the moment."""
        return self._phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._phase = phase
        self._kept.allow(_NATIVE.get(phase, Keeps.ALL_ASKED))

    @property
    def pages_kept(self) -> int:
        """Pages whose bytes were kept before a write, for this snapshot."""
        return self._kept.pages

    def forked(self, child: _Space) -> None:
        """Take note of a forked child, whose pages are protected as its parent's: it writes to shared memory, too."""
        if self.arming.shared:
            child.capture = self
            self.arming.forked(child)

    @property
    def _space(self) -> _Space:
        space: _Space = self.arming.spaces[0]
        return space

    # Until the moment

    async def begin(
        self, memory: ProcessMemory, pagemap: Pagemap | None, base: str | None, granule: int
    ) -> list[Range] | None:
        """Protect what is there, and let a moment be; `end` must follow, whatever comes of this.

        Args:
            memory: reads it, by offsets of the image; open until `end`.
            pagemap: tells what is there of private memory; open until this returns. None: the memfd says it.
            base: names a snapshot. What was written since is known if it was the last one.
            granule: bytes that are read together: whole pages.

        Returns:
            What may differ from the base, in offsets of the image; None: nothing is known.

        Raises:
            UnsupportedError: the kernel cannot protect this memory.
            RangeGoneError: another process has not registered it so.
        """
        assert self.phase is Phase.IDLE
        self.phase, self.failure, self.pause_ns = Phase.PROTECTING, None, 0
        self._followed, self.base = self.base if base == self.base else None, None
        self._laid_out.clear()
        self._kept.begin(memory)
        self._memory, self._pagemap = memory, pagemap
        self.arming.register()
        for space in self.arming.spaces:
            if space.fast_path is not None and space.bound is None:
                space.fast_path.keep(space.uffd.fileno(), self._kept)
        known = base is not None and base in (self._followed, _snapshot_of(self._space.backend.source))
        if self._followed is None:
            self._states[:] = bytes(len(self._states))
            for run in self._bound.written.clean(0, self._places.end) if known and self._bound is not None else ():
                self._set(run.start, run.end, PROTECTED)
            for gap in self._places.changed(self._space.mappings):
                self._set(gap.start, gap.end, EMPTIED)
        turns, differing = _Turns(), Granules(self._states, self.page, granule)
        self._differing = differing.found
        self._granules = differing if known else None
        for pages in runs(self._states, _NEW if self._bound is None else _OPEN) if known else ():
            differing.add(*await turns.before(pages))
        self._seen = _placed(self._space)
        await self._protect(self._unprotected(await uninterrupted(self._there)))  # a thread uses the descriptors
        for _ in range(_TRIES):
            if len(self._again) > _FEW:
                await self._protect_again()
        self.phase, began = Phase.HOLDING, perf_counter_ns()
        await self._protect_again()
        while not self._is_moment():
            await asyncio.sleep(_RETRY)
            self.check()
        if not known or EMPTIED in self._states:
            self._states[:] = self._states.translate(_HELD if known else _WITH_BASE)
        if self._bound is not None:
            for gap in self._came.gaps(0, self._places.end):
                missing = slice(gap.start // self.page, gap.end // self.page)
                self._states[missing] = self._states[missing].translate(_MISSING)
        self._granules = None
        self._let_go()
        self.pause_ns = perf_counter_ns() - began
        return [await turns.before(item) for item in differing.found] if known else None

    def _there(self, wait: float = _PATIENCE, parts: Iterable[tuple[int, int]] | None = None) -> list[tuple[int, int]]:
        offsets = None if parts is None else ((first * self.page, last * self.page) for first, last in parts)
        return self._places.there(self._memory, self._pagemap, self.page, wait, offsets)

    def _set(self, start: int, end: int, state: int) -> None:
        """Note the state of the pages at some offsets."""
        first, last = start // self.page, end // self.page
        self._states[first:last] = bytes([state]) * (last - first)
        if self._granules is not None and state != PROTECTED:
            self._granules.add(first, last)

    def _unprotected(self, spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Yield the offsets of the pages that are there and may be written."""
        for low, high in self._places.mapped_of(spans, self._space.mappings):
            for first, last in runs(self._states, _OPEN, low // self.page, high // self.page):
                yield first * self.page, last * self.page

    async def _protect(self, offsets: Iterable[tuple[int, int]]) -> None:
        turns = _Turns()
        for piece in (piece for start, end in offsets for piece in pieces(start, end, self.page, _PIECE)):
            at, size = await turns.before(piece)
            while not self._protect_now(at, at + size):
                await asyncio.sleep(_RETRY)
                self.check()
        self.check()

    async def _protect_again(self) -> None:
        """Protect what was written meanwhile."""
        again, self._again = self._again, []
        await self._protect(_joined(again, self.page))

    def _protect_now(self, start: int, end: int) -> bool:
        if not self.arming.protect(start, end):
            return False
        self._set(start, end, DUE)
        return True

    def _is_moment(self) -> bool:
        """Protect what has come meanwhile; False: the layout is changing."""
        with self._quiet():
            for low, high in self._laid_out:  # and missing since, perhaps, though it was protected behind that
                self._set(low, high, EMPTIED)
            nothing_came = self._alone and _placed(self._space) == self._seen and not self._laid_out
            parts = None if self._bound is not None else blocks(self._states, _OPEN, max(_BLOCK // self.page, 1))
            there = [] if nothing_came and self._bound is None else self._there(_MOMENT, parts)
            if not all(self._protect_now(*run) for run in self._unprotected(there)):
                return False
            self._laid_out.clear()
            self._came = RangeSet(Range.between(*span) for span in there)
            self._shown = self._space.mappings.copy()
            self.phase = Phase.READING
        return True

    # Writes

    def keeps(self, space: _Space, page: int, flags: int, thread: int) -> bool:
        """Take note of a write to a protected page; True: it goes on already, or is held back, and goes on later."""
        index = self._places.offset(page) // self.page
        if index < 0:
            return False
        due = self.phase is Phase.READING and self._states[index] in ((DUE, ABSENT) if self._saves else (DUE,))
        if self.phase is Phase.HOLDING or (due and self._kept.is_full):
            self._held.append((space, page, flags, thread))
            return True
        if due:
            return self._keep(index, space, page, flags, thread)
        if self._states[index] in (PROTECTED, DUE, ABSENT):
            self._states[index] = LOOSE
            if self.phase is Phase.PROTECTING:
                self._again.append(index)
        return False

    def _keep(self, index: int, space: _Space, page: int, flags: int, thread: int) -> bool:
        """Keep the bytes of a page, and let its writer go; False: that is left to do."""
        if self._bound is not None and not self._bound.shows(space, page):
            return False  # it was dropped just now: its writer faults again
        data = self._memory.page(index * self.page, self.page)
        if len(data) < self.page:
            self.fail(LayoutChangingError("a snapshot", page, self.page, errno.EAGAIN))
            return False
        # The usual way takes 5 us more. Where pages are dropped, only that notes the write: it is left to do.
        mode, lifted = (0, self.page) if self._bound is None else (NEITHER, -errno.EINVAL)
        result = space.uffd.try_writeprotect(page, self.page, mode)
        if result == -errno.EAGAIN:  # the layout is changing: what was read is of another page, perhaps
            self._held.append((space, page, flags, thread))
            asyncio.get_running_loop().call_later(_RETRY, self._let_go)
            return True
        if result == lifted:
            self._kept.keep(index, data)
        return bool(result == self.page)

    def _let_go(self) -> None:
        """Let the writes go on that were held back, as far as there is room for what they overwrite."""
        held, self._held = self._held, []
        for space, page, flags, thread in held:
            if not space.closing and not space.is_gone and not self.keeps(space, page, flags, thread):
                space.backend.written(space, page, flags, thread)

    # Reading

    def check(self) -> None:
        """Raise why this snapshot cannot be: it is of no moment any more.

        Raises:
            LayoutChangingError: pages were unmapped, moved or emptied before they were read.
            ClosedError: the memory is served no longer, or its process is gone.
        """
        space = self._space
        if space.closing or space.uffd.gone():  # asked behind each read: the pages of a dead process read as missing
            self.left(space)
        if self.failure is not None:
            raise self.failure

    def left(self, space: _Space) -> None:
        """Have the snapshot end if it is of this space, which is served no longer: slow reads look at that."""
        if space is self._space:
            self.fail(ClosedError("it is served no longer"))

    def fail(self, error: BaseException) -> None:
        """Have the snapshot end with an error. From now on no write waits for it, and it waits for no source."""
        self.failure = self.failure or error
        if self.phase in (Phase.HOLDING, Phase.READING):
            self.phase = Phase.LIFTING
            asyncio.get_running_loop().call_soon(self._let_go)
            for task in filter(None, self._fetching):
                task.cancel()

    def _changed(self, start: int, end: int) -> None:
        """Take note that the layout of the addresses [start, end) has changed."""
        for low, high in self._places.offsets(align_down(start, self.page), align_up(end, self.page)):
            if self.phase is not Phase.IDLE:
                self._laid_out.append((low, high))
            if self.phase is not Phase.READING:
                self._set(low, high, EMPTIED)
                continue
            part = self._states[low // self.page : high // self.page]
            was = self._places.missing(self._shown, low, high) if self._saves and ABSENT in part else ()
            if DUE in part or (self._bound is not None and _is_shown(self._bound, was)):
                self.fail(LayoutChangingError("a snapshot", start, end - start, errno.EAGAIN))
            self._replace(low, high, ABSENT, LOOSE)  # no write there goes to the source any more

    @property
    def _saves(self) -> bool:
        """Whether what is written goes to the source, which has its bytes for good else."""
        return self._bound is not None and self._bound.write_back is not None

    def dropped(self, start: int, end: int) -> None:
        """Take note that the pages of addresses [start, end) are about to be dropped: the source has their bytes."""
        if self.phase is Phase.READING:
            for low, high in self._places.offsets(start, end):
                self._replace(low, high, DUE, ABSENT)

    def _replace(self, start: int, end: int, old: int, new: int) -> None:
        """Note another state of the pages at some offsets that have one."""
        part = slice(start // self.page, end // self.page)
        self._states[part] = self._states[part].replace(bytes([old]), bytes([new]))

    def to_read(self, first: int, last: int) -> list[tuple[int, int]]:
        """Return the pages (start, end) of [first, last) that are read from memory. From any thread."""
        return list(runs(self._states, _TO_READ, first, last))

    async def extents(self, size: int) -> list[Range]:
        """Return what may not be zeros, in offsets of the image, which has so many bytes: before any of it is read."""
        found, turns, data = RangeSet(), _Turns(), self._space.backend.data
        for first, last in runs(self._states, _TO_READ):
            found.add(*await turns.before((first * self.page, last * self.page)))
        for offset, at, length in self._places.missing(self._shown, 0, size):
            for low, high in data(at, at + length):
                part = align_down(low + offset - at, self.page), align_up(high + offset - at, self.page)
                found.add(*await turns.before(part))
        return [await turns.before(item) for item in found]

    async def read(self, first: int, last: int, lost: list[int], *, lifts: bool) -> list[tuple[int, Any]]:
        """Take note that the pages [first, last) were read; return (offset, bytes) of what was not in memory.

        Args:
            first: index of the first page.
            last: index behind the last one.
            lost: indexes of pages that could not be read.
            lifts: they may be written from now on, and nobody wants to know.

        Raises:
            LayoutChangingError, ClosedError: as `check`.
            SourceError: missing pages could not be read from the source.
        """
        while lost and self.failure is None and self.arming.is_changing:  # noqa: ASYNC110 - no event
            await asyncio.sleep(_RETRY)  # pages have gone: munmap(2) tells of that when it has unmapped all of them
        self.check()
        there = RangeSet(Range.between(*span) for span in self.to_read(first, last))
        for index in lost:
            there.remove(index, index + 1)
        found: list[tuple[int, Any]] = []
        for gap in there.gaps(first, last):
            for offset, at, length in self._places.missing(self._shown, gap.start * self.page, gap.end * self.page):
                found.append((offset, await self._fetched(at, length)))
        self.check()
        # Behind what was fetched: the source may have got a page already that was written meanwhile.
        found += [(index * self.page, data) for index, data in self._kept.take(first, last)]
        self._states[first:last] = self._states[first:last].translate(_READ)
        if lifts and self._bound is None:
            self._replace(first * self.page, last * self.page, PROTECTED, LOOSE)
            for place in self._places.addresses(first * self.page, last * self.page):
                self.arming.lift(place.start, place.end)
        if self._held:
            self._let_go()
        return found

    async def _fetched(self, at: int, length: int) -> Any:
        """Return bytes of the source, or raise why they are of no use any more: the source may never answer."""
        self._fetching.add(asyncio.current_task())  # in no variable: it has the error in whose traceback this frame is
        try:
            return await self._space.backend.fetch(at, length)
        except asyncio.CancelledError:
            self.check()  # `fail` has canceled it
            raise
        finally:
            self._fetching.discard(asyncio.current_task())

    # The end

    async def end(self, name: str | None) -> None:
        """Be done with a snapshot.

        Args:
            name: of the snapshot, since which it is to be known what was written: the protection stays. None: there is
                none. If it is known what was written since another, which was its base, that stays known; else nothing
                is protected any more when this returns.
        """
        self.base, self._granules = name or self._followed, None
        self.phase = Phase.LIFTING
        self._kept.end()
        self._again.clear()
        self._let_go()
        try:
            if self.base is None:
                self._states[:] = bytes(len(self._states))
                if self._bound is None:
                    await self.arming.disarm()
                return
            self._states[:] = self._states.translate(_READ if name else _NOT_WRITTEN)
            found = [] if name else [(run.start, run.end) for run in self._differing]
            for low, high in found + self._laid_out:
                self._set(low, high, EMPTIED)
        finally:
            self.phase = Phase.IDLE
