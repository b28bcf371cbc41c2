"""Look up a few rows of an embeddings table that is in an object store: only their pages are fetched.

    python examples/embeddings.py                              # makes a table and serves it
    python examples/embeddings.py https://host/table.npy 17 4711
    python examples/embeddings.py s3://bucket/table.npy 17 4711    # credentials: AWS_ACCESS_KEY_ID and so on

The file is an .npy of two dimensions, as numpy.save writes it.
"""

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

import numpy as np
from page_server import serving

import aiouffd
from aiouffd import formats


async def look_up(url: str, rows: list[int], nearest: int) -> None:
    began = time.perf_counter()
    async with aiouffd.open(url, readahead=64 << 10) as region:  # rows that are far apart: small windows
        file = await asyncio.to_thread(formats.Npy, region)  # it touches the header
        table = file.array
        rows = rows or [int(row) for row in np.random.default_rng(1).integers(0, len(table), 100)]
        # All rows at once: touches would wait for one page after the other.
        await file.prefetch_rows("array", rows)
        vectors = table[rows]
        print(f"{len(rows)} of {len(table):,} rows, after {time.perf_counter() - began:.3f} s")
        for row, score in sorted(zip(rows, vectors @ vectors[0], strict=True), key=lambda pair: -pair[1])[:nearest]:
            print(f"row {row:>8}: {score:.3f} beside row {rows[0]}")
        seen = region.monitor.statistics()
        print(f"{seen.bytes_fetched:,} of {len(region):,} bytes fetched")


def main() -> None:
    parser = argparse.ArgumentParser(description="Look up rows of an embeddings table on a server.")
    parser.add_argument("url", nargs="?", help="of an .npy file (default: one of 128 MiB that is made and served)")
    parser.add_argument("rows", nargs="*", type=int, help="to look up (default: a hundred at random)")
    parser.add_argument("--nearest", type=int, default=3, help="how many to print (%(default)s)")
    arguments = parser.parse_args()
    if arguments.url:
        asyncio.run(look_up(arguments.url, arguments.rows, arguments.nearest))
        return
    with tempfile.TemporaryDirectory() as directory:
        table = np.random.default_rng(0).standard_normal((1 << 17, 256), np.float32)
        np.save(Path(directory, "table.npy"), table / np.linalg.norm(table, axis=1, keepdims=True))
        with serving(Path(directory)) as root:
            asyncio.run(look_up(f"{root}/table.npy", arguments.rows, arguments.nearest))


if __name__ == "__main__":
    main()
