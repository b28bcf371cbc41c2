"""The engine for faults that are resolved in the faulting thread: `InThread`.

The kernel sends no messages (Feature.SIGBUS). The handler of the signal, in the native part, places bytes that are in
memory. For everything else it writes the message that the kernel would have sent into a pipe, and the toucher waits on
a futex with the GIL released. A loop in a thread of its own reads the pipe, as other engines read a userfaultfd.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import errno
import logging
import os
import threading
import weakref
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from aiouffd.engine.reading import PythonReader
from aiouffd.engine.serve.handler import wants_writes
from aiouffd.engine.statistics import Counters
from aiouffd.errors import BusyError
from aiouffd.kernel import abi
from aiouffd.kernel.abi import Feature, RegisterMode
from aiouffd.kernel.limits import no_thread
from aiouffd.loops import new_event_loop, run
from aiouffd.monitor.engines.calls import Call, no_collections
from aiouffd.monitor.engines.extents import Extents
from aiouffd.monitor.engines.local import Local, LocalEngine
from aiouffd.monitor.engines.pipe import PipeUserfaultfd
from aiouffd.monitor.engines.protocol import positive_or_none
from aiouffd.native import faults
from aiouffd.native.faults import Served

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from aiouffd.engine.statistics import Statistics
    from aiouffd.monitor.engines.layout import Layout
    from aiouffd.monitor.engines.protocol import Assignment, Terms
    from aiouffd.store.live import Order

__all__ = ["InThread", "InThreadEngine"]

log: logging.Logger = logging.getLogger("aiouffd")

_BEAT = 0.25  # seconds between signs of life; less where threads lose patience sooner
_engines: weakref.WeakSet[InThreadEngine] = weakref.WeakSet()


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
    serves_children: ClassVar[bool] = False
    counts_here: ClassVar[bool] = True
    loop_is_here: ClassVar[bool] = True
    needs_loop: ClassVar[bool] = False

    def drops_private(self, **_: object) -> bool:
        """Its loop is here."""
        return True

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
        """Return an engine."""
        return InThreadEngine(self)


class _Handlers:
    """The signal handlers of one region, as its layout changes. It knows no engine, which would be in a cycle then.

    Args:
        served: what the handlers know of the region.
        extents: what they may place.
    """

    def __init__(self, served: Served, extents: Extents) -> None:
        self._served = served
        self._extents = extents

    @contextlib.contextmanager
    def quiet(self, layout: Layout) -> Iterator[None]:
        """Keep them away inside the block."""
        with no_collections():
            try:
                if not self._served.close():
                    raise BusyError("a change of the layout", layout.start, layout.end - layout.start, errno.EBUSY)
                yield
            finally:
                self._served.open()

    def show(self, layout: Layout) -> None:
        """Tell them what is shown where; they are kept away."""
        start, end = layout.start, layout.end
        self._served.show(start, end, self._extents.of(layout.mappings, start, end))


class InThreadEngine(LocalEngine):
    """Serves one region of this process, in the threads that touch it and from a loop in a thread of its own.

    Raises (on start):
        NativePartError: there is no native part.
        LimitError: 256 regions are served already, or no thread can be started.
    """

    pids: tuple[int, ...] = ()

    def __init__(self, choice: InThread) -> None:
        self._choice = choice
        self._counters = Counters()
        self._pid = os.getpid()
        patiences = (choice.stuck_warning, choice.stuck_limit)
        self._period = min([_BEAT] + [patience / 4 for patience in patiences if patience])
        self._done = asyncio.Event()
        self._begun = threading.Lock()  # taken by the loop's thread, or by who gives up before
        self._last: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._leaves = False
        self._served: Served
        self._reading = self._writing = -1
        self._loop: asyncio.AbstractEventLoop
        self._uffd: PipeUserfaultfd
        # A daemon, so that a program may end without leaving: see `_at_exit`.
        self._thread = threading.Thread(target=self._run, name="aiouffd-in-thread", daemon=True)

    def start(self, assignment: Assignment) -> None:
        """Serve the region."""
        options = assignment.options
        with contextlib.ExitStack() as undo:
            self._loop = new_event_loop()
            undo.callback(self._loop.close)
            self._reading, self._writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            undo.callback(self._close_pipe)
            self._served = Served(
                assignment.uffd.fileno(),
                self._writing,
                page_size=assignment.page_size,
                readahead=options.readahead,
                mode=abi.COPY_MODE_WP if options.write_protect else 0,
                shared=bool(options.modes & RegisterMode.MINOR) and not options.bounded,
                asks_to_write=options.bounded,
                warning=self._choice.stuck_warning,
                limit=self._choice.stuck_limit or 0.0,
            )
            undo.callback(self._remove, for_good=True)
            refuse = None if assignment.can_poison else self._served.refuse
            page = assignment.page_size if options.modes & RegisterMode.MINOR else 0
            self._uffd = PipeUserfaultfd.joined(assignment.uffd, self._reading, self._loop, refuse, page=page)
            undo.callback(self._uffd.close)
            # No spinning: the touchers need the GIL, which the loop would hold. The native reader would place nothing:
            # the handlers have placed what is in memory.
            handlers = _Handlers(self._served, Extents(assignment.service, options, assignment.page_size))
            how: dict[str, Any] = {"spin_us": 0, "reader": PythonReader, "quiet": handlers.quiet}
            self._local = Local(self._loop, assignment, self._uffd, self._counters, changed=handlers.show, **how)
            handlers.show(self._local.layout)
            undo.callback(self._abandon)
            try:
                self._thread.start()
            except RuntimeError as error:
                raise no_thread("a thread for engine=InThread()") from error
            self._served.open()
            _engines.add(self)
            undo.pop_all()

    def _abandon(self) -> None:
        """End the loop. A thread that has not begun yet, since a signal handler has raised, does not begin."""
        if not self._begun.acquire(blocking=False):
            self._leaves = True
            self._end(lambda: None)

    # The loop's thread

    def _run(self) -> None:
        if not self._begun.acquire(blocking=False):
            return
        try:
            run(self._loop, self._main())
        except BaseException:
            log.exception("the loop of a Monitor with engine=InThread() has ended")
        self._last.get()()

    async def _main(self) -> None:
        self._served.loop(threading.get_native_id())
        self._beat()
        self._local.begin()
        try:
            await self._done.wait()
            if self._leaves:
                self._keep_out()  # before the source is closed, of which handlers copy
        finally:
            await self._local.aclose()

    def _beat(self) -> None:
        displaced = self._served.beat()
        if displaced:
            _report_displaced(self._served, displaced)
        self._loop.call_later(self._period, self._beat)

    # Other threads' side

    def snapshot(self, order: Order) -> Future[dict[str, Any]]:
        """Have the memory of one moment written; from now on the handlers ask the loop about writes."""
        return self._local.snapshot(order, self._served.tell_writes)

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

    def check_may_wait(self) -> None:
        """Raise RuntimeError in the loop's thread."""
        if not self._local.layout.may_wait:
            raise RuntimeError("this thread runs the loop of engine=InThread(): await prefetch() instead")

    def refuse(self) -> None:
        """Do nothing: a thread that touches a missing page waits until `leave` has settled it."""

    def leave(self, settle: Callable[[], None], *, sigbus: bool) -> None:
        """Serve no longer. A thread that touches a missing page meanwhile waits until it is settled.

        The loop's thread does the work: a signal handler may run in this one and touch such a page.
        """
        self._leaves = True
        leave = Call(partial(self._leave, settle, sigbus=sigbus))
        with no_collections():
            self._end(leave)
            leave()  # if the thread had ended before: the interpreter is finalized
        self._local.end()
        leave.wait()

    def _leave(self, settle: Callable[[], None], *, sigbus: bool) -> None:
        self._keep_out()
        self._uffd.close()
        self._close_pipe()
        try:
            settle()
        finally:
            self._remove(for_good=sigbus)

    def stop(self, timeout: float) -> None:
        """End the loop. Handlers go on placing bytes that are in memory; threads that need other pages wait."""
        self._end(lambda: None, timeout)

    def _end(self, last: Callable[[], None], timeout: float | None = None) -> None:
        """End the loop and then its thread, which makes this call before."""
        self._last.put(last)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._done.set)
        try:
            self._thread.join(timeout)
        except BaseException:  # of a signal handler
            self._thread.join(timeout)
            raise

    @property
    def serves_this_process(self) -> bool:
        """Whether it was made here, and not before a fork."""
        return os.getpid() == self._pid

    def _keep_out(self) -> None:
        while not self._served.close():
            log.error("a thread has been handling a fault for 5 s; waiting for it to finish")

    def _close_pipe(self) -> None:
        # Both ends together, while the handlers are kept away: a write to a pipe that nobody can read is SIGPIPE.
        os.close(self._writing)
        os.close(self._reading)

    def _remove(self, *, for_good: bool) -> None:
        """Let the threads that wait touch again: what that means is settled. `for_good`: missing pages are SIGBUS."""
        self._served.remove(for_good=for_good)
        _engines.discard(self)


