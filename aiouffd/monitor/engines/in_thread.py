"""The engine for faults that are resolved in the faulting thread: what is not at hand comes to a loop in a thread.

The kernel sends no messages (Feature.SIGBUS); `aiouffd.native.faults` has the handler of the signal, which places what
is at hand by itself. What it cannot is written into a pipe as the message that the kernel would have sent, and the
toucher waits on a futex with the GIL free. So the engine is the one that serves everybody else: it reads from the
pipe, and its descriptor wakes the futex where the kernel would wake a sleeper.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import errno
import faulthandler
import logging
import mmap
import os
import sys
import threading
import weakref
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import attrs
import uvloop

from aiouffd.engine.ahead.fill import bring_ahead
from aiouffd.engine.assembly import make_backend, make_readahead
from aiouffd.engine.dispatcher import Dispatcher
from aiouffd.engine.mappings import ZEROS, Mapping, Mappings
from aiouffd.engine.resolver import DONTWAKE
from aiouffd.engine.serve.handler import Handler, wants_writes
from aiouffd.engine.space import Space
from aiouffd.engine.statistics import Counters
from aiouffd.errors import BusyError, ClosedError
from aiouffd.kernel import abi
from aiouffd.kernel.abi import Feature, RegisterMode
from aiouffd.kernel.userfaultfd import Userfaultfd
from aiouffd.monitor.engines.layout import Standstill, moved
from aiouffd.monitor.engines.protocol import positive_or_none
from aiouffd.native import faults
from aiouffd.native.faults import Extent, Kind, Served
from aiouffd.ranges import align_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aiouffd.engine.assembly import Options, Service
    from aiouffd.engine.serve.handler import HandlerBackend
    from aiouffd.engine.serve.source import SourceBackend
    from aiouffd.engine.statistics import Statistics
    from aiouffd.errors import UffdError
    from aiouffd.monitor.engines.protocol import Assignment, Terms

__all__ = ["InThread", "InThreadEngine"]

log = logging.getLogger("aiouffd")

_BEAT = 0.25  # seconds between signs of life; less where threads lose patience sooner
_SHORT = 64 << 10  # 20 us
_engines: weakref.WeakSet[InThreadEngine] = weakref.WeakSet()


class _Asked(Userfaultfd):
    """A descriptor without messages and without sleepers, as one that has them."""

    _pipe: int
    _loop: asyncio.AbstractEventLoop
    _copy: Callable[[int, int, int, int, int], int]
    _later: list[tuple[int, int]]

    @classmethod
    def joined(cls, uffd: Userfaultfd, pipe: int, loop: asyncio.AbstractEventLoop) -> Self:
        """Work on a duplicate of `uffd`; messages come by `pipe`, which stays the caller's."""
        self = cls.from_fd(os.dup(uffd.fileno()), uffd.features)
        self._pipe = pipe
        self._loop = loop
        self._copy = faults.copying()
        self._later = []
        return self

    def fileno(self) -> int:
        """Return where messages are read."""
        return self._pipe

    def try_copy(self, dst: int, src: int, length: int, mode: int) -> int:
        """UFFDIO_COPY."""
        if length <= _SHORT:
            result = self._copy(self._fd, dst, src, length, mode | DONTWAKE)
        else:
            result = super().try_copy(dst, src, length, mode | DONTWAKE)
        return self._woken(dst, result, mode)

    def try_zeropage(self, start: int, length: int, mode: int) -> int:
        """UFFDIO_ZEROPAGE."""
        return self._woken(start, super().try_zeropage(start, length, mode | DONTWAKE), mode)

    def try_continue(self, start: int, length: int, mode: int) -> int:
        """UFFDIO_CONTINUE."""
        return self._woken(start, super().try_continue(start, length, mode | DONTWAKE), mode)

    def try_poison(self, start: int, length: int, mode: int) -> int:
        """UFFDIO_POISON."""
        return self._woken(start, super().try_poison(start, length, mode | DONTWAKE), mode)

    def try_wake(self, start: int, length: int) -> int:
        """Wake the threads that wait in their signal handlers.

        A thread that is woken wants the GIL, which the loop has until it sleeps. So those whose pages have come by a
        task are woken when all the tasks of this turn have run, or each would be woken twice.
        """
        if asyncio.current_task(self._loop) is None:
            faults.wake(start, length)
            return length
        if not self._later:
            self._loop.call_soon(self._wake_all)
        self._later.append((start, length))
        return length

    def _wake_all(self) -> None:
        later, self._later = self._later, []
        for start, length in later:
            faults.wake(start, length)

    def _woken(self, start: int, result: int, mode: int) -> int:
        if result > 0 and not mode & DONTWAKE:
            self.try_wake(start, result)
        return result


