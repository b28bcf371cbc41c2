"""How much to bring along with a fault. Pure decisions: offsets in, ranges out.

A fault brings its neighbourhood, since one COPY of sixteen pages costs a third of sixteen faults. Touchers that
move in order are recognised by where they fault next: just behind what was brought, or just before it (sequential,
upwards or downwards: a large memcpy goes down), or as far from the last fault as that was from the one before
(strided). Each recognised stream doubles its window up to the limit, as the kernel's own readahead does; faults that
belong to no stream shrink the neighbourhood down to the page itself.
"""

from __future__ import annotations

from typing import TypeAlias

from aiouffd.ranges import RangeSet

__all__ = ["Readahead"]

Window: TypeAlias = tuple[int, int]
"""Where it starts, and its length."""

_STREAMS = 16
_PIECES = 64  # a strided stream is given at most so many separate pages at once
_STRANGERS = 4  # faults in a row without a stream, before the neighbourhood is halved


class _Stream:
    """One toucher's way: where it faulted last, where it is expected, how much it gets.

    Attributes:
        last: the offset of the last fault.
        expected: where it is expected if it goes up, or by its stride.
        below: the page where it is expected if it goes down.
        direction: 1: up; -1: down; 0: not known yet.
        window: bytes that it gets.
        step: the distance from the fault before.
        stride: the same, once two steps in a row were equal; else 0.
    """

    __slots__ = ("below", "direction", "expected", "last", "step", "stride", "window")

    def __init__(self, last: int, page: int, step: int) -> None:
        self.last = last
        self.expected = last + page
        self.below = last - page
        self.direction = 0
        self.window = page
        self.step = step
        self.stride = 0


