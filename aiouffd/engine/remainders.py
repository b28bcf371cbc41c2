"""The rest of large windows, whose first piece lets the toucher go on. Pure data.

One COPY of a whole window would keep the loop from other faults, and its toucher waiting for pages that it does not
need yet. So the piece with the awaited page comes first, the rest in pieces while the toucher works on the first one.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from aiouffd.engine.runs import Op

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from aiouffd.engine.runs import Run

__all__ = ["FIRST_PIECE", "Remainders"]

FIRST_PIECE = 64 << 10
"""Bytes of a window that come before its toucher goes on."""
_PIECE = 128 << 10  # of the rest at once: some 30 us, for which a fault may have to wait
_LARGEST_PIECE = 2 << 20


class Remainders:
    """Runs that are resolved in pieces when the loop has time.

    Args:
        page_size: bytes; a piece is whole pages, at least one.
    """

    __slots__ = ("_first", "_hurried", "_page", "_piece", "_runs")

    def __init__(self, page_size: int) -> None:
        self._page = page_size
        self._first = max(FIRST_PIECE, page_size)
        self._piece = max(_PIECE, page_size)
        self._hurried = self._piece
        self._runs: deque[Run] = deque()

    def split(self, runs: Iterable[Run], wanted: Iterable[int]) -> tuple[list[Run], list[Run]]:
        """Divide the runs of windows: what is resolved at once, and what may come later. Nothing is kept here.

        Args:
            runs: any; a COPY that is larger than the first piece is divided.
            wanted: addresses of the pages that threads wait for.
        """
        now: list[Run] = []
        later: list[Run] = []
        for run in runs:
            if run.op != Op.COPY or run.left <= self._first:
                now.append(run)
                continue
            page = next((page for page in wanted if run.dst <= page < run.dst + run.left), run.dst)
            before = min(
                page - run.dst, run.left - self._first
            )  # the first piece is at the end for a toucher going down
            now.append(run.part(before, self._first))
            if behind := run.left - before - self._first:
                later.append(run.part(before + self._first, behind))
            if before:
                later.append(run.part(0, before))
        return now, later

    def add(self, runs: Iterable[Run]) -> None:
        """Keep runs for later."""
        self._runs += runs

    def take(self, page: int) -> Run | None:
        """Take out the piece that begins at a page, or the last one before the end that holds it; None: not here.

        The toucher is faster than the pieces: each time, the piece that is taken out so is twice as large.
        """
        for index, run in enumerate(self._runs):
            if run.dst <= page < run.dst + run.left:
                del self._runs[index]
                size = min(self._hurried, run.left)
                before = min(page - run.dst, run.left - size)
                if before:
                    self._runs.append(run.part(0, before))
                if behind := run.left - before - size:
                    self._runs.appendleft(run.part(before + size, behind))
                self._hurried = min(2 * self._hurried, max(_LARGEST_PIECE, self._page))
                return run.part(before, size)
        return None

    def next_piece(self) -> Run | None:
        """Take out the next piece; None: there is none."""
        if not self._runs:
            return None
        run = self._runs.popleft()
        size = min(self._piece, run.left)
        if size < run.left:
            self._runs.appendleft(run.part(size, run.left - size))
        elif not self._runs:  # the pieces were faster than their toucher
            self._hurried = max(self._hurried // 2, self._piece)
        return run.part(0, size)

    def revise(self, valid: Callable[[Run], Iterable[Run]]) -> None:
        """Replace each run by what is left of it after a change of the layout."""
        self._runs = deque(part for run in self._runs for part in valid(run))

    def clear(self) -> None:
        """Forget all."""
        self._runs.clear()

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs)

    def __len__(self) -> int:
        return len(self._runs)
