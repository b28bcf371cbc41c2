"""Counts by time, and looks at the memory, in bounded memory however long a run is. Pure data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Film", "Timeline"]

_BUCKETS: Final = 200
_LOOKS: Final = 96
_REST: Final = 500  # times as long as a look has taken, no other is due


class Timeline:
    """Rows of counts, one for each of at most 200 equal parts of the time. When it is full, neighbors are joined.

    Args:
        columns: counts of a row.
        width: seconds of a part, until they are joined first.

    Attributes:
        rows: of the parts, the first begins at 0.
        width: seconds of a part, now.
    """

    def __init__(self, columns: int, width: float = 0.1) -> None:
        self._columns = columns
        self.width: float = width
        self.rows: list[list[int]] = []

    def add(self, since: float, at: float, counts: Sequence[int]) -> None:
        """Add what was counted between two times, in seconds, at least 0.

        It belongs to the second, where that is soon after the first. Else nobody could look, as while a thread waits
        for a page with the GIL held: it is spread over all parts.
        """
        while at >= _BUCKETS * self.width:
            self.width *= 2
            pairs = (self.rows[index : index + 2] for index in range(0, len(self.rows), 2))
            self.rows = [[sum(column) for column in zip(*pair, strict=True)] for pair in pairs]
        last = int(at / self.width)
        first = int(since / self.width) if at - since > 2 * self.width else last
        parts = last - first + 1
        self.rows += ([0] * self._columns for _ in range(last + 1 - len(self.rows)))
        for part in range(parts):
            row = self.rows[first + part]
            for column, count in enumerate(counts):
                row[column] += count * (part + 1) // parts - count * part // parts


class Film:
    """Looks at the memory, at most 96. When it is full, every second one is dropped.

    Args:
        pause: seconds between two looks, at least; doubled whenever it is full.

    Attributes:
        looks: (seconds, percent of each cell that had come), in order.
        due: seconds from which on another look is worth its cost.
    """

    def __init__(self, pause: float) -> None:
        self._pause = pause
        self.looks: list[tuple[float, list[int]]] = []
        self.due: float = 0.0

    def add(self, at: float, shares: Sequence[float], cost: float) -> None:
        """Add a look.

        Args:
            at: seconds, when it was.
            shares: of each cell, which part has come.
            cost: seconds of processor time that the look has taken.
        """
        if len(self.looks) >= _LOOKS:
            del self.looks[1::2]
            self._pause *= 2
        self.looks.append((at, [min(100, max(1, round(100 * share))) if share > 0 else 0 for share in shares]))
        self.due = at + max(self._pause, _REST * cost)
