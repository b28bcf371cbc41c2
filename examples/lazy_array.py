"""An array whose bytes are on a web server and come when they are touched.

python examples/lazy_array.py                                      # starts page_server.py on a file that it makes
python examples/lazy_array.py http://127.0.0.1:8080/file.bin
"""

import argparse
import asyncio
import tempfile
from pathlib import Path

import numpy as np
from page_server import serving

import aiouffd


async def use(url: str) -> None:
    async with aiouffd.open(url) as region:
        array = np.frombuffer(region, np.uint8)
        print(f"{len(array):,} bytes are mapped; none is fetched yet")

        print("the byte in the middle:", array[len(array) // 2])  # any touch, from any thread, fetches what it needs
        print("the sum of the last 100,000:", array[-100_000:].sum())

        await region.monitor.prefetch(0, min(len(array), 8 << 20))  # or fetch before the touch
        print("the sum of the first 8 MiB:", array[: 8 << 20].sum())

        seen = region.monitor.statistics()
        print(f"{seen.faults} faults, {seen.bytes_fetched:,} bytes fetched")


def main() -> None:
    parser = argparse.ArgumentParser(description="Use a file on a web server as an array.")
    parser.add_argument("url", nargs="?", help="default: a file of 64 MiB that this program makes and serves")
    url = parser.parse_args().url
    if url:
        asyncio.run(use(url))
        return
    with tempfile.TemporaryDirectory() as directory:
        np.arange(16 << 20, dtype=np.uint32).tofile(Path(directory, "array.bin"))
        with serving(Path(directory)) as root:
            asyncio.run(use(f"{root}/array.bin"))


if __name__ == "__main__":
    main()
