"""The engine on the caller's own loop, for memory that only others touch: `InProcess`."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import sys
import threading
from typing import TYPE_CHECKING, ClassVar, Self

import attrs

from aiouffd.engine.ahead.fill import bring_ahead
from aiouffd.engine.assembly import make_backend, make_readahead
from aiouffd.engine.dispatcher import Dispatcher
from aiouffd.engine.mappings import Mappings
from aiouffd.engine.space import Space
from aiouffd.engine.statistics import SIZE as COUNTERS_SIZE
from aiouffd.engine.statistics import Counters
from aiouffd.kernel.abi import Feature, RegisterMode
from aiouffd.kernel.memory import map_shared
from aiouffd.kernel.userfaultfd import Userfaultfd
from aiouffd.monitor.engines.guard import Guard
from aiouffd.monitor.engines.layout import Standstill, moved
from aiouffd.monitor.engines.protocol import positive_or_none
from aiouffd.ranges import align_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from aiouffd.engine.serve.handler import HandlerBackend
    from aiouffd.engine.serve.source import SourceBackend
    from aiouffd.engine.statistics import Statistics
    from aiouffd.monitor.engines.protocol import Assignment, Terms

__all__ = ["InProcess", "InProcessEngine"]


@attrs.frozen
class InProcess:
    """The loop is the caller's own, for memory that only others touch: another process, a virtual machine, C code.

    A touch with the GIL held would stop the loop that should serve it. The Monitor is entered by `async with`.

    Args:
        spin_us: microseconds for which the loop looks for further faults before it sleeps, while faults keep coming.
        stuck_warning: seconds that a page is waited for, while the loop does not run, until a message on standard error
            says so.
        stuck_limit: seconds until the process is ended with tracebacks instead of hanging. None: never.
    """

    spin_us: int = attrs.field(default=50, validator=attrs.validators.ge(0))
    stuck_warning: float = attrs.field(default=2.0, validator=attrs.validators.gt(0.0))
    stuck_limit: float | None = attrs.field(default=5.0, validator=positive_or_none)

    features: ClassVar[Feature] = Feature.THREAD_ID
    serves_system_calls: ClassVar[bool] = True

    def check(self, terms: Terms) -> None:
        """Accept everything."""

    def make(self, loop: asyncio.AbstractEventLoop | None) -> InProcessEngine:
        """Return an engine on `loop`; without one this is a TypeError."""
        if loop is None:
            raise TypeError("engine=InProcess() serves on the caller's event loop: use `async with`, not `with`")
        return InProcessEngine(self, loop)


class InProcessEngine:
    """Serves one region on a loop of this process.

    No layout event is asked for: a thread that causes one sleeps until it is read, and with the GIL held that would
    be for ever. The region's own methods tell instead.
    """

    pids = ()

    def __init__(self, choice: InProcess, loop: asyncio.AbstractEventLoop) -> None:
        self._choice = choice
        self._loop = loop
        self._thread = threading.get_ident()
        # In a memfd, so that a guard in another process can see whether the loop makes progress.
        self._counters_fd = os.memfd_create("aiouffd-counters", os.MFD_CLOEXEC)
        os.ftruncate(self._counters_fd, COUNTERS_SIZE)
        self._counters = Counters(map_shared(self._counters_fd))
        self._guard: Guard | None = None
        self._modes: RegisterMode
        self._start: int
        self._end: int
        self._standstill: Standstill
        self._backend: SourceBackend | HandlerBackend
        self._dispatcher: Dispatcher
        self._ahead: asyncio.Task[None]
        self.space: Space
        # A loop that is stuck ends with the traceback of the line that touched.
        if choice.stuck_limit is not None and not faulthandler.is_enabled() and sys.stderr is not None:
            faulthandler.enable()

    def start(self, assignment: Assignment) -> None:
        """Serve the region."""
        asyncio.run_coroutine_threadsafe(self._begin(assignment), self._loop).result()
        if self._choice.stuck_limit is not None:
            self._guard = Guard(
                assignment.uffd,
                self._counters_fd,
                assignment.page_size,
                min(self._choice.stuck_warning, self._choice.stuck_limit),
                self._choice.stuck_limit,
            )

    async def _begin(self, assignment: Assignment) -> None:
        options, service = assignment.options, assignment.service
        self._standstill = Standstill(self._loop)
        self._backend = make_backend(service, self._counters, options)
        self._modes = RegisterMode(options.modes)
        self._start, self._end = assignment.mapping.start, assignment.mapping.end
        self.space = Space(
            Userfaultfd.from_fd(os.dup(assignment.uffd.fileno()), assignment.uffd.features),
            Mappings([assignment.mapping]),
            page_size=assignment.page_size,
            backend=self._backend,
            counters=self._counters,
            readahead=make_readahead(assignment.page_size, options, local=self._backend.local),
            write_protect=options.write_protect,
            on_error=lambda _, error: assignment.on_error(error),
        )
        self._dispatcher = Dispatcher(self._loop, self._counters, spin_us=self._choice.spin_us)
        self._dispatcher.add(self.space)
        self._ahead = self._loop.create_task(
            bring_ahead(self.space, self._backend, service.trace, options.background), name="aiouffd-ahead"
        )

    def statistics(self) -> Statistics:
        """Read the counters."""
        return self._counters.snapshot()

    def prefetch(self, offset: int, length: int) -> Future[None]:
        """Bring offsets [offset, offset + length)."""
        return asyncio.run_coroutine_threadsafe(self._backend.prefetch(self.space, offset, length), self._loop)

    def check_may_wait(self) -> None:
        """Raise RuntimeError in the loop's thread."""
        if threading.get_ident() == self._thread:
            raise RuntimeError("engine=InProcess() serves on this thread's event loop: await prefetch() instead")

    def refuse(self) -> None:
        """Poison what is waited for, and whatever is touched until `leave`."""
        asyncio.run_coroutine_threadsafe(self._refuse(), self._loop).result()

    async def _refuse(self) -> None:
        self._ahead.cancel()
        self.space.refuse()

    def leave(self, settle: Callable[[], None], *, sigbus: bool) -> None:
        """Serve no longer."""
        if self._guard is not None:
            self._guard.close()
        try:
            asyncio.run_coroutine_threadsafe(self._end_serving(), self._loop).result()
        finally:  # where the source could not be closed as well: nobody reads any more
            settle()

    async def _end_serving(self) -> None:
        self._dispatcher.close()
        self._ahead.cancel()
        os.close(self._counters_fd)
        await self._backend.aclose()

    @property
    def layout(self) -> Self:
        """Told by the region."""
        return self

    # What the region tells

    @contextlib.contextmanager
    def changing(self) -> Iterator[Self]:
        """Serve nothing inside the block, in which the region changes its layout and says how.

        Raises:
            BusyError: the loop does not run; nothing was changed.
        """
        with self._standstill():
            yield self

    def removed(self, start: int, length: int) -> None:
        """The region was emptied there: zeros from now on."""
        begin = self._start + start
        self.space.emptied(begin, begin + align_up(length, self.space.page_size))

    def moved(self, address: int, length: int) -> None:
        """The region lies at `address` now, and has `length` bytes."""
        new = (address, address + length)
        # Without EVENT_REMAP the kernel has unregistered what it moved.
        moved(
            self.space,
            (self._start, self._end),
            new,
            lambda start, size: self.space.uffd.register(start, size, self._modes),
        )
        self._start, self._end = new
