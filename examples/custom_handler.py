"""A handler of your own: an array that is computed page by page when it is touched.

    python examples/custom_handler.py [--entries N]

The class is in `__main__` and still runs in the pager process: it travels by value.
"""

import argparse
import asyncio
import mmap
import sys
import warnings

import numpy as np

import aiouffd


class Squares(aiouffd.Handler):
    """Fills each page with the squares of its indices."""

    async def pagefault(self, fault: aiouffd.Fault, batch: aiouffd.Batch) -> None:
        first = fault.offset // 8
        squares = np.arange(first, first + fault.page.length // 8, dtype=np.uint64) ** 2
        await asyncio.sleep(0.001)  # it may await what it needs: a database, another service
        batch.copy(fault.page, squares)

    async def remove(self, event: aiouffd.Remove) -> None:
        print(f"pager: {(event.end - event.start) >> 10} KiB were emptied", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compute the pages of an array when they are touched.")
    parser.add_argument("--entries", type=int, default=1 << 27, help="of 8 bytes each (%(default)s: a gigabyte)")
    entries = parser.parse_args().entries
    region = aiouffd.Region(entries * 8)
    with aiouffd.Monitor(region, Squares()) as monitor:
        squares = np.frombuffer(region, np.uint64)
        place = entries // 100
        print(f"{place} squared is {squares[place]}")
        print("the last entry is", squares[-1])
        print("the sum of a thousand in the middle is", squares[entries // 2 :][:1000].sum())
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # the page reads as zeros from now on
            region.madvise(mmap.MADV_DONTNEED, 0, region.page_size)
        pages = region.mapped_length // region.page_size
        print(f"{monitor.statistics().faults} pages were computed, {pages} are mapped")


if __name__ == "__main__":
    main()
