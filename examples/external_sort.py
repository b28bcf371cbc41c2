"""Sort numbers that do not fit into memory: sorted runs are merged, each of them a lazy array.

    python examples/external_sort.py                           # makes numbers
    python examples/external_sort.py INPUT OUTPUT --memory 1024

The input is a file of 64-bit numbers. It is cut into runs that fit, and each is sorted to a file. To merge them, all
runs are mapped. Readahead brings them in order; what has been merged is given back (MADV_DONTNEED). So the merge is
plain numpy on whole arrays, and its memory is bounded. The runs may as well be objects of a store: `aiouffd.open` takes
URLs.
"""

import argparse
import contextlib
import mmap
import resource
import tempfile
import warnings
from pathlib import Path

import numpy as np

import aiouffd

PIECE = 1 << 16  # numbers of a run that are looked at together


def sorted_runs(path: Path, directory: Path, memory: int) -> list[Path]:
    """Sort pieces of a file that fit into half of `memory` bytes."""
    runs = []
    with path.open("rb") as file:
        while len(numbers := np.fromfile(file, np.int64, memory // 16)):
            numbers.sort()
            runs.append(directory / f"run{len(runs)}")
            numbers.tofile(runs[-1])
    return runs


class Run:
    """A sorted file: its numbers are taken from the front, and their memory is given back."""

    def __init__(self, region: aiouffd.Region) -> None:
        self.region = region
        self.numbers = np.frombuffer(region, np.int64)
        self.at = self.given = 0

    def last_of_piece(self) -> int:
        """Return the largest of the next numbers."""
        return int(self.numbers[min(self.at + PIECE, len(self.numbers)) - 1])

    def take(self, limit: int) -> np.ndarray:
        """Take the next numbers up to a limit, at most a piece."""
        piece = self.numbers[self.at : self.at + PIECE]
        taken = piece[: np.searchsorted(piece, limit, "right")].copy()
        self.at += len(taken)
        done = self.at * 8 // self.region.page_size * self.region.page_size
        if done - self.given >= 512 << 10:
            self.region.madvise(mmap.MADV_DONTNEED, self.given, done - self.given)
            self.given = done
        return taken


def merge(paths: list[Path], output: Path) -> int:
    """Merge sorted files; return how many numbers were written."""
    with contextlib.ExitStack() as stack, output.open("wb") as file:
        runs = [Run(stack.enter_context(aiouffd.open(path, readahead=512 << 10))) for path in paths]
        written = 0
        while runs:
            # No number behind any piece is smaller than the smallest end of a piece.
            limit = min(run.last_of_piece() for run in runs)
            merged = np.concatenate([run.take(limit) for run in runs])
            merged.sort()
            merged.tofile(file)
            written += len(merged)
            runs = [run for run in runs if run.at < len(run.numbers)]
    return written


def peak() -> int:
    """Return the most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def sort(source: Path, output: Path, memory: int) -> None:
    before = peak()
    with tempfile.TemporaryDirectory(dir=output.parent) as directory:
        runs = sorted_runs(source, Path(directory), memory)
        written = merge(runs, output)
    print(f"{written:,} numbers ({written * 8 >> 20} MiB) in {len(runs)} runs")
    print(f"{(peak() - before) >> 20} MiB of memory more than before")


def main() -> None:
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # memory that is given back reads as zeros, from now on
    parser = argparse.ArgumentParser(description="Sort a file of 64-bit numbers that does not fit into memory.")
    parser.add_argument("input", nargs="?", type=Path, help="default: 64 MiB of numbers that are made")
    parser.add_argument("output", nargs="?", type=Path, help="the sorted file")
    parser.add_argument("--memory", type=int, default=16, metavar="MIB", help="about so much is used (%(default)s)")
    arguments = parser.parse_args()
    memory = arguments.memory << 20
    if arguments.input:
        if arguments.output is None:
            parser.error("an input needs an output")
        sort(arguments.input, arguments.output, memory)
        return
    with tempfile.TemporaryDirectory() as name:
        source, output = Path(name, "numbers"), Path(name, "sorted")
        with source.open("wb") as file:
            for seed in range(8):
                np.random.default_rng(seed).integers(-(1 << 62), 1 << 62, 1 << 20).tofile(file)
        sort(source, output, memory)
        numbers = np.memmap(output, np.int64)
        right = bool((numbers[:-1] <= numbers[1:]).all()) and numbers.sum() == np.memmap(source, np.int64).sum()
        print("the output is", "sorted" if right else "WRONG")


if __name__ == "__main__":
    main()
