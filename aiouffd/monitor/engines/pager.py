"""The engine in a pager process: `Pager`."""

from __future__ import annotations

import contextlib
import mmap
import os
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final, Self

import attrs

from aiouffd.errors import ClosedError, PagerStartError, UffdError
from aiouffd.kernel import abi
from aiouffd.kernel.abi import Feature
from aiouffd.kernel.memory import ProcessMemory
from aiouffd.kernel.owned_descriptor import name_of
from aiouffd.kernel.pagemap import Pagemap
from aiouffd.lifetime import uninterrupted
from aiouffd.monitor.engines.on_demand import Dropping, may_be_dropped
from aiouffd.monitor.engines.protecting import ProtectingUserfaultfd
from aiouffd.monitor.engines.protocol import positive_or_none
from aiouffd.pager.client.launch import START_TIMEOUT
from aiouffd.pager.client.packing import Pack
from aiouffd.pager.client.shared import Pagers, place
from aiouffd.pager.process.serialization import Pickles

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future
    from typing import Any

    from aiouffd.engine.statistics import Statistics
    from aiouffd.monitor.engines.protocol import Assignment, Terms
    from aiouffd.pager.client.client import PagerClient
    from aiouffd.pager.client.tenant import Tenant
    from aiouffd.store.live import Order

__all__ = ["Pager", "PagerEngine", "default"]

_shared = Pagers(Pickles.NEVER, place)


@attrs.frozen
class Pager:
    """The loop runs in a process of its own, so that any thread may touch the region, holding the GIL or not.

    This is the default, with one pager for all Monitors of this process. It starts with the first Monitor, and ends
    with the last. It serves sources of aiouffd only. A source or handler of your own, which could block the loop, gets
    a pager for itself.

    An instance is a pager apart from that: for the Monitors that it is passed to, whatever their source or handler is.
    It runs as long as one of them does. As a context manager, plain or asynchronous, it also runs for the time of the
    block::

        with aiouffd.Pager() as pager:
            with aiouffd.Monitor(a, one, engine=pager), aiouffd.Monitor(b, other, engine=pager):
                ...

    A forked child starts another.

    Args:
        spin_us: microseconds for which the pager looks for further faults before it sleeps, while faults keep coming.
        stuck_limit: seconds until this process is ended (SIGABRT) if all processes of the pager were killed while a
            thread waits for a page with the GIL held, so that no others can be started. It needs the native part.
            None: never.
        linger: seconds that the pager of an instance waits for another Monitor when the last was left. It ends earlier
            where the program closes all of its descriptors, as daemons do.

    Raises on entering:
        PagerStartError: it did not start.
    """

    spin_us: int = attrs.field(default=50, validator=attrs.validators.ge(0))
    stuck_limit: float | None = attrs.field(default=5.0, validator=positive_or_none)
    linger: float = attrs.field(default=0.0, validator=attrs.validators.ge(0))
    _pagers: Pagers = attrs.field(init=False, repr=False, eq=False)
    _kept: list[PagerClient] = attrs.field(init=False, repr=False, eq=False, factory=list)

    @_pagers.default
    def _own(self) -> Pagers:
        return Pagers(Pickles.ALWAYS, linger=self.linger)

    features: ClassVar[Feature] = Feature.THREAD_ID | abi.LAYOUT_EVENTS
    serves_system_calls: ClassVar[bool] = True
    serves_children: ClassVar[bool] = True
    counts_here: ClassVar[bool] = True
    loop_is_here: ClassVar[bool] = False
    needs_loop: ClassVar[bool] = False

    def drops_private(self, *, write_back: bool, fork: str | None) -> bool:
        """Whether a thread of this process can drop private pages. Forked children, and who was killed, have none."""
        return not write_back and fork != "serve" and may_be_dropped()

    def check(self, terms: Terms) -> None:
        """Refuse to drop private memory that cannot become shared."""
        if terms.options.bounded and not terms.shared and terms.page_size > mmap.PAGESIZE:
            raise ValueError(
                "engine=Pager() drops huge pages of shared memory only, since no other process can drop private ones:"
                " max_resident needs Region(length, page_size=..., shared=True) there, or engine=InThread()"
            )

    def make(self, _loop: asyncio.AbstractEventLoop | None) -> PagerEngine:
        """Return an engine."""
        return PagerEngine(self)

    def pagers_for(self, _pack: Pack | None) -> Pagers:
        """Return the pagers, of which one serves; None: a source of ours."""
        return self._pagers

    def expect(self) -> Callable[[], None]:
        """Have a pager ready that will replay a recording soon; return what ends that.

        Raises:
            PagerStartError: it did not start.
        """
        pagers = self.pagers_for(None)
        client = pagers.take()
        client.expect()
        return partial(pagers.give_back, client)

    def __reduce__(self) -> tuple[type[Pager], tuple[int, float | None, float]]:
        return type(self), (self.spin_us, self.stuck_limit, self.linger)

    def __enter__(self) -> Self:
        """Start the pager."""
        self._kept.append(self._pagers.take())
        return self

    def __exit__(self, *_: object) -> None:
        """End the pager, unless Monitors still use it: it ends with the last one then."""
        self._pagers.give_back(self._kept.pop())

    async def __aenter__(self) -> Self:
        """Start the pager. Canceling is safe: there is none then."""
        await uninterrupted(self.__enter__, self.__exit__)
        return self

    async def __aexit__(self, *_: object) -> None:
        """As `__exit__`. Canceling does not interrupt this."""
        await uninterrupted(self.__exit__)


