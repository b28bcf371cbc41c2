"""What all readers share: arrays by name on a region, and the prefetch of just their bytes."""

from __future__ import annotations

import asyncio
import mmap
import operator
from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import attrs

from aiouffd.formats.dtypes import numpy_dtype, torch_dtype
from aiouffd.formats.header import Header
from aiouffd.formats.spans import place_of, spans
from aiouffd.kernel.region import Region
from aiouffd.ranges import RangeSet, align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["ArrayEntry", "ArrayFile"]


@attrs.frozen
class ArrayEntry:
    """What a file says of one array."""

    name: str
    kind: str
    """The element type, as the file has it: `BF16`, `Q4_K`, `<f4`."""
    dtype: Any
    """The same by the name that torch and ml_dtypes share (`bfloat16`), or a type of numpy; raw blocks are `uint8`."""
    shape: tuple[int, ...]
    start: int
    """Offset of the first element in the region."""
    length: int
    """Bytes; for one with `strides`, those of the storage from its first element on."""
    strides: tuple[int, ...] | None = None
    """Elements from one to the next along each axis. None: C order."""


class ArrayFile(Mapping[str, Any]):
    """The arrays of a file that a region shows, by name: `file[name]` is a numpy array on the region, without a copy.

    The header is read and checked here, which blocks until its bytes have come: in a program with a loop,
    `await asyncio.to_thread(formats.Safetensors, region)`. To take an array touches none of its bytes; to use it does,
    and brings what `readahead` says. `prefetch_tensor` brings the bytes of an array and no others, but whole pages.

    Arrays keep the region mapped, and do not keep it served: use them inside the block of `aiouffd.open`, or take the
    region from `aiouffd.map`. What is written to them stays in the region.

    Args:
        region: of `aiouffd.open` or `aiouffd.map`, which shows the whole file.

    Attributes:
        region: the same.

    Raises:
        FormatError: the file is not what the format demands; it names the file and the offset.
        SourceError: the header could not be had.
        RuntimeError: this thread runs the engine's loop.
        TypeError: `region` is a path or a URL, for example.
    """

    def __init__(self, region: Region) -> None:
        if not isinstance(region, Region):
            raise TypeError(
                f"{type(self).__name__} takes a region: {type(self).__name__}(aiouffd.map({region!r:.80})), for example"
            )
        self.region = region
        self._header = Header(region)
        self._entries: dict[str, ArrayEntry] = {}

    def info(self, name: str) -> ArrayEntry:
        """Return where an array is and of what type, without touching it.

        Raises:
            KeyError: the file has no such array.
        """
        return self._entries[name]

    def raw(self, name: str) -> memoryview:
        """Return the bytes of an array, as they are in the file: a view of the region. Raises as `info`."""
        entry = self.info(name)
        return memoryview(self.region)[entry.start : entry.start + entry.length]

    def __getitem__(self, name: str) -> Any:
        """Return a numpy array. TypeError: numpy has no such type (bfloat16, float8), and ml_dtypes is missing."""
        import numpy as np  # noqa: PLC0415 - an extra

        entry = self.info(name)
        dtype = numpy_dtype(entry.dtype)
        strides = None if entry.strides is None else tuple(step * dtype.itemsize for step in entry.strides)
        return np.ndarray(entry.shape, dtype, self.raw(name) if entry.length else None, 0, strides)

    def tensor(self, name: str) -> Any:
        """Return a torch tensor on the region, without a copy. TypeError: torch has no such type."""
        return self._tensor(self.info(name))

    def _tensor(self, entry: ArrayEntry) -> Any:
        import torch  # noqa: PLC0415 - an extra

        dtype = torch_dtype(entry.dtype)
        if not entry.length:
            return torch.empty(entry.shape, dtype=dtype)
        flat = torch.frombuffer(self.region, dtype=torch.uint8, count=entry.length, offset=entry.start).view(dtype)
        return flat.reshape(entry.shape) if entry.strides is None else flat.as_strided(entry.shape, entry.strides)

    async def prefetch_tensor(self, *what: Any) -> None:
        """Bring the bytes of arrays, and no others: whole pages, all by one request. Faults go first.

        Canceling gives up waiting; what was asked for comes all the same.

        Args:
            *what: names; also arrays or tensors on the region, a slice of one for example: `file["embed"][100:200]`.
                Of a slice with steps, what lies between is left out where it is whole pages.

        Raises:
            KeyError: the file has no array of this name.
            ValueError: an array is not on the region.
            SourceError: bytes could not be had; nothing is poisoned, what came is kept.
        """
        await asyncio.wrap_future(self._ask_for(await asyncio.to_thread(self._ranges, what)))

    def prefetch_tensor_sync(self, *what: Any) -> None:
        """As `prefetch_tensor`, for programs without a loop.

        Raises:
            RuntimeError: this thread runs the engine's loop.
        """
        self._bring(self._ranges(what))

    async def prefetch_rows(self, name: str, rows: Iterable[int]) -> None:
        """Bring some rows of an array, as `prefetch_tensor` does: what `file[name][rows]` copies.

        Args:
            name: of the array.
            rows: indices along its first axis, in any order; negative ones count from its end.

        Raises:
            KeyError: the file has no array of this name.
            IndexError: the array has no such row.
            SourceError: bytes could not be had; nothing is poisoned, what came is kept.
        """
        await asyncio.wrap_future(self._ask_for(await asyncio.to_thread(self._rows, name, rows)))

    def prefetch_rows_sync(self, name: str, rows: Iterable[int]) -> None:
        """As `prefetch_rows`, for programs without a loop. RuntimeError: this thread runs the engine's loop."""
        self._bring(self._rows(name, rows))

    def ask_for_tensor(self, *what: Any) -> Future[Any]:
        """As `prefetch_tensor`, and return at once: all is there when the future has its result.

        Blocks where names have to be looked up in the file (`Npz`, `Checkpoint`).
        """
        return self._ask_for(self._ranges(what))

    def _bring(self, ranges: RangeSet) -> None:
        """Have the pages there."""
        if self._is_served:
            self.region.monitor.prefetch_sync(ranges)
        else:
            self._ask_for(ranges)

    def _ask_for(self, ranges: RangeSet) -> Future[Any]:
        coming: Future[Any] = Future()
        if self._is_served:
            coming = self.region.monitor.ask_for(ranges)
        else:
            for each in ranges:
                self.region.bring(each.start, each.length)
            coming.set_result(None)
        return coming

    @property
    def _is_served(self) -> bool:
        return self.region.monitor is not None and self.region.monitor.serves_here

    def _ranges(self, what: tuple[Any, ...]) -> RangeSet:
        """Return the pages of names and arrays, each once. May block, where names have to be looked up in the file."""
        self._look_up(each for each in what if isinstance(each, str))
        return self._pages(
            span
            for each in what
            for span in (self._spans_of(self.info(each)) if isinstance(each, str) else self._spans_on(each))
        )

    def _look_up(self, names: Iterable[str]) -> None:
        """Have what the file says of some arrays at hand, where it is spread over the file."""

    def _rows(self, name: str, rows: Iterable[int]) -> RangeSet:
        """Return the pages of some rows. May block, as `_ranges`."""
        self._look_up([name])
        entry = self.info(name)
        count = entry.shape[0] if entry.shape else 0
        chosen = [operator.index(row) for row in rows]
        for row in chosen:
            if not -count <= row < count:
                raise IndexError(f"{name!r:.80} of the shape {entry.shape} has no row {row}")
        size = entry.length // count if count else 0
        if entry.strides is None:
            return self._pages((entry.start + row % count * size, size) for row in chosen)
        size = numpy_dtype(entry.dtype).itemsize
        steps, shape = [step * size for step in entry.strides], (1, *entry.shape[1:])
        firsts = (entry.start + row % count * steps[0] for row in chosen)
        return self._pages(span for first in firsts for span in spans(first, shape, steps, size))

    def _pages(self, found: Iterable[tuple[int, int]]) -> RangeSet:
        """Return the pages that (start, length) ranges are on, within the region."""
        pages, end = RangeSet(), len(self.region)
        for start, length in sorted(found):
            pages.add(align_down(start, mmap.PAGESIZE), min(align_up(start + length, mmap.PAGESIZE), end))
        return pages

    def _spans_of(self, entry: ArrayEntry) -> Iterator[tuple[int, int]]:
        if entry.strides is None:
            return iter([(entry.start, entry.length)] if entry.length else [])
        size = numpy_dtype(entry.dtype).itemsize
        return spans(entry.start, entry.shape, [step * size for step in entry.strides], size)

    def _spans_on(self, array: Any) -> Iterator[tuple[int, int]]:
        address, shape, strides, itemsize = place_of(array)
        for start, length in spans(address - self.region.address, shape, strides, itemsize):
            if start < 0 or start + length > len(self.region):
                raise ValueError(f"an array of the shape {tuple(shape)} is not on {self.region!r}: it is a copy")
            yield start, length

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}, {len(self)} arrays on {self.region!r}>"
