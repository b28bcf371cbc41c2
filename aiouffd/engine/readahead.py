"""How much to bring along with a fault. Pure decisions: offsets in, ranges out.

A fault brings its neighbourhood, since one COPY of sixteen pages costs a third of sixteen faults. Touchers that
move in order are recognised by where they fault next: just behind what was brought, or just before it (sequential,
upwards or downwards: a large memcpy goes down), or as far from the last fault as that was from the one before
(strided). Each recognised stream doubles its window up to the limit, as the kernel's own readahead does; faults that
belong to no stream shrink the neighbourhood down to the page itself.

Most faults on a busy host belong to no stream, and a decision must not cost more than the system call that follows
it. So such faults are looked up by their block and by order (`_Strangers`), and only proven streams one by one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import TypeAlias

from aiouffd.engine.present import PresentPages

__all__ = ["Note", "NotePages", "Readahead", "Window"]

Note: TypeAlias = Callable[[int, int, int], None]
"""Called with the offset of a page that was touched (-1: none was), and start and length of what comes with it."""

NotePages: TypeAlias = "Callable[[list[int]], None]"
"""Called with the offsets of pages that were touched, each of which came alone."""

Window: TypeAlias = tuple[int, int]
"""Where it starts, and its length."""

_MAX_STREAMS = 16
_STREAM_AGE = 128  # faults in which a stream was not seen, before it is forgotten
_MAX_STRANGERS = 16
_MAX_STRIDED_PAGES = 64  # a strided stream is given at most so many separate pages at once
_MAX_DOUBTS = 1 << 12  # faults that were not believed and did not come again
_STRANGERS_UNTIL_HALVED = 4  # faults in a row without a stream, before the neighbourhood is halved
_SHARE_AHEAD = 4  # of what a stream has run through, one part in so many may be brought ahead of it


class _Stream:
    """One toucher: where it faulted last, where it is expected, how much it gets.

    Attributes:
        began: the offset of its first fault.
        last: the offset of the last fault.
        expected: where it is expected if it goes up, or by its stride.
        below: the page where it is expected if it goes down.
        direction: 1: up; -1: down; 0: not known yet.
        window: bytes that it gets.
        step: the distance from the fault before.
        stride: the same, once two steps in a row were equal; else 0.
        seen: the number of the last fault that belonged to it.
    """

    __slots__ = ("began", "below", "direction", "expected", "last", "seen", "step", "stride", "window")

    def __init__(self, last: int, step: int, window: Window, page: int) -> None:
        start, length = window
        self.began = last
        self.last = last
        self.expected = start + length
        self.below = start - page
        self.direction = 0
        self.window = length
        self.step = step
        self.stride = 0
        self.seen = 0

    def is_at(self, offset: int, tolerance: int) -> bool:
        """Tell whether the stream was expected at `offset`, and note its direction; it may have skipped a little."""
        if self.stride:
            return offset == self.expected
        if self.direction >= 0 and 0 <= offset - self.expected < tolerance:
            self.direction = 1
            return True
        if self.direction <= 0 and 0 <= self.below - offset < tolerance:
            self.direction = -1
            return True
        return False


class _Strangers:
    """The last faults that belonged to no stream, and may each turn out to be the first of one.

    Args:
        block: bytes; the window of a stranger lies within one aligned block of this size.
    """

    __slots__ = ("_block", "_by_block", "_by_last", "_lasts")

    def __init__(self, block: int) -> None:
        self._block = block
        self._by_block: dict[int, _Stream] = {}  # the oldest first
        self._by_last: dict[int, _Stream] = {}
        self._lasts: list[int] = []  # sorted

    def take(self, offset: int) -> _Stream | None:
        """Remove and return the stranger that goes on at `offset`: in its block or in the next on either side."""
        block = offset // self._block
        for at in (block, block - 1, block + 1):
            stream = self._by_block.get(at)
            if stream is not None and stream.is_at(offset, max(stream.window, self._block)):
                self._remove(stream)
                return stream
        return None

    def nearest(self, offset: int) -> _Stream | None:
        """Return the stranger whose fault was nearest to `offset`."""
        lasts = self._lasts
        if not lasts:
            return None
        index = bisect_left(lasts, offset)
        if index == len(lasts) or (index and offset - lasts[index - 1] <= lasts[index] - offset):
            index -= 1
        return self._by_last[lasts[index]]

    def add(self, stream: _Stream) -> None:
        """Add a stranger in place of the one in the same block, or of the oldest where there are too many."""
        block = stream.last // self._block
        replaced = self._by_block.get(block) or self._by_last.get(stream.last)
        if replaced is None and len(self._lasts) >= _MAX_STRANGERS:
            replaced = next(iter(self._by_block.values()))
        if replaced is not None:
            self._remove(replaced)
        self._by_block[block] = stream
        self._by_last[stream.last] = stream
        insort(self._lasts, stream.last)

    def _remove(self, stream: _Stream) -> None:
        del self._by_block[stream.last // self._block]
        del self._by_last[stream.last]
        del self._lasts[bisect_left(self._lasts, stream.last)]

    promote = _remove

    def __len__(self) -> int:
        return len(self._lasts)


class Readahead:
    """Chooses what to bring for a fault at an offset.

    Args:
        page: page size in bytes.
        limit: the largest window in bytes; 0: the page alone.
        around: the neighbourhood of a fault that belongs to no stream, in bytes.

    Attributes:
        note: is told what was chosen; None: nobody asks.
        note_pages: is told of pages that came without being chosen; None: nobody asks.
    """

    def __init__(
        self,
        page: int,
        limit: int,
        around: int = 64 << 10,
        note: Note | None = None,
        note_pages: NotePages | None = None,
    ) -> None:
        self.note: Note | None = note
        self.note_pages: NotePages | None = note_pages
        self.page = page
        self._asked_around = around
        self.limit: int = limit & -page if limit >= page else 0
        self._around = max(page, min(around & -page, self.limit))
        self._neighbourhood = self._around
        self._in_a_row = 0  # strangers, since the neighbourhood was chosen
        self._faults = 0
        self._step = 0
        self._streams: list[_Stream] = []  # most recently used last
        self._strangers = _Strangers(self._around)
        self._present = PresentPages(page)
        self._not_placed: dict[int, Window] = {}
        self.follows: bool = False
        """Whether the last fault that `windows` was asked about belonged to a stream."""
        self._doubts: set[tuple[int, int]] = set()  # page and thread of faults that were not believed
        self.losses: int = 0
        """How often something was forgotten that may have been taken for present meanwhile."""

    def fresh(self) -> Readahead:
        """Return one with the same settings that has seen nothing."""
        return Readahead(self.page, self.limit, self._asked_around, self.note, self.note_pages)

    def windows(self, offset: int, low: int, high: int) -> list[Window]:
        """Return (start, length) of what to bring for a fault at `offset`: one of them holds the fault.

        All are whole pages within [low, high), which holds the fault, and spare what is known to be present; from
        now on they count as present.
        """
        self.follows = False
        if not self.limit:
            if self.note is not None:
                self.note(offset, offset, self.page)
            return [(offset, self.page)]
        if self._not_placed and (chosen := self._not_placed.pop(offset, None)) is not None:
            return [chosen]
        window = self.neighbours(offset, low, high)
        if window is not None:
            return [window]
        windows = self._of_stream(self._streams[-1], offset, low, high)
        if self.note is not None:
            for start, length in windows:
                self.note(offset, start, length)
        return windows

    def _of_stream(self, stream: _Stream, offset: int, low: int, high: int) -> list[Window]:
        self.follows = True
        self._in_a_row = 0
        self._neighbourhood = self._around
        stream.window = min(max(stream.window * 2, 2 * self.page), self.limit)
        stream.last = offset
        if stream.stride:
            return self._strided(stream, offset, low, high)
        stream.window = max(stream.window, self._around)
        if stream.direction > 0:
            start, length = self._present.claim(offset, offset, min(offset + stream.window, high))
            stream.expected = start + length
        else:
            start, length = self._present.claim(
                offset, max(offset + self.page - stream.window, low), offset + self.page
            )
            stream.below = start - self.page
        return [(start, length)]

    def neighbours(self, offset: int, low: int, high: int) -> Window | None:
        """Return what `windows` would, for a fault that belongs to no stream: the aligned block around it.

        For others, None: nothing is noted then, but that the stream is the last of `_streams`. Also where a window was
        chosen and not placed: `windows` returns that, and another would leave its other pages counted as present.
        """
        if offset in self._not_placed or self._belongs_to_stream(offset):
            return None
        self._in_a_row += 1
        if self._in_a_row > _STRANGERS_UNTIL_HALVED:
            self._in_a_row = 0
            self._neighbourhood = max(self.page, self._neighbourhood // 2 & -self.page)
        size = self._neighbourhood
        start = offset // size * size
        window = self._present.claim(offset, max(start, low), min(start + size, high))
        self._strangers.add(_Stream(offset, self._step, window, self.page))
        if self.note is not None:
            self.note(offset, *window)
        return window

    @property
    def is_at_random(self) -> bool:
        """Whether faults that belong to no stream get one page each."""
        return self._neighbourhood == self.page

    @property
    def around(self) -> int:
        """Bytes: a fault so close to another one may belong to the same stream."""
        return self._around

    def touched(self, offset: int) -> None:
        """Take note that what came along is touched."""
        if self.note is not None:
            self.note(offset, offset, 0)

    def expected(self) -> list[tuple[int, int]]:
        """Return where known streams may go on, as (start, end) of offsets, the most recently seen stream first."""
        pairs = []
        for stream in reversed(self._streams):
            reach = max(stream.window, self._around)
            if stream.stride:
                pairs.append((stream.expected, stream.expected + self.page))
            else:
                pairs.append((stream.below - reach, stream.expected + reach))
        return pairs

    def not_placed(self, offset: int, window: Window) -> None:
        """Have the next `windows(offset)` return this window again, which could not be placed on the plain path."""
        self._not_placed[offset] = window

    def not_brought(self, start: int, end: int) -> None:
        """Take note that these bytes of a window have not come: they were not waited for, and nobody relied on them."""
        self._present.remove(start, end)

    def block(self, offset: int, size: int, low: int, high: int) -> Window:
        """Return what is missing around a fault in its block of `size` bytes, within [low, high); nothing is noted."""
        start = offset // size * size
        start, end = max(start, low), min(start + size, high)
        window = self._present.claim(offset, start, end)
        self._present.remove(window[0], sum(window))
        return window

    def follow(self, offset: int, low: int, high: int, most: int = 0) -> tuple[Window, Window] | None:
        """Return the next window that a stream at full speed will want, and what is behind that.

        It is brought while its toucher works on those before, so that neither waits for the other. One window ahead is
        always brought, more of them in proportion to what the stream has run through: little is brought in vain where
        it ends. It counts as present from now on.

        Both are (start, length) within [low, high). The second, of two windows, is not brought, and may be empty.

        Args:
            offset: where the toucher is.
            low: where its mapping begins.
            high: where it ends.
            most: bytes ahead, if they are more than one window.
        """
        for stream in reversed(self._streams):
            if stream.window != self.limit or stream.stride:
                continue
            reach = max(self.limit, min(abs(offset - stream.began) // _SHARE_AHEAD, most))
            if stream.direction > 0 and stream.last <= offset < stream.expected:
                return self._noted(self._above(stream, high)) if stream.expected - offset <= reach else None
            if stream.direction < 0 and stream.below < offset <= stream.last:
                return self._noted(self._below(stream, low)) if offset - stream.below <= reach else None
        return None

    def _noted(self, windows: tuple[Window, Window] | None) -> tuple[Window, Window] | None:
        if windows is not None and self.note is not None:
            self.note(-1, *windows[0])
        return windows

    def _above(self, stream: _Stream, high: int) -> tuple[Window, Window] | None:
        start, end = stream.expected, min(stream.expected + stream.window, high)
        length = next((length for at, length in self._present.missing(start, end) if at == start), 0)
        if not length:
            return None
        stream.expected = start + length
        self._present.add(start, start + length)
        return (start, length), (start + length, min(2 * stream.window, high - start - length))

    def _below(self, stream: _Stream, low: int) -> tuple[Window, Window] | None:
        end = stream.below + self.page
        start = max(end - stream.window, low)
        length = next((length for at, length in self._present.missing(start, end) if at + length == end), 0)
        if not length:
            return None
        start = end - length
        stream.below = start - self.page
        self._present.add(start, end)
        behind = min(2 * stream.window, start - low)
        return (start, length), (start - behind, behind)

    def brought(self, start: int, length: int) -> None:
        """Take note that these bytes are present now (prefetch)."""
        self._present.add(start, start + length)

    def forget(self, start: int, end: int) -> None:
        """Take note that these bytes are gone (removed, unmapped), or have not come after all."""
        self.losses += 1
        self._present.remove(start, end)

    def put_off(self, start: int, end: int) -> None:
        """Take note that these bytes come later, though it was said that they are present: who said it brings them."""
        self._present.remove(start, end)

    def missing(self, start: int, end: int) -> list[Window]:
        """Return the parts of [start, end) that are not known to be present, as (start, length)."""
        return self._present.missing(start, end)

    def is_doubtful(self, offset: int, thread: int) -> bool:
        """Tell whether a fault is not to be believed: its page counts as present. The thread's next one is believed."""
        if offset not in self._present or offset in self._not_placed:
            return False
        doubt = offset, thread
        if doubt in self._doubts:
            self._doubts.remove(doubt)
            return False
        if len(self._doubts) >= _MAX_DOUBTS:
            self._doubts.pop()
        self._doubts.add(doubt)
        return True

    def _belongs_to_stream(self, offset: int) -> bool:
        """Tell whether a fault belongs to a stream, which is then the last of `_streams`.

        It finds the same again as long as nothing else is asked for. If there is none, `_step` is the distance from the
        nearest stranger.
        """
        self._faults += 1
        streams = self._streams
        for index in range(len(streams) - 1, -1, -1):
            stream = streams[index]
            if stream.is_at(offset, max(stream.window, self._around)):
                stream.seen = self._faults
                if index != len(streams) - 1:
                    streams.append(streams.pop(index))
                return True
        if streams and self._faults - streams[0].seen > _STREAM_AGE:
            del streams[0]
        found = self._strangers.take(offset)
        if found is None:
            # Compare the step from the nearest fault with the step before it: two equal ones are a stride.
            found = self._strangers.nearest(offset)
            self._step = 0 if found is None else offset - found.last
            if found is None or not found.step or self._step != found.step:
                return False
            self._strangers.promote(found)
            found.stride = found.step
            found.direction = 0
            found.window = self.page
            found.expected = offset
        found.seen = self._faults
        streams.append(found)
        del streams[:-_MAX_STREAMS]
        return True

    def _strided(self, stream: _Stream, offset: int, low: int, high: int) -> list[Window]:
        page, stride = self.page, stream.stride
        count = min(stream.window // page, _MAX_STRIDED_PAGES)
        stream.expected = offset + count * stride
        starts = [start for i in range(count) if low <= (start := offset + i * stride) <= high - page]
        if abs(stride) == page:  # in order, downwards: one run
            return [self._present.claim(offset, min(starts), max(starts) + page)]
        self._present.remove(offset, offset + page)  # it faulted, so it is not there
        chosen = [(start, page) for start in starts if start not in self._present]
        for start, length in chosen:
            self._present.add(start, start + length)
        return chosen
