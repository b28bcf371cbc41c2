"""What a Monitor asks of an engine, and what an engine is given."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    import attrs

    from aiouffd.engine.mappings import Mapping
    from aiouffd.engine.options import Options, Service
    from aiouffd.engine.protect import WrittenPages
    from aiouffd.engine.statistics import Statistics
    from aiouffd.kernel.abi import Feature
    from aiouffd.kernel.region import LayoutListener
    from aiouffd.kernel.userfaultfd import Userfaultfd
    from aiouffd.store.live import Order

__all__ = ["Assignment", "Engine", "EngineChoice", "Terms", "positive_or_none"]


def positive_or_none(_: object, attribute: attrs.Attribute[Any], value: float | None) -> None:
    """Refuse a number of seconds that is not above 0."""
    if value is not None and not value > 0:
        raise ValueError(f"{attribute.name!r} must be > 0, or None: {value}")


class Terms(NamedTuple):
    """What a Monitor was asked for, before anything is done.

    Attributes:
        origin: the source or handler; None: none was given.
        fork: "dontfork", "serve", or None: as the engine does by default.
        options: how to serve, as far as that is not a matter of the engine.
        records: whether the order of touches is recorded.
        replays: whether a recording is replayed.
        shared: whether the region is shared memory.
        page_size: of the region, in bytes.
        reports: whether a report of the run is asked for.
    """

    origin: Any
    fork: str | None
    options: Options
    records: bool = False
    replays: bool = False
    shared: bool = False
    page_size: int = mmap.PAGESIZE
    reports: bool = False


class Assignment(NamedTuple):
    """A region to serve.

    Attributes:
        uffd: the region's descriptor; it stays the Monitor's, and open until `Engine.leave` settles it.
        service: what brings the pages.
        mapping: where the region lies.
        page_size: of the region, in bytes.
        options: how it is served.
        can_poison: whether the kernel has UFFDIO_POISON.
        on_error: called from any thread with each error.
        on_lost: called from any thread when nobody serves the region any more, and nobody can.
        file: the memfd of shared memory; -1: it is private. It stays the region's.
        written: where the pages are noted that were written, if pages are dropped. It stays the Monitor's.
        on_flight: called from any thread with what is told of each flight: see `Landings`; None: nobody wants that.
    """

    uffd: Userfaultfd
    service: Service
    mapping: Mapping
    page_size: int
    options: Options
    can_poison: bool
    on_error: Callable[[BaseException], None]
    on_lost: Callable[[], None]
    file: int = -1
    written: WrittenPages | None = None
    on_flight: Callable[[dict[str, Any]], None] | None = None


class Engine(Protocol):
    """Serves one region, from `start` until `leave`.

    Both block, and are called in a thread that does not run the engine's loop.
    """

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes that serve, as far as they belong to this Monitor."""

    @property
    def layout(self) -> LayoutListener | None:
        """Told of each layout change that goes through the `Region`; None where the kernel's events tell."""

    def start(self, assignment: Assignment) -> None:
        """Serve the region. After an exception nothing is served, and `leave` is not called."""

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> Future[Any]:
        """Bring (offset, length) ranges, in this order. The future is done when all of them are present."""

    def evict(self, offset: int, length: int) -> Future[int]:
        """Drop what was not written of offsets [offset, offset + length); the result is how many bytes were there."""

    def flush(self, offset: int, length: int) -> Future[None]:
        """Write what was written of offsets [offset, offset + length) to the source, until it is durable."""

    def snapshot(self, order: Order) -> Future[dict[str, Any]]:
        """Write the memory of one moment; the result is what `Captured` is made of.

        Raises:
            ValueError: such an engine cannot.
        """

    def cancel_snapshot(self) -> None:
        """Have the snapshot end that is under way; its future is done when it has. Does not wait."""

    def check_may_wait(self) -> None:
        """Raise RuntimeError where this thread runs the engine's loop, and so cannot wait for a page."""

    def give_up(self, offset: int, length: int) -> None:
        """Have pages of these offsets be SIGBUS once they have failed again, with on_error="retry". Does not wait."""

    def refuse(self) -> None:
        """Bring nothing more: a touch of a missing page is SIGBUS, or waits, until `leave`."""

    def leave(self, settle: Callable[[], None], *, sigbus: bool) -> None:
        """Serve no longer.

        Args:
            settle: decides what a touch of a missing page is from now on. The engine calls it once, at the moment when
                no touch can slip through between it and the engine.
            sigbus: whether missing pages are SIGBUS from then on.
        """

    def statistics(self) -> Statistics:
        """Return what has been counted."""


class EngineChoice(Protocol):
    """Where the loop of a Monitor runs, with the options that only such an engine has."""

    @property
    def features(self) -> Feature:
        """What the region's descriptor must have."""

    @property
    def serves_system_calls(self) -> bool:
        """Whether a system call that touches a missing page is served; else it fails with EFAULT."""

    @property
    def serves_children(self) -> bool:
        """Whether forked children are served, where nothing else is asked for."""

    @property
    def counts_here(self) -> bool:
        """Whether `Engine.statistics` is of this region alone, and asks no other process."""

    @property
    def loop_is_here(self) -> bool:
        """Whether its loop runs in this process."""

    @property
    def needs_loop(self) -> bool:
        """Whether it serves on the caller's loop."""

    def drops_private(self, *, write_back: bool, fork: str | None) -> bool:
        """Whether pages of private small memory can be dropped; else it becomes shared.

        Args:
            write_back: what was written is saved.
            fork: as for `Terms`.
        """

    def check(self, terms: Terms) -> None:
        """Raise ValueError where such an engine cannot do what the Monitor was asked for; it names both."""

    def make(self, loop: asyncio.AbstractEventLoop | None) -> Engine:
        """Return an engine; called in the thread that enters the Monitor.

        Args:
            loop: the loop that runs there, if the Monitor is entered by `async with`.

        Raises:
            TypeError: it needs a loop, and there is none.
            NativePartError: it needs the native part, and there is none.
        """
