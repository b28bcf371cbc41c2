"""In place of `criu lazy-pages`: serves the processes that `criu restore --lazy-pages` hands over."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any

import attrs

from aiouffd.criu.images import REMOTE, TaskImage, read_task
from aiouffd.criu.page_server import CriuPageServer
from aiouffd.criu.relay import Relay
from aiouffd.criu.socket import LazyPagesSocket
from aiouffd.engine.assembly import Options, Service
from aiouffd.engine.mappings import Mapping
from aiouffd.errors import HandoffError, UffdError
from aiouffd.kernel import abi
from aiouffd.kernel.abi import Feature
from aiouffd.kernel.userfaultfd import Userfaultfd
from aiouffd.pager.client.client import PagerClient
from aiouffd.pager.client.tenant import Pack, Tenant
from aiouffd.sources.base import ZeroSource
from aiouffd.sources.concat import ConcatSource
from aiouffd.sources.file import FileSource

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.criu.socket import RestoredTask
    from aiouffd.engine.statistics import Statistics
    from aiouffd.sources.base import Source

__all__ = ["LazyPages"]

log = logging.getLogger("aiouffd.lazy_pages")

_PAGE = 4096
_FEATURES = Feature.EVENT_FORK | abi.LAYOUT_EVENTS
"""What CRIU asks for on each descriptor."""


@attrs.frozen
class _Remote:
    """The lazy pages of a process that a page server has, one behind the other: an offset is a place in that row.

    Attributes:
        server: connected.
        pid: as in the images.
        addresses: of the pages, when they were dumped: (first offset, address, bytes) of each run.
        size: of them all.
    """

    server: CriuPageServer
    pid: int
    addresses: list[tuple[int, int, int]]
    size: int

    async def read(self, offset: int, length: int) -> Any:
        """Return the pages; a mapping, and so a read, lies within one run."""
        start, address, _ = next(run for run in reversed(self.addresses) if run[0] <= offset)
        return await self.server.read(self.pid, address + offset - start, length // _PAGE)


class LazyPages:
    """Serves one restore: takes its processes over, brings what is touched, and all the rest in the background.

    Args:
        images: the directory of the images (`-D`).
        work: where CRIU looks for the socket (`-W`); by default `images`.
        page_server: (host, port) of `criu dump --lazy-pages`, which has the lazy pages then.
        header: of that page server: `criu_page_server.HEADER_4_1` or `HEADER_4_2`.
        options: how the pages are served.
        background: bring all in the background, and end when all is there; else serve until the processes end.
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        *,
        work: str | os.PathLike[str] | None = None,
        page_server: tuple[str, int] | None = None,
        header: str,
        options: Options,
        background: bool = True,
    ) -> None:
        self._images = images
        self._work = images if work is None else work
        self._server = None if page_server is None else CriuPageServer(*page_server, header=header)
        self._options = options
        self._background = background
        self._prepared: dict[int, tuple[Pack, list[Mapping]]] = {}
        self._tenants: dict[str, Tenant] = {}
        self._changed = asyncio.Event()
        self._death: BaseException | None = None
        self.errors: list[BaseException] = []
        self.tasks = 0
        self.pages = 0  # brought, once all is done

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Listen, serve, and return when all is done. Canceling leaves the pager serving.

        Args:
            ready: called when CRIU may connect.

        Raises:
            HandoffError: the restore has failed, or an image is not what it should be.
            SourceError: the page server is not there.
            PagerDiedError: the pager was given up: what is missing is SIGBUS.
        """
        loop = asyncio.get_running_loop()

        def soon(function: Callable[..., None], *arguments: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(function, *arguments)

        self._pager = PagerClient(
            on_error=lambda tenant, error: soon(self._failed, tenant, error),
            on_gone=lambda tenant: soon(self._gone, tenant),
        )
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._leave)
            socket = stack.enter_context(LazyPagesSocket(self._work))
            await asyncio.to_thread(self._pager.start)
            self._relay = await stack.enter_async_context(Relay())
            if self._server is not None:
                await stack.enter_async_context(self._server)
            await self._prepare()
            ready()
            async for task in socket.tasks():
                await self._serve(task)
            log.info("%d processes are restored", self.tasks)
            if self._background:
                await asyncio.gather(*(self._release(tenant) for tenant in list(self._tenants.values())))
            while self._tenants:
                if self._death is not None:
                    raise self._death
                self._changed.clear()
                await self._changed.wait()

    @property
    def holds_pages(self) -> bool:
        """Whether pages come through this process: the pager cannot do without it then."""
        return self._server is not None

    def statistics(self) -> Statistics:
        """Return what the pager has counted."""
        return attrs.evolve(self._pager.statistics(), clients=len(self._tenants))

    @property
    def pids(self) -> tuple[int, int]:
        """The pager's processes: keeper and worker."""
        return self._pager.pids

    async def _serve(self, task: RestoredTask) -> None:
        uffd = Userfaultfd.from_fd(task.fd, _FEATURES)
        try:
            if task.pid not in self._prepared:
                self._prepared[task.pid] = await asyncio.to_thread(self._pack, task.pid)
            pack, mappings = self._prepared.pop(task.pid)
        except BaseException:
            uffd.close()  # CRIU has failed then: it kills what it has restored
            raise
        tenant = Tenant(pack, uffd, mappings, _PAGE)
        self._tenants[tenant.token] = tenant
        opened = asyncio.wrap_future(self._pager.open(tenant))
        if self._background:
            # CRIU has some milliseconds of work left when the memory is there: all of it may come before it runs.
            self._pager.request("begin", tenant)
        await opened
        self.tasks += 1
        pages = sum(mapping.end - mapping.start for mapping in mappings) // _PAGE
        log.info("process %d: %d lazy pages in %d runs", task.pid, pages, len(mappings))

    async def _prepare(self) -> None:
        """Read the images, and have the pager open what is in them, before CRIU comes: its processes wait for that.

        What is wrong is said when the process comes that it concerns.
        """
        names = await asyncio.to_thread(os.listdir, self._images)
        pids = [name[3:-4] for name in names if name.startswith("mm-") and name.endswith(".img")]
        pids = list(filter(str.isdecimal, pids))
        if not pids:
            raise HandoffError(
                str(self._images), "there are no images of a process (mm-PID.img): -D says where they are"
            )
        for pid in map(int, pids):
            with contextlib.suppress(UffdError, OSError):
                self._prepared[pid] = pack, _ = await asyncio.to_thread(self._pack, pid)
                await asyncio.wrap_future(self._pager.prepare(pack))

    def _pack(self, pid: int) -> tuple[Pack, list[Mapping]]:
        source, mappings = self._source(read_task(self._images, pid))
        return Pack(Service(source), self._options), mappings

    def _source(self, image: TaskImage) -> tuple[Source, list[Mapping]]:
        """Return where a process's lazy pages are, and which address shows which of them."""
        runs = list(image.lazy())
        remote = [run for run in runs if run.file == REMOTE]
        if remote and self._server is None:
            raise HandoffError(
                str(self._images), f"pages of process {image.pid} are with the page server of its dump: --page-server"
            )
        used = sorted({run.file for run in runs if run.file != REMOTE})
        parts: list[Source] = [FileSource(image.files[file]) for file in used]
        if self._server is not None and remote:
            parts.append(self._relay.add(_remote(self._server, image.pid, [(r.address, r.length) for r in remote])))
        if not parts:
            return ZeroSource(_PAGE), []  # it has no lazy pages; what it maps from now on is zeros
        whole = ConcatSource(parts)
        mappings = []
        at = whole.starts[-1] if remote else 0
        for run in runs:
            if run.file == REMOTE:
                mappings.append(Mapping(run.address, run.end, at))
                at += run.length + _PAGE
            else:
                start = whole.starts[used.index(run.file)] + run.offset
                mappings.append(Mapping(run.address, run.end, start))
        return (parts[0] if len(parts) == 1 else whole), mappings

    async def _release(self, tenant: Tenant) -> None:
        try:
            await asyncio.wrap_future(self._pager.request("release", tenant))
        except UffdError as error:
            log.warning("not all could be brought: %s", error)
        else:
            self._gone(tenant)

    def _gone(self, tenant: Tenant) -> None:
        if self._tenants.pop(tenant.token, None) is not None:
            self._pager.forget(tenant)
            tenant.uffd.close()
            tenant.pack.close()
            self._changed.set()

    def _failed(self, tenant: Tenant | None, error: BaseException) -> None:
        if tenant is None:  # nobody is served any more, and of nobody's end will be told
            self._death = error
            self._changed.set()
        log.error("%s", error)
        self.errors.append(error)

    def _leave(self) -> None:
        with contextlib.suppress(AssertionError):  # it has not started
            self.pages = self._pager.statistics().pages
        self._pager.stop(leave=bool(self._tenants))
        for pack, _ in self._prepared.values():
            pack.close()


def _remote(server: CriuPageServer, pid: int, runs: list[tuple[int, int]]) -> _Remote:
    addresses = []
    at = 0
    for address, length in runs:
        addresses.append((at, address, length))
        at += length + _PAGE  # a window must not reach from one run into the next
    return _Remote(server, pid, addresses, at)
