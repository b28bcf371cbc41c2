"""Resolves what is brought ahead of faults: large COPYs by two threads, all else as what is brought for a fault."""

from __future__ import annotations

from array import array
from collections import deque
from functools import partial
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

from aiouffd.engine.runs import Op, merge
from aiouffd.engine.statistics import Counter
from aiouffd.engine.two_threads import SHORT_PART, two_threads
from aiouffd.ranges import pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from aiouffd.engine.runs import Run
    from aiouffd.engine.serve.precedence import Precedence
    from aiouffd.engine.space import Space

__all__ = ["MAX_READ", "Steps", "place_at_hand", "resolve_bulk"]

_LARGE: Final = 1 << 20  # bytes: 0.2 ms; to have another thread begin takes a tenth of that
MAX_READ: Final = 2 << 20
"""Bytes: one COPY of this size takes 0.4 ms: the longest that the loop is kept."""
_FEW: Final = 256 << 10  # bytes: of a read ahead where others fault; it takes 0.1 ms to receive, and as long to place
_LONGEST_NS: Final = 1_000_000  # of a step, while others wait and are served: what else the loop has to do waits, too
_MAX_RUNS: Final = 64  # of a step
_MAX_BEGUN: Final = 8  # reads of a step
_MANY: Final = 16  # parts of several pages or of one, for which another thread is asked: 50 us and more
_COPIES = int(Counter.COPIES)


class Steps:
    """Divides what is brought ahead into steps, between which the loop gets a turn.

    Others are served before each step and between its parts. A step begins a turn of the loop later where they wait
    still. After that turn something comes, though they wait still: of a local source a part, and it is asked for no
    more than that.

    Args:
        space: for which it is brought.
        ranges: (offset, length) of whole pages.
        precedence: tells whether others wait.
        local: bytes may be had without waiting.

    Attributes:
        runs: that are placed when the step ends.
    """

    def __init__(self, space: Space, ranges: Iterable[tuple[int, int]], precedence: Precedence, *, local: bool) -> None:
        self.runs: list[Run] = []
        self._space, self._local = space, local
        self._precedence = precedence
        self._until_ns = 0  # when the step has to end, where others wait
        self._left = deque(_pieces(ranges, space.page_size))
        self._size = 0
        self._insists = False  # others had a turn just now

    def __bool__(self) -> bool:
        return bool(self._left)

    def wait(self) -> bool:
        """Tell whether the next step has to begin a turn later."""
        if self._size:
            return False
        self._until_ns = perf_counter_ns() + _LONGEST_NS
        if not self._others_wait():
            return False
        self._insists = True
        return True

    def take(self) -> tuple[int, int, bool]:
        """Return offset and length of the next piece, and whether it is its range's last."""
        offset, length, is_last = self._left.popleft()
        is_short = self._is_short if self._local else self._precedence.others_fault()
        most = max(SHORT_PART if self._local else _FEW, self._space.page_size)
        if is_short and length > most:
            self._left.appendleft((offset + most, length - most, is_last))
            return offset, most, False
        return offset, length, is_last

    def count(self, length: int, *, begun: bool) -> None:
        """Take note of a piece that belongs to this step; `begun`: a read for it."""
        self._size += MAX_READ // _MAX_BEGUN if begun else length

    def _others_wait(self) -> bool | None:
        return self._precedence.serve_others(self._space, self._until_ns)

    @property
    def _is_short(self) -> bool:
        return self._local and self._insists

    def end(self) -> bool:
        """Place what belongs to this step if it is large enough, or the last; tell whether it was.

        What is left off for others comes in the next one.
        """
        most = SHORT_PART if self._is_short else MAX_READ * two_threads.count
        if self._left and len(self.runs) < _MAX_RUNS and self._size < most:
            return False
        self._until_ns = perf_counter_ns() + _LONGEST_NS
        self.place((lambda: None) if self._is_short else self._others_wait)
        return True

    def place(self, others_wait: Callable[[], bool | None] = lambda: None) -> None:
        """Place what belongs to this step."""
        left = resolve_bulk(self._space, self.runs, others_wait, lets=not self._insists)
        self._left.extendleft((*part, False) for part in left[::-1])
        self.runs, self._size, self._insists = [], 0, False


def _pieces(ranges: Iterable[tuple[int, int]], page: int) -> Iterator[tuple[int, int, bool]]:
    """Cut the (offset, length) ranges that are larger than what is read at once; tell which piece is a range's last."""
    for offset, length in ranges:
        if length <= MAX_READ:
            yield offset, length, True
        else:
            for at, size in pieces(offset, offset + length, page, MAX_READ):
                yield at, size, at + size >= offset + length