def _report_displaced(served: Served, displaced: int) -> None:
    """Log that another handler of SIGBUS was installed above ours."""
    if displaced > 0:
        log.warning(
            "SIGBUS was taken from a Monitor with engine=InThread(), by %s. The Monitor's handler is reinstalled above"
            " it, and forwards each SIGBUS that is not for its pages. A missing page that was touched in between was"
            " not served",
            _owner(served.below()),
        )
    else:
        log.error(
            "SIGBUS was taken from a Monitor with engine=InThread(), once too often: a touch of a missing page ends the"
            " process from now on"
        )


def _owner(address: int) -> str:
    """Say whose handler lies at an address."""
    if address < 2:  # SIG_DFL, SIG_IGN
        return "code that has set it to its default" if address == 0 else "code that ignores it"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
            span, *_, name = line.split(maxsplit=5)
            low, high = (int(end, 16) for end in span.split("-"))
            if low <= address < high:
                return f"a handler in {name} ({address:#x})"
    return f"a handler at {address:#x}"


@atexit.register
def _at_exit() -> None:
    """End the loops of Monitors that were not left, while the interpreter still runs.

    From now on no thread gets the GIL back in a signal handler.
    """
    served = [engine for engine in _engines if engine.serves_this_process]
    if served:
        faults.finalizing()
        for engine in served:
            engine.stop(1.0)
