"""A handler of one's own: an array that is computed on first touch, page by page, and a log of what happens.

python examples/custom_handler.py
"""

import asyncio
import mmap
import sys

import numpy as np

import aiouffd

ENTRIES = 1 << 27  # a gigabyte of squares, of which only the touched pages are ever computed


class Squares(aiouffd.Handler):
    """Fills a page with the squares of its indices. Lives in `__main__`, and travels to the pager all the same."""

    async def pagefault(self, fault: aiouffd.Fault, batch: aiouffd.Batch) -> None:
        first = fault.offset // 8
        squares = np.arange(first, first + fault.page.length // 8, dtype=np.uint64) ** 2
        await asyncio.sleep(0.001)  # it may await whatever it needs
        batch.copy(fault.page, squares)

    async def remove(self, event: aiouffd.Remove) -> None:
        print(f"pager: {(event.end - event.start) // 4096} pages were given back", file=sys.stderr)


def main() -> None:
    region = aiouffd.Region(ENTRIES * 8)
    with aiouffd.Monitor(region, Squares()) as monitor:
        squares = np.frombuffer(region, np.uint64)
        print("1234567 squared is", squares[1_234_567])
        print("the last entry is", squares[-1])
        print("a thousand in the middle:", squares[50_000_000:50_001_000].sum())
        region.madvise(mmap.MADV_DONTNEED, 0, 1 << 20)
        print(monitor.statistics().faults, "pages were computed,", len(region) // 4096, "are mapped")


if __name__ == "__main__":
    main()
