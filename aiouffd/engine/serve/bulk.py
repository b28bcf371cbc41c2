"""Resolves what is brought ahead of faults: large COPYs by two threads, all else as what is brought for a fault."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aiouffd.engine.resolver import DONTWAKE
from aiouffd.engine.runs import Op, merge
from aiouffd.engine.statistics import Counter
from aiouffd.engine.two_threads import two_threads

if TYPE_CHECKING:
    from aiouffd.engine.runs import Run
    from aiouffd.engine.space import Space

__all__ = ["resolve_bulk"]

_LARGE: Final = 1 << 20  # bytes: 0.2 ms; to have another thread begin takes a tenth of that
_COPIES, _PARTIAL = int(Counter.COPIES), int(Counter.PARTIAL)


def resolve_bulk(space: Space, runs: list[Run]) -> None:
    """Resolve runs as `Space.resolve` does. Those of them that are large are of memory that is not the loop's own."""
    runs = merge(runs)
    large = [run for run in runs if run.op == Op.COPY and run.left >= _LARGE]
    others = space.bound or space.allowance or space.backend.one_copy or space.resolver.moving
    if not large or others is not None:  # those make room, count, write to a file, or fill huge pages before
        space.resolve(runs)
        return
    small = [run for run in runs if run.op != Op.COPY or run.left < _LARGE]
    if small:
        space.resolve(small)
    parts = two_threads.copy(space.uffd.try_copy, large, space.resolver.mode | DONTWAKE, space.page_size)
    came = [(part.dst - done, part.dst) for part, done in parts if done]
    left = [part for part, _ in parts if part.left]
    space.counters.words[_COPIES] += len(came)
    space.counters.words[_PARTIAL] += sum(done > 0 < part.left for part, done in parts)
    if came:
        space.wake(came, each=bool(left))
    if left:  # the kernel says again why
        space.resolve(left)
