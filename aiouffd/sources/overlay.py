"""Which of several layers shows each byte: one sorted table, however many layers there are. Pure arithmetic."""

from __future__ import annotations

import heapq
from array import array
from bisect import bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["NOBODY", "Overlay"]

NOBODY = -1
"""In place of a layer: no layer has these bytes, so they are zeros."""


class Overlay:
    """Parts of [0, size), one behind the other, and the layer that shows each.

    Args:
        size: of the whole, in bytes.
        starts: where each part begins, from 0 on.
        layers: the number of each part's layer, or `NOBODY`.
    """

    def __init__(self, size: int, starts: array[int], layers: array[int]) -> None:
        self.size = size
        self.starts = starts
        self.layers = layers

    @classmethod
    def of(cls, size: int, extents: Sequence[Sequence[tuple[int, int]]]) -> Overlay:
        """Resolve layers to one table.

        Args:
            size: of the whole.
            extents: for each layer, the lowest first, where it has data: (start, end) in order, below `size`.
        """
        found = cls(size, array("q"), array("i"))
        shown: list[tuple[int, int]] = []  # a heap of (-layer, end) of the extents that have begun
        at = 0
        beginnings = heapq.merge(
            *([(start, layer, end) for start, end in places] for layer, places in enumerate(extents))
        )
        for start, layer, end in beginnings:
            at = found._advance(at, start, shown)
            heapq.heappush(shown, (-layer, end))
        found._advance(at, size, shown)
        return found

    def _advance(self, at: int, stop: int, shown: list[tuple[int, int]]) -> int:
        """Add what is shown of [at, stop); return `stop`."""
        while at < stop:
            while shown and shown[0][1] <= at:
                heapq.heappop(shown)
            layer, end = (-shown[0][0], min(shown[0][1], stop)) if shown else (NOBODY, stop)
            if not self.layers or self.layers[-1] != layer:
                self.starts.append(at)
                self.layers.append(layer)
            at = end
        return stop

    def at(self, offset: int) -> tuple[int, int]:
        """Return (layer, end) of the part that `offset` is in."""
        index = bisect_right(self.starts, offset) - 1
        return self.layers[index], self._end(index)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (layer, start, end) of what [start, stop), which is not empty, consists of."""
        index = bisect_right(self.starts, start) - 1
        while start < stop:
            end = min(self._end(index), stop)
            yield self.layers[index], start, end
            start = end
            index += 1

    def _end(self, index: int) -> int:
        return self.starts[index + 1] if index + 1 < len(self.starts) else self.size

    def only(self, used: Sequence[int]) -> Overlay:
        """Return the same table with layers numbered by their place in `used`."""
        numbers = {layer: number for number, layer in enumerate(used)} | {NOBODY: NOBODY}
        return Overlay(self.size, self.starts, array("i", (numbers[layer] for layer in self.layers)))
