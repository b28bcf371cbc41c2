"""Files in layers: what an upper one has hides what is below; its holes show it. So are Firecracker's Diff snapshots.

Which layer shows a byte is found once, when the layers are opened, and kept in one table (`overlay`): at a fault ten
layers cost what two do.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from aiouffd.errors import ShortReadError, SourceError
from aiouffd.sources.base import Source
from aiouffd.sources.daemon_threads import DaemonThreads
from aiouffd.sources.file import FileSource
from aiouffd.sources.overlay import NOBODY, Overlay

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["LayeredSource"]

_THREADS = 16  # limit of reads under way
_EXPECTED = 8  # parts of a range that are read ahead: more of them are small
_IN_HANDLERS = 1 << 14  # parts that a signal handler is told of


class LayeredSource:
    """A file and what has changed since, in sparse files: a hole of a file shows the layer below it.

    Data that is zero is zeros; what is a hole in all layers is zeros. So the file systems, and whatever copies the
    files, must keep holes and zeros apart: `cp --sparse=always`, for example, does not.

    Opening blocks, looks up all extents of all files, and closes the files of which nothing is to be seen. The bytes
    are those of that moment: once a file is written, the pages that are read from it are an error.

    Args:
        layers: paths, the lowest first. The lowest may also be any `Source`.

    Attributes:
        size: in bytes: that of the uppermost layer.
        layers: those of which something is shown, the lowest first.

    Raises:
        SourceError: a file cannot be opened, or is smaller than one below it, as a file is that has been cut.
        TypeError: a layer above the lowest is no path.
        ValueError: there are no layers.
    """

    def __init__(self, layers: Sequence[str | os.PathLike[str] | Source]) -> None:
        opened = [_opened(layer, lowest=not number) for number, layer in enumerate(layers)]
        if not opened:
            raise ValueError("a LayeredSource has at least one layer")
        for below, above in pairwise(opened):
            if above.size < below.size:
                reason = f"it has {above.size} bytes, and {below!r} below it has {below.size}"
                raise SourceError(repr(above), 0, 0, reason)
        places = [layer.data() if isinstance(layer, FileSource) else [(0, layer.size)] for layer in opened]
        overlay = Overlay.of(opened[-1].size, places)
        used = sorted(set(overlay.layers) - {NOBODY})
        self._adopt([opened[number] for number in used], overlay.only(used))
        self._given = list(layers)

    @classmethod
    def arrived(cls, layers: list[Any], size: int, starts: array[int], numbers: array[int]) -> LayeredSource:
        """Make a source of layers that another process has opened."""
        self = cls.__new__(cls)
        self._adopt(layers, Overlay(size, starts, numbers))
        return self

    def _adopt(self, layers: list[Any], overlay: Overlay) -> None:
        self.layers = layers
        self.size: int = overlay.size
        self._overlay = overlay
        self._locate = [getattr(layer, "locate", _nowhere) for layer in layers]
        self._page = [getattr(layer, "page", locate) for layer, locate in zip(layers, self._locate, strict=True)]
        self._pool: DaemonThreads | None = None
        base = layers[0] if layers and not isinstance(layers[0], FileSource) else None
        self._given = layers
        self._base: Any = base
        self._hole = getattr(base, "hole", None) if getattr(base, "sparse", True) else None
        self.plain: bool = self._hole is None  # `page` finds nothing in holes
        self.sparse: bool = NOBODY in overlay.layers or self._hole is not None
        quick = hasattr(base, "locate") or hasattr(base, "read_nowait")
        self.local: bool = base is None or getattr(base, "local", quick)
        self.keeps: bool = getattr(base, "keeps", False)
        self._take_limits()

    def _take_limits(self) -> None:
        """Have the limits of the lowest layer, where it has its own."""
        for name in ("timeout", "retries"):
            if hasattr(self._base, name):
                setattr(self, name, getattr(self._base, name))

    @property
    def identity(self) -> tuple[Any, ...] | None:
        """Equal for sources of the same bytes; None: a layer does not say."""
        found = tuple(getattr(layer, "identity", None) for layer in self.layers)
        return None if None in found else ("layers", *found)

    def begin(self, timeout: float | None, retries: int | None, on_retry: Callable[[], None]) -> None:
        """Tell the lowest layer what the Monitor was given."""
        begin = getattr(self._base, "begin", None)
        if begin is not None:
            begin(timeout, retries, on_retry)
            self._take_limits()

    def mappable(self, start: int, end: int) -> list[tuple[int, int, int, int]] | None:
        """As of a file: what is missing in between is zeros. None: not all of it is whole pages of files."""
        found: list[tuple[int, int, int, int]] = []
        for number, low, high in self._overlay.pieces(start, end):
            if low % mmap.PAGESIZE or (high % mmap.PAGESIZE and high != self.size):
                return None
            mappable = None if number == NOBODY else getattr(self.layers[number], "mappable", lambda *_: None)
            parts = [] if mappable is None else mappable(low, high)
            if parts is None:
                return None
            found += parts
        return found

    # What is in memory

    def hole(self, offset: int, length: int) -> int:
        """Return how many bytes from `offset` on are zeros that no layer has, at most `length`."""
        layer, end = self._overlay.at(offset)
        length = min(length, end - offset)
        if layer == NOBODY:
            return length
        return self._hole(offset, length) if self._hole is not None and self.layers[layer] is self._base else 0

    def locate(self, offset: int, length: int) -> int | None:
        """Return the address of the bytes, if they are resident and of one layer."""
        layer, end = self._overlay.at(offset)
        whole = layer != NOBODY and offset + length <= end
        return self._locate[layer](offset, length) if whole else None

    def page(self, offset: int, length: int) -> int | None:
        """As `locate`, until the next call."""
        layer, end = self._overlay.at(offset)
        whole = layer != NOBODY and offset + length <= end
        return self._page[layer](offset, length) if whole else None

    def blank(self, offset: int, length: int, block: int) -> list[int]:
        """Return where blocks of zeros begin, relative to `offset`, in bytes of one layer that are resident."""
        layer, end = self._overlay.at(offset)
        blank = getattr(self.layers[layer], "blank", None) if layer != NOBODY and offset + length <= end else None
        return [] if blank is None else blank(offset, length, block)

    def memories(self) -> Iterator[tuple[int, int, tuple[int, int, int, int]]]:
        """Yield (start, end, what `memory` of the layer returns) of what is shown of layers in memory, in order."""
        if len(self._overlay.starts) > _IN_HANDLERS:
            return
        memories = [getattr(layer, "memory", lambda: None)() for layer in self.layers]
        for layer, start, end in self._overlay.pieces(0, self.size):
            memory = None if layer == NOBODY else memories[layer]
            if memory is not None:
                yield start, end, memory

    def read_nowait(self, offset: int, length: int) -> Any:
        """Return the bytes, put together of several layers, if they can be had without waiting."""
        layer, end = self._overlay.at(offset)
        if layer != NOBODY and offset + length <= end:
            return self._read_nowait(layer, offset, length)
        data = bytearray(length)
        view = memoryview(data)
        for number, start, stop in self._overlay.pieces(offset, offset + length):
            into = view[start - offset : stop - offset]
            if number == NOBODY:
                continue
            if self.layers[number] is self._base:
                found = self._read_nowait(number, start, stop - start)
                if found is None or memoryview(found).nbytes != len(into):
                    return None
                into[:] = memoryview(found).cast("B")
            elif not self.layers[number].fill_nowait(start, into):
                return None
        return data

    def _read_nowait(self, layer: int, offset: int, length: int) -> Any:
        read_nowait = getattr(self.layers[layer], "read_nowait", None)
        return None if read_nowait is None else read_nowait(offset, length)

    def expect(self, offset: int, length: int) -> None:
        """Have the layers bring what they show of these bytes."""
        stop = min(offset + length, self.size)
        pieces = self._overlay.pieces(offset, stop) if offset < stop else iter(())
        for _, (layer, start, end) in zip(range(_EXPECTED), pieces, strict=False):
            expect = getattr(self.layers[layer], "expect", None) if layer != NOBODY else None
            if expect is not None:
                expect(start, end - start)

    # What must be waited for

    async def read(self, offset: int, length: int) -> Any:
        """Return the bytes. Canceling is safe. Errors are those of the layers."""
        layer, end = self._overlay.at(offset)
        if layer != NOBODY and offset + length <= end:
            return await self.layers[layer].read(offset, length)
        data = bytearray(length)
        pieces = list(self._overlay.pieces(offset, offset + length))
        await self._add_base(offset, data, [piece for piece in pieces if self._is_base(piece[0])])
        files = [piece for piece in pieces if piece[0] != NOBODY and not self._is_base(piece[0])]
        if files:
            if self._pool is None:
                self._pool = DaemonThreads(_THREADS, "aiouffd-layers")
            await asyncio.get_running_loop().run_in_executor(self._pool, self._add_files, offset, data, files)
        return data

    def _is_base(self, layer: int) -> bool:
        return layer != NOBODY and self.layers[layer] is self._base

    async def _add_base(self, offset: int, data: bytearray, pieces: list[tuple[int, int, int]]) -> None:
        """Read what is shown of the lowest layer, with what is hidden in between: one request, and not many."""
        if not pieces:
            return
        low, high = pieces[0][1], pieces[-1][2]
        found = memoryview(await self._base.read(low, high - low)).cast("B")
        if len(found) != high - low:
            raise ShortReadError(repr(self._base), low, high - low, f"gave {len(found)} bytes")
        for _, start, stop in pieces:
            data[start - offset : stop - offset] = found[start - low : stop - low]

    def _add_files(self, offset: int, data: bytearray, pieces: list[tuple[int, int, int]]) -> None:
        view = memoryview(data)
        for layer, start, stop in pieces:
            self.layers[layer].fill(start, view[start - offset : stop - offset])

    def sample(self, offset: int, length: int) -> bytes:
        """Return some bytes, to tell these layers from others. Blocks."""
        found = b""
        for layer, start, stop in self._overlay.pieces(offset, min(offset + length, self.size)):
            sample = getattr(self.layers[layer], "sample", None) if layer != NOBODY else _zeros
            found += b"" if sample is None else sample(start, stop - start)
        return found

    async def aclose(self) -> None:
        """Close all layers. Does not wait for reads under way."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        for layer in self.layers:
            close = getattr(layer, "aclose", None)
            if close is not None:
                await close()

    def travel(self) -> tuple[Any, tuple[Any, ...]]:
        """Return what makes this source of the open files and the table."""
        return LayeredSource.arrived, (self.layers, self.size, self._overlay.starts, self._overlay.layers)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return LayeredSource, (self._given,)

    def __repr__(self) -> str:
        return f"LayeredSource({self.layers!r})"


def _opened(layer: Any, *, lowest: bool) -> Any:
    if isinstance(layer, str | os.PathLike):
        return FileSource(layer)
    if not isinstance(layer, FileSource) and not (lowest and isinstance(layer, Source)):
        raise TypeError(f"{layer!r:.200} is no path, and no source that can be the lowest layer")
    return layer


def _nowhere(_offset: int, _length: int) -> None:
    """Locate nothing: the layer has no bytes in memory."""


def _zeros(_offset: int, length: int) -> bytes:
    return bytes(length)
