"""The process that private memory belongs to, which drops pages of it on demand: no other may (`native/dropper.c`)."""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING, Final

from aiouffd.kernel.memory import address_of, map_file
from aiouffd.kernel.pagemap import Pagemap
from aiouffd.native import dropper
from aiouffd.ranges import Range, RangeSet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aiouffd.engine.apart import Apart
    from aiouffd.engine.dropping import Outcomes, Part

__all__ = ["Owner", "take_back"]

_SOON: Final = 2  # milliseconds: most answers come within that, and the loop waits for them
_LAST: Final = 1000  # milliseconds
_LOOK: Final = 50  # milliseconds, after which it is looked at whether the process lives: it may be stopped


class Owner:
    """Asks for pages to be dropped, one demand at a time. Used on one loop, which reads no message until the answer.

    Args:
        words: a memfd that the process has, too; taken.
        pagemap: /proc/self/pagemap, opened by that process; taken.
        is_gone: tells, in any thread, whether the process is gone.

    Raises:
        NativePartError: there is no native part.
    """

    def __init__(self, words: int, pagemap: int, is_gone: Callable[[], bool]) -> None:
        self._pagemap = Pagemap.of(pagemap)
        try:
            self._words = map_file(words, mmap.PAGESIZE, mmap.ACCESS_WRITE)
        finally:
            os.close(words)
        self._address = address_of(self._words)
        self._is_gone = is_gone
        self._took_over = False

    def begin(self, parts: Iterable[Part], apart: Apart, then: Callable[[Outcomes], None]) -> Callable[[], None]:
        """Ask for some pages; return what the loop must call before it goes on, which calls `then` with the outcomes.

        Where the answer does not come soon that is called later, and `apart` says until then that it is waited for.
        """
        parts = list(parts)
        ranges = [place for _, _, places in parts for place in places]
        dropper.ask(self._words, self._address, ranges[: dropper.MOST])

        def told(results: list[int]) -> None:
            then(_outcomes(parts, results))

        def finish() -> None:
            results = dropper.answered(self._words, self._address, _SOON, min(len(ranges), dropper.MOST))
            if results is None or len(ranges) > len(results):
                apart.call(lambda: self._all(ranges), told)
            else:
                told(results)

        return finish

    def _all(self, ranges: list[tuple[int, int]]) -> list[int]:
        """Wait for the first answer, and ask for the rest; in a thread."""
        results = self._wait(min(len(ranges), dropper.MOST))
        while len(results) < len(ranges):
            more = ranges[len(results) : len(results) + dropper.MOST]
            dropper.ask(self._words, self._address, more)
            results += self._wait(len(more))
        return results

    def _wait(self, count: int) -> list[int]:
        while (results := dropper.answered(self._words, self._address, _LOOK, count)) is None:
            if self._is_gone():
                return [errno.ESRCH] * count
        return results

    def there(self, shown: Iterable[tuple[int, int, int]]) -> list[tuple[int, int]]:
        """Return the start and end offsets of the pages that are there, of (start, end, offset); in a thread.

        The first time, what a predecessor has asked for is taken back before, or waited for.
        """
        while not self._took_over:
            self._took_over = dropper.take_back(self._address)
            if not self._took_over:
                self._wait(0)
                self._took_over = self._is_gone()
        try:
            return [
                (low - start + offset, high - start + offset)
                for start, end, offset in shown
                for low, high in self._pagemap.spans(start, end - start, -1, mmap.PAGESIZE)
            ]
        except OSError:  # the process is gone
            return []

    def missing(self, parts: Iterable[tuple[int, int, Iterable[tuple[int, int, int]]]]) -> list[tuple[int, int]]:
        """Return what is missing of offsets (start, end, as for `there`): not all of them could be dropped."""
        found: list[tuple[int, int]] = []
        for low, high, shown in parts:
            there = RangeSet(Range.between(start, end) for start, end in self.there(shown))
            found += [(gap.start, gap.end) for gap in there.gaps(low, high)]
        return found

    def close(self) -> None:
        """Ask no more."""
        self._pagemap.close()


def take_back(words: int) -> None:
    """Take back what was asked for by a memfd: before messages are read by somebody who asks for nothing.

    What is being done is waited for, for a second: unless its process is stopped, it takes less than a millisecond.
    """
    mapping = map_file(words, mmap.PAGESIZE, mmap.ACCESS_WRITE)
    if not dropper.take_back(address_of(mapping)):
        dropper.answered(mapping, address_of(mapping), _LAST, 0)


def _outcomes(parts: list[Part], results: list[int]) -> Outcomes:
    left, outcomes = iter(results), list[tuple[int, int, OSError | None]]()
    for low, high, places in parts:
        failed = next(filter(None, [next(left) for _ in places]), 0)
        outcomes.append((low, high, OSError(failed, os.strerror(failed)) if failed else None))
    return outcomes
