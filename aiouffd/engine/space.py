"""One descriptor on a loop: its messages, what is in flight for it, and what is deferred.

The order inside one wake-up. The kernel hands out page faults before older layout events, so layout events of a
wake-up are applied first, and the faults are looked up in the newest layout. That cannot resolve a fault too
early: while an event is unread, or its thread has not run again, every resolving ioctl answers EAGAIN.

After a layout event the sleepers of the old range are woken: whoever still needs a page there faults again, under
the new layout. So nothing that was begun under the old one has to be carried over: flights over a changed range
are forgotten, and what they bring is used only where the mappings still say the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import mmap
import operator
import sys
from collections import deque
from time import perf_counter_ns
from typing import TYPE_CHECKING, Protocol

from aiouffd.engine.mappings import ZEROS
from aiouffd.engine.resolver import Op, Resolver, Run, merge
from aiouffd.engine.statistics import Counter
from aiouffd.errors import ClosedError, PagerError, operation_error
from aiouffd.kernel import abi
from aiouffd.kernel.abi import FaultFlag
from aiouffd.kernel.memory import address_of, zeros

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from aiouffd.engine.flight import Flight
    from aiouffd.engine.mappings import Mappings
    from aiouffd.engine.plain import FastPath, Way
    from aiouffd.engine.readahead import Readahead
    from aiouffd.engine.statistics import Counters
    from aiouffd.errors import UffdError
    from aiouffd.kernel.userfaultfd import Userfaultfd

__all__ = ["COUNTER_OF_EVENT", "Backend", "Space"]

log = logging.getLogger("aiouffd")

_MESSAGE = abi.PAGEFAULT_MESSAGE.unpack_from
_ITER = abi.PAGEFAULT_MESSAGE.iter_unpack
_by_address = operator.itemgetter(2)
_FAULTS, _JOINED, _LATENCY, _DEFERRED = (
    int(Counter.FAULTS),
    int(Counter.JOINED),
    int(Counter.LATENCY),
    int(Counter.DEFERRED),
)
COUNTER_OF_EVENT = {
    abi.EVENT_FORK: int(Counter.FORKS),
    abi.EVENT_REMAP: int(Counter.REMAPS),
    abi.EVENT_REMOVE: int(Counter.REMOVES),
    abi.EVENT_UNMAP: int(Counter.UNMAPS),
}
_EAGAIN = -errno.EAGAIN
_PUT_OFF = (_EAGAIN, -errno.ENOMEM)
_STUCK_NS = 5_000_000_000
"""After so long a deferred run is reported. A failed mremap can leave EAGAIN for ever on kernels before mid-2026."""
_STUCK_AGAIN_NS = 60_000_000_000
_NO_MEMORY_NS = 30_000_000_000
"""For so long ENOMEM is taken for a shortage that passes."""
_TURN = 0.001
_MINOR_AROUND = 64 << 10
_FIRST = 64 << 10  # of a window, before its toucher goes on
_MOST = 2 << 20
_STEP = 128 << 10  # of the rest at once: some 30 us, for which a fault may have to wait
_ZEROS = 256 << 10


class Backend(Protocol):
    """Who brings the pages of a space: see `serve.source` and `handler`."""

    @property
    def local(self) -> bool:
        """Whether bytes may be at hand without waiting."""

    def serve(self, space: Space, faults: list[tuple[int, int, int]], began_ns: int) -> None:
        """Resolve faults (page address, flags, thread id) at once, or begin a flight for them. Never blocks."""

    async def bring(self, space: Space, ranges: Iterable[tuple[int, int]], cause: Counter) -> None:
        """Bring (offset, length) ranges ahead of faults. Raises UffdError where that fails; nothing is poisoned."""

    def follow(self, space: Space, page: int) -> None:
        """Take note that a page was touched whose window is being brought."""

    def written(self, space: Space, page: int, flags: int, thread: int) -> None:
        """Let a thread go that writes to a page which is protected (UFFDIO_WRITEPROTECT, COPY with MODE_WP)."""

    def layout(self, space: Space, code: int, message: bytes, child: Space | None) -> None:
        """Take note of a layout event that has been applied to the space."""

    def failed(self, space: Space, run: Run, number: int) -> None:
        """Take note that the kernel refused a run for good, with this errno; its pages are missing still."""

    def stalled(self, space: Space, run: Run) -> None:
        """Take note that the kernel has been putting a run off (EAGAIN) for seconds; it is still being tried."""

    def opened(self, space: Space) -> None:
        """Take note that the faults of a space are about to come."""


class Space:
    """One descriptor, its mappings, and what is under way for it. Single-threaded: one loop owns it.

    Args:
        uffd: belongs to the space from now on.
        mappings: which address shows which offset; the space applies the layout events to it.
        page_size: bytes of a page of all its mappings.
        backend: brings the pages.
        counters: shared by all spaces of a dispatcher.
        readahead: what it knows of this space's touchers.
        identity: number that names it, also to a successor.
        write_protect: new pages come write-protected, so that loads do not count as writes.
        on_error: told why a page could not be had, before it is poisoned.
        on_child: called with a forked child's space before its first message is read.
        on_gone: called once when the process turns out to be gone.
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
        on_child: Callable[[Space, Space], None] | None = None,
        on_gone: Callable[[Space], None] | None = None,
    ) -> None:
        self.uffd = uffd
        self.mappings = mappings
        self.page_size = page_size
        self.backend = backend
        self.counters = counters
        self.readahead = readahead
        self.identity = identity
        self.born = mappings.generation
        self.write_protect = write_protect
        self.on_error = on_error
        self.on_child = on_child
        self.on_gone = on_gone
        self.on_deferred: Callable[[], None] | None = None  # the dispatcher's, which has the timer
        self.later: deque[Run] = deque()  # the rest of windows whose beginning is there
        self._hurry = max(_STEP, page_size)  # bytes of them that come at once when their toucher is there first
        self.on_later: Callable[[Space], None] | None = None  # the dispatcher's, which has the time
        self.fast_path: FastPath | None = None  # the dispatcher's
        self.filling = 0
        """Bytes that a fault brings at once, as far as they are at hand, for the time that everything is brought."""
        self.is_gone = False
        self.closing = False
        self.flights: dict[int, Flight] = {}  # page address -> the flight that brings it
        self.deferred: list[tuple[Run, int, int]] = []  # run, since when, when it is reported
        self.resolver = Resolver(uffd, page_size, counters, abi.COPY_MODE_WP if write_protect else 0)
        self.replayed = 0  # pages of a trace that have been brought
        self.filled = 0  # bytes of the background fill that have been brought
        self._words = counters.words
        self._mask = -page_size

    # Messages

    def messages(self, buffer: memoryview, length: int, commit: Callable[[Space, list[bytes]], None]) -> None:
        """Act on the messages in buffer[:length]. `commit` makes layout events durable before they are acted on."""
        began = perf_counter_ns()
        if length == 32 and buffer[0] == 0x12:
            _, flags, address, thread = _MESSAGE(buffer)
            self._words[_FAULTS] += 1
            page = address & self._mask
            if self.flights and page in self.flights:
                self._join(page)
            elif flags & 6:
                self._present(page, flags, thread)
            elif not self.later or not self._hasten(page, began):
                self._serve([(page, flags, thread)], began)
            return
        count = bytes(buffer[0 : length : abi.MESSAGE_SIZE]).count(abi.EVENT_PAGEFAULT)
        self._words[_FAULTS] += count
        if count * abi.MESSAGE_SIZE != length:
            self._layout_first(buffer, length, commit)
        mask, flights = self._mask, self.flights
        missing: list[tuple[int, int, int]] = []
        last = -1
        # Sorted, so that neighbours are together, and a page that several threads wait for is there once.
        for code, flags, address, thread in sorted(_ITER(buffer[:length]), key=_by_address):
            page = address & mask
            if code != abi.EVENT_PAGEFAULT or page == last:
                continue
            last = page
            if flights and page in flights:
                self._join(page)
            elif flags & 6:
                self._present(page, flags, thread)
            elif not self.later or not self._hasten(page, began):
                missing.append((page, flags, thread))
        if missing:
            self._serve(missing, began)

    def _layout_first(self, buffer: memoryview, length: int, commit: Callable[[Space, list[bytes]], None]) -> None:
        """Apply the layout events of a wake-up, before its faults are looked up."""
        layout: list[bytes] = []
        for at in range(0, length, abi.MESSAGE_SIZE):
            code = buffer[at]
            if code in COUNTER_OF_EVENT:
                layout.append(bytes(buffer[at : at + abi.MESSAGE_SIZE]))
            elif code != abi.EVENT_PAGEFAULT:
                log.warning("unknown userfaultfd event %#x: %s", code, bytes(buffer[at : at + 32]).hex())
        commit(self, layout)
        for message in layout:
            self.layout(message)

    def _serve(self, faults: list[tuple[int, int, int]], began_ns: int) -> None:
        if self.closing:
            self.poison(page for page, _, _ in faults)
            return
        try:
            self.backend.serve(self, faults, began_ns)
        except Exception as error:
            # A defect of ours, or of a source's `locate` or `read_nowait`: it costs these pages, and no hang.
            log.exception(
                "faults at %s could not be served; poisoned", ", ".join(f"{page:#x}" for page, _, _ in faults)
            )
            self.readahead.forget(0, sys.maxsize)  # what was to come along has not come
            self._words[Counter.SOURCE_ERRORS] += 1
            self.report(PagerError(f"the page at {faults[0][0]:#x} could not be served: {error!r}"))
            self.poison(page for page, _, _ in faults if page not in self.flights)

    def _join(self, page: int) -> None:
        self._words[_JOINED] += 1
        self.flights[page].wanted.add(page)

    def _present(self, page: int, flags: int, thread: int) -> None:
        """Serve a fault on a page that is there: a write to a protected one, or one that only the file has (minor)."""
        if flags & FaultFlag.WP:
            self._words[Counter.WRITE_FAULTS] += 1
            self.backend.written(self, page, flags, thread)
            return
        self._words[Counter.MINOR_FAULTS] += 1
        start, end, first = self.mappings.locate(page)
        # The neighbours that the file has are mapped as well; the kernel stops at the first that it has not.
        block = max(self.page_size, min(_MINOR_AROUND, self.readahead.limit))
        length = min(block - (first + page - start) % block, end - page) if first >= 0 else 0
        if length > self.page_size:
            self._words[Counter.CONTINUES] += 1  # first: its toucher may kill this process before it goes on
        if length <= self.page_size or self.uffd.try_continue(page, length, self.resolver.mode) <= 0:
            self.resolve([self.run(Op.CONTINUE, page)])

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

    def zeros(self, start: int, offset: int, length: int) -> Iterator[Run]:
        """Yield the runs that fill [start, start + length) with zeros: by ZEROPAGE, where that is possible."""
        if self.maps_zeros:
            yield Run(Op.ZEROPAGE, start, offset, length)
            return
        memory = zeros(max(self.page_size, _ZEROS))
        source, step = address_of(memory), len(memory)
        for at in range(0, length, step):
            part = min(step, length - at)
            yield Run(Op.COPY, start + at, offset if offset < 0 else offset + at, part, source, memory)

    def layout(self, message: bytes) -> None:
        """Apply one FORK, REMAP, REMOVE or UNMAP message."""
        code = message[0]
        child: Space | None = None
        self._words[COUNTER_OF_EVENT[code]] += 1
        if code == abi.EVENT_FORK:
            child = self._fork(*abi.FORK_MESSAGE.unpack(message))
        elif code == abi.EVENT_REMAP:
            source, destination, size = abi.REMAP_MESSAGE.unpack(message)
            self.mappings.remap(source, destination, size)
            self._changed(source, source + size)
            self._changed(destination, destination + size)
        else:
            start, end = abi.RANGE_MESSAGE.unpack(message)
            if code == abi.EVENT_REMOVE:
                self.mappings.remove(start, end)
            else:
                self.mappings.unmap(start, end)
            self._changed(start, end)
        self.backend.layout(self, code, message, child)

    def _fork(self, fd: int) -> Space:
        child = Space(
            type(self.uffd).from_fd(fd, self.uffd.features),
            self.mappings.copy(),
            page_size=self.page_size,
            backend=self.backend,
            counters=self.counters,
            readahead=self.readahead.fresh(),
            write_protect=self.write_protect,
            on_error=self.on_error,
            on_child=self.on_child,
            on_gone=self.on_gone,
        )
        if self.on_child is not None:
            self.on_child(self, child)
        return child

    def emptied(self, start: int, end: int) -> None:
        """As a REMOVE event, for a region whose owner tells in place of the kernel."""
        self.mappings.remove(start, end)
        self._changed(start, end)

    def _changed(self, start: int, end: int) -> None:
        """Forget what is under way for a range whose layout has changed, and wake its sleepers to fault anew."""
        # What is dropped here was taken for present: that must be forgotten, or nobody brings it any more.
        if self.flights:
            for page in [page for page in self.flights if start <= page < end]:
                flight = self.flights.pop(page)
                self._forget(flight.offset + page - flight.start, self.page_size)
        if self.deferred:
            for run, _, _ in self.deferred:
                self._forget(run.offset, run.left)
            self.deferred = [(piece, since, due) for run, since, due in self.deferred for piece in self.valid(run)]
        if self.later:
            for run in self.later:
                self._forget(run.offset, run.left)
            self.later = deque(piece for run in self.later for piece in self.valid(run))
        self.close_fast_path()
        self.resolver.wake(start & self._mask, (end - start + self.page_size - 1) & self._mask)

    def open_fast_path(self, way: Way, start: int, end: int, offset: int) -> None:
        """From now on, the plain faults of [start, end) take this way, until the layout changes."""
        if self.fast_path is not None:
            self.fast_path.open(self.uffd.fileno(), start, end, offset, way)

    def close_fast_path(self) -> None:
        """From now on, no fault does."""
        if self.fast_path is not None:
            self.fast_path.block(self.uffd.fileno())

    def _forget(self, offset: int, length: int) -> None:
        if offset >= 0:
            self.readahead.forget(offset, offset + length)

    async def quiet(self) -> None:
        """Wait until what is under way now is done: flights, what is deferred, and the rests of windows."""
        flights = {flight.done for flight in self.flights.values() if flight.done is not None}
        if flights:
            await asyncio.wait(flights)
        while (self.deferred or self.later) and not self.is_gone and not self.closing:
            self.advance()
            await asyncio.sleep(_TURN if self.deferred else 0)  # the dispatcher's timer retries

    def valid(self, run: Run) -> list[Run]:
        """Cut a run down to the parts whose addresses still show what they showed when it was made."""
        pieces: list[Run] = []
        at = run.dst
        end = run.dst + run.left
        while at < end:
            start, stop, first = self.mappings.locate(at)
            if stop == 0:  # memory that grew, or nothing: as zeros, page by page
                stop, shown = at + self.page_size, ZEROS
            else:
                stop, shown = min(stop, end), first if first < 0 else first + at - start
            expected = run.offset if run.offset < 0 else run.offset + at - run.dst
            if shown == expected:
                pieces.append(Run(run.op, at, expected, stop - at, run.src + at - run.dst, run.owner))
            at = stop
        return pieces

    # Resolving

    def resolve(self, runs: list[Run]) -> None:
        """Work off the runs of one wake-up: one run is one waking ioctl; several share a single WAKE.

        What the layout does not allow now is deferred; what the kernel refuses for good goes to `backend.failed`.
        """
        if len(runs) == 1:
            self._resolve(runs[0], wake=True)
            return
        runs = merge(runs)
        if len(runs) == 1:
            self._resolve(runs[0], wake=True)
            return
        low, high = runs[0].dst, runs[-1].dst + runs[-1].left
        if self.flights and any(low <= page < high for page in self.flights):
            # A WAKE over all of them would send the sleepers in between around for nothing.
            for run in runs:
                self._resolve(run, wake=True)
            return
        ranges = [(run.dst, run.left) for run in runs]
        if all([self._resolve(run, wake=False) for run in runs]):  # noqa: C419 - each of them
            self.resolver.wake(low, high - low)
            return
        # Who waits for what was put off must not be woken: he would fault anew, and that would be put off again.
        for (start, length), run in zip(ranges, runs, strict=True):
            if length > run.left:
                self.resolver.wake(start, length - run.left)

    def _resolve(self, run: Run, *, wake: bool) -> bool:
        """Resolve a run, or put it off; tell whether it is resolved."""
        result = self.resolver.resolve(run, wake=wake)
        if result == 0:
            return True
        if result in _PUT_OFF:
            self.defer(run)
        elif result == -errno.ESRCH:
            self.gone()
        else:
            self._refused(run, -result)
        return False

    def _refused(self, run: Run, number: int) -> None:
        """Have the backend decide on what the kernel refused for good; for a refused POISON there is only waiting."""
        if run.op != Op.POISON:
            self.backend.failed(self, run, number)
            return
        self.report(operation_error(run.name, run.dst, run.left, number))  # EINVAL: no such operation before Linux 6.6
        self.defer(run)

    def resolve_window(self, runs: list[Run], wanted: list[int]) -> None:
        """As `resolve`, for windows: of a large run, only what begins (or ends) with the page that is waited for.

        The rest follows in pieces while the toucher works on the beginning, and faults that come meanwhile pass it.
        """
        now: list[Run] = []
        later: list[Run] = []
        for run in runs:
            page = next((page for page in wanted if run.dst <= page < run.dst + run.left), run.dst)
            if run.op != Op.COPY or run.left <= max(_FIRST, self.page_size):
                now.append(run)
            else:
                size = max(_FIRST, self.page_size)
                before = min(page - run.dst, run.left - size)  # at its end, where the toucher goes down
                now.append(run.part(before, size))
                if behind := run.left - before - size:
                    later.append(run.part(before + size, behind))
                if before:
                    later.append(run.part(0, before))
        if now:
            self.resolve(now)
        if later:
            self.resolve_later(later)

    def _hasten(self, page: int, began_ns: int) -> bool:
        """Settle a page whose window is being brought, out of turn; tell whether there was one.

        Its toucher is faster than the pieces: each time, more of what is behind (or before) the page comes at once.
        """
        for index, run in enumerate(self.later):
            if run.dst <= page < run.dst + run.left:
                del self.later[index]
                size = min(self._hurry, run.left)
                before = min(page - run.dst, run.left - size)
                if before:
                    self.later.append(run.part(0, before))
                if behind := run.left - before - size:
                    self.later.appendleft(run.part(before + size, behind))
                self._hurry = min(2 * self._hurry, max(_MOST, self.page_size))
                if self._words[Counter.PAGES_READAHEAD]:  # else it was counted before, and has faulted anew
                    self._words[Counter.PAGES_FAULT] += 1
                    self._words[Counter.PAGES_READAHEAD] -= 1
                self._resolve(run.part(before, size), wake=True)
                self.record_latency(began_ns)
                self.backend.follow(self, page)
                return True
        return False

    def resolve_later(self, runs: list[Run]) -> None:
        """Settle runs when there is time, in pieces."""
        idle = not self.later
        self.later += runs
        if idle and runs and self.on_later is not None:
            self.on_later(self)

    def advance(self) -> bool:
        """Settle the next piece of what comes later; tell whether there is more."""
        if self.later:
            run = self.later.popleft()
            size = min(max(_STEP, self.page_size), run.left)
            if size < run.left:
                self.later.appendleft(run.part(size, run.left - size))
            elif not self.later:  # nobody has come upon it before it was done
                self._hurry = max(self._hurry // 2, _STEP, self.page_size)
            self._resolve(run.part(0, size), wake=True)
        return bool(self.later)

    def defer(self, run: Run) -> None:
        """Put a run off until `retry`; it wakes its sleepers then."""
        if any(
            run.op == other.op and other.dst <= run.dst and run.dst + run.left <= other.dst + other.left
            for other, _, _ in self.deferred
        ):
            return  # its toucher has faulted anew, because of a signal or of another's WAKE
        self._words[_DEFERRED] += 1
        now = perf_counter_ns()
        self.deferred.append((run, now, now + _STUCK_NS))
        if self.on_deferred is not None:
            self.on_deferred()

    def retry(self) -> None:
        """Try the deferred runs again: call after reading events, and on a timer."""
        runs, self.deferred = self.deferred, []
        now = perf_counter_ns()
        for run, since, due in runs:
            if self.is_gone:
                return
            result = self.resolver.resolve(run, wake=True)
            if result == _EAGAIN:
                if now > due:
                    # Not even POISON is accepted in this state. So whoever owns the memory is told, and may leave.
                    self.backend.stalled(self, run)
                    due = now + _STUCK_AGAIN_NS  # noqa: PLW2901 - said once per interval
                self.deferred.append((run, since, due))
            elif result == -errno.ENOMEM and now - since < _NO_MEMORY_NS:
                if now > due:
                    self.report(operation_error(run.name, run.dst, run.left, errno.ENOMEM))
                    due = now + _STUCK_AGAIN_NS  # noqa: PLW2901 - as above
                self.deferred.append((run, since, due))
            elif result == -errno.ESRCH:
                self.gone()
            elif result != 0 and run.op == Op.POISON:
                self.deferred.append((run, since, due))  # it was told when it was refused first
            elif result != 0:
                self.backend.failed(self, run, -result)

    def report(self, error: UffdError) -> None:
        """Say why a page could not be had."""
        self.on_error(self, error)

    def record_latency(self, began_ns: int, count: int = 1) -> None:
        """Count `count` faults that were read at `began_ns` and are resolved now."""
        self._words[_LATENCY + min((perf_counter_ns() - began_ns).bit_length(), 47)] += count

    # Flights

    def take_off(self, flight: Flight) -> None:
        """Enter a flight: faults on its pages join it from now on."""
        page = self.page_size
        for address in range(flight.start, flight.end, page):
            self.flights[address] = flight

    def land(self, flight: Flight) -> None:
        """Leave a flight, whatever came of it."""
        flights = self.flights
        for address in range(flight.start, flight.end, self.page_size):
            if flights.get(address) is flight:
                del flights[address]

    # End

    def gone(self) -> None:
        """The process is gone: nothing is owed to it any more."""
        if not self.is_gone:
            self.is_gone = True
            self.deferred.clear()
            self.later.clear()
            if self.on_gone is not None:
                self.on_gone(self)

    def require_served(self) -> None:
        """Raise ClosedError where nobody serves the space any more, so that what was waited for may never have come."""
        if self.closing or self.is_gone:
            raise ClosedError("it is served no longer")

    def wake_all(self) -> None:
        """Wake every sleeper: each fault that a predecessor had read comes again as a new message."""
        for mapping in self.mappings:
            self.resolver.wake(mapping.start, mapping.end - mapping.start)

    def poison_if_missing(self, page: int) -> bool | None:
        """Tell whether a page is there already, and wake its sleepers if so; **poison it** if not.

        The kernel has no question that only asks: this is for pages that have failed if they are not there. Their
        sleepers are left asleep, so that the failure can be told before `poison` lets them go. None: it does not say
        now, since the layout is changing.
        """
        result = self.uffd.try_poison(page, self.page_size, 1)
        if result == _EAGAIN:
            return None
        if result != -errno.EEXIST:
            return False
        self.resolver.wake(page, self.page_size)
        return True

    def wake(self, faults: list[tuple[int, int, int]]) -> None:
        """WAKE the pages of some faults, which are sorted: all at once, unless others would be woken in vain."""
        low, high = faults[0][0], faults[-1][0] + self.page_size
        if self.flights and any(low <= page < high for page in self.flights):
            for page, _, _ in faults:
                self.resolver.wake(page, self.page_size)
        else:
            self.resolver.wake(low, high - low)

    def poison(self, pages: Iterable[int]) -> None:
        """Let whoever waits for these pages go with SIGBUS."""
        for page in pages:
            self._words[Counter.PAGES_POISONED] += 1
            self._resolve(self.run(Op.POISON, page), wake=True)

    def unregister(self) -> None:
        """Give the memory back to its process: what is missing reads as zeros from now on, and nobody waits."""
        for mapping in self.mappings:
            with contextlib.suppress(OSError):  # unmapped meanwhile, or the process is gone
                self.uffd.unregister(mapping.start, mapping.end - mapping.start)

    def refuse(self) -> None:
        """Poison what is waited for, and whatever is touched from now on: the owner is about to settle the rest."""
        waited = {page for flight in self.flights.values() for page in flight.wanted}
        self._end_flights()
        self.poison(waited)

    def _end_flights(self) -> None:
        self.closing = True
        self.close_fast_path()
        for flight in set(self.flights.values()):  # others wait for the room that they take
            if flight.done is not None:
                flight.done.cancel()
        self.flights.clear()

    def close(self) -> None:
        """Close the descriptor and forget everything."""
        self._end_flights()
        self.deferred.clear()
        self.later.clear()
        self.uffd.close()

    def __repr__(self) -> str:
        return f"<Space {self.identity} {self.uffd!r} {self.mappings!r}>"
