"""What all readers share: arrays by name on a region, and the prefetch of just their bytes."""

from __future__ import annotations

import asyncio
import mmap
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import attrs

from aiouffd.formats.dtypes import numpy_dtype, torch_dtype
from aiouffd.formats.header import Header
from aiouffd.formats.spans import place_of, spans
from aiouffd.ranges import RangeSet, align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from concurrent.futures import Future

    from aiouffd.kernel.region import Region

__all__ = ["ArrayEntry", "ArrayFile"]

_AT_ONCE: Final = 256  # prefetches that are asked for and have not come yet


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
    """

    def __init__(self, region: Region) -> None:
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
        """Bring the bytes of arrays, and no others: whole pages, all at once. Faults go first.

        Canceling gives up waiting; what was asked for comes all the same.

        Args:
            *what: names; also arrays or tensors on the region, a slice of one for example: `file["embed"][100:200]`.
                Of a slice with steps, what lies between is left out where it is whole pages.

        Raises:
            KeyError: the file has no array of this name.
            ValueError: an array is not on the region.
            SourceError: bytes could not be had; nothing is poisoned, what came is kept.
        """
        for future in self._ask_for(await asyncio.to_thread(self._ranges, what)):
            await asyncio.wrap_future(future)

    def prefetch_tensor_sync(self, *what: Any) -> None:
        """As `prefetch_tensor`, for programs without a loop.

        Raises:
            RuntimeError: this thread runs the engine's loop.
        """
        ranges = self._ranges(what)
        if self.region.monitor is not None and self.region.monitor.serves_here:
            self.region.monitor.prefetch_sync(0, 0)  # refuses to wait in the thread of the loop
        for future in self._ask_for(ranges):
            future.result()

    def ask_for_tensor(self, *what: Any) -> list[Future[Any]]:
        """As `prefetch_tensor`, and return at once: all is there when each of these has its result.

        Blocks where names have to be looked up in the file (`Npz`, `Checkpoint`).
        """
        return list(self._ask_for(self._ranges(what)))

    def _ask_for(self, ranges: RangeSet) -> Iterator[Future[Any]]:
        """Ask for ranges; yield what has to be waited for."""
        monitor = self.region.monitor
        pending: deque[Future[Any]] = deque()
        for each in ranges:
            length = min(each.end, len(self.region)) - each.start
            if monitor is None or not monitor.serves_here:
                self.region.bring(each.start, length)
                continue
            pending.append(monitor.ask_for(each.start, length))
            if len(pending) > _AT_ONCE:
                yield pending.popleft()
        yield from pending

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

    @staticmethod
    def _pages(found: Iterable[tuple[int, int]]) -> RangeSet:
        """Return the pages that (start, length) ranges are on."""
        pages = RangeSet()
        for start, length in found:
            pages.add(align_down(start, mmap.PAGESIZE), align_up(start + length, mmap.PAGESIZE))
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
