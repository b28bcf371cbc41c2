"""A snapshot of memory that is in use: `engine.capture` has the moment, and this writes it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
from typing import TYPE_CHECKING, Any, TypedDict

import attrs

from aiouffd.engine.capture import Capture
from aiouffd.engine.moment import Moment
from aiouffd.engine.places import Places
from aiouffd.errors import BusyError, ClosedError
from aiouffd.kernel import files
from aiouffd.lifetime import until_done
from aiouffd.store.folder import Folder
from aiouffd.store.place import SUFFIX
from aiouffd.store.snapshot import Snapshot, open_snapshot
from aiouffd.store.writer import CHUNK_SIZE, target, write_image

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from aiouffd.engine.space import Space
    from aiouffd.kernel.memory import ProcessMemory
    from aiouffd.kernel.pagemap import Pagemap
    from aiouffd.sources.storage_options import StorageOptions

__all__ = ["Captured", "LiveOptions", "Order", "Snapshots", "capture"]

_PIECE = 2 << 20


class LiveOptions(TypedDict, total=False):
    """How a snapshot of memory in use is written.

    Attributes:
        rate: bytes in a second that are read at most; None (the default): as fast as it goes.
        replace: whether a snapshot of that name may be replaced.
        codec: `zstd` (the default), `lz4` or `none`.
        level: of zstd; 3 by default.
        metadata: any JSON, which is kept with it.
        storage_options: as for `open`.
    """

    rate: float | None
    replace: bool
    codec: str
    level: int
    metadata: Mapping[str, Any] | None
    storage_options: StorageOptions | None


@attrs.frozen
class Captured:
    """What a snapshot of memory in use took.

    Attributes:
        pause_ns: nanoseconds for which writes to protected pages were held back until the moment, the longest of them.
        bytes: how many were read, of memory and of the source.
        pages_saved: pages whose bytes were kept, since they were written before they were read.
        changed: which part of the image was read, since it may differ from the base: from 0 to 1. What is known to be
            zeros counts.
    """

    pause_ns: int
    bytes: int
    pages_saved: int
    changed: float


@attrs.frozen
class Order:
    """What is to be written, as plain values that travel.

    Attributes:
        destination: absolute, or a URL. The name of a snapshot ends with `.snap`; else it is a plain file.
        base: of a snapshot, in the same store; None: none.
        places: which addresses [start, end) have which offset of the image on.
        size: bytes of the image.
        rate: as of `LiveOptions`.
        options: the other ones.
    """

    destination: str
    base: str | None
    places: Sequence[tuple[int, int, int]]
    size: int
    rate: float | None = None
    options: dict[str, Any] = attrs.field(factory=dict)

    @property
    def is_file(self) -> bool:
        """Whether it is a plain file."""
        return not self.destination.endswith(SUFFIX)

    @property
    def start(self) -> int:
        """The lowest address."""
        return self.places[0][0]


class Snapshots:
    """The snapshots of memory in use that one loop takes."""

    def __init__(self) -> None:
        self._tasks: dict[Space, asyncio.Task[Captured]] = {}
        self._images: dict[Space, Moment] = {}

    async def take(
        self,
        spaces: list[Space],
        order: Order,
        memory: ProcessMemory,
        pagemap: Pagemap | None,
        modes: int | None,
        quiet: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> Captured:
        """Take one; both descriptors are closed. Raises as `capture`; ClosedError: it was canceled."""
        with memory, pagemap or contextlib.nullcontext():
            space = spaces[0]
            if space in self._tasks:
                raise BusyError("a snapshot", order.start, order.size, errno.EBUSY)
            state = Capture.of(spaces, Places(order.places, ours=modes is not None), modes, quiet)
            state.arming.shared = memory.file >= 0
            begun = functools.partial(self._images.__setitem__, space)
            task = asyncio.get_running_loop().create_task(capture(state, order, memory, pagemap, begun))
            self._tasks[space] = task
            try:
                await asyncio.wait([task])
            finally:
                task.cancel()
                await _ended(task)
                del self._tasks[space]  # not before: it ends what another would begin
                self._images.pop(space, None)
            try:
                if task.cancelled():
                    raise ClosedError("the snapshot was canceled")
                return task.result()
            finally:
                del task

    def cancel(self, space: Space) -> None:
        """Have the snapshot of a space end, if one is under way; `take` raises when it has."""
        if space in self._tasks:
            self._tasks[space].cancel()

    def progress(self, space: Space) -> tuple[int, int] | None:
        """Return how many bytes are read of the snapshot of a space, and of how many; None before its moment."""
        image = self._images.get(space)
        return None if image is None else (image.bytes_read, image.total)

    async def aclose(self) -> None:
        """Cancel all of them, and wait until they have ended."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        for task in tasks:
            await _ended(task)


