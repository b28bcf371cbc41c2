"""The engine in a pager process, as a Monitor uses it: one region, one pager."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiouffd.native.watchdog import Watch
from aiouffd.pager.client.client import PagerClient
from aiouffd.pager.client.tenant import Pack, Tenant

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from typing import Any

    from aiouffd.engine.assembly import Options, Service
    from aiouffd.engine.mappings import Mapping
    from aiouffd.engine.statistics import Statistics
    from aiouffd.kernel.userfaultfd import Userfaultfd

__all__ = ["PagerEngine"]


class PagerEngine:
    """Serves a region from a pager of its own, as soon as it is made. Blocks for a tenth of a second.

    Args:
        uffd: the region's; stays the caller's, and must stay open until `close`.
        service: what serves it.
        mapping: where the region lies.
        page_size: of the region.
        options: how it is served.
        on_error: called from another thread with each error that the pager reports.
        on_lost: called from there when nobody serves the region any more.
        stuck_limit: seconds until the process is ended when keeper and worker were both killed while a thread waits for
            a page with the GIL held, so that no others can be started; None: never.

    Raises:
        PagerStartError: the pager did not start, or what should serve could not travel or be rebuilt there.
    """

    def __init__(
        self,
        uffd: Userfaultfd,
        service: Service,
        mapping: Mapping,
        page_size: int,
        options: Options,
        *,
        on_error: Callable[[BaseException], None],
        on_lost: Callable[[], None],
        stuck_limit: float | None = None,
    ) -> None:
        self._pack = Pack(service, options)
        self._tenant = Tenant(self._pack, uffd, [mapping], page_size)
        guard = Watch(uffd.fileno(), stuck_limit)
        self._client = PagerClient(on_error=lambda _, error: on_error(error), on_lost=on_lost, guard=guard)
        try:
            self._client.start()
            self._client.open_wait(self._tenant)
        except BaseException:
            self._client.stop()
            self._pack.close()
            raise

    def prefetch(self, offset: int, length: int) -> Future[Any]:
        """Bring offsets [offset, offset + length)."""
        return self._client.request("prefetch", self._tenant, offset=offset, length=length)

    def statistics(self) -> Statistics:
        """Read the counters: shared memory, no round trip."""
        return self._client.statistics()

    @property
    def pids(self) -> tuple[int, int]:
        """Keeper and worker, as far as known."""
        return self._client.pids

    def refuse(self) -> None:
        """Bring nothing more: whoever waits or touches gets SIGBUS, until the memory is settled and this is closed."""
        self._client.refuse(self._tenant)

    def close(self) -> None:
        """Serve no longer; forked children are served on. Settle the memory first: who touches it later would hang."""
        self._client.close(self._tenant)
        self._client.stop()
        self._pack.close()
