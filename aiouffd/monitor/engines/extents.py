"""What signal handlers may place by themselves: the parts of a region whose bytes are in memory, or zeros."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

from aiouffd.engine.mappings import ZEROS, Mapping
from aiouffd.engine.serve.handler import Handler
from aiouffd.native.faults import Extent, Kind
from aiouffd.ranges import align_up

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from aiouffd.engine.options import Options, Service

__all__ = ["Extents"]


class Extents:
    """Tells what a region shows, as far as a handler may place it. It asks the loop for everything else.

    Args:
        service: what brings the pages.
        options: how the region is served.
        page_size: in bytes.
    """

    def __init__(self, service: Service, options: Options, page_size: int) -> None:
        self._source: Any = None if isinstance(service.origin, Handler) else service.origin
        self._loop_sees_all = service.recorder is not None or options.bounded
        self._page_size = page_size
        # hugetlb knows no ZEROPAGE, and no ZEROPAGE comes write-protected: the loop copies zeros.
        self._maps_zeros = page_size == mmap.PAGESIZE and not options.write_protect

    def of(self, mappings: Iterable[Mapping], start: int, end: int) -> list[Extent]:
        """Return the extents of [start, end), in order.

        Args:
            mappings: the region's, in order.
            start: its address.
            end: a multiple of the page size.
        """
        if self._loop_sees_all:
            return []
        return list(self._all(mappings, start, end))

    def _all(self, mappings: Iterable[Mapping], start: int, end: int) -> Iterator[Extent]:
        source = self._source
        size = 0 if source is None else source.size
        memories = _memories(source, size)
        hole = getattr(source, "hole", None)
        all_zeros = hole is not None and hole(0, size) == size
        at = start
        for mapping in mappings:
            yield from self._zeros(at, mapping.start)  # the region has grown there
            at = mapping.end
            if mapping.offset == ZEROS or all_zeros:
                yield from self._zeros(mapping.start, at)
            elif source is not None:
                yield from self._data(mapping, size, memories)
        yield from self._zeros(at, end)

    def _zeros(self, start: int, end: int) -> Iterator[Extent]:
        if start < end and self._maps_zeros:
            yield Extent(start, end, 0, 0, Kind.ZEROS, -1, 0)

    def _data(self, mapping: Mapping, size: int, memories: list[tuple[int, int, Memory]]) -> Iterator[Extent]:
        """Yield what a mapping shows of the source, and the zeros behind it. The last, partial page is the loop's."""
        first, last = mapping.offset, mapping.offset + mapping.end - mapping.start
        page = self._page_size
        skew = mapping.start - first
        for low, high, (address, length, fd, mtime_ns) in memories:
            # Pages that are not of one memory are the loop's as well.
            begin, end = align_up(max(low, first), page), min(high, length, size, last) & -page
            if begin < end:
                kind = Kind.COPY if fd < 0 else Kind.RESIDENT
                yield Extent(begin + skew, end + skew, address + begin, begin, kind, fd, mtime_ns)
        behind = max(align_up(size, page), first)
        yield from self._zeros(mapping.start + behind - first, mapping.end)


Memory = tuple[int, int, int, int]
"""What `Source.memory` returns."""


def _memories(source: Any, size: int) -> list[tuple[int, int, Memory]]:
    """Return (start, end, memory) of the parts of a source that are in memory, in order."""
    if (several := getattr(source, "memories", None)) is not None:
        return list(several())
    memory = getattr(source, "memory", lambda: None)()
    return [] if memory is None or memory[2] < -1 else [(0, size, memory)]