@attrs.frozen
class InThread:
    """A signal handler resolves each fault in the thread that touches; the loop runs in a thread of this process.

    For memory that only threads of this process touch, and by themselves: a system call on a missing page fails with
    EFAULT (see `Monitor.read`). No process is started, and bytes that are in memory are there sooner than from any
    handler elsewhere. It needs the native part. It cannot serve forked children or call `Handler.write`.

    Args:
        stuck_warning: seconds that a page is waited for, while the loop does not run, until a message on standard error
            says so: the loop's own thread waits for the page, or native code keeps the GIL.
        stuck_limit: seconds until the process is ended with tracebacks instead of hanging. None: never.
    """

    stuck_warning: float = attrs.field(default=2.0, validator=attrs.validators.gt(0.0))
    stuck_limit: float | None = attrs.field(default=5.0, validator=positive_or_none)

    features: ClassVar[Feature] = Feature.SIGBUS
    serves_system_calls: ClassVar[bool] = False

    def check(self, terms: Terms) -> None:
        """Refuse fork="serve" and `Handler.write`."""
        if terms.fork == "serve":
            raise ValueError('engine=InThread() serves this process only: fork="serve" needs engine=Pager()')
        if wants_writes(terms.origin):
            raise ValueError(
                "the signal does not tell a write to a protected page from a missing page: with engine=InThread() there"
                " is no Handler.write; track_writes=True tells which pages were written"
            )

    def make(self, _loop: asyncio.AbstractEventLoop | None) -> InThreadEngine:
        """Return an engine.

        faulthandler is enabled below our handler, so that a page that cannot be had ends with the line that touched it;
        where SIGBUS has a handler already, that one is kept.
        """
        if faults.handler() == 0 and not faulthandler.is_enabled() and sys.stderr is not None:
            faulthandler.enable()  # in the caller's thread, which gets an alternate stack by that
        return InThreadEngine(self)