async def capture(
    state: Capture,
    order: Order,
    memory: ProcessMemory,
    pagemap: Pagemap | None,
    begun: Callable[[Moment], None] = lambda _: None,
) -> Captured:
    """Write a snapshot. On the loop of the capture.

    Canceling is safe: no snapshot appears, and what is known of writes since its base stays known; else nothing is
    protected any more, when this raises. `begun` is called at the moment.

    Raises:
        LayoutChangingError: pages were unmapped, moved or emptied before they were read.
        StoreError: it cannot be written, or is there already.
        SourceError: missing pages could not be read.
        ClosedError: the memory is served no longer.
        BusyError: another snapshot of it is under way.
        UnsupportedError: the kernel cannot protect this memory.
    """
    below = await asyncio.to_thread(_prepared, order)
    base = None if below is None or below.index.size != order.size else below.manifest.index.hash
    granule = state.page if order.is_file else _chunk_size(state, below)
    name: str | None = None
    writing: asyncio.Future[str | None] | None = None
    try:
        changed = await state.begin(memory, pagemap, base, granule)
        extents = await state.extents(order.size)
        image = Moment(state, memory, order.size, order.rate, extents=extents, lifts=order.is_file, changed=changed)
        begun(image)
        settings = {"base": below, "changed": changed, "chunk_size": granule, "page_size": state.page}
        writing = asyncio.ensure_future(asyncio.to_thread(_write, order, image, settings))
        name = await asyncio.shield(writing)
    except BaseException as error:
        known = state.failure is not None and isinstance(error, Exception)
        state.fail(error if isinstance(error, Exception) else ClosedError("the snapshot was canceled"))
        if writing is not None:
            await _ended(writing)
        if state.failure is not None:
            # Of threads that write and tasks that read, some of whose frames have it in a future.
            state.failure.__traceback__ = state.failure.__context__ = None
        if known and state.failure is not None:  # what writes a file takes it for an error of the file's
            raise state.failure from None
        raise
    finally:
        await _ended(asyncio.ensure_future(state.end(name)))
        writing = state.failure = None  # this frame is in their tracebacks: a cycle would keep the source
    return Captured(state.pause_ns, image.bytes_read, state.pages_kept, image.bytes_read / order.size)


async def _ended(work: asyncio.Future[Any]) -> None:
    """Wait until something has ended, whatever becomes of it, and however often this is canceled."""
    await until_done(work)
    if not work.cancelled():
        work.exception()  # retrieved


def _prepared(order: Order) -> Snapshot | None:
    """Look whether it can be written; return the base."""
    stored = order.options.get("storage_options")
    if not order.is_file:
        target(order.destination, stored, replace=order.options.get("replace", False))
    return None if order.base is None else open_snapshot(order.base, stored)


def _chunk_size(state: Capture, below: Snapshot | None) -> int:
    """Return bytes of a chunk: whole pages."""
    if below is None:
        return max(CHUNK_SIZE, state.page)
    if below.index.chunk_size < state.page:
        raise ValueError(
            f"its base has chunks of {below.index.chunk_size} bytes, which are no whole pages of the region"
        )
    return below.index.chunk_size


def _write(order: Order, image: Moment, settings: dict[str, Any]) -> str | None:
    """Write an image; return the hash of its index, which names it; None: it is a file."""
    if order.is_file:
        above, name = os.path.split(order.destination)
        Folder(above).fill(name, lambda fd: _fill(fd, image, max(_PIECE, settings["page_size"])))
        return None
    store, name = target(order.destination, order.options.get("storage_options"), replace=True)
    return write_image(store, name, image, **settings, **order.options).index.hash


def _fill(fd: int, image: Moment, piece: int) -> None:
    os.ftruncate(fd, image.size)
    for low, high in image.extents():
        for at in range(low, high, piece):  # whole pages: each is read once
            files.write_at(fd, image.read(at, min(piece, high - at)), at)
    image.close()
