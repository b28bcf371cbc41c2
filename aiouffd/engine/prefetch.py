"""How much to bring along with a fault. Pure decisions: offsets in, ranges out.

A fault brings its neighbourhood, since one COPY of sixteen pages costs a third of sixteen faults. Touchers that
move in order are recognised by where they fault next: just behind what was brought (sequential), or as far from
the last fault as that was from the one before (strided, backwards too). Each recognised stream doubles its window
up to the limit, as the kernel's own readahead does; faults that belong to no stream shrink the neighbourhood down
to the page itself.
"""

from __future__ import annotations

from aiouffd.ranges import RangeSet

__all__ = ["Readahead"]

_STREAMS = 16
_PIECES = 64  # a strided stream is given at most so many separate pages at once
_STRANGERS = 4  # faults in a row without a stream, before the neighbourhood is halved


class _Stream:
    """One toucher's way: where it faulted last, where it is expected, how much it gets.

    `step` is the distance from the fault before; `stride` is set once two steps in a row were the same.
    """

    __slots__ = ("expected", "last", "step", "stride", "window")

    def __init__(self, last: int, expected: int, window: int, step: int) -> None:
        self.last = last
        self.expected = expected
        self.window = window
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

    def fresh(self) -> Readahead:
        """Return one with the same settings that has seen nothing."""
        return Readahead(self.page, self.limit, self._asked_around)

    def windows(self, offset: int, low: int, high: int) -> list[tuple[int, int]]:
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
        start, length = self._clip(offset, offset, min(offset + stream.window, high))
        stream.expected = start + length
        return [(start, length)]

    def follow(self, offset: int, high: int) -> tuple[int, int] | None:
        """Return (start, length) of the window behind the one that `offset` is in, for a stream at full speed.

        It is brought while its toucher works on this one, so that neither waits for the other. At most one window
        ahead: nothing is returned before the toucher is in the one that was. It counts as present from now on.
        """
        for stream in reversed(self._streams):
            if stream.window == self.limit and not stream.stride and stream.last <= offset < stream.expected:
                start, end = stream.expected, min(stream.expected + stream.window, high)
                length = next((gap.length for gap in self._present.gaps(start, end) if gap.start == start), 0)
                if not length:
                    return None
                stream.last, stream.expected = start, start + length
                self._present.add(start, start + length)
                return start, length
        return None

    def brought(self, start: int, length: int) -> None:
        """Take note that these bytes are present now (prefetch)."""
        if self.limit:
            self._present.add(start, start + length)

    def forget(self, start: int, end: int) -> None:
        """Take note that these bytes are gone (removed, unmapped)."""
        self._present.remove(start, end)

    def missing(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the parts of [start, end) that are not known to be present, as (start, length)."""
        return [(gap.start, gap.length) for gap in self._present.gaps(start, end)]

    def _match(self, offset: int) -> _Stream | None:
        """Find the stream that was expected here; a sequential one may have skipped a little."""
        for index in range(len(self._streams) - 1, -1, -1):
            stream = self._streams[index]
            ahead = offset - stream.expected
            if ahead == 0 or (not stream.stride and 0 < ahead < max(stream.window, self._around)):
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
                nearest.window = self.page
                return nearest
        self._streams.append(_Stream(offset, offset + self.page, self.page, step))
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