def resolve_bulk(
    space: Space, runs: list[Run], others_wait: Callable[[], bool | None] = lambda: None, *, lets: bool = False
) -> list[tuple[int, int]]:
    """Resolve runs as `Space.resolve` does. Those of them that are large are of memory that is not the loop's own.

    Args:
        space: whose runs they are.
        runs: any.
        others_wait: tells whether threads wait that go first, as for `TwoThreads.copy`.
        lets: where they wait already, all is left off, and not only what is behind the first part.

    Returns:
        (offset, length) of what was left off for these: as if it had not been asked for.
    """
    if not runs or space.is_gone or space.closing:
        return []
    if lets and others_wait():
        return _leave_off(space, runs)
    runs = merge(runs)
    large = [run for run in runs if run.op == Op.COPY and run.left >= _LARGE] if _is_simple(space) else []
    left_off = _resolve_in_turn(space, [run for run in runs if run not in large] if large else runs, others_wait)
    if large and not left_off:
        parts, left_off = space.resolver.copy_by_two(large, wake=False, others_wait=others_wait)
        came = [(part.dst - done, part.dst) for part, done in parts if done]
        left = [part for part, _ in parts if part.left]
        if came:
            space.wake(came, each=bool(left or left_off))
        left_off += _resolve_in_turn(space, left, others_wait)  # the kernel says again why
    else:
        left_off += large
    return _leave_off(space, left_off)


def _leave_off(space: Space, runs: list[Run]) -> list[tuple[int, int]]:
    for run in runs:
        space.resolver.uncount(run, run.left)
        space.readahead.put_off(run.offset, run.offset + run.left)
    return [(run.offset, run.left) for run in runs]


def _resolve_in_turn(space: Space, runs: list[Run], others_wait: Callable[[], bool | None]) -> list[Run]:
    """Resolve runs, at least a part, as long as no others wait; return what is left off.

    Where other pages are there already, each costs a call: so a part may take twice as long as its COPY.
    """
    if not runs:
        return []
    if others_wait() is None:
        space.resolve(runs)
        return []
    size = max(SHORT_PART, space.page_size)
    parts = [run.part(at, min(size, run.left - at)) for run in runs for at in range(0, run.left, size)]
    for number, part in enumerate(parts):
        if number and others_wait():
            return parts[number:]
        space.resolve([part])
    return []


def place_at_hand(space: Space, parts: Sequence[tuple[int, int, int]], cause: Counter) -> list[tuple[int, int]]:
    """COPY whole pages to where they are shown; return (offset, length) of what is left: it is not that simple.

    No run is made of them: there are many, and small ones. What is on its way for a thread comes now.

    Args:
        space: where to.
        parts: offset, length and address of each.
        cause: what they count as.
    """
    (low, *_), (last, length, _) = min(parts), max(parts)
    high = last + length  # no two overlap
    shown = space.mappings.addresses(low, high) if _is_simple(space) and not (space.is_gone or space.closing) else []
    if len(shown) != 1 or shown[0].offset != low or shown[0].end - shown[0].start != high - low:
        return [(offset, length) for offset, length, _ in parts]
    skew, half = shown[0].start - low, (len(parts) + 1) // 2
    finish = two_threads.beside(partial(_copy_parts, space, parts[half:], skew)) if half >= _MANY else None
    came, left = _copy_parts(space, parts if finish is None else parts[:half], skew)
    if finish is not None:
        others, others_left = finish()
        came, left = came + others, left + others_left
    for offset, length, _ in came:
        space.readahead.brought(offset, length)
    words, size = space.counters.words, sum(length for _, length, _ in came)
    words[_COPIES] += len(came) + len(left)  # also what came in part: whoever looks whether something came sees that
    words[cause] += size // space.page_size
    words[Counter.BYTES_SHARED] += size
    if came:
        space.wake(sorted([(offset + skew, offset + skew + length) for offset, length, _ in came]), each=False)
    return left


def _copy_parts(
    space: Space, parts: Sequence[tuple[int, int, int]], skew: int
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]]]:
    """COPY parts, in any thread; return those that came, and (offset, length) of the others."""
    came, left, at = list[tuple[int, int, int]](), list[tuple[int, int]](), 0
    while at < len(parts):
        copies = array("Q", [word for offset, length, source in parts[at:] for word in (offset + skew, source, length)])
        count = space.uffd.try_copies(copies, space.resolver.mode)
        came += parts[at : at + count]
        left += [(offset, length) for offset, length, _ in parts[at + count :][:1]]
        at += count + 1
    return came, left


def _is_simple(space: Space) -> bool:
    """Tell whether nothing makes room for what comes, counts it, writes it to a file, or fills huge pages before."""
    return (space.bound or space.allowance or space.backend.one_copy or space.resolver.moving) is None
