"""What came longest ago, in blocks: the order in which pages are dropped. Pure data.

The kernel tells nobody but root which pages were touched since they came. What is known is when a page has come, and
that a block was missed after it had been dropped. So the block in which no page has come for longest goes first, and a
block that came back soon after it was dropped is passed over once.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Clock"]

_LARGEST = 2 << 20  # bytes of a block: to drop less at once costs more for each page
_SHARE = 16  # a block is at most so large a part of the limit


class Clock:
    """The pages that are resident, by offset.

    Args:
        page: bytes.
        limit: bytes that are to be resident at most.

    Attributes:
        total: bytes that are resident.
        block: bytes of a block, a power of two.
    """

    def __init__(self, page: int, limit: int) -> None:
        self._page = page
        largest = max(min(_LARGEST, limit // _SHARE), 1)
        self.block: int = max(page, 1 << (largest.bit_length() - 1))
        self._pages = self.block // page
        self.total: int = 0
        self._blocks: OrderedDict[int, bytearray] = OrderedDict()  # a byte for each page; what came last is last
        self._spared: set[int] = set()  # blocks that are passed over once
        self._dropped: OrderedDict[int, None] = OrderedDict()  # what was dropped last is last
        self._set_aside: dict[int, bytearray] = {}  # what cannot be dropped

    def came(self, start: int, length: int) -> None:
        """Take note that pages are resident: whole pages."""
        first, last = start // self._page, (start + length) // self._page
        while first < last:
            number, low = divmod(first, self._pages)
            high = min(self._pages, low + last - first)
            pages = self._blocks.get(number)
            if pages is None:
                pages = self._blocks[number] = self._returned(number)
            else:
                self._blocks.move_to_end(number)
            new = pages.count(0, low, high)
            if new:
                pages[low:high] = b"\1" * (high - low)
                self.total += new * self._page
            first += high - low

    def _returned(self, number: int) -> bytearray:
        if number in self._dropped:
            del self._dropped[number]
            self._spared.add(number)
        return self._set_aside.pop(number, None) or bytearray(self._pages)

    def gone(self, start: int, end: int) -> int:
        """Take note that pages are missing; return how many bytes of them were resident."""
        found = 0
        first, last = start // self._page, end // self._page
        while first < last:
            number, low = divmod(first, self._pages)
            high = min(self._pages, low + last - first)
            held = self._blocks if number in self._blocks else self._set_aside
            pages = held.get(number)
            if pages is not None:
                found += pages.count(1, low, high)
                pages[low:high] = bytes(high - low)
                if not any(pages):
                    del held[number]
                    self._remember(number)
            first += high - low
        self.total -= found * self._page
        return found * self._page

    def _remember(self, number: int) -> None:
        self._spared.discard(number)
        self._dropped[number] = None
        while len(self._dropped) > len(self._blocks) + len(self._set_aside):
            self._dropped.popitem(last=False)

    def oldest(self, start: int, end: int, newest: int = 0) -> Iterator[tuple[int, int]]:
        """Yield the (start, end) of blocks, the oldest first, but those that touch [start, end), and the newest.

        The caller drops what it can of each, and calls `gone` for that, before it asks for the next. A block of which
        it drops nothing is set aside, until one of its pages comes or `reconsider` is called.
        """
        for _ in range(len(self._blocks) - newest):
            number = next(iter(self._blocks))
            low, high = number * self.block, (number + 1) * self.block
            if number in self._spared or (low < end and start < high):
                self._spared.discard(number)
                self._blocks.move_to_end(number)
                continue
            yield low, high
            if number in self._blocks:  # some of it could not be dropped
                self._set_aside[number] = self._blocks.pop(number)

    def holds(self, offset: int) -> bool:
        """Tell whether a page is resident."""
        number, index = divmod(offset // self._page, self._pages)
        pages = self._blocks.get(number) or self._set_aside.get(number)
        return pages is not None and pages[index] == 1

    def order(self) -> list[tuple[int, int]]:
        """Return the (start, end) of all blocks, what was set aside first, then the oldest."""
        numbers = [*self._set_aside, *self._blocks]
        return [(number * self.block, (number + 1) * self.block) for number in numbers]

    def reconsider(self) -> None:
        """Have what was set aside be asked for again: it may be dropped now."""
        for number, pages in self._set_aside.items():
            self._blocks[number] = pages
            self._blocks.move_to_end(number, last=False)
        self._set_aside.clear()