class _Default(Pager):
    """What serves where no engine was chosen."""

    def pagers_for(self, pack: Pack | None) -> Pagers:
        """Return the pager that this process shares, or another where code of the application's own is to run."""
        return Pagers(Pickles.ONCE) if pack is not None and pack.is_pickle else _shared

    def __repr__(self) -> str:
        return "Pager()"


default: Final[Pager] = _Default()


class PagerEngine:
    """Serves a region from a pager. `start` blocks for a tenth of a second where the pager does not run yet.

    Raises (on start):
        PagerStartError: the pager did not start, or what should serve could not travel or be rebuilt there.
    """

    layout = None

    def __init__(self, choice: Pager) -> None:
        self._choice = choice
        self._pack: Pack
        self._tenant: Tenant
        self._client: PagerClient
        self._end: Callable[[], None]
        self._dropping: Dropping | None = None

    def start(self, assignment: Assignment) -> None:
        """Have a pager serve the region."""
        self._file = assignment.file
        memory: tuple[Any, ...] = ()
        traces = assignment.on_flight is not None
        options = attrs.evolve(assignment.options, spin_us=self._choice.spin_us, traces=traces)
        with contextlib.ExitStack() as undo:
            if assignment.written is not None and self._file < 0:
                dropping = Dropping(assignment.uffd, assignment.mapping.start)
                self._dropping = undo.enter_context(contextlib.closing(dropping))
                memory = (assignment.written, *self._dropping.memory)
            elif assignment.written is not None:
                memory = (assignment.written, self._file)
            self._pack = Pack(assignment.service, options, memory, assignment.page_size)
            undo.callback(self._pack.close)
            pagers = self._choice.pagers_for(self._pack)
            self._client = pagers.take()
            undo.callback(pagers.give_back, self._client)
            from aiouffd.native.watchdog import Watch  # noqa: PLC0415 - imported while the pager started
            from aiouffd.pager.client.tenant import Tenant  # noqa: PLC0415 - likewise

            self._tenant = Tenant(
                self._pack,
                assignment.uffd,
                [assignment.mapping],
                assignment.page_size,
                slot=self._client.take_slot(),
                file=name_of(self._file),
                watch=Watch(assignment.uffd.fileno(), self._choice.stuck_limit),
                protect=self._protect,
                report=assignment.on_error,
                lost=assignment.on_lost,
                flight=assignment.on_flight,
            )
            undo.callback(self._client.close, self._tenant)
            try:
                self._client.open(self._tenant).result(START_TIMEOUT)
            except TimeoutError as error:
                raise PagerStartError(f"the pager did not answer in {START_TIMEOUT:.0f} s") from error
            self._end = undo.pop_all().close

    def _protect(self, start: int, length: int) -> None:
        """Make a page inaccessible that cannot be had, where the kernel has no UFFDIO_POISON."""
        with contextlib.suppress(ClosedError, OSError):  # settled just now
            uffd = ProtectingUserfaultfd.from_fd(os.dup(self._tenant.uffd.fileno()))
            with uffd:
                if uffd.try_poison(start, length, 0) < 0:
                    uffd.try_wake(start, length)  # it is present after all

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> Future[Any]:
        """Bring (offset, length) ranges: one message, however many there are."""
        return self._client.request("prefetch", self._tenant, ranges=ranges)

    def evict(self, offset: int, length: int) -> Future[int]:
        """Drop what was not written of these offsets."""
        return self._client.request("evict", self._tenant, offset=offset, length=length)

    def flush(self, offset: int, length: int) -> Future[None]:
        """Write what was written of these offsets to the source."""
        return self._client.request("flush", self._tenant, offset=offset, length=length)

    def snapshot(self, order: Order) -> Future[dict[str, Any]]:
        """Have the memory of one moment written: the pager reads it through descriptors of this process."""
        shared = self._file >= 0
        memory = ProcessMemory(os.dup(self._file)) if shared else ProcessMemory.own(order.start)
        with contextlib.ExitStack() as undo:
            fds = [undo.enter_context(memory).fileno()]
            if not shared:
                fds.append(undo.enter_context(Pagemap()).fileno())
            asked = {"order": attrs.asdict(order), "worker": self.pids[1]}
            future = self._client.request("snapshot", self._tenant, fds=fds, **asked)
            kept = undo.pop_all()
            future.add_done_callback(lambda _: kept.close())
        return future

    def cancel_snapshot(self) -> None:
        """Have the snapshot end that is under way; its future is done when it has."""
        with contextlib.suppress(UffdError):  # it was left just now
            self._client.request("cancel_snapshot", self._tenant)

    def check_may_wait(self) -> None:
        """Do nothing: the loop runs in another process."""

    def statistics(self) -> Statistics:
        """Read the counters: shared memory, no round trip."""
        return self._client.statistics(self._tenant)

    @property
    def pids(self) -> tuple[int, int]:
        """Keeper and worker, as far as known."""
        return self._client.pids

    def give_up(self, offset: int, length: int) -> None:
        """Ask no longer for what fails in these offsets."""
        with contextlib.suppress(UffdError):  # it was left just now
            self._client.request("give_up", self._tenant, offset=offset, length=length)

    def refuse(self) -> None:
        """Bring nothing more: a touch of a missing page is SIGBUS until `leave`."""
        self._client.refuse(self._tenant)

    def leave(self, settle: Callable[[], None], *, sigbus: bool) -> None:
        """Serve no longer; forked children are served on.

        The memory is settled first: a touch that nobody answers, with the GIL held, would stop this very thread.
        """
        if self._dropping is not None:
            self._dropping.end()
        self._client.settles(self._tenant)
        try:
            settle()
        finally:
            self._end()
