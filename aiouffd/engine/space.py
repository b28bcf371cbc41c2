"""One descriptor on a loop: its mappings, what is in flight for it, and what is deferred.

After a layout event the sleepers of the old range are woken: a thread that still needs a page there faults again,
under the new layout. So nothing that was begun under the old one has to be carried over: flights over a changed range
are forgotten, and what they bring is used only where the mappings still say the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import mmap
from time import perf_counter_ns
from typing import TYPE_CHECKING, Protocol

from aiouffd.engine.deferred import Deferred
from aiouffd.engine.flight import Flights, tasks_of
from aiouffd.engine.others import Others
from aiouffd.engine.remainders import Remainders
from aiouffd.engine.resolver import DONTWAKE, Resolver
from aiouffd.engine.retrying import Retrying
from aiouffd.engine.runs import Op, Purpose, Run, merge, still_valid, zero_runs
from aiouffd.engine.statistics import Counter
from aiouffd.errors import ClosedError, operation_error
from aiouffd.kernel import abi
from aiouffd.ranges import align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from contextlib import AbstractContextManager

    from aiouffd.engine.allowance import Allowance
    from aiouffd.engine.bound import Bound
    from aiouffd.engine.capture import Capture
    from aiouffd.engine.common_file import CommonFile
    from aiouffd.engine.flight import Flight
    from aiouffd.engine.mappings import Mappings
    from aiouffd.engine.one_copy import OneCopy
    from aiouffd.engine.plain import PlainFaults, PlainSource
    from aiouffd.engine.readahead import Readahead
    from aiouffd.engine.statistics import Counters
    from aiouffd.errors import UffdError
    from aiouffd.kernel.userfaultfd import Userfaultfd

__all__ = ["Backend", "Space"]

log: logging.Logger = logging.getLogger("aiouffd")

_NO_POISON = (
    "the page at %#x cannot be had, and this kernel has no UFFDIO_POISON (Linux 6.6) to say so: the threads that touch"
    " it wait until the Monitor is left, or their process ends"
)

_LATENCY, _DEFERRED = int(Counter.LATENCY), int(Counter.DEFERRED)
_EAGAIN = -errno.EAGAIN
_PUT_OFF = (_EAGAIN, -errno.ENOMEM)
_NO_MEMORY_NS = 30_000_000_000
"""For so long ENOMEM is taken for a shortage that passes."""
_RETRY_WAIT = 0.001  # seconds
_LOWEST = 4 << 20  # not below vm.mmap_min_addr, which WAKE refuses; the kernel chooses higher addresses


class Backend(Protocol):
    """What brings the pages of a space: see `serve.source` and `serve.handler`."""

    @property
    def bound(self) -> Bound | None:
        """What drops pages again, which come write-protected then; None: they stay."""

    @property
    def one_copy(self) -> OneCopy | None:
        """The file that all its spaces map privately; None: they map none in common."""

    @property
    def local(self) -> bool:
        """Whether bytes may be had without waiting."""

    @property
    def pieces(self) -> int:
        """How many pieces of a background fill may be under way at once."""

    def serve(self, space: Space, faults: list[tuple[int, int, int]], began_ns: int) -> None:
        """Resolve faults (page address, flags, thread id) at once, or begin a flight for them. Never blocks."""

    def fills(self, space: Space) -> AbstractContextManager[None]:
        """Count a space as one for which something is brought, also between two calls of `bring`, within the block."""

    async def bring(self, space: Space, ranges: Iterable[tuple[int, int]], cause: Counter) -> None:
        """Bring (offset, length) ranges ahead of faults. Raises UffdError where that fails; nothing is poisoned."""

    def follow(self, space: Space, page: int) -> None:
        """Take note that a page was touched whose window is being brought."""

    def written(self, space: Space, page: int, flags: int, thread: int) -> None:
        """Let a thread go that writes to a page which is protected (UFFDIO_WRITEPROTECT, COPY with MODE_WP)."""

    def layout(self, space: Space, code: int, message: bytes, child: Space | None) -> None:
        """Take note of a layout event that has been applied to the space."""

    def refusal(self, run: Run, number: int) -> UffdError:
        """Return the error that says that the kernel refused a run for good, with this errno; count it."""

    def opened(self, space: Space) -> None:
        """Take note that the faults of a space are about to come."""


class Space:
    """One descriptor, its mappings, and what is under way for it. Single-threaded: one loop owns it.

    Args:
        uffd: belongs to the space from now on.
        mappings: which address shows which offset; layout events are applied to it.
        page_size: bytes of a page of all its mappings.
        backend: brings the pages.
        counters: where to count; several spaces may share them.
        readahead: what it knows of this space's touchers.
        identity: number that names it, also to a successor.
        write_protect: new pages come write-protected, so that loads do not count as writes.
        on_error: called with the reason why a page could not be had, before it is poisoned.
        retries: what cannot be had is not poisoned; it is asked for again, after a while, for ever.
        on_child: called with a forked child's space before its first message is read.
        on_gone: called once when the process turns out to be gone.
        allowance: what its client may have in a second; None: it has no limit.
        file: of its memory, as far as that is shared and known.
    """

    def __init__(
        self,
        uffd: Userfaultfd,
        mappings: Mappings,
        *,
        page_size: int,
        backend: Backend,
        counters: Counters,
        readahead: Readahead,
        identity: int = 0,
        write_protect: bool = False,
        on_error: Callable[[Space, UffdError], None],
        retries: bool = False,
        on_child: Callable[[Space, Space], None] | None = None,
        on_gone: Callable[[Space], None] | None = None,
        allowance: Allowance | None = None,
        file: CommonFile | None = None,
    ) -> None:
        self.uffd = uffd
        self.file: CommonFile | None = file and file.enter(self)
        self.allowance = allowance
        self.mappings = mappings
        self.page_size: int = page_size
        self.backend = backend
        self.counters = counters
        self.readahead = readahead
        self.identity = identity
        self.born: int = mappings.generation
        self.write_protect = write_protect
        self.on_error = on_error
        self.retrying: Retrying | None = Retrying(self) if retries else None
        self.on_child = on_child
        self.on_gone = on_gone
        self.on_deferred: Callable[[], None] | None = None  # the dispatcher's, which has the timer
        self.on_remainders: Callable[[Space], None] | None = None  # the dispatcher's, which has the time
        self.others: Others = Others()  # the dispatcher's
        self.on_file: Callable[[Space, bool], None] | None = None  # the dispatcher's, which does not read meanwhile
        self.fast_path: PlainFaults | None = None  # the dispatcher's
        self.on_changed: set[Callable[[int, int], None]] = set()  # of who keeps addresses
        self.filling = 0  # bytes that a fault brings at once, of what is in memory, while everything is brought
        self.is_gone: bool = False
        self.closing: bool = False
        self.flights: Flights = Flights()
        self.deferred: Deferred = Deferred()
        self.remainders: Remainders = Remainders(page_size)
        self.bound: Bound | None = backend.bound
        self.capture: Capture | None = None  # since the first snapshot
        mode = abi.COPY_MODE_WP if write_protect else 0
        by = self.bound or backend.one_copy
        self.resolver: Resolver = by.enter(self) if by else Resolver(uffd, page_size, counters, mode)
        self.replayed = self.filled = 0  # pages of a trace, and bytes of the background fill, that have been brought
        self._words = counters.words

    def forked(self, fd: int) -> Space:
        """Return the space of a child that was forked from this one, whose descriptor is `fd`."""
        return Space(
            type(self.uffd).from_fd(fd, self.uffd.features),
            self.mappings.copy(),
            page_size=self.page_size,
            backend=self.backend,
            counters=self.counters,
            readahead=self.readahead.fresh(),
            write_protect=self.write_protect,
            on_error=self.on_error,
            retries=self.retrying is not None,
            on_child=self.on_child,
            on_gone=self.on_gone,
            allowance=self.allowance,
            file=self.file,
        )

    # The layout

    def changed(self, start: int, end: int) -> None:
        """Forget what is under way for a range whose layout has changed, and wake its sleepers to fault anew."""
        # What is dropped here was taken for present: that must be forgotten, or nobody brings it any more.
        if self.flights:
            whole = align_up(start, self.page_size), align_up(end, self.page_size)
            for low, high, flight in self.flights.remove(*whole):
                self._forget(flight.offset + low - flight.start, high - low)
        for callback in self.on_changed:
            callback(start, end)
        self.deferred.revise(self._revised)
        self.remainders.revise(self._revised)
        self.close_fast_path()
        low = align_down(start, self.page_size)
        self.resolver.wake(low, align_up(end, self.page_size) - low)

    def _revised(self, run: Run) -> list[Run]:
        """Return what is left of a run after a change of the layout; the rest has not come after all."""
        parts = self.valid(run)
        dropped = run.left - sum(part.left for part in parts)
        if dropped:
            self.resolver.uncount(run, dropped)
            self._forget(run.offset, run.left)
            for part in parts:
                if part.offset >= 0:
                    self.readahead.brought(part.offset, part.left)
        return parts

    def open_fast_path(self, source: PlainSource, start: int, end: int, offset: int) -> None:
        """From now on, plain faults of [start, end) are served by the fast path, until the layout changes."""
        if self.fast_path is not None and offset >= 0 and not self.closing:
            self.fast_path.open(self.uffd.fileno(), start, end, offset, source, self.bound, self.readahead.note_pages)

    def close_fast_path(self) -> None:
        """From now on, no fault is."""
        if self.fast_path is not None:
            self.fast_path.close(self.uffd.fileno())

    def _forget(self, offset: int, length: int) -> None:
        if offset >= 0:
            self.readahead.forget(offset, offset + length)

    # Runs

    def run(self, op: int, page: int) -> Run:
        """Return a run of one page as it is shown now."""
        start, _, first = self.mappings.locate(page)
        return Run(op, page, first if first < 0 else first + page - start, self.page_size)

    @property
    def maps_zeros(self) -> bool:
        """Whether zeros are placed by ZEROPAGE, which costs no memory and a seventh of a COPY.

        hugetlb knows no ZEROPAGE, and no ZEROPAGE comes write-protected, so that it would count as a write.
        """
        return self.page_size == mmap.PAGESIZE and not self.write_protect

    def zeros(self, start: int, offset: int, length: int, purpose: Purpose) -> Iterator[Run]:
        """Return the runs that fill [start, start + length) with zeros: by ZEROPAGE, where that is possible."""
        return zero_runs(start, offset, length, self.page_size, purpose, mapped=self.maps_zeros)

    def valid(self, run: Run) -> list[Run]:
        """Cut a run down to the parts whose addresses still show what they showed when it was made."""
        return still_valid(run, self.mappings, self.page_size)

    # Resolving

    def resolve(self, runs: list[Run]) -> None:
        """Work off the runs of one wake-up: one run is one waking ioctl; several share a single WAKE.

        What the layout does not allow now is deferred; what the kernel refuses for good goes to `backend.failed`.
        """
        runs = merge(runs) if len(runs) > 1 else runs
        if len(runs) == 1 or self.flights.touches(runs[0].dst, runs[-1].dst + runs[-1].left):
            # One WAKE over all of them would send the sleepers of the flights around for nothing.
            for run in runs:
                self._resolve(run, wake=True)
            return
        ranges = [(run.dst, run.dst + run.left) for run in runs]
        if all([self._resolve(run, wake=False) for run in runs]):  # noqa: C419 - each of them
            self.wake(ranges, each=False)
        else:  # a thread that waits for what was put off must not be woken: it would fault anew
            self.wake([(low, run.dst) for (low, _), run in zip(ranges, runs, strict=True) if run.dst > low], each=True)

    def resolve_windows(self, runs: list[Run], wanted: list[int]) -> None:
        """As `resolve`, but of a large run only the piece with the awaited page: the rest follows in pieces.

        The toucher works on the beginning meanwhile, and other faults pass the rest.
        """
        now, later = self.remainders.split(runs, wanted)
        if now:
            self.resolve(now)
        self.resolve_later(later)

    def resolve_later(self, runs: list[Run]) -> None:
        """Resolve runs when there is time, in pieces."""
        idle = not self.remainders
        self.remainders.add(runs)
        if idle and runs and self.on_remainders is not None:
            self.on_remainders(self)

    def hasten(self, page: int, began_ns: int) -> bool:
        """Resolve a page whose window is being brought, out of turn; tell whether there was one."""
        run = self.remainders.take(page)
        if run is None:
            return False
        self.readahead.touched(run.offset + page - run.dst)
        self.counters.asked_for()
        self.counters.words[Counter.SEQUENTIAL] += 1  # only streams have windows that come in pieces
        self._resolve(run, wake=True)
        self.record_latency(began_ns)
        self.backend.follow(self, page)
        return True

    def advance(self) -> bool:
        """Resolve the next piece of what comes later; tell whether there is more."""
        piece = self.remainders.next_piece()
        if piece is not None:
            self._resolve(piece, wake=True)
        return bool(self.remainders)

    def _resolve(self, run: Run, *, wake: bool) -> bool:
        """Resolve a run, or put it off; tell whether it is resolved."""
        result = self.resolver.resolve(run, wake=wake)
        if result == 0:
            return True
        if result in _PUT_OFF:
            self._defer(run)
        elif result == -errno.ESRCH:
            self.gone()
        else:
            self._refused(run, -result)
        return False

    def _refused(self, run: Run, number: int) -> None:
        """What the kernel refuses for good has failed. For a refused POISON there is only waiting."""
        if run.op == Op.POISON:  # EINVAL: no such operation before Linux 6.6
            log.critical(_NO_POISON, run.dst)
            self.report(operation_error(run.name, run.dst, run.left, number))
            self._defer(run)
            return
        error = self.backend.refusal(run, number)
        self.resolver.uncount(run, run.left)
        self._forget(run.offset, run.left)
        if run.purpose is not None and run.purpose.errors is not None:
            run.purpose.errors.append(error)
            # Threads may have faulted there meanwhile, and wait for this run: they fault again, for themselves.
            self.resolver.wake(run.dst, run.left)
            return
        self.give_up(range(run.dst, run.dst + run.left, self.page_size), error)

    def _defer(self, run: Run) -> None:
        """Put a run off until `retry`; it wakes its sleepers then."""
        if self.deferred.add(run, perf_counter_ns()):
            self._words[_DEFERRED] += 1
            if self.on_deferred is not None:
                self.on_deferred()

    def retry(self) -> None:
        """Try the deferred runs again: call after reading events, and on a timer."""
        now = perf_counter_ns()
        for waiting in self.deferred.take():
            if self.is_gone:
                return
            run = waiting.run
            result = self.resolver.resolve(run, wake=True)
            if result == 0:
                continue
            if result == -errno.ESRCH:
                self.gone()
            elif result == _EAGAIN or (result == -errno.ENOMEM and now - waiting.since_ns < _NO_MEMORY_NS):
                self.deferred.keep(waiting)
                if waiting.is_due(now):
                    # Where it is EAGAIN, not even POISON is accepted: the page goes on waiting. The owner may leave.
                    self.report(operation_error(run.name, run.dst, run.left, -result))
            elif run.op == Op.POISON:
                self.deferred.keep(waiting)  # reported when it was refused first
            else:
                self._refused(run, -result)

    async def quiet(self, ranges: Iterable[tuple[int, int]] | None = None) -> None:
        """Wait until what is under way now is done: what is deferred, the rests of windows, and flights of `ranges`."""
        if tasks := tasks_of(self.flights, ranges):
            await asyncio.wait(tasks)
        while (self.deferred or self.remainders) and not self.is_gone and not self.closing:
            self.advance()
            await asyncio.sleep(_RETRY_WAIT if self.deferred else 0)  # the dispatcher's timer retries

    @property
    def is_bringing(self) -> bool:
        """Whether pages are on their way already, so that a fault may concern what is under way."""
        return bool(self.flights or self.remainders or self.filling)

    def report(self, error: UffdError) -> None:
        """Tell the owner why a page could not be had."""
        self.on_error(self, error)

    def record_latency(self, began_ns: int, count: int = 1) -> None:
        """Count `count` faults that were read at `began_ns` and are resolved now."""
        self._words[_LATENCY + min((perf_counter_ns() - began_ns).bit_length(), 47)] += count

    # Flights

    def take_off(self, flight: Flight) -> None:
        """Enter a flight: faults on its pages join it from now on."""
        flight.generation = self.mappings.generation
        self.flights.add(flight)

    # Waking and poisoning

    def wake(self, ranges: list[tuple[int, int]], *, each: bool) -> None:
        """WAKE (start, end) ranges, which are sorted; one by one where others wait between them, else by one call."""
        low, high = (ranges[0][0], ranges[-1][1]) if ranges else (0, 0)
        if each or self.flights.touches(low, high):
            for start, end in ranges:
                self.resolver.wake(start, end - start)
        else:
            self.resolver.wake(low, high - low)

    def wake_all(self) -> None:
        """Wake every sleeper, also in what mremap(2) has made longer, which is in no mapping: all fault again."""
        self.resolver.wake_all(min([_LOWEST, *(mapping.start for mapping in self.mappings)]))

    def poison_if_missing(self, page: int) -> bool | None:
        """Poison a page if it is missing; if it is present, wake its sleepers, and return True.

        The kernel has no question that only asks: this is for pages that have failed if they are not there. The
        sleepers of a poisoned page are left asleep, so that the failure can be reported before `poison` lets them go.

        Returns:
            Whether the page is present, or its mapping or process gone; None: unknown for now, since the layout is
            changing or memory is short.
        """
        result = self.uffd.try_poison(page, self.page_size, DONTWAKE)
        if result in _PUT_OFF:
            return None
        if result in (-errno.ESRCH, -errno.ENOSPC):
            self.gone()
            return True
        if result not in (-errno.EEXIST, -errno.ENOENT):
            return False
        self.resolver.wake(page, self.page_size)
        return True

    def give_up(self, pages: Collection[int], error: UffdError) -> None:
        """Threads wait for pages that cannot be had: report why, and let them go with SIGBUS, or have them wait."""
        retrying = None if self.closing else self.retrying
        lost = pages if retrying is None else retrying.lost(pages)
        again = [page for page in pages if page not in lost]
        self._words[Counter.ASKED_AGAIN] += len(again)
        is_news = retrying is None or retrying.postpone(again)
        if is_news or lost:
            self.report(error)  # before the poison, which may end the toucher's process at once
        self.poison(lost)

    def poison(self, pages: Iterable[int]) -> None:
        """Let the threads that wait for these pages go with SIGBUS."""
        for page in pages:
            self._words[Counter.PAGES_POISONED] += 1
            self._resolve(self.run(Op.POISON, page), wake=True)

    # End

    def gone(self) -> None:
        """The process is gone: nothing is owed to it any more."""
        if not self.is_gone:
            self.is_gone = True
            self.deferred.clear()
            self.remainders.clear()
            if self.on_gone is not None:
                self.on_gone(self)

    def require_served(self) -> None:
        """Raise ClosedError if the space is served no longer, so that what was waited for may never have come."""
        if self.closing or self.is_gone:
            raise ClosedError("it is served no longer")

    def unregister(self) -> None:
        """Give the memory back to its process: what is missing reads as zeros from now on, and nobody waits."""
        for mapping in self.mappings:
            with contextlib.suppress(OSError):  # unmapped meanwhile, or the process is gone
                self.uffd.unregister(mapping.start, mapping.end - mapping.start)

    def refuse(self) -> None:
        """Poison what is waited for, and what is touched from now on: the owner decides on the rest, and leaves."""
        waited = {page for flight in self.flights for page in flight.wanted}
        self._end_flights()
        self.poison(waited)

    def _end_flights(self) -> None:
        self.closing = True
        self.close_fast_path()
        for task in tasks_of(self.flights):  # others wait for the room that they take
            task.cancel()
        self.flights.clear()

    def close(self) -> None:
        """Close the descriptor and forget everything."""
        self._end_flights()
        self.deferred.clear()
        self.remainders.clear()
        if self.capture is not None:
            self.capture.left(self)
            self.capture = None  # which has this: a cycle would keep the source, and with it the lock of its file
        self.uffd.close()

    def __repr__(self) -> str:
        return f"<Space {self.identity} {self.uffd!r} {self.mappings!r}>"
