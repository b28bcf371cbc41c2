"""`Monitor`: serves a region of this process."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import mmap
import os
import threading
from collections import deque
from typing import TYPE_CHECKING, Literal, Self, TypeAlias, overload

import attrs

from aiouffd.engine.ahead.trace import Recorder, Trace
from aiouffd.engine.assembly import Options, Service, checked
from aiouffd.engine.mappings import Mapping
from aiouffd.engine.serve.handler import wants_writes
from aiouffd.engine.serve.source import Limits
from aiouffd.errors import BusyError, ClosedError, PagerDiedError, UffdError
from aiouffd.kernel import abi, libc
from aiouffd.kernel.abi import Feature, RegisterMode
from aiouffd.kernel.region import Region
from aiouffd.kernel.settle import leave_sigbus
from aiouffd.kernel.userfaultfd import Userfaultfd, probe
from aiouffd.kernel.write_tracker import WRITE_TRACKING, collect
from aiouffd.monitor.engines.pager import Pager
from aiouffd.monitor.engines.protocol import Assignment, Terms
from aiouffd.sources.base import ZeroSource

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from aiouffd.engine.serve.handler import Handler
    from aiouffd.engine.statistics import Statistics
    from aiouffd.monitor.engines.in_process import InProcess
    from aiouffd.monitor.engines.in_thread import InThread
    from aiouffd.monitor.engines.protocol import Engine, EngineChoice
    from aiouffd.monitor.engines.served_by import ServedBy
    from aiouffd.ranges import Range
    from aiouffd.sources.base import Source

__all__ = ["Monitor"]

OnExit: TypeAlias = Literal["sigbus", "populate", "zeros"]

_KEPT = 1000  # errors that nobody has asked for yet


class Monitor:
    """Serves the page faults of a region, from entering the `with` block until leaving it.

    A thread that touches a missing page with the GIL held stops its whole interpreter, and a loop in it. So the loop
    runs in a pager process by default, and any thread may touch the region. A Monitor is an asynchronous context
    manager, and a plain one for programs without a loop.

    Args:
        region: served by one Monitor at a time.
        source_or_handler: where the bytes come from; by default zeros. What the region has beyond the source's end
            is zeros.
        engine: where the loop runs: `Pager()` (the default), `InThread()`, `InProcess()` or `ServedBy(path)`.
        readahead: the largest window that a fault brings along, in bytes; 0 serves page by page.
        on_exit: what becomes of pages that are still missing when the block is left: "sigbus" (a touch ends the
            process), "populate" (all are brought first; if that fails, or the block raises, "sigbus"), "zeros".
        fork: "dontfork": forked children do not have the region at all, a touch is SIGSEGV there; "serve": they are
            served with the same contents, and so are their children. That needs CAP_SYS_PTRACE.
        timeout: seconds for one read of the source or one call of the handler; None: no limit.
        retries: further tries after a failed read, with exponential backoff and jitter.
        concurrent_reads: source reads, or handlers, under way at once.
        bytes_in_flight: bytes of source reads under way at once.
        record: a file to write the order of first touches to, complete when the block is left. Pages are served one by
            one then, whatever `readahead` says: a page that comes along with another is not seen to be touched.
        replay: a file that was recorded: its pages are brought in that order, from entering on. Faults go first.
        background: True: bring all that is missing in the background, as fast as faults allow; a number: so many bytes
            per second at most.
        track_writes: have `collect()` tell which pages were written (Linux 6.7). What is loaded does not count as
            written, nor does what is emptied (MADV_DONTNEED).
        user_mode_only: for users who may not do more; a system call on a missing page fails with EFAULT then.

    Raises (on entering):
        UnsupportedError: the kernel lacks userfaultfd or a feature; NativePartError: the native part is missing.
        AccessError: this user may not use it; it names the knobs.
        BusyError: the region is served already.
        TraceError: `replay` is no recording, not complete, damaged, or of another page size.
        PagerStartError: the pager did not start, or source or handler cannot travel to it.
        TypeError: `InProcess()` without a running loop.
    """

    @overload
    def __init__(
        self,
        region: Region,
        source_or_handler: Source | Handler | None = None,
        *,
        engine: Pager | InProcess | None = None,
        readahead: int = 2 << 20,
        on_exit: OnExit = "sigbus",
        fork: Literal["dontfork", "serve"] = "dontfork",
        timeout: float | None = 30.0,
        retries: int = 4,
        concurrent_reads: int = 128,
        bytes_in_flight: int = 128 << 20,
        record: str | os.PathLike[str] | None = None,
        replay: str | os.PathLike[str] | None = None,
        background: bool | float = False,
        track_writes: bool = False,
        user_mode_only: bool = False,
    ) -> None: ...

    @overload
    def __init__(
        self,
        region: Region,
        source_or_handler: Source | Handler | None = None,
        *,
        engine: InThread,
        readahead: int = 2 << 20,
        on_exit: OnExit = "sigbus",
        fork: Literal["dontfork"] = "dontfork",
        timeout: float | None = 30.0,
        retries: int = 4,
        concurrent_reads: int = 128,
        bytes_in_flight: int = 128 << 20,
        record: str | os.PathLike[str] | None = None,
        replay: str | os.PathLike[str] | None = None,
        background: bool | float = False,
        track_writes: bool = False,
        user_mode_only: bool = False,
    ) -> None: ...

    @overload
    def __init__(
        self,
        region: Region,
        *,
        engine: ServedBy,
        on_exit: OnExit = "sigbus",
        fork: Literal["dontfork", "serve"] = "dontfork",
        track_writes: bool = False,
        user_mode_only: bool = False,
    ) -> None: ...

    def __init__(
        self,
        region: Region,
        source_or_handler: Source | Handler | None = None,
        *,
        engine: EngineChoice | None = None,
        readahead: int = 2 << 20,
        on_exit: OnExit = "sigbus",
        fork: Literal["dontfork", "serve"] = "dontfork",
        timeout: float | None = 30.0,
        retries: int = 4,
        concurrent_reads: int = 128,
        bytes_in_flight: int = 128 << 20,
        record: str | os.PathLike[str] | None = None,
        replay: str | os.PathLike[str] | None = None,
        background: bool | float = False,
        track_writes: bool = False,
        user_mode_only: bool = False,
    ) -> None:
        _check_region(region)
        if on_exit not in ("sigbus", "populate", "zeros"):
            raise ValueError(f'on_exit is "sigbus", "populate" or "zeros", not {on_exit!r}')
        if fork not in ("dontfork", "serve"):
            raise ValueError(f'fork is "dontfork" or "serve", not {fork!r}')
        if record is not None and replay is not None:
            raise ValueError("either record or replay: what a replay brings is not seen to be touched")
        self.region = region
        self.origin = ZeroSource(len(region)) if source_or_handler is None else checked(source_or_handler)
        if track_writes and wants_writes(self.origin):
            raise ValueError("either the kernel tracks writes (track_writes=True), or Handler.write is told of them")
        self._choice: EngineChoice = Pager() if engine is None else engine
        self._on_exit = on_exit
        self._sigbus = True  # whether what is missing when the block is left is SIGBUS from then on
        self._fork = fork
        self._track_writes = track_writes
        self._user_mode_only = user_mode_only
        self._record = record
        self._replay = replay
        self._recorder: Recorder | None = None
        self._modes = RegisterMode.MISSING
        if track_writes or wants_writes(self.origin):
            self._modes |= RegisterMode.WP
        self._options = Options(
            readahead if record is None else 0,
            background=math.inf if background is True else float(background),
            write_protect=RegisterMode.WP in self._modes,
            limits=Limits(concurrent_reads, bytes_in_flight, timeout, retries),
        )
        self._choice.check(Terms(source_or_handler, fork, self._options, record is not None, replay is not None))
        self._uffd: Userfaultfd | None = None
        self._engine: Engine | None = None
        self._errors: deque[BaseException] = deque()
        self._news = threading.Condition()
        self._waiters: list[Callable[[], object]] = []
        self._pid = 0  # of the process that entered: a forked child that leaves the block must not end its parent's

    # Entering and leaving

    async def __aenter__(self) -> Self:
        """Start to serve."""
        engine = self._choice.make(asyncio.get_running_loop())
        starting = asyncio.ensure_future(asyncio.to_thread(self._start, engine))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            # The thread cannot be interrupted: let it finish, and undo what it did.
            with contextlib.suppress(BaseException):
                await starting
                await asyncio.to_thread(self._stop)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Serve no longer; settle what is missing as `on_exit` says. Canceling does not interrupt this."""
        stopping = asyncio.ensure_future(asyncio.to_thread(self._stop, populate=kind is None))
        try:
            await asyncio.shield(stopping)
        except asyncio.CancelledError:
            await stopping
            raise

    def __enter__(self) -> Self:
        """Start to serve, in a program without a loop."""
        self._start(self._choice.make(None))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Serve no longer; settle what is missing as `on_exit` says."""
        self._stop(populate=kind is None)

    def _start(self, engine: Engine) -> None:
        # What may take time or fail comes first: the size of a source is asked of a server.
        _ = getattr(self.origin, "size", None)
        self._register()
        region = self.region
        try:
            engine.start(
                Assignment(
                    uffd=self._descriptor,
                    service=self._service(),
                    mapping=Mapping(region.address, region.address + region.mapped_length, 0),
                    page_size=region.page_size,
                    options=self._options,
                    on_error=self._failed,
                    on_lost=self._lost,
                )
            )
        except BaseException:
            self._unregister()
            raise
        self._engine = engine
        region.listen(engine.layout)

    def _stop(self, *, populate: bool = False) -> None:
        engine = self._engine
        if engine is None or os.getpid() != self._pid:
            return
        try:
            if populate and self._on_exit == "populate":
                engine.prefetch(0, len(self.region)).result()
                self._sigbus = False
        finally:
            if self._sigbus and Feature.POISON in probe().features:
                engine.refuse()
            try:
                engine.leave(self._settle, sigbus=self._sigbus)
            finally:
                self._left()

    def _register(self) -> None:
        region = self.region
        self._pid = os.getpid()
        self._sigbus = self._on_exit != "zeros"
        if region.monitor is not None:
            raise BusyError("UFFDIO_REGISTER", region.address, region.mapped_length, errno.EBUSY)
        if region.closed:
            raise ClosedError("the region is closed")
        available = probe()
        # In user mode only, faults of system calls are not served; some engines never serve them.
        user_mode_only = self._user_mode_only or (
            available.opened_by == "user-mode-only" and not self._choice.serves_system_calls
        )
        if not user_mode_only and available.opened_by == "user-mode-only":
            Userfaultfd().close()  # raises: the caller has not agreed to that
        self._uffd = Userfaultfd(self._wanted(available.features), user_mode_only=user_mode_only)
        try:
            if self._fork != "serve":
                libc.madvise(region.address, region.mapped_length, libc.MADV_DONTFORK)
            self._uffd.register(region.address, region.mapped_length, self._modes)
            if self._track_writes:
                self.collect()  # what was there before is protected, too
        except BaseException:
            self._unregister()
            raise
        region.monitor = self

    def _wanted(self, available: Feature) -> Feature:
        """Return what the descriptor must have; with it goes what the region is registered for."""
        wanted = self._choice.features
        if self._fork == "serve":
            wanted |= Feature.EVENT_FORK
        if self._track_writes:
            wanted |= WRITE_TRACKING
        elif RegisterMode.WP in self._modes:
            wanted |= Feature.PAGEFAULT_FLAG_WP | (Feature.WP_HUGETLBFS_SHMEM & available)
        if self.region.fd >= 0 and (minor := _minor(self.region) & available):
            # What another process has brought into the file is mapped by CONTINUE, and not fetched again.
            wanted |= minor
            self._modes |= RegisterMode.MINOR
        self._options = attrs.evolve(self._options, modes=int(self._modes))
        return wanted

    def _service(self) -> Service:
        page, size = self.region.page_size, len(self.region)
        if self._record is not None:
            self._recorder = Recorder.create(self._record, page, size)
        trace = None if self._replay is None else Trace.load(self._replay, page)
        return Service(self.origin, self._recorder, trace)

    def _unregister(self) -> None:
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.close()
        uffd, self._uffd = self._uffd, None
        self.region.monitor = None
        if uffd is not None:
            with contextlib.suppress(UffdError):
                uffd.unregister(self.region.address, self.region.mapped_length)
            uffd.close()
            if self._fork != "serve":
                libc.madvise(self.region.address, self.region.mapped_length, libc.MADV_DOFORK)

    def _left(self) -> None:
        """Nobody serves the region any more."""
        self._engine = None
        self.region.monitor = None
        self.region.listen(None)
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.complete()
        with self._news:
            self._tell()

    def _settle(self) -> None:
        """Decide what a touch of a missing page is from now on."""
        if (uffd := self._take()) is None:
            return
        if self._sigbus and Feature.SIGBUS in uffd.features:
            # As long as it is open, and none of our handlers is called, a missing page is SIGBUS for everybody.
            self.region.keep(uffd)
            return
        with uffd:
            if self._sigbus:
                leave_sigbus(self.region, uffd)
            else:
                uffd.unregister(self.region.address, self.region.mapped_length)
                if self._fork != "serve":
                    libc.madvise(self.region.address, self.region.mapped_length, libc.MADV_DOFORK)

    # Using it

    async def prefetch(self, start: int, length: int) -> None:
        """Bring `length` bytes from offset `start` of the region. Faults go first.

        Returns when all of them are there. Canceling gives up waiting; what is under way comes all the same.

        Raises:
            SourceError: the source failed; nothing is poisoned, what came is kept.
            ValueError: not within the region.
        """
        self._check(start, length)
        await asyncio.wrap_future(self._running().prefetch(start, length))

    def prefetch_sync(self, start: int, length: int, timeout: float | None = None) -> None:
        """As `prefetch`, for programs without a loop; TimeoutError after `timeout` seconds."""
        self._check(start, length)
        engine = self._running()
        engine.check_may_wait()
        future = engine.prefetch(start, length)
        try:
            future.result(timeout)
        except TimeoutError:
            if future.done():  # just now, or with an error of this kind
                future.result()
                return
            late = f"[{start}, {start + length}) is not all there after {timeout} s; it goes on coming"
            raise TimeoutError(late) from None

    def read(self, start: int, length: int) -> bytes:
        """Return a copy of `length` bytes from offset `start` on. Missing pages are brought first.

        For what cannot wait for a missing page itself: with `InThread` (and with `user_mode_only`) a system call on a
        missing page fails with EFAULT, write(2) of a view for example. It succeeds with what this returns.

        Raises:
            SourceError: a page could not be had.
            ValueError: not within the region.
            RuntimeError: this thread runs the engine's loop: await `prefetch` there, and take a slice.
        """
        self.prefetch_sync(start, length)
        return self.region[start : start + length]

    def collect(self) -> list[Range]:
        """Return the pages written since the last call, or since entering, and begin anew: in one step.

        Offsets in the region, whole pages, in order, neighbours joined; the last may reach behind `len(region)`. Needs
        `track_writes=True`. Writes through another mapping of a shared region, and by write(2) to its memfd, are not
        seen.
        """
        if not self._track_writes:
            raise ValueError("writes are not tracked: Monitor(..., track_writes=True)")
        if self._uffd is None:
            raise ClosedError("this Monitor is not entered: use it inside its `with` block")
        # A page that is not there counts as written for the kernel, since it is not protected; not for us.
        return collect(self.region, anyof=abi.PAGE_IS_PRESENT | abi.PAGE_IS_SWAPPED)

    def statistics(self) -> Statistics:
        """Return what has been counted since entering; also after worker deaths. Costs microseconds.

        With `ServedBy`, what the server has counted for all its clients, since it began.
        """
        return self._running().statistics()

    async def wait_error(self) -> None:
        """Wait until a page could not be had, and raise why: each error once, in order. Canceling is safe.

        A thousand errors are kept until they are raised; of further ones the statistics tell, and the log.

        Raises:
            SourceError, HandlerError: why a page was poisoned.
            PagerDiedError: the pager was given up.
            ClosedError: the Monitor was left.
        """
        loop = asyncio.get_running_loop()
        event = asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # that loop is closed
                loop.call_soon_threadsafe(event.set)

        with self._news:
            self._waiters.append(tell)
        try:
            while True:
                self.check()
                if self._engine is None:
                    raise ClosedError("the Monitor was left")
                await event.wait()
                event.clear()
        finally:
            with self._news:
                self._waiters.remove(tell)

    def check(self) -> None:
        """Raise the next error that has not been raised yet; the plain form of `wait_error`."""
        with self._news:
            if self._errors:
                raise self._errors.popleft()

    def _failed(self, error: BaseException) -> None:
        with self._news:
            if len(self._errors) < _KEPT or isinstance(error, PagerDiedError):
                self._errors.append(error)
            self._tell()

    def _lost(self) -> None:
        """Nobody serves any more: what is missing is SIGBUS from now on, no hang and no zeros."""
        if (uffd := self._take()) is not None:
            with uffd:
                leave_sigbus(self.region, uffd)

    def _take(self) -> Userfaultfd | None:
        """Take the descriptor away, for who settles the memory; who comes second, from another thread, gets None."""
        with self._news:
            uffd, self._uffd = self._uffd, None
        return uffd

    def _tell(self) -> None:
        for tell in self._waiters:
            tell()

    def _running(self) -> Engine:
        if self._engine is None:
            raise ClosedError("this Monitor is not entered: use it inside its `with` block")
        if os.getpid() != self._pid:
            raise ClosedError("this Monitor belongs to the process that entered it, not to its forked child")
        return self._engine

    def _check(self, start: int, length: int) -> None:
        if start < 0 or length < 0 or start + length > len(self.region):
            raise ValueError(f"[{start}, {start + length}) is not within the region of {len(self.region)} bytes")

    def __repr__(self) -> str:
        state = "not entered" if self._engine is None else "entered"
        return f"<Monitor of {self.region!r} by {self.origin!r}, {self._choice!r}, {state}>"

    @property
    def _descriptor(self) -> Userfaultfd:
        assert self._uffd is not None
        return self._uffd

    @property
    def pids(self) -> tuple[int, ...]:
        """The pager's processes: keeper and worker; empty where the loop runs elsewhere."""
        return () if self._engine is None else self._engine.pids


def _check_region(region: Region) -> None:
    if not isinstance(region, Region):
        raise TypeError(f"a Monitor serves an aiouffd.Region, not {type(region).__name__}")
    if region.closed:
        raise ClosedError("the region is closed")


def _minor(region: Region) -> Feature:
    return Feature.MINOR_SHMEM if region.page_size == mmap.PAGESIZE else Feature.MINOR_HUGETLBFS
