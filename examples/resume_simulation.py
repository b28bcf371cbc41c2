"""Resume a simulation from a large checkpoint: it goes on at once, and writes back only what has changed.

    python examples/resume_simulation.py                       # makes a checkpoint, and resumes it twice
    python examples/resume_simulation.py DIRECTORY --steps 500

The state is a field of cells and some walkers that change the cells that they visit. A step touches few of them, so
that most of the checkpoint is neither read nor written again. Needs Linux 6.7, to know which pages were written.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

import aiouffd

SIDE = 4096  # cells of the field's side, of 4 bytes: 64 MiB


def begin(directory: Path, walkers: int) -> None:
    """Write a checkpoint of a field that nobody has visited."""
    np.zeros((SIDE, SIDE), np.uint32).tofile(directory / "field.bin")
    np.save(directory / "walkers.npy", np.random.default_rng(0).integers(0, SIDE, (walkers, 2)))


def simulate(field: np.ndarray, walkers: np.ndarray, steps: int, seed: int) -> np.ndarray:
    """Move each walker to a neighboring cell, and count its visit there, so many times."""
    moves = np.random.default_rng(seed).integers(-1, 2, (steps, *walkers.shape))
    for move in moves:
        walkers = (walkers + move) % SIDE
        np.add.at(field, (walkers[:, 0], walkers[:, 1]), 1)
    return walkers


def resume(directory: Path, steps: int) -> None:
    """Go on from a checkpoint, and replace it."""
    began = time.perf_counter()
    path = directory / "field.bin"
    walkers = np.load(directory / "walkers.npy")
    visits = sum(np.load(directory / "visits.npy")) if (directory / "visits.npy").exists() else 0
    with aiouffd.open(path, track_writes=True) as region:
        field = np.frombuffer(region, np.uint32).reshape(SIDE, SIDE)
        walkers = simulate(field, walkers, steps, seed=visits)
        changed = [(one.start, region[one.start : one.end]) for one in region.monitor.collect()]
        fetched = region.monitor.statistics().bytes_fetched
    # Not while it is served: a source must not change.
    with path.open("r+b") as file:
        for start, data in changed:
            os.pwrite(file.fileno(), data, start)
    np.save(directory / "walkers.npy", walkers)
    np.save(directory / "visits.npy", [visits, steps * len(walkers)])
    written = sum(len(data) for _, data in changed)
    print(
        f"{steps} steps after {time.perf_counter() - began:.2f} s: {fetched:,} bytes read and {written:,} written, "
        f"of {path.stat().st_size:,}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Resume a simulation from a checkpoint without reading all of it.")
    parser.add_argument("directory", nargs="?", type=Path, help="of the checkpoint (default: one is made)")
    parser.add_argument("--steps", type=int, default=100, help="to simulate (%(default)s)")
    parser.add_argument("--walkers", type=int, default=20, help="of a checkpoint that is made (%(default)s)")
    arguments = parser.parse_args()
    if arguments.directory:
        resume(arguments.directory, arguments.steps)
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        begin(directory, arguments.walkers)
        resume(directory, arguments.steps)
        resume(directory, arguments.steps)
        visits = int(np.fromfile(directory / "field.bin", np.uint32).sum())
        right = visits == 2 * arguments.steps * arguments.walkers
        print(f"{visits} visits are in the checkpoint, which is {'right' if right else 'WRONG'}")


if __name__ == "__main__":
    main()