class InThreadEngine:
    """Serves one region of this process, in the threads that touch it and from a loop in a thread of its own.

    Raises (on start):
        NativePartError: there is no native part.
        BusyError: too many regions.
    """

    pids = ()

    def __init__(self, choice: InThread) -> None:
        self._choice = choice
        self._counters = Counters()
        self._pid = os.getpid()
        patiences = (choice.stuck_warning, choice.stuck_limit)
        self._period = min([_BEAT] + [patience / 4 for patience in patiences if patience])
        self._service: Service
        self._options: Options
        self._page_size: int
        self._start: int
        self._end: int
        self._on_error: Callable[[UffdError], None]
        self._standstill: Standstill
        self._backend: SourceBackend | HandlerBackend
        self._done: asyncio.Event
        self._space: Space
        self._served: Served
        self._reading = self._writing = -1
        self._loop: asyncio.AbstractEventLoop
        self._uffd: _Asked
        self._thread: threading.Thread

    def start(self, assignment: Assignment) -> None:
        """Serve the region."""
        self._service, self._options = assignment.service, assignment.options
        self._page_size = assignment.page_size
        self._start, self._end = assignment.mapping.start, assignment.mapping.end
        self._on_error = assignment.on_error
        self._reading, self._writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self._served = Served(
                assignment.uffd.fileno(),
                self._writing,
                page_size=self._page_size,
                readahead=self._options.readahead,
                mode=abi.COPY_MODE_WP if self._options.write_protect else 0,
                shared=bool(self._options.modes & RegisterMode.MINOR),
                warning=self._choice.stuck_warning,
                limit=self._choice.stuck_limit or 0.0,
            )
        except BaseException:
            self._close_pipe()
            raise
        self._loop = uvloop.new_event_loop()
        self._uffd = _Asked.joined(assignment.uffd, self._reading, self._loop)
        ready: Future[None] = Future()
        # A daemon, so that a program may end without leaving: see `_at_exit`.
        self._thread = threading.Thread(target=self._run, args=(ready,), name="aiouffd-in-thread", daemon=True)
        self._thread.start()
        try:
            ready.result()
        except BaseException:
            self._thread.join()
            self._close()
            self._remove(for_good=True)
            raise
        _engines.add(self)

    # The loop's thread

    def _run(self, ready: Future[None]) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._main(ready))
        except BaseException as error:
            if ready.done():
                log.exception("the loop of a Monitor with engine=InThread() has ended")
            else:
                ready.set_exception(error)

    async def _main(self, ready: Future[None]) -> None:
        self._standstill = Standstill(self._loop)
        self._done = asyncio.Event()
        options, service = self._options, self._service
        self._backend = make_backend(service, self._counters, options)
        self._space = Space(
            self._uffd,
            Mappings([Mapping(self._start, self._end, 0)]),
            page_size=self._page_size,
            backend=self._backend,
            counters=self._counters,
            readahead=make_readahead(self._page_size, options, local=self._backend.local),
            write_protect=options.write_protect,
            on_error=lambda _, error: self._on_error(error),
        )
        dispatcher = Dispatcher(self._loop, self._counters, spin_us=0)  # its touchers need the GIL that it would hold
        dispatcher.add(self._space)
        ahead = self._loop.create_task(bring_ahead(self._space, self._backend, service.trace, options.background))
        self._served.loop(threading.get_native_id())
        self._beat()
        self._show()
        self._served.open()
        ready.set_result(None)
        try:
            await self._done.wait()
        finally:
            dispatcher.close()
            ahead.cancel()
            await self._backend.aclose()

    def _beat(self) -> None:
        displaced = self._served.beat()
        if displaced:
            _tell(self._served, displaced)
        self._loop.call_later(self._period, self._beat)

    # What handlers may place by themselves

    def _show(self) -> None:
        """Tell the handlers what is shown where. They are kept out, and the loop stands still."""
        self._served.show(self._start, align_up(self._end, self._page_size), list(self._extents()))

    def _extents(self) -> Iterator[Extent]:
        if self._service.recorder is not None:
            return  # the loop must see each touch
        source: Any = self._service.origin
        is_handler = isinstance(source, Handler)
        size = 0 if is_handler else source.size
        memory = None if is_handler else getattr(source, "memory", lambda: None)()
        hole = None if is_handler else getattr(source, "hole", None)
        nothing = hole is not None and hole(0, size) == size
        at = self._start
        for mapping in self._space.mappings:
            if mapping.start > at:
                yield from self._zeros(at, mapping.start)  # it has grown there
            at = mapping.end
            if mapping.offset == ZEROS or nothing:
                yield from self._zeros(mapping.start, at)
            elif not is_handler:
                yield from self._data(mapping, size, memory)
        yield from self._zeros(at, align_up(self._end, self._page_size))

    def _zeros(self, start: int, end: int) -> Iterator[Extent]:
        # hugetlb knows no ZEROPAGE, and none comes write-protected: the loop copies zeros.
        if start < end and self._page_size == mmap.PAGESIZE and not self._options.write_protect:
            yield Extent(start, end, 0, 0, Kind.ZEROS, -1, 0)

    def _data(self, mapping: Mapping, size: int, memory: tuple[int, int, int, int] | None) -> Iterator[Extent]:
        """What a mapping shows of the source, and the zeros behind it; the last, partial page is the loop's."""
        first, last = mapping.offset, mapping.offset + mapping.end - mapping.start
        if memory is not None:
            address, length, fd, mtime_ns = memory
            whole = min(min(length, size) & -self._page_size, last)
            if first < whole:
                kind = Kind.COPY if fd < 0 else Kind.RESIDENT
                end = mapping.start + whole - first
                yield Extent(mapping.start, end, address + first, first, kind, fd, mtime_ns)
        behind = max(align_up(size, self._page_size), first)
        yield from self._zeros(mapping.start + behind - first, mapping.end)

    # Other threads' side

    def prefetch(self, offset: int, length: int) -> Future[Any]:
        """Bring offsets [offset, offset + length)."""
        return asyncio.run_coroutine_threadsafe(self._prefetch(offset, length), self._loop)

    async def _prefetch(self, offset: int, length: int) -> None:
        try:
            await self._backend.prefetch(self._space, offset, length)
        except asyncio.CancelledError:
            if self._done.is_set():
                raise ClosedError("the Monitor has been left") from None
            raise

    def statistics(self) -> Statistics:
        """Read the counters: the loop's, and those of the handlers."""
        loop = self._counters.snapshot()
        counted = self._served.counters()
        added = {
            name.lower(): getattr(loop, name.lower()) + value
            for name, value in zip(faults.COUNTERS, counted, strict=False)
        }
        latency = tuple(map(sum, zip(loop.latency, counted[len(faults.COUNTERS) :], strict=True)))
        return attrs.evolve(loop, latency=latency, **added)

    def refuse(self) -> None:
        """Do nothing: whoever touches a missing page waits until `leave` has settled it."""

    def leave(self, settle: Callable[[], None], *, sigbus: bool) -> None:
        """Serve no longer: whoever touches a missing page meanwhile waits until it is settled."""
        self._close()
        try:
            settle()
        finally:
            self._remove(for_good=sigbus)

    def check_may_wait(self) -> None:
        """Raise RuntimeError in the loop's thread."""
        if threading.get_ident() == self._thread.ident:
            raise RuntimeError("this thread runs the loop of engine=InThread(): await prefetch() instead")

    @property
    def layout(self) -> Self:
        """Told by the region."""
        return self

    def _close(self) -> None:
        while not self._served.close():
            log.error("a thread is in the midst of a fault, and does not come to its end; waiting for it")
        self.stop()
        self._uffd.close()
        self._close_pipe()

    def _close_pipe(self) -> None:
        # Both ends together, and with the handlers kept out: a write to a pipe that nobody can read is SIGPIPE.
        os.close(self._writing)
        os.close(self._reading)

    def stop(self, timeout: float | None = None) -> None:
        """End the loop. Handlers go on placing what is at hand, and whoever needs more than that waits."""
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._done.set)
            self._thread.join(timeout)

    @property
    def serves_this_process(self) -> bool:
        """Whether it was made here, and not before a fork."""
        return os.getpid() == self._pid

    def _remove(self, *, for_good: bool) -> None:
        """Let whoever waits touch again: what that means has been settled. `for_good`: missing pages are SIGBUS."""
        self._served.remove(for_good=for_good)
        _engines.discard(self)

    # What the region tells

    @contextlib.contextmanager
    def changing(self) -> Iterator[Self]:
        """Serve nothing inside the block, in which the region changes its layout and says how.

        Raises:
            BusyError: the loop does not run, or a thread is stuck in a fault; nothing was changed.
        """
        with self._standstill():
            try:
                if not self._served.close():
                    raise BusyError("a change of the layout", self._start, self._end - self._start, errno.EBUSY)
                yield self
            finally:
                self._served.open()

    def removed(self, start: int, length: int) -> None:
        """The region was emptied there: zeros from now on."""
        begin = self._start + start
        self._space.emptied(begin, begin + align_up(length, self._page_size))
        self._show()

    def moved(self, address: int, length: int) -> None:
        """The region lies at `address` now, and has `length` bytes."""
        new = (address, address + length)
        modes = RegisterMode(self._options.modes)
        # Without EVENT_REMAP the kernel has unregistered what it moved.
        moved(
            self._space,
            (self._start, self._end),
            new,
            lambda start, size: self._uffd.register(start, size, modes),
        )
        self._start, self._end = new
        self._show()


def _tell(served: Served, displaced: int) -> None:
    if displaced > 0:
        log.warning(
            "SIGBUS was taken from a Monitor with engine=InThread(), by %s. It is taken back, and passed on where it is"
            " not the Monitor's. A missing page that was touched in between was not served",
            _where(served.below()),
        )
    else:
        log.error(
            "SIGBUS was taken from a Monitor with engine=InThread(), once too often: a touch of a missing page ends the"
            " process from now on"
        )


def _where(address: int) -> str:
    """Say what lies at an address."""
    if address < 2:  # SIG_DFL, SIG_IGN
        return "somebody who has set it to its default" if address == 0 else "somebody who ignores it"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
            span, *_, name = line.split(maxsplit=5)
            low, high = (int(end, 16) for end in span.split("-"))
            if low <= address < high:
                return f"a handler in {name} ({address:#x})"
    return f"a handler at {address:#x}"


@atexit.register
def _at_exit() -> None:
    """The interpreter ends while Monitors serve: from now on no thread gets the GIL back in a signal handler."""
    served = [engine for engine in _engines if engine.serves_this_process]
    if served:
        faults.finalizing()
        for engine in served:
            engine.stop(1.0)
