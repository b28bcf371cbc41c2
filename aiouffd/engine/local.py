"""The engine on the caller's own loop, for memory that only others touch."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING

from aiouffd.engine.ahead import bring_ahead
from aiouffd.engine.assembly import Options, Service, make_readahead, make_server
from aiouffd.engine.dispatcher import Dispatcher
from aiouffd.engine.mappings import Mapping, Mappings
from aiouffd.engine.space import Space
from aiouffd.engine.statistics import SIZE as COUNTERS_SIZE
from aiouffd.engine.statistics import Counters
from aiouffd.kernel.abi import RegisterMode
from aiouffd.kernel.memory import map_shared
from aiouffd.kernel.userfaultfd import Userfaultfd

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.engine.statistics import Statistics
    from aiouffd.errors import UffdError

__all__ = ["LocalEngine"]


class LocalEngine:
    """Serves one region on the running loop. Parameters as in `aiouffd.pager.client.PagerClient`.

    No layout event is asked for: a thread that causes one sleeps until it is read, and with the GIL held that would
    be for ever. The region's own methods tell instead.
    """

    def __init__(
        self,
        uffd: Userfaultfd,
        service: Service,
        mapping: Mapping,
        page_size: int,
        options: Options,
        *,
        on_error: Callable[[UffdError], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        # In a memfd, so that a guard in another process can see whether the loop makes progress.
        self.counters_fd = os.memfd_create("aiouffd-counters", os.MFD_CLOEXEC)
        os.ftruncate(self.counters_fd, COUNTERS_SIZE)
        self._counters = Counters(map_shared(self.counters_fd))
        self._server = make_server(service, self._counters, options)
        self._modes = RegisterMode(options.modes)
        self._start = mapping.start
        self._end = mapping.end
        self.space = Space(
            Userfaultfd.from_fd(os.dup(uffd.fileno()), uffd.features),
            Mappings([mapping]),
            page_size=page_size,
            server=self._server,
            counters=self._counters,
            readahead=make_readahead(page_size, options, local=self._server.local),
            write_protect=options.write_protect,
            on_error=lambda _, error: on_error(error),
        )
        self._dispatcher = Dispatcher(self._loop, self._counters, spin_us=options.spin_us)
        self._dispatcher.add(self.space)
        self._ahead = self._loop.create_task(
            bring_ahead(self.space, self._server, service.trace, options.background), name="aiouffd-ahead"
        )

    def statistics(self) -> Statistics:
        """Read the counters."""
        return self._counters.snapshot()

    async def prefetch(self, offset: int, length: int) -> None:
        """Bring offsets [offset, offset + length)."""
        await self._server.prefetch(self.space, offset, length)

    async def close(self, *, poison: bool) -> None:
        """Serve no longer; what threads wait for is poisoned, if asked."""
        if poison:
            self.space.poison({page for flight in self.space.flights.values() for page in flight.wanted})
        self._dispatcher.close()
        self._ahead.cancel()
        os.close(self.counters_fd)
        await self._server.aclose()

    # What the region tells

    def region_removed(self, start: int, length: int) -> None:
        """The region was emptied there: zeros from now on."""
        begin = self._start + start
        self._apply(lambda: self.space.emptied(begin, begin + length))

    def region_moved(self, address: int, length: int) -> None:
        """The region lies at `address` now. What was added shows zeros."""
        source, size = self._start, min(self._end - self._start, length)

        def moved() -> None:
            self.space.mappings.unmap(source + size, self._end)
            if address != source:
                self.space.mappings.remap(source, address, size)
                # Without EVENT_REMAP the kernel has unregistered what it moved.
                page = self.space.page_size
                self.space.uffd.register(address, (length + page - 1) & -page, self._modes)
            self._start, self._end = address, address + length

        self._apply(moved)

    def _apply(self, change: Callable[[], None]) -> None:
        """Run a change on the loop's thread, and wait for it, so that no fault is served in between."""
        if threading.get_ident() == self._thread:
            change()
            return
        done = threading.Event()

        def run() -> None:
            change()
            done.set()

        self._loop.call_soon_threadsafe(run)
        done.wait(5.0)
