"""The engine in a pager process: `Pager`."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, ClassVar

import attrs

from aiouffd.errors import ClosedError
from aiouffd.kernel import abi
from aiouffd.kernel.abi import Feature
from aiouffd.monitor.engines.protecting import ProtectingUserfaultfd
from aiouffd.monitor.engines.protocol import positive_or_none
from aiouffd.native.watchdog import Watch
from aiouffd.pager.client.client import PagerClient
from aiouffd.pager.client.tenant import Pack, Tenant

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from concurrent.futures import Future
    from typing import Any

    from aiouffd.engine.statistics import Statistics
    from aiouffd.monitor.engines.protocol import Assignment, Terms

__all__ = ["Pager", "PagerEngine"]


@attrs.frozen
class Pager:
    """The loop runs in a process of its own, so that any thread may touch the region, holding the GIL or not.

    This is the default.

    Args:
        spin_us: microseconds for which the pager looks for further faults before it sleeps, while faults keep coming.
        stuck_limit: seconds until this process is ended (SIGABRT) if all processes of the pager were killed while a
            thread waits for a page with the GIL held, so that no others can be started. It needs the native part.
            None: never.
    """

    spin_us: int = attrs.field(default=50, validator=attrs.validators.ge(0))
    stuck_limit: float | None = attrs.field(default=5.0, validator=positive_or_none)

    features: ClassVar[Feature] = Feature.THREAD_ID | abi.LAYOUT_EVENTS
    serves_system_calls: ClassVar[bool] = True
    serves_children: ClassVar[bool] = True
    counts_here: ClassVar[bool] = True

    def check(self, terms: Terms) -> None:
        """Accept everything."""

    def make(self, _loop: asyncio.AbstractEventLoop | None) -> PagerEngine:
        """Return an engine."""
        return PagerEngine(self)


class PagerEngine:
    """Serves a region from a pager of its own. `start` blocks for a tenth of a second.

    Raises (on start):
        PagerStartError: the pager did not start, or what should serve could not travel or be rebuilt there.
    """

    layout = None

    def __init__(self, choice: Pager) -> None:
        self._choice = choice
        self._pack: Pack
        self._tenant: Tenant
        self._client: PagerClient

    def start(self, assignment: Assignment) -> None:
        """Start a pager, and have it serve the region."""
        self._pack = Pack(assignment.service, attrs.evolve(assignment.options, spin_us=self._choice.spin_us))
        with contextlib.ExitStack() as undo:
            undo.callback(self._pack.close)
            self._tenant = Tenant(self._pack, assignment.uffd, [assignment.mapping], assignment.page_size, own=True)
            self._client = PagerClient(
                on_error=lambda _, error: assignment.on_error(error),
                on_unavailable=self._protect,
                on_lost=assignment.on_lost,
                guard=Watch(assignment.uffd.fileno(), self._choice.stuck_limit),
            )
            undo.callback(self._client.stop)
            self._client.start()
            self._client.open_wait(self._tenant)
            undo.pop_all()

    def _protect(self, start: int, length: int) -> None:
        """Make a page inaccessible that cannot be had, where the kernel has no UFFDIO_POISON."""
        with contextlib.suppress(ClosedError, OSError):  # settled just now
            uffd = ProtectingUserfaultfd.from_fd(os.dup(self._tenant.uffd.fileno()))
            with uffd:
                if uffd.try_poison(start, length, 0) < 0:
                    uffd.try_wake(start, length)  # it is present after all

    def prefetch(self, offset: int, length: int) -> Future[Any]:
        """Bring offsets [offset, offset + length)."""
        return self._client.request("prefetch", self._tenant, offset=offset, length=length)

    def check_may_wait(self) -> None:
        """Do nothing: the loop runs in another process."""

    def statistics(self) -> Statistics:
        """Read the counters: shared memory, no round trip."""
        return self._client.statistics()

    @property
    def pids(self) -> tuple[int, int]:
        """Keeper and worker, as far as known."""
        return self._client.pids

    def refuse(self) -> None:
        """Bring nothing more: a touch of a missing page is SIGBUS until `leave`."""
        self._client.refuse(self._tenant)

    def leave(self, settle: Callable[[], None], *, sigbus: bool) -> None:
        """Serve no longer; forked children are served on.

        The memory is settled first: a touch that nobody answers, with the GIL held, would stop this very thread.
        """
        try:
            settle()
        finally:
            self._client.close(self._tenant)
            self._client.stop()
            self._pack.close()
