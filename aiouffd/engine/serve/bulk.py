"""Resolves what is brought ahead of faults: large COPYs by two threads, all else as what is brought for a fault."""

from __future__ import annotations

from array import array
from collections import deque
from typing import TYPE_CHECKING, Final

from aiouffd.engine.runs import Op, merge
from aiouffd.engine.statistics import Counter
from aiouffd.engine.two_threads import SHORT_PART

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from aiouffd.engine.runs import Run
    from aiouffd.engine.space import Space

__all__ = ["Bulk", "place_at_hand", "resolve_bulk"]

_LARGE: Final = 1 << 20  # bytes: 0.2 ms; to have another thread begin takes a tenth of that
_COPIES = int(Counter.COPIES)


class Bulk:
    """What one call brings ahead of faults: what is still to be asked for, and runs that are placed together.

    Args:
        space: where to.
        pieces: (offset, length, whether it is the last of its range).

    Attributes:
        todo: the pieces.
        runs: of what is in memory.
        size: bytes that were asked for since runs were placed last, or what counts as so many.
    """

    def __init__(self, space: Space, pieces: Iterable[tuple[int, int, bool]]) -> None:
        self._space = space
        self.todo: deque[tuple[int, int, bool]] = deque(pieces)
        self.runs: list[Run] = []
        self.size: int = 0
        self._lets = False

    def place(self, others_wait: Callable[[], bool | None] = lambda: None) -> None:
        """Place the runs. What is left off for others is to be asked for again."""
        self._lets = not self._lets  # so that something comes in each second step
        left_off = resolve_bulk(self._space, self.runs, others_wait, lets=self._lets)
        self.todo.extendleft((*part, False) for part in left_off[::-1])
        self.runs, self.size = [], 0


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

    Where pages are there already, each costs three calls: so a part may take longer than its COPY.
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
    skew, left = shown[0].start - low, list[tuple[int, int]]()
    came, at = list[tuple[int, int, int]](), 0
    while at < len(parts):
        copies = array("Q", [word for offset, length, source in parts[at:] for word in (offset + skew, source, length)])
        count = space.uffd.try_copies(copies, space.resolver.mode)
        came += parts[at : at + count]
        left += [(offset, length) for offset, length, _ in parts[at + count :][:1]]
        at += count + 1
    for offset, length, _ in came:
        space.readahead.brought(offset, length)
    words, size = space.counters.words, sum(length for _, length, _ in came)
    words[_COPIES] += len(came) + len(left)  # also what came in part: whoever looks whether something came sees that
    words[cause] += size // space.page_size
    words[Counter.BYTES_SHARED] += size
    if came:
        space.wake(sorted([(offset + skew, offset + skew + length) for offset, length, _ in came]), each=False)
    return left


def _is_simple(space: Space) -> bool:
    """Tell whether nothing makes room for what comes, counts it, writes it to a file, or fills huge pages before."""
    return (space.bound or space.allowance or space.backend.one_copy or space.resolver.moving) is None
