"""Takes the place of `criu lazy-pages`: serves the processes that `criu restore --lazy-pages` hands over."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from aiouffd.criu.images import REMOTE, TaskImage, read_task
from aiouffd.criu.page_server import HEADER_4_1, HEADER_4_2, CriuPageServer
from aiouffd.criu.relay import Relay
from aiouffd.criu.socket import LazyPagesSocket
from aiouffd.engine.mappings import Mapping
from aiouffd.engine.options import Options, Service
from aiouffd.errors import HandoffError, UffdError
from aiouffd.kernel import abi
from aiouffd.kernel.abi import Feature
from aiouffd.kernel.userfaultfd import Userfaultfd
from aiouffd.lifetime import uninterrupted
from aiouffd.pager.client.client import PagerClient
from aiouffd.pager.client.packing import Pack
from aiouffd.pager.client.tenant import Tenant
from aiouffd.pager.process.serialization import Pickles
from aiouffd.report.words import several
from aiouffd.sources.base import ZeroSource
from aiouffd.sources.concat import ConcatSource
from aiouffd.sources.file import FileSource

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from aiouffd.criu.socket import RestoredTask
    from aiouffd.engine.statistics import Statistics
    from aiouffd.sources.base import Source

__all__ = ["LazyPages"]

log: logging.Logger = logging.getLogger("aiouffd.lazy_pages")

_FEATURES = Feature.EVENT_FORK | abi.LAYOUT_EVENTS
"""The features that CRIU enables on each descriptor."""


class LazyPages:
    """Serves one restore: resolves the faults of its processes, and fills all other pages in the background.

    Args:
        images: the directory of the images (`-D`).
        work: where CRIU looks for the socket (`-W`); by default `images`.
        page_server: (host, port) of the `criu dump --lazy-pages` that has the lazy pages; None: the images have them.
        header: of that page server: `page_server.HEADER_4_1` or `HEADER_4_2`. None: the one of the CRIU that wrote
            the images.
        options: how the pages are served.
        background: fill all pages in the background, and end when all are there; else serve until the processes end.

    Attributes:
        errors: of pages and processes, in order.
        tasks: number of processes.
        pages: number of pages that were placed, once `run` has ended.
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        *,
        work: str | os.PathLike[str] | None = None,
        page_server: tuple[str, int] | None = None,
        header: str | None = None,
        options: Options,
        background: bool = True,
    ) -> None:
        self._images = images
        self._work = images if work is None else work
        self._address = page_server
        self._header = header
        self._server: CriuPageServer | None = None
        self._options = options
        self._background = background
        self._prepared: dict[int, tuple[Pack, list[Mapping]]] = {}
        self._tenants: dict[str, Tenant] = {}
        self._changed = asyncio.Event()
        self._death: BaseException | None = None
        self.errors: list[BaseException] = []
        self.tasks: int = 0
        self.pages: int = 0

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Listen, serve, and return when all is done. Canceling leaves the pager serving.

        Args:
            ready: called when CRIU may connect.

        Raises:
            HandoffError: the restore failed, or an image is not valid.
            SourceError: the page server cannot be reached.
            PagerDiedError: the pager was given up; a touch of a missing page is SIGBUS.
        """
        loop = asyncio.get_running_loop()

        def soon(function: Callable[..., None], *arguments: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(function, *arguments)

        self._pager = PagerClient(
            on_error=lambda tenant, error: soon(self._failed, tenant, error),
            on_gone=lambda tenant: soon(self._gone, tenant),
            pickles=Pickles.NEVER,
        )
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._leave)
            await uninterrupted(self._pager.start)
            self._relay = await stack.enter_async_context(Relay())
            pids = await asyncio.to_thread(self._pids)
            if self._address is not None:
                header = self._header
                if header is None:
                    header = await asyncio.to_thread(self._find_header, pids)
                self._server = await stack.enter_async_context(CriuPageServer(*self._address, header=header))
            await self._prepare(pids)
            # Last: whoever finds the socket is served at once.
            socket = await stack.enter_async_context(LazyPagesSocket(self._work))
            ready()
            async for task in socket.tasks():
                await self._serve(task)
            log.info("restored: %s", several(self.tasks, "process", "processes"))
            if self._background:
                await asyncio.gather(*(self._release(tenant) for tenant in list(self._tenants.values())))
            while self._tenants:
                if self._death is not None:
                    raise self._death
                self._changed.clear()
                await self._changed.wait()

    @property
    def holds_pages(self) -> bool:
        """Whether pages come through this process, so that the pager cannot serve without it."""
        return self._address is not None

    def statistics(self) -> Statistics:
        """Return the pager's counters."""
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
            uffd.close()  # CRIU then fails, and kills what it has restored
            raise
        tenant = Tenant(pack, uffd, mappings, mmap.PAGESIZE)
        self._tenants[tenant.token] = tenant
        opened = asyncio.wrap_future(self._pager.open(tenant))
        if self._background:
            # CRIU has some milliseconds of work left when the memory is registered: all pages may come before the
            # process runs.
            self._pager.request("begin", tenant)
        await opened
        self.tasks += 1
        pages = sum(mapping.end - mapping.start for mapping in mappings) // mmap.PAGESIZE
        log.info("process %d: %d lazy pages in %d runs", task.pid, pages, len(mappings))

    def _pids(self) -> list[int]:
        """Return the processes that the directory has images of."""
        names = [path.stem[3:] for path in Path(self._images).glob("mm-*.img")]
        pids = [int(name) for name in names if name.isdecimal()]
        if not pids:
            raise HandoffError(
                str(self._images), "has no images of a process (mm-PID.img): give the directory of the images with -D"
            )
        return pids

    def _find_header(self, pids: list[int]) -> str:
        """Return the header of the page server's version: the CRIU that wrote the images serves the pages."""
        for pid in pids:
            with contextlib.suppress(UffdError, OSError):
                wide = read_task(self._images, pid).wide_counts
                if wide is not None:
                    return HEADER_4_2 if wide else HEADER_4_1
        return HEADER_4_2

    async def _prepare(self, pids: list[int]) -> None:
        """Have the pager open the files of all images before CRIU connects: a restored process waits for that.

        An image that is not valid raises when its process comes.
        """
        for pid in pids:
            with contextlib.suppress(UffdError, OSError):
                self._prepared[pid] = pack, _ = await asyncio.to_thread(self._pack, pid)
                await asyncio.wrap_future(self._pager.prepare(pack))

    def _pack(self, pid: int) -> tuple[Pack, list[Mapping]]:
        source, mappings = self._source(read_task(self._images, pid))
        return Pack(Service(source), self._options), mappings

    def _source(self, image: TaskImage) -> tuple[Source, list[Mapping]]:
        """Return the source of a process's lazy pages, and which address shows which offset."""
        runs = list(image.lazy())
        remote = [run for run in runs if run.file == REMOTE]
        if remote and self._server is None:
            raise HandoffError(
                str(self._images), f"the page server of its dump has pages of process {image.pid}: use --page-server"
            )
        used = sorted({run.file for run in runs if run.file != REMOTE})
        parts: list[Source] = [FileSource(image.files[file]) for file in used]
        offsets: list[int] = []
        if self._server is not None and remote:
            task = self._server.task(image.pid, ((run.address, run.length) for run in remote))
            offsets = task.offsets
            parts.append(self._relay.add(task))
        if not parts:
            return ZeroSource(mmap.PAGESIZE), []  # no lazy pages: what the process maps from now on is zeros
        whole = ConcatSource(parts)
        starts = {run.address: whole.starts[-1] + offset for run, offset in zip(remote, offsets, strict=True)}
        for run in runs:
            if run.file != REMOTE:
                starts[run.address] = whole.starts[used.index(run.file)] + run.offset
        mappings = [Mapping(run.address, run.end, starts[run.address]) for run in runs]
        return (parts[0] if len(parts) == 1 else whole), mappings

    async def _release(self, tenant: Tenant) -> None:
        try:
            await asyncio.wrap_future(self._pager.request("release", tenant))
        except UffdError as error:
            log.warning("not all pages could be placed: %s", error)
        else:
            self._gone(tenant)

    def _gone(self, tenant: Tenant) -> None:
        if self._tenants.pop(tenant.token, None) is not None:
            self._pager.forget(tenant)
            tenant.uffd.close()
            tenant.pack.close()
            self._changed.set()

    def _failed(self, tenant: Tenant | None, error: BaseException) -> None:
        if tenant is None:  # the pager is given up: it serves nobody, and reports no end of a process
            self._death = error
            self._changed.set()
        log.error("%s", error)
        self.errors.append(error)

    def _leave(self) -> None:
        with contextlib.suppress(AssertionError):  # it has not started
            self.pages = self._pager.statistics().pages
        self._pager.stop(leave=bool(self._tenants), wait=False)  # this process is about to end
        for pack, _ in self._prepared.values():
            pack.close()
