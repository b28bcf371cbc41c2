"""Sort a file of numbers that is larger than memory, as an array that is sorted in place.

    python examples/sort_what_does_not_fit.py                      # makes numbers
    python examples/sort_what_does_not_fit.py FILE --memory 256    # sorts FILE

The file is a region with `max_resident` and `write_back`: what does not fit is written to the file, and dropped. So the
program is plain numpy: it sorts pieces in place, and then merges them into a second region of the same kind.
"""

import argparse
import contextlib
import os
import tempfile
from pathlib import Path

import numpy as np

import aiouffd

STEP = 1 << 13  # numbers of a piece that are looked at together


def opened(path: Path, memory: int) -> contextlib.AbstractContextManager[aiouffd.Region]:
    """Map a file, of which so many bytes are in memory at most."""
    return aiouffd.open(path, max_resident=memory, write_back=True)


def merge(pieces: list[np.ndarray], result: np.ndarray) -> None:
    """Merge sorted arrays into one."""
    written = 0
    while pieces:
        # No number behind any step is smaller than the smallest end of a step.
        limit = min(piece[:STEP][-1] for piece in pieces)
        counts = [int(np.searchsorted(piece[:STEP], limit, "right")) for piece in pieces]
        end = written + sum(counts)
        result[written:end] = np.sort(np.concatenate([piece[:n] for piece, n in zip(pieces, counts, strict=True)]))
        written = end
        pieces = [rest for piece, n in zip(pieces, counts, strict=True) if len(rest := piece[n:])]


def sort(path: Path, memory: int) -> None:
    """Sort a file of 64-bit numbers."""
    result = path.with_name(f"{path.name}.sorted")
    result.touch()
    os.truncate(result, path.stat().st_size)
    with opened(path, memory // 2) as unsorted, opened(result, memory // 2) as merged:
        numbers, size = np.frombuffer(unsorted, np.int64), memory // 64
        pieces = [numbers[at : at + size] for at in range(0, len(numbers), size)]
        for piece in pieces:
            piece.sort()
        print(f"{len(pieces)} sorted pieces of {size * 8 >> 10} KiB")
        merge(pieces, np.frombuffer(merged, np.int64))
        for region in (unsorted, merged):
            region.monitor.flush_sync()
            seen, page = region.monitor.statistics(), region.page_size
            counts = seen.pages * page, seen.pages_written_back * page, seen.resident
            print("{} MiB came, {} MiB were written, {} MiB are there".format(*(count >> 20 for count in counts)))
        del numbers, pieces, piece
    result.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Sort a file of 64-bit numbers that does not fit into memory.")
    parser.add_argument("file", nargs="?", type=Path, help="default: numbers that are made")
    parser.add_argument("--size", type=int, default=64, metavar="MIB", help="of numbers that are made (%(default)s)")
    parser.add_argument("--memory", type=int, default=16, metavar="MIB", help="so much is used (%(default)s)")
    arguments = parser.parse_args()
    if arguments.file:
        sort(arguments.file, arguments.memory << 20)
        return
    with tempfile.TemporaryDirectory() as name:
        path, total = Path(name, "numbers"), 0
        with path.open("wb") as file:
            for seed in range(arguments.size // 8):
                numbers = np.random.default_rng(seed).integers(-(1 << 62), 1 << 62, 1 << 20)
                numbers.tofile(file)
                total += int(numbers.sum())
        sort(path, arguments.memory << 20)
        last, found, right = -(1 << 63), 0, True
        for at in range(0, arguments.size << 20, 8 << 20):
            numbers = np.fromfile(path, np.int64, 1 << 20, offset=at)
            right = right and last <= numbers[0] and bool((numbers[:-1] <= numbers[1:]).all())
            last, found = numbers[-1], found + int(numbers.sum())
        print("the file is", "sorted" if right and (total - found) % (1 << 64) == 0 else "WRONG")  # sums wrap


if __name__ == "__main__":
    main()
