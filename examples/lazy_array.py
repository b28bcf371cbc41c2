"""An array whose bytes are on a page server, and come when they are touched.

python examples/page_server.py --directory /data --port 8080
python examples/lazy_array.py http://127.0.0.1:8080/file.bin
"""

import asyncio
import sys

import numpy as np

import aiouffd


async def main(url: str) -> None:
    async with aiouffd.open(url) as region:
        array = np.frombuffer(region, np.uint8)
        print(f"{len(array):,} bytes mapped; nothing fetched yet")

        print("one byte in the middle:", array[len(array) // 2])  # any touch, from any thread, fetches what it needs
        print("sum of the last 100,000:", array[-100_000:].sum())

        await region.monitor.prefetch(0, min(len(array), 8 << 20))  # or ask ahead of time
        print("sum of the first 8 MiB:", array[: 8 << 20].sum())

        seen = region.monitor.statistics()
        print(f"{seen.faults} faults, {seen.bytes_fetched:,} bytes fetched")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
