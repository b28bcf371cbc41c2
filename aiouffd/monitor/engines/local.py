"""What engines share that serve a region on a loop of its own process."""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401 - asyncio.to_thread imports it when it is first called
import contextlib
import logging
import mmap
import os
import sys
import threading
from concurrent.futures import InvalidStateError
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from aiouffd.engine.ahead.fill import bring_ahead, prefetch
from aiouffd.engine.assembly import make_backend, make_readahead
from aiouffd.engine.bound import Bound
from aiouffd.engine.dispatcher import Dispatcher
from aiouffd.engine.landing import Landings
from aiouffd.engine.mappings import Mappings
from aiouffd.engine.moving import Moving, huge_pages_come
from aiouffd.engine.serve.source import SourceBackend
from aiouffd.engine.space import Space
from aiouffd.errors import ClosedError
from aiouffd.kernel.abi import Feature, RegisterMode
from aiouffd.kernel.memory import ProcessMemory
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.kernel.pagemap import Pagemap
from aiouffd.kernel.userfaultfd import kernel_features
from aiouffd.lifetime import close_in_children
from aiouffd.monitor.engines.calls import start_in_loop
from aiouffd.monitor.engines.layout import Layout
from aiouffd.pager.loglines import Apart, NonBlockingHandler

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from concurrent.futures import Future

    from aiouffd.engine.reading import MakeReader
    from aiouffd.engine.serve.handler_backend import HandlerBackend
    from aiouffd.engine.statistics import Counters
    from aiouffd.kernel.userfaultfd import Userfaultfd
    from aiouffd.monitor.engines.protocol import Assignment
    from aiouffd.store.live import Order, Snapshots

__all__ = ["Local", "LocalEngine"]

_HUGE_PAGES_COME = huge_pages_come()  # now: the loop reads no file
_LEFT = "the Monitor has been left"
_standard_error = NonBlockingHandler()
_log = logging.getLogger("aiouffd")
_log.addFilter(_apart := Apart(_log))

T = TypeVar("T")