class Readahead:
    """Chooses what to bring for a fault at an offset.

    Args:
        page: page size in bytes.
        limit: the largest window in bytes; 0: the page alone.
        around: the neighbourhood of a fault that belongs to no stream, in bytes.
    """

    def __init__(self, page: int, limit: int, around: int = 64 << 10) -> None:
        self.page = page
        self._asked_around = around
        self.limit = limit & -page if limit >= page else 0
        self._around = max(page, min(around & -page, self.limit))
        self._neighbourhood = self._around
        self._strangers = 0
        self._streams: list[_Stream] = []  # most recently used last
        # What was brought, as a hint: the kernel's EEXIST is the truth. Bounded, so that memory stays flat.
        self._present = RangeSet(limit=1024)
        self.losses = 0
        """How often something was forgotten that may have been taken for present meanwhile."""

    def fresh(self) -> Readahead:
        """Return one with the same settings that has seen nothing."""
        return Readahead(self.page, self.limit, self._asked_around)

    def windows(self, offset: int, low: int, high: int) -> list[Window]:
        """Return (start, length) of what to bring for a fault at `offset`: one of them holds the fault.

        All are whole pages within [low, high), which holds the fault, and spare what is known to be present; from
        now on they count as present.
        """
        if not self.limit:
            return [(offset, self.page)]
        chosen = self._choose(offset, low, high)
        for start, length in chosen:
            self._present.add(start, start + length)
        return chosen

    def _choose(self, offset: int, low: int, high: int) -> list[tuple[int, int]]:
        page = self.page
        self._present.remove(offset, offset + page)  # it faulted, so it is not there
        stream = self._match(offset) or self._train(offset)
        if stream is None:
            return [self._neighbours(offset, low, high)]
        self._strangers = 0
        self._neighbourhood = self._around
        stream.window = min(max(stream.window * 2, 2 * page), self.limit)
        stream.last = offset
        if stream.stride:
            return self._strided(stream, offset, low, high)
        stream.window = max(stream.window, self._around)
        if stream.direction > 0:
            start, length = self._clip(offset, offset, min(offset + stream.window, high))
            stream.expected = start + length
        else:
            start, length = self._clip(offset, max(offset + page - stream.window, low), offset + page)
            stream.below = start - page
        return [(start, length)]

    def block(self, offset: int, size: int, low: int, high: int) -> Window:
        """Return what is missing around a fault in its block of `size` bytes, within [low, high); nothing is noted."""
        start = offset // size * size
        self._present.remove(offset, offset + self.page)
        return self._clip(offset, max(start, low), min(start + size, high))

    def follow(self, offset: int, low: int, high: int) -> tuple[Window, Window] | None:
        """Return the window behind the one that `offset` is in, for a stream at full speed, and what is behind that.

        It is brought while its toucher works on this one, so that neither waits for the other. At most one window
        ahead: nothing is returned before the toucher is in the one that was. It counts as present from now on.

        Both are (start, length) within [low, high). The second, of two windows, is not brought, and may be empty.
        """
        for stream in reversed(self._streams):
            if stream.window != self.limit or stream.stride:
                continue
            if stream.direction > 0 and stream.last <= offset < stream.expected:
                return self._above(stream, high)
            if stream.direction < 0 and stream.below < offset <= stream.last:
                return self._below(stream, low)
        return None

    def _above(self, stream: _Stream, high: int) -> tuple[Window, Window] | None:
        start, end = stream.expected, min(stream.expected + stream.window, high)
        length = next((gap.length for gap in self._present.gaps(start, end) if gap.start == start), 0)
        if not length:
            return None
        stream.last, stream.expected = start, start + length
        self._present.add(start, start + length)
        return (start, length), (start + length, min(2 * stream.window, high - start - length))

    def _below(self, stream: _Stream, low: int) -> tuple[Window, Window] | None:
        end = stream.below + self.page
        start = max(end - stream.window, low)
        length = next((gap.length for gap in self._present.gaps(start, end) if gap.end == end), 0)
        if not length:
            return None
        start = end - length
        stream.last, stream.below = end - self.page, start - self.page
        self._present.add(start, end)
        behind = min(2 * stream.window, start - low)
        return (start, length), (start - behind, behind)

    def brought(self, start: int, length: int) -> None:
        """Take note that these bytes are present now (prefetch)."""
        if self.limit:
            self._present.add(start, start + length)

    def forget(self, start: int, end: int) -> None:
        """Take note that these bytes are gone (removed, unmapped), or have not come after all."""
        self.losses += 1
        self._present.remove(start, end)

    def missing(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the parts of [start, end) that are not known to be present, as (start, length)."""
        return [(gap.start, gap.length) for gap in self._present.gaps(start, end)]

    def _match(self, offset: int) -> _Stream | None:
        """Find the stream that was expected here; a sequential one may have skipped a little."""
        for index in range(len(self._streams) - 1, -1, -1):
            stream = self._streams[index]
            tolerance = 1 if stream.stride else max(stream.window, self._around)
            if stream.direction >= 0 and 0 <= offset - stream.expected < tolerance:
                stream.direction = 1
            elif stream.direction <= 0 and not stream.stride and 0 <= stream.below - offset < tolerance:
                stream.direction = -1
            else:
                continue
            self._streams.append(self._streams.pop(index))
            return stream
        return None

    def _train(self, offset: int) -> _Stream | None:
        """Compare the step from the nearest fault with the step before it: two equal ones are a stride."""
        step = 0
        if self._streams:
            nearest = min(self._streams, key=lambda stream: abs(offset - stream.last))
            step = offset - nearest.last
            if step and step == nearest.step:
                nearest.stride = step
                nearest.direction = 0
                nearest.window = self.page
                return nearest
        self._streams.append(_Stream(offset, self.page, step))
        del self._streams[:-_STREAMS]
        return None

    def _neighbours(self, offset: int, low: int, high: int) -> tuple[int, int]:
        """Take the aligned block around a fault of no stream."""
        self._strangers += 1
        if self._strangers > _STRANGERS:
            self._strangers = 0
            self._neighbourhood = max(self.page, self._neighbourhood // 2 & -self.page)
        size = self._neighbourhood
        start = offset // size * size
        window = self._clip(offset, max(start, low), min(start + size, high))
        stream = self._streams[-1]
        stream.expected = window[0] + window[1]
        stream.below = window[0] - self.page
        stream.window = window[1]
        return window

    def _strided(self, stream: _Stream, offset: int, low: int, high: int) -> list[tuple[int, int]]:
        page, stride = self.page, stream.stride
        count = min(stream.window // page, _PIECES)
        stream.expected = offset + count * stride
        starts = [start for i in range(count) if low <= (start := offset + i * stride) <= high - page]
        if abs(stride) == page:  # in order, downwards: one run
            return [self._clip(offset, min(starts), max(starts) + page)]
        return [(start, page) for start in starts if start == offset or start not in self._present]

    def _clip(self, offset: int, start: int, end: int) -> tuple[int, int]:
        """Cut [start, end) down to what is missing around `offset`."""
        for gap in self._present.gaps(start, end):
            if offset in gap:
                return gap.start, gap.length
        return offset, self.page
