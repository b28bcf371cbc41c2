"""The engine on the caller's own loop, for memory that only others touch."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Self

from aiouffd.engine.ahead.fill import bring_ahead
from aiouffd.engine.assembly import Options, Service, make_backend, make_readahead
from aiouffd.engine.dispatcher import Dispatcher
from aiouffd.engine.mappings import Mapping, Mappings
from aiouffd.engine.space import Space
from aiouffd.engine.statistics import SIZE as COUNTERS_SIZE
from aiouffd.engine.statistics import Counters
from aiouffd.kernel.abi import RegisterMode
from aiouffd.kernel.memory import map_shared
from aiouffd.kernel.userfaultfd import Userfaultfd
from aiouffd.monitor.engines.layout import Standstill, moved
from aiouffd.ranges import align_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aiouffd.engine.statistics import Statistics
    from aiouffd.errors import UffdError

__all__ = ["LocalEngine"]


class LocalEngine:
    """Serves one region on the running loop. Parameters as in `aiouffd.pager.client.client.PagerClient`.

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
        self._standstill = Standstill(self._loop)
        # In a memfd, so that a guard in another process can see whether the loop makes progress.
        self.counters_fd = os.memfd_create("aiouffd-counters", os.MFD_CLOEXEC)
        os.ftruncate(self.counters_fd, COUNTERS_SIZE)
        self._counters = Counters(map_shared(self.counters_fd))
        self._backend = make_backend(service, self._counters, options)
        self._modes = RegisterMode(options.modes)
        self._start = mapping.start
        self._end = mapping.end
        self.space = Space(
            Userfaultfd.from_fd(os.dup(uffd.fileno()), uffd.features),
            Mappings([mapping]),
            page_size=page_size,
            backend=self._backend,
            counters=self._counters,
            readahead=make_readahead(page_size, options, local=self._backend.local),
            write_protect=options.write_protect,
            on_error=lambda _, error: on_error(error),
        )
        self._dispatcher = Dispatcher(self._loop, self._counters, spin_us=options.spin_us)
        self._dispatcher.add(self.space)
        self._ahead = self._loop.create_task(
            bring_ahead(self.space, self._backend, service.trace, options.background), name="aiouffd-ahead"
        )

    def statistics(self) -> Statistics:
        """Read the counters."""
        return self._counters.snapshot()

    async def prefetch(self, offset: int, length: int) -> None:
        """Bring offsets [offset, offset + length)."""
        await self._backend.prefetch(self.space, offset, length)

    async def close(self, *, poison: bool) -> None:
        """Serve no longer; what threads wait for is poisoned, if asked."""
        if poison:
            self.space.poison({page for flight in self.space.flights.values() for page in flight.wanted})
        self._dispatcher.close()
        self._ahead.cancel()
        os.close(self.counters_fd)
        await self._backend.aclose()

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
