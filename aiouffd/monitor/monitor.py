"""`Monitor`: serves a region of this process."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import threading
import weakref
from functools import partial
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    Self,
    SupportsFloat,
    SupportsIndex,
    TypeAlias,
    TypedDict,
    Unpack,
    overload,
)

from aiouffd import native
from aiouffd.engine.mappings import Mapping
from aiouffd.engine.options import Options, Service, checked
from aiouffd.engine.serve.bounds import Limits
from aiouffd.errors import BusyError, ClosedError, UffdError
from aiouffd.kernel.limits import limit_error
from aiouffd.kernel.region import Region
from aiouffd.lifetime import uninterrupted
from aiouffd.monitor.beginnings import beginnings
from aiouffd.monitor.capturing import Capturing
from aiouffd.monitor.crashes import CrashNotes, caller, enable_tracebacks
from aiouffd.monitor.engines.pager import default as default_pager
from aiouffd.monitor.engines.protocol import Assignment, Terms
from aiouffd.monitor.error_queue import ErrorQueue
from aiouffd.monitor.held import Held
from aiouffd.monitor.lookout import Lookout
from aiouffd.monitor.registration import Registration
from aiouffd.report.observers import NOBODY, installed
from aiouffd.sources.base import ZeroSource

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from aiouffd.engine.ahead.pages import Recording
    from aiouffd.engine.serve.handler import Handler
    from aiouffd.monitor.deciding import Choice
    from aiouffd.monitor.engines.in_process import InProcess
    from aiouffd.monitor.engines.in_thread import InThread
    from aiouffd.monitor.engines.pager import Pager
    from aiouffd.monitor.engines.protocol import Engine, EngineChoice
    from aiouffd.monitor.engines.served_by import ServedBy
    from aiouffd.monitor.progress import Show
    from aiouffd.monitor.recording import Tracing
    from aiouffd.monitor.reporting import Reporting
    from aiouffd.monitor.watching import Watching
    from aiouffd.report.observers import MonitorWatch
    from aiouffd.sources.base import Source

__all__ = [
    "AllOptions",
    "MapOptions",
    "MappedMemoryOptions",
    "MemoryOptions",
    "Monitor",
    "OnError",
    "OnExit",
    "OnFork",
    "ServingOptions",
    "checked_engine",
]

_FEWEST = 4  # pages: an instruction can move from one place to another, both across a border, and needs all at once

OnError: TypeAlias = "Choice | Callable[[UffdError], Choice]"
OnExit: TypeAlias = Literal["sigbus", "populate", "zeros"]
OnFork: TypeAlias = Literal["dontfork", "serve"]


class MappedMemoryOptions(TypedDict, total=False):
    """Options of a Monitor about its memory, which go with each engine and with `aiouffd.map`."""

    track_writes: bool
    user_mode_only: bool
    max_resident: int | None
    write_back: bool


class MemoryOptions(MappedMemoryOptions, total=False):
    """Options of a Monitor about its memory, which go with each engine."""

    on_exit: OnExit


class ServingOptions(TypedDict, total=False):
    """Options about how it is served; a server chooses them for itself."""

    readahead: int
    timeout: float | None
    retries: int | None
    concurrent_reads: int
    bytes_in_flight: int
    record: str | os.PathLike[str] | Recording | None
    replay: str | os.PathLike[str] | None
    report: str | os.PathLike[str] | None
    background: bool | float
    on_error: OnError
    progress: Show


class MapOptions(ServingOptions, MappedMemoryOptions, total=False):
    """The options of a Monitor that has no block: all but `on_exit`."""


class AllOptions(ServingOptions, MemoryOptions, total=False):
    """The options of a Monitor that chooses how it is served."""


class Monitor(Capturing):
    """Serves the page faults of a region, from entering the `with` block until leaving it.

    A thread that touches a missing page with the GIL held stops its whole interpreter, and a loop in it. So the loop
    runs in a pager process by default, and any thread may touch the region. A Monitor is an asynchronous context
    manager, and a plain one for programs without a loop.

    Args:
        region: served by one Monitor at a time; not again once it was left with on_exit="sigbus". What was touched
            before stays as it is: zeros.
        source_or_handler: where the bytes come from; by default zeros. What the region has beyond the source's end
            is zeros.
        engine: where the loop runs: `Pager()`, `InThread()`, `InProcess()` or `ServedBy(path)`. None: in the pager that
            this process shares among its Monitors; a source or handler of your own gets one for itself.
        readahead: the largest window that a fault brings along, in bytes (2 MiB); 0 serves page by page.
        on_exit: what becomes of pages that are still missing when the block is left: "sigbus" (the default: a touch
            ends the process), "populate" (all are brought first; if that fails, or the block raises, "sigbus"),
            "zeros".
        fork: "serve": forked children are served with the same contents, and so are their children. That needs
            CAP_SYS_PTRACE. "dontfork": they do not have the region at all, a touch is SIGSEGV there. None: "serve"
            with `Pager()`, where this user may; else "dontfork".
        timeout: seconds for one read of the source or one call of the handler (30); None: no limit. A window that
            times out is followed by one read of the page alone: a touch of a source of your own that does not answer
            waits for (retries + 2) timeouts, and the pauses between them.
        retries: further tries after a failed read, with exponential backoff and jitter. None: 4, and for URLs as many
            as two thirds of the timeout allow.
        concurrent_reads: the most source reads, or handlers, under way at once (128).
        bytes_in_flight: the most bytes of source reads under way at once (128 MiB).
        record: a file to write the order of first touches to, complete when the block is left or the program ends. What
            comes along with a touched page is marked, since nobody sees whether it is touched; `readahead=0` records
            touches only.
            With `Recording(path, pages=True)` it also carries the bytes of the pages, which are read again at the end.
        replay: a file that was recorded: its pages are brought in that order, from entering on. Faults go first. Bytes
            of pages that it carries are not fetched, if the source has the same version still.
        report: a file to write what the run was like to, when the block is left, also if it raises: `.html`, a page for
            a browser, or `.json`, for `aiouffd report` and other programs. Without it, the environment variable
            AIOUFFD_REPORT may name a folder: each Monitor writes a `.json` there.
        background: True: bring all that is missing in the background, as fast as faults allow; a number: so many bytes
            per second at most, on average. It comes in steps of 512 KiB from a file or from memory, else of 8 MiB.
        on_error: what becomes of a thread that touches a page that cannot be had, after all tries: "sigbus" (the
            default: the signal, which ends most programs), "retry" (the thread waits, and the page is asked for again
            every second, for ever), or a function that is called with the error and chooses one of them. It is called
            in another thread, or on the loop with `InProcess`, when a page fails first, and once a minute. Until it has
            returned, and as long as it cannot run since a thread that waits holds the GIL, the page is asked for again.
            "sigbus" is for the bytes that a SourceError names, and for all of the region with other errors. Either way
            the error is reported. `prefetch` and `read` raise it with all of them.
        progress: show how much has come, of all or of what is replayed, from entering on until all has come or the
            block is left: as for `prefetch`, twice a second.
        track_writes: have `collect()` tell which pages were written (Linux 6.7). What is loaded does not count as
            written, nor does what is emptied (MADV_DONTNEED).
        max_resident: bytes that are there at most, four pages or more; None: as many as come. What came longest ago is
            dropped before more comes, and brought again when it is touched. Pages that were written stay, and count;
            what is read at once (`readahead`) is at most a sixteenth. For a Source. With `Pager()` and fork="serve" or
            `write_back`, or before Linux 6.18, a private region becomes shared memory when the block is entered, with
            the bytes that it has; huge pages must be shared. Forked children get such a region only with fork="serve",
            and what they write is seen by all.
        write_back: pages that were written go to the source, which has `write` (`FileSource(path, writable=True)`, or
            what `open` and `map` make of a path): before they are dropped, at `flush`, and when the block is left or
            the program ends. What lies behind the source's end does not.
        user_mode_only: for users who may not do more; a system call on a missing page fails with EFAULT then.

    Raises:
        TypeError, ValueError: an option is of a wrong type, unknown, or not for this engine.
        OSError: `report` cannot be written.

    Raises on entering:
        UnsupportedError: the kernel lacks userfaultfd or a feature.
        NativePartError: the native part is missing.
        AccessError: this user may not use it; it names the knobs.
        BusyError: the region is served already, or was left with "sigbus".
        LimitError: a limit is too low; it names the limit.
        TraceError: `replay` is no recording, not complete, damaged, or of another page size or source.
        OSError: `record` cannot be written, or `replay` cannot be read.
        PagerStartError: the pager did not start, or source or handler cannot travel to it.
        TypeError: `InProcess()` without a running loop.
    """

    _pid = 0  # of the process that entered: a forked child that leaves the block must not end its parent's
    _sigbus = True  # whether what is missing when the block is left is SIGBUS from then on
    _crashes: CrashNotes
    _engine: Engine | None = None
    _registration: Registration | None = None
    _lookout: Lookout | None = None
    _watching: Watching | None = None
    _observation: MonitorWatch = NOBODY

    @overload
    def __init__(
        self,
        region: Region,
        source_or_handler: Source | Handler | None = None,
        *,
        engine: Pager | InProcess | None = None,
        fork: OnFork | None = None,
        **options: Unpack[AllOptions],
    ) -> None: ...

    @overload
    def __init__(
        self,
        region: Region,
        source_or_handler: Source | Handler | None = None,
        *,
        engine: InThread,
        fork: Literal["dontfork"] | None = None,
        **options: Unpack[AllOptions],
    ) -> None: ...

    @overload
    def __init__(
        self, region: Region, *, engine: ServedBy, fork: OnFork | None = None, **options: Unpack[MemoryOptions]
    ) -> None: ...

    def __init__(
        self,
        region: Region,
        source_or_handler: Source | Handler | None = None,
        *,
        engine: EngineChoice | None = None,
        readahead: int = 2 << 20,
        on_exit: OnExit = "sigbus",
        fork: OnFork | None = None,
        timeout: float | None = 30.0,
        retries: int | None = None,
        concurrent_reads: int = 128,
        bytes_in_flight: int = 128 << 20,
        record: str | os.PathLike[str] | Recording | None = None,
        replay: str | os.PathLike[str] | None = None,
        report: str | os.PathLike[str] | None = None,
        background: bool | float = False,
        on_error: OnError = "sigbus",
        progress: Show = False,
        track_writes: bool = False,
        max_resident: int | None = None,
        write_back: bool = False,
        user_mode_only: bool = False,
    ) -> None:
        _check_region(region)
        counts = {"readahead": readahead, "concurrent_reads": concurrent_reads, "bytes_in_flight": bytes_in_flight}
        _check_numbers("a whole number", int | SupportsIndex, **counts)
        optional = int | None | SupportsIndex
        _check_numbers("a whole number or None", optional, retries=retries, max_resident=max_resident)
        _check_numbers("a number of seconds or None", float | None | SupportsFloat, timeout=timeout)
        _check_numbers("a number or a bool", bool | float | SupportsFloat, background=background)
        _check_choice("on_exit", on_exit, "sigbus", "populate", "zeros")
        if not callable(on_error):
            _check_choice("on_error", on_error, "sigbus", "retry")
        _check_choice("fork", fork, None, "dontfork", "serve")
        self._held, self._layout = Held(region), threading.RLock()
        self.shows_data: bool = source_or_handler is not None and not isinstance(source_or_handler, ZeroSource)
        self.origin: Any = ZeroSource(len(region)) if source_or_handler is None else checked(source_or_handler)
        noted = "saved" if write_back else "noted" if max_resident is not None else ""
        self._writes = _writes(self.origin, noted, tracked=track_writes)
        _check_bound(region, max_resident, on_exit)
        self._choice = checked_engine(engine)
        self._on_exit, self._on_error, self._progress = on_exit, on_error, progress
        self._children = None if fork is None and self._choice.serves_children else fork == "serve"
        self._fork, self._user_mode_only = fork, user_mode_only
        self._options = Options(
            readahead,
            background=math.inf if background is True else float(background),
            write_protect=bool(self._writes),
            limits=Limits(concurrent_reads, bytes_in_flight, timeout, retries),
            max_resident=None if max_resident is None else int(max_resident),
            bounded=bool(noted),
            write_back=write_back,
            on_error="retry" if callable(on_error) else on_error,
        )
        self._recording = _recording(record, replay, source_or_handler, self._options.limits)
        terms = source_or_handler, fork, self._options, record is not None, replay is not None, region.fd >= 0
        self._choice.check(Terms(*terms, region.page_size, reports=report is not None))
        self._reporting = _reporting(report, self._choice)
        self._errors = ErrorQueue()

    # Entering and leaving

    async def __aenter__(self) -> Self:
        """Start to serve."""
        import asyncio  # noqa: PLC0415 - 20 ms, that a program with a loop has spent already

        if not native.is_known():
            await asyncio.to_thread(native.reason)  # loads the native part, once a process: that reads files
        enable_tracebacks(of_all=self._choice.loop_is_here)
        engine = self._choice.make(asyncio.get_running_loop())
        await uninterrupted(partial(self._start, engine), self._stop)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Serve no longer; settle what is missing as `on_exit` says. Canceling does not interrupt this."""
        await uninterrupted(partial(self._stop, populate=kind is None, raised=kind, where=caller()))

    def __enter__(self) -> Self:
        """Start to serve, in a program without a loop."""
        enable_tracebacks(of_all=self._choice.loop_is_here)
        self._start(self._choice.make(None))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Serve no longer; settle what is missing as `on_exit` says."""
        self._stop(populate=kind is None, raised=kind, where=caller())

    def _start(self, engine: Engine) -> None:
        # What may take time or fail comes first: the size of a source is asked of a server.
        _ = getattr(self.origin, "size", None)
        region = self.region
        if region.monitor is self:
            raise BusyError("entering this Monitor a second time", region.address, len(region), errno.EBUSY)
        self._pid = os.getpid()
        self._sigbus = self._on_exit != "zeros"
        with beginnings.begin(children=self._children is not False):
            registered = None if self._recording is None else self._recording.registered()
            self._registration = registration = registered or self.register()
            name = f"The Monitor of {region!r} by {self.origin!r}"
            self._crashes = CrashNotes(self._held, name, children=registration.children)
            leave: Callable[[], None] = registration.abandon
            try:
                if self._writes == "tracked":
                    registration.collect()  # what was there before is protected, too
                service = self._service()
                engine.start(
                    Assignment(
                        uffd=registration.uffd,
                        service=service,
                        mapping=Mapping(region.address, region.address + region.mapped_length, 0),
                        page_size=region.page_size,
                        options=self._options.of(registration.modes),
                        can_poison=registration.can_poison,
                        on_error=self._report_to(engine),
                        on_lost=_weak(
                            self._lost
                        ),  # the engine is part of cycles, and the region is not to wait for their end
                        file=region.fd,
                        written=registration.written,
                        on_flight=self._observed(service),
                    )
                )
                leave = partial(engine.leave, registration.abandon, sigbus=False)
                registration.is_served()
            except BaseException as error:
                self._observation.end(type(error))
                if self._recording is not None:
                    self._recording.end(complete=False)
                self._registration = None
                leave()
                self._crashes.close()
                if isinstance(error, OSError) and not isinstance(error, UffdError):
                    limit = limit_error(f"serving {region!r}", error.errno or 0)
                    if limit is not None:
                        raise limit from error
                raise
        self._engine, region.monitor = engine, self
        if region.fd >= 0:
            self._lookout = Lookout(registration, engine.statistics, meanwhile=self._choice.counts_here)
        region.listen(engine.layout)
        self._watch(engine, service)

    def register(self) -> Registration:
        """Register the region, for whoever enters the Monitor; raises as `Registration`."""
        return Registration(
            self._held,
            self._choice.features,
            shared=not self._choice.drops_private(write_back=self._options.write_back, fork=self._fork),
            writes=self._writes,
            children=self._children,
            user_mode_only=self._user_mode_only,
            serves_system_calls=self._choice.serves_system_calls,
        )

    def _watch(self, engine: Engine, service: Service) -> None:
        """Begin to look at the region for people, while it is served, and at the end of the program."""
        if self.writes_back or self._recording is not None:
            from aiouffd.monitor.saving import save_at_exit  # noqa: PLC0415 - for few programs

            save_at_exit(self, self._recording)
        if self._choice.counts_here:
            self._observation.begin(engine.statistics)
        if self._reporting is not None:
            self._reporting.begin(self._held, engine, service, repr(self._choice), self._options)
        if self._progress:
            from aiouffd.monitor.watching import Watching  # noqa: PLC0415 - 2 ms, for few programs

            self._watching = Watching(self._held, self._progress, service.trace, repr(self.origin))

    def _observed(self, service: Service) -> Callable[[dict[str, Any]], None] | None:
        """Tell who is installed, if somebody is; return what is called with each flight, if that is wanted."""
        observer = installed()
        if observer is not None:
            facts = {"source": repr(service.origin)[:1000], "engine": repr(self._choice)}
            sizes = {"region.size": len(self.region), "page_size": self.region.page_size}
            self._observation = observer.monitor({**facts, **sizes})
        return self._observation.flight if self._observation.traces else None

    def _report_to(self, engine: Engine) -> Callable[[BaseException], None]:
        put = self._errors.put if self._reporting is None else self._reporting.noting(self._errors.put)
        if not callable(self._on_error):
            return put
        from aiouffd.monitor.deciding import Deciding  # noqa: PLC0415 - half a millisecond, for few programs

        return Deciding(self._on_error, put, engine)

    def _lost(self) -> None:
        """Nobody serves the region any more: no hang, and no zeros."""
        if self._registration is not None:
            with contextlib.suppress(ClosedError):  # its finalizer settles it
                self._crashes.lost()
                self._registration.settle(sigbus=True)

    def _stop(
        self,
        *,
        populate: bool = False,
        raised: type[BaseException] | None = None,
        where: str = "its entrance, which was canceled",
    ) -> None:
        engine, registration = self._engine, self._registration
        if engine is None or registration is None or os.getpid() != self._pid:
            return
        try:
            if self._options.write_back:
                engine.flush(0, len(self.region)).result()
            if populate and self._on_exit == "populate":
                engine.prefetch([(0, len(self.region))]).result()
                self._sigbus = False
        finally:
            self._observation.leaving()
            if self._reporting is not None:
                self._reporting.end(raised)
            if self._sigbus:
                self._crashes.left(where)
            if self._sigbus and registration.can_poison:
                engine.refuse()
            if self._watching is not None:
                self._watching.close()
            if self._lookout is not None:
                self._lookout.close()
            self._watching = self._lookout = None
            try:
                engine.leave(partial(registration.settle, sigbus=self._sigbus), sigbus=self._sigbus)
            finally:
                if not self._sigbus:
                    self._crashes.close()
                # In this order: to another thread, one that is entered nowhere is that of a forked child's parent.
                self.region.monitor = self._engine = self._registration = None
                self.region.reopens = None  # it has the source, and so the lock of a file that is written to
                self._errors.wake()
                self._observation.end(raised)
                try:
                    if self._recording is not None:
                        self._recording.end(complete=True, raised=raised)
                finally:
                    if self._reporting is not None:
                        self._reporting.write()

    def belong_to_region(self) -> None:
        """Have the region keep this Monitor, which keeps it no longer: `leave_region` ends the serving."""
        self._held.release()

    def leave_region(self, region: Region) -> None:
        """Serve no longer what `belong_to_region` has let go of."""
        self._held.keep(region)
        self._stop(where=caller())
        self._held.release()

    def _service(self) -> Service:
        return Service(self.origin) if self._recording is None else self._recording.service(self.origin, self.region)

    def __repr__(self) -> str:
        state = "not entered" if self._engine is None else "entered"
        return f"<Monitor of {self._held!r} by {self.origin!r}, {self._choice!r}, {state}>"


def _check_region(region: Region) -> None:
    if not isinstance(region, Region):
        raise TypeError(f"a Monitor serves an aiouffd.Region, not {type(region).__name__}")
    if region.closed:
        raise ClosedError("the region is closed")


def _writes(origin: Any, noted: str, *, tracked: bool) -> str:
    """Return which writes are told, as `Registration` takes it; ValueError where two want them."""
    if tracked and noted:
        raise ValueError("either the kernel tracks writes (track_writes=True), or max_resident and write_back do")
    if tracked and _wants_writes(origin):
        raise ValueError("either the kernel tracks writes (track_writes=True), or Handler.write is told of them")
    if noted and getattr(origin, "read", None) is None:
        raise ValueError("max_resident and write_back need a Source: a page of a handler cannot be had again, perhaps")
    if noted == "saved" and not (callable(getattr(origin, "write", None)) and getattr(origin, "writable", True)):
        raise ValueError(f"{origin!r:.200} takes nothing back; FileSource(path, writable=True) does, for one")
    return "tracked" if tracked else noted or ("served" if _wants_writes(origin) else "")


def _wants_writes(origin: Any) -> bool:
    if not hasattr(origin, "pagefault"):  # no handler: its module takes 4 ms
        return False
    from aiouffd.engine.serve.handler import wants_writes  # noqa: PLC0415

    return wants_writes(origin)


def _check_bound(region: Region, max_resident: int | None, on_exit: OnExit) -> None:
    if max_resident is None:
        return
    least = _FEWEST * region.page_size
    if max_resident < least:
        raise ValueError(f"max_resident is at least {_FEWEST} pages of the region, {least} bytes, not {max_resident}")
    if on_exit == "populate" and max_resident < len(region):
        raise ValueError(f'on_exit="populate" brings all {len(region)} bytes, and max_resident is {max_resident}')


def checked_engine(engine: EngineChoice | None) -> EngineChoice:
    """Return the default where none was chosen. Raises TypeError for what is no engine."""
    if engine is None:
        return default_pager
    if isinstance(engine, type) or not hasattr(engine, "serves_children"):
        raise TypeError(f"engine= takes an instance, InThread() for example, not {engine!r:.200}")
    return engine


def _recording(
    record: str | os.PathLike[str] | Recording | None,
    replay: str | os.PathLike[str] | None,
    origin: object,
    limits: Limits,
) -> Tracing | None:
    if record is None and replay is None and not hasattr(origin, "recording"):
        return None
    from aiouffd.monitor.recording import Tracing  # noqa: PLC0415 - 5 ms, and few Monitors record or replay

    return Tracing(record, replay, limits)


def _reporting(report: str | os.PathLike[str] | None, choice: EngineChoice) -> Reporting | None:
    folder = os.environ.get("AIOUFFD_REPORT") if choice.counts_here else None
    if report is None and not folder:
        return None
    from aiouffd.monitor.reporting import Reporting  # noqa: PLC0415 - 10 ms, and few Monitors report

    return Reporting(report) if report is not None else Reporting.in_folder(folder or "")


def _check_numbers(what: str, kind: Any, **options: Any) -> None:
    for name, value in options.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name}= takes {what}, not {value!r:.200}")


def _check_choice(name: str, value: Any, *choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}, not {value!r:.200}")


def _weak(method: Callable[[], None]) -> Callable[[], None]:
    """Return a function that calls a method as long as its object lives."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        if (alive := reference()) is not None:
            alive()

    return call
