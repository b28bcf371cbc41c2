"""Warm a process up once, and fork it for each worker: the workers share what is present, and fetch the rest lazily.

    python examples/prefork.py [--workers N]
    python examples/prefork.py https://host/weights.bin

The parent maps the weights and prefetches the part that every request needs. A forked worker starts in milliseconds
with that part in memory, which all of them share. What only some requests need comes when a worker touches it. Needs
CAP_SYS_PTRACE: forked children are served by the parent's pager.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from page_server import serving

import aiouffd

LAYERS = 16


def layer(weights: np.ndarray, number: int) -> np.ndarray:
    """Return one of the equal parts of the weights."""
    size = len(weights) // LAYERS
    return weights[number * size : (number + 1) * size]


def work(weights: np.ndarray, number: int, began: float) -> None:
    """Do a worker's request: it needs the first two layers, and one of its own."""
    shared = float(layer(weights, 0).mean() + layer(weights, 1).mean())
    first = time.perf_counter() - began
    own = float(layer(weights, 2 + number % (LAYERS - 2)).mean())
    print(f"worker {number}: {shared:g} after {first * 1000:.1f} ms, {own:g} of its own layer", flush=True)


def serve(url: str, workers: int) -> None:
    with aiouffd.open(url) as region:
        weights = np.frombuffer(region, np.float32)
        size = len(region) // LAYERS
        region.monitor.prefetch_sync(0, 2 * size)
        warm = region.monitor.statistics().bytes_fetched
        print(f"warmed up: {warm:,} of {len(region):,} bytes are present", flush=True)
        pids = []
        for number in range(workers):
            began = time.perf_counter()
            pid = os.fork()
            if not pid:
                work(weights, number, began)
                os._exit(0)  # not the end of the parent's block
            pids.append(pid)
        failed = [pid for pid in pids if os.waitpid(pid, 0)[1]]
        more = region.monitor.statistics().bytes_fetched - warm
        print(f"{workers - len(failed)} workers have answered; {more:,} bytes were fetched for them")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fork workers from a process that has warmed up lazy weights.")
    parser.add_argument("url", nargs="?", help="a path or a URL (default: a file of 64 MiB that is made and served)")
    parser.add_argument("--workers", type=int, default=4, help="to fork (%(default)s)")
    arguments = parser.parse_args()
    if arguments.url:
        serve(arguments.url, arguments.workers)
        return
    with tempfile.TemporaryDirectory() as directory:
        np.repeat(np.arange(LAYERS, dtype=np.float32), 1 << 20).tofile(Path(directory, "weights.bin"))
        with serving(Path(directory)) as root:
            serve(f"{root}/weights.bin", arguments.workers)


if __name__ == "__main__":
    main()