class Local:
    """The backend, space and dispatcher of one region. Used on the loop that runs it, unless it says so.

    Args:
        loop: does not run yet, or runs in this thread.
        assignment: what is served.
        uffd: belongs to this object from now on.
        counters: of the engine.
        spin_us: as for `Dispatcher`, like `reader`.
        **layout: as for `Layout`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        assignment: Assignment,
        uffd: Userfaultfd,
        counters: Counters,
        *,
        spin_us: int,
        reader: MakeReader | None = None,
        **layout: Any,
    ) -> None:
        options, service, mapping = assignment.options, assignment.service, assignment.mapping
        on_error = assignment.on_error  # and not the assignment, which would keep the region alive in a cycle
        self._loop = loop
        self._closed = self._ended = False
        self._asked: set[Future[Any]] = set()
        self._snapshots: Snapshots | None = None
        self._modes = options.modes
        bound = None
        self._file = file = OwnedDescriptor(os.dup(assignment.file)) if assignment.file >= 0 else None
        if assignment.written is not None:
            bound = Bound(assignment.written, assignment.page_size, options.max_resident, counters, file)
        self.backend: SourceBackend | HandlerBackend = make_backend(service, counters, options, bound)
        on_flight = assignment.on_flight
        if on_flight is not None:
            self.backend.on_landed = Landings(lambda _, told: on_flight(told), traces=True)
        self.space: Space = Space(
            close_in_children(uffd),
            Mappings([mapping]),
            page_size=assignment.page_size,
            backend=self.backend,
            counters=counters,
            readahead=make_readahead(
                assignment.page_size, options, local=self.backend.local, recorder=service.recorder
            ),
            write_protect=options.write_protect,
            on_error=partial(_report, on_error),
            retries=options.on_error == "retry",
        )
        if bound is None and _may_move(assignment):
            self.space.resolver.moving = Moving(uffd, Pagemap.open_if_possible(), counters)
            source = self.backend.source if isinstance(self.backend, SourceBackend) else None
            if getattr(source, "gives", False) and (moved := getattr(source, "moved", None)):
                moved()
        self.layout: Layout = Layout(
            self._loop, self.space, mapping.start, mapping.end, RegisterMode(options.modes), **layout
        )
        self._dispatcher = Dispatcher(self._loop, counters, spin_us=spin_us, reader=reader)
        self._dispatcher.add(self.space)
        self._bring_ahead = partial(bring_ahead, self.space, self.backend, service.trace, options.background)
        self._brings_ahead = service.trace is not None or options.background > 0
        self._ahead: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Bring what nobody has touched, and know the loop's thread by this call in it."""
        self.layout.thread = threading.get_ident()
        _apart.loops.append(self.layout.thread)
        if self._brings_ahead:
            self._ahead = self._loop.create_task(self._bring_ahead(), name="aiouffd-ahead")

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> Future[None]:
        """Bring (offset, length) ranges. From any thread.

        Raises:
            ClosedError: the loop is closed.
        """
        return self._ask(lambda: self._prefetch(ranges))

    def evict(self, offset: int, length: int) -> Future[int]:
        """Drop what was not written of these offsets. From any thread. Raises as `prefetch`."""
        return self._ask(lambda: self._evict(offset, length))

    def flush(self, offset: int, length: int) -> Future[None]:
        """Write what was written of these offsets to the source. From any thread. Raises as `prefetch`."""
        return self._ask(lambda: self._flush(offset, length))

    def snapshot(self, order: Order, first: Callable[[], None] = lambda: None) -> Future[dict[str, Any]]:
        """Have the memory of one moment written. From any thread. Raises as `prefetch`.

        Args:
            order: what is to be written.
            first: called while nobody places pages.
        """
        return self._ask(lambda: self._snapshot(order, first))

    def cancel_snapshot(self) -> None:
        """Have the snapshot end that is under way; its future is done when it has. From any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._cancel_snapshot)

    def _cancel_snapshot(self) -> None:
        if self._snapshots is not None:
            self._snapshots.cancel(self.space)

    def _ask(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        try:
            asked = start_in_loop(self._loop, lambda: None if self._closed else work())
        except RuntimeError:
            raise ClosedError(_LEFT) from None
        self._asked.add(asked)
        asked.add_done_callback(self._asked.discard)
        if self._ended:
            self.end()
        return asked

    def end(self) -> None:
        """Let whoever has asked for something, and waits still, get ClosedError: after `aclose`, from any thread.

        Not in the thread of the loop, which waits for no lock of others.
        """
        self._ended = True
        for asked in list(self._asked):
            with contextlib.suppress(InvalidStateError):
                asked.set_exception(ClosedError(_LEFT))

    async def _prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        try:
            await prefetch(self.space, ranges)
        except asyncio.CancelledError:
            if self._closed:
                raise ClosedError(_LEFT) from None
            raise

    async def _evict(self, offset: int, length: int) -> int:
        bound = self.backend.bound
        return bound.evict(offset, offset + length) if bound is not None else 0

    async def _flush(self, offset: int, length: int) -> None:
        if self.backend.bound is not None:
            await self.backend.bound.flush(offset, offset + length)

    async def _snapshot(self, order: Order, first: Callable[[], None]) -> dict[str, Any]:
        module = await asyncio.to_thread(import_module, "aiouffd.store.live")
        if self._snapshots is None:  # asked behind the await: there is one for all
            self._snapshots = module.Snapshots()
        with self.layout.quiet():
            first()
        file = self._file
        memory = ProcessMemory.own(order.start) if file is None else ProcessMemory(os.dup(file.fileno()))
        pagemap, quiet = Pagemap() if file is None else None, self.layout.quiet
        return attrs.asdict(await self._snapshots.take([self.space], order, memory, pagemap, self._modes, quiet))

    def give_up(self, offset: int, length: int) -> None:
        """Ask no longer for what fails in these offsets. From any thread."""
        if self.space.retrying is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self.space.retrying.give_up, offset, length)

    def _stop_bringing(self) -> None:
        if self._ahead is not None:
            self._ahead.cancel()

    async def refuse(self) -> None:
        """Poison what is waited for, and whatever is touched until `aclose`."""
        self._stop_bringing()
        self.space.refuse()

    async def aclose(self) -> None:
        """Serve no longer. What was written is saved before: nobody else has private memory."""
        self._closed = True
        self._stop_bringing()
        if self._snapshots is not None:
            await self._snapshots.aclose()
        if self.backend.bound is not None:
            await self.backend.bound.aclose()
        self._dispatcher.close()
        await self.backend.aclose()
        if self.layout.thread in _apart.loops:
            _apart.loops.remove(self.layout.thread)


class LocalEngine:
    """What an `Engine` has that serves by a `Local`, which it makes when it starts."""

    _local: Local

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> Future[None]:
        """Bring (offset, length) ranges."""
        return self._local.prefetch(ranges)

    def evict(self, offset: int, length: int) -> Future[int]:
        """Drop what was not written of these offsets."""
        return self._local.evict(offset, length)

    def flush(self, offset: int, length: int) -> Future[None]:
        """Write what was written of these offsets to the source."""
        return self._local.flush(offset, length)

    def snapshot(self, order: Order) -> Future[dict[str, Any]]:
        """Have the memory of one moment written."""
        return self._local.snapshot(order)

    def cancel_snapshot(self) -> None:
        """Have the snapshot end that is under way."""
        self._local.cancel_snapshot()

    def give_up(self, offset: int, length: int) -> None:
        """Ask no longer for what fails in these offsets."""
        self._local.give_up(offset, length)

    @property
    def layout(self) -> Layout:
        """Told by the region."""
        return self._local.layout


def _may_move(assignment: Assignment) -> bool:
    """Tell whether huge pages can be moved to a region: it is private, of small pages, and not write-protected.

    Where none come, what is large is copied by two threads in place of that.
    """
    small = assignment.file < 0 and assignment.page_size == mmap.PAGESIZE
    return small and not assignment.options.write_protect and Feature.MOVE in kernel_features() and _HUGE_PAGES_COME


def _report(on_error: Callable[[BaseException], None], _space: Space, error: BaseException) -> None:
    """Say why a page cannot be had, before its poison ends the process; as the pager does.

    Not by a logger: a thread that waits for a page may hold the lock of one of its handlers.
    """
    if sys.stderr is not None:  # else the program may have a file of its own there
        text = f"aiouffd[{os.getpid()}]: {error}"
        _standard_error.handle(logging.LogRecord("aiouffd", logging.ERROR, "", 0, text, None, None))
    on_error(error)
