"""Memory with a limit, beside np.memmap below the same limit; and what goes back to the file, beside pwrite."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import aiouffd
from benchmarks.contestants import PAGE
from benchmarks.native import touch
from benchmarks.row import MIB, Bar, Row, shuffled

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["bounded_rows"]

_PROGRAM = 160 * MIB  # of a limit, for interpreters and their libraries
_TOUCHERS = 16
_READS = 128  # one for so many pages: np.memmap takes 4 ms a page where the kernel reads 8 MiB ahead
_READ = """
import mmap, os, sys, time
import numpy as np
kind, path, limit, count, group = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:5]), sys.argv[5]
open(f"{group}/cgroup.procs", "w").write(str(os.getpid()))
pages = os.path.getsize(path) // 4096
rng = np.random.default_rng(1)
places = rng.permutation(pages)[(rng.zipf(1.1, 2 * count) - 1) % pages][:count]
def read(words):
    words[: limit // 8 * 5 // 4 : 512].sum()  # from the first read on, memory is full
    began = time.perf_counter()
    words.reshape(-1, 512)[places, 0].sum()
    print((time.perf_counter() - began) / count * 1e6)
if kind != "aiouffd":
    file = np.memmap(path, np.uint64, "r")
    if kind != "np.memmap":
        file._mmap.madvise(mmap.MADV_RANDOM)
    read(file)
else:
    import aiouffd
    with aiouffd.open(path, max_resident=limit) as region:
        read(np.frombuffer(region, np.uint64))
"""
_folders: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def file_of(size: int) -> Path:
    """Return a file whose first word in page n is n + 1, in a folder that is removed when the benchmarks end."""
    _folders.append(tempfile.TemporaryDirectory(prefix="aiouffd-bounded-", dir="/var/tmp"))
    path = Path(_folders[-1].name) / "file"
    rng = np.random.default_rng(3)
    with path.open("wb") as file:
        for at in range(0, size // PAGE, 1024):
            pages = rng.integers(0, 1 << 63, (1024, PAGE // 8), np.uint64)
            pages[:, 0] = np.arange(at + 1, at + 1025)
            pages.tofile(file)
        file.flush()
        os.fsync(file.fileno())
    return path


@contextlib.contextmanager
def group(limit: int) -> Iterator[Path]:
    """Give a cgroup with so many bytes of memory. OSError: there can be none."""
    first = Path("/sys/fs/cgroup/memory")
    one, name = (first, "memory.limit_in_bytes") if first.exists() else (first.parent, "memory.max")
    made = one / f"aiouffd-benchmark-{os.getpid()}"
    made.mkdir()
    try:
        (made / name).write_text(str(limit))
        yield made
    finally:
        while (made / "cgroup.procs").read_text():
            time.sleep(0.01)
        made.rmdir()


def reads(kind: str, size: int) -> float:
    """Return the microseconds of a read, of Zipf's distribution (1.1), below a limit of a quarter of the file.

    Both have all of their memory in one cgroup: also the pages of the file that the kernel caches. None of these is
    cached before. Memory is filled first, in order, so that something has to go for each page that is read.
    """
    path = file_of(size)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with group(size // 4 + _PROGRAM) as limited:
        arguments = [kind, str(path), str(size // 4), str(size // PAGE // _READS), str(limited)]
        done = subprocess.run([sys.executable, "-c", _READ, *arguments], check=True, capture_output=True, text=True)
        return float(done.stdout)


def scan(size: int, limit: int | None) -> float:
    """Return the seconds of a sum over all of a file, whose pages are cached."""
    with aiouffd.open(file_of(size), max_resident=limit) as region:
        words = np.frombuffer(region, np.uint64)
        began = time.perf_counter()
        for at in range(0, len(words), MIB // 8):
            words[at : at + MIB // 8].sum()
        spent = time.perf_counter() - began
        del words
    return spent


def anonymous() -> int:
    """Return how many bytes of private memory this process has."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) << 10 if found else 0


def above(size: int, limit: int) -> float:
    """Return the most MiB that were resident above a limit, while many threads touch pages at random."""
    highest, done = 0, threading.Event()
    with aiouffd.open(file_of(size), max_resident=limit) as region:
        before = anonymous()

        def look() -> None:
            nonlocal highest
            while not done.is_set():  # page tables change while they are read; these counts do not
                there = anonymous() - before if region.fd < 0 else os.fstat(region.fd).st_blocks * 512
                highest = max(highest, there)

        thread = threading.Thread(target=look)
        thread.start()
        touch(region.address, shuffled(size), _TOUCHERS)
        done.set()
        thread.join()
    return max(highest - limit, 0) / MIB


def some_pages(size: int) -> list[int]:
    """Return the offsets of one page in a hundred."""
    return sorted(int(page) * PAGE for page in shuffled(size, seed=4, share=0.01))


def saved(size: int) -> float:
    """Ours: one page in a hundred was written, and is saved; milliseconds until it is durable."""
    source = aiouffd.FileSource(file_of(size), writable=True)
    with aiouffd.open(source, write_back=True, readahead=0) as region:
        for at in some_pages(size):
            region[at + 8] = 1
        began = time.perf_counter()
        region.monitor.flush_sync()
        return (time.perf_counter() - began) * 1e3


def by_pwrite(size: int) -> float:
    """Write as many pages to the same places by pwrite(2), and fsync; milliseconds."""
    data, path, places = os.urandom(PAGE - 8), file_of(size), some_pages(size)
    with path.open("r+b", buffering=0) as file:
        began = time.perf_counter()
        for at in places:
            os.pwrite(file.fileno(), (at // PAGE + 1).to_bytes(8, "little") + data, at)
        os.fsync(file.fileno())
        return (time.perf_counter() - began) * 1e3


def bounded_rows(*, quick: bool) -> Iterator[Row]:
    """Return the rows of memory with a limit."""
    size = (64 if quick else 4096) * MIB
    left_out = {}
    try:
        with group(1 << 30):
            pass
    except OSError as error:
        left_out["aiouffd"] = f"no cgroup with a limit can be made: {error}"
    kinds = ("aiouffd", "np.memmap", "np.memmap, MADV_RANDOM")
    yield Row(
        "bounded-zipf",
        f"{size // MIB} MiB file, a full quarter of it in memory: a read from disk, of Zipf's distribution (1.1)",
        "us",
        {kind: functools.partial(reads, kind, size) for kind in kinds},
        (Bar("np.memmap", 1.2),),
        repeats=3,
        left_out=left_out,
    )
    limit = size // 16
    yield Row(
        "bounded-scan",
        f"{size // MIB} MiB summed in order, {limit // MIB} MiB of them in memory",
        "s",
        {"aiouffd": lambda: scan(size, limit), "no limit": lambda: scan(size, None)},
        (Bar("no limit", 1.2),),
        repeats=3,
    )
    yield Row(
        "bounded-above",
        f"resident above a limit of {limit // MIB} MiB, {_TOUCHERS} touchers",
        "MiB",
        {"aiouffd": lambda: above(min(size, 1024 * MIB), limit), "8 MiB": lambda: 8.0},
        (Bar("8 MiB", 1.0),),
        repeats=3,
    )
    yield Row(
        "write-back",
        f"one page in a hundred of {size // MIB} MiB goes back to its file, until it is durable",
        "ms",
        {"aiouffd": lambda: saved(size), "pwrite": lambda: by_pwrite(size)},
        (Bar("pwrite", 1.3),),
        repeats=3,
    )
