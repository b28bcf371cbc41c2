"""Machines of one snapshot, restored one after the other: the memory that they take, and when each is usable."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import aiouffd
from benchmarks.contestants import PAGE
from benchmarks.native import touch
from benchmarks.row import MIB, Bar, Row, shuffled
from examples import microvm

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["clones_rows"]

_COUNT = 25
_WRITTEN = 0.02  # of its memory, by each
_USED = 1 / 16  # of its memory, in random order, until a machine is usable


def clones_rows(*, quick: bool) -> Iterator[Row]:
    """Clones of one snapshot, which map one file; and those that have a copy each."""
    size = (16 if quick else 1024) * MIB
    yield Row(
        "clones-memory",
        f"memory of {_COUNT} clones of a snapshot of {size // MIB} MiB, of which each reads all and writes 2 %",
        "MiB",
        {"aiouffd": lambda: _memory(size), "one, and what was written": lambda: _least(size)},
        (Bar("one, and what was written", 1.2),),
        repeats=1,
        setup="aiouffd serve --one-copy small",
    )
    yield Row(
        "clones-usable",
        f"until a clone has touched a 16th of its {size // MIB} MiB, p95 of {_COUNT}",
        "ms",
        {"aiouffd": lambda: _usable(size, one_copy=True), "a copy each": lambda: _usable(size, one_copy=False)},
        setup="aiouffd serve --one-copy small",
    )


def _least(size: int) -> float:
    return size * (1 + _COUNT * _WRITTEN) / MIB


def _memory(size: int) -> float:
    with _server(size) as (path, pids), contextlib.ExitStack() as clones:
        before = _taken(pids)
        for number in range(_COUNT):
            address = clones.enter_context(_clone(path, size, one_copy=True))
            touch(address, shuffled(size, number), 1)
            for page in shuffled(size, _COUNT + number, _WRITTEN).tolist():
                ctypes.memset(address + page * PAGE, 1, 8)
        return (_taken(pids) - before) / MIB


def _usable(size: int, *, one_copy: bool) -> float:
    took = []
    with _server(size) as (path, _), contextlib.ExitStack() as clones:
        for number in range(_COUNT):
            pages = shuffled(size, number, _USED)
            began = time.perf_counter()
            touch(clones.enter_context(_clone(path, size, one_copy=one_copy)), pages, 1)
            took.append(time.perf_counter() - began)
    return float(np.percentile(took, 95)) * 1e3


@contextlib.contextmanager
def _server(size: int) -> Iterator[tuple[str, list[int]]]:
    """Serve a snapshot; yield the path of the socket, and all processes whose memory counts."""
    with tempfile.TemporaryDirectory() as directory:
        image, path = Path(directory) / "image", Path(directory) / "socket"
        np.repeat(np.arange(1, size // PAGE + 1, dtype=np.uint64), PAGE // 8).tofile(image)
        command = [sys.executable, "-m", "aiouffd", "serve", str(image), "--socket", str(path), "--one-copy", "small"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
            try:
                while not path.exists():
                    time.sleep(0.01)
                yield str(path), [os.getpid(), *_tree(server.pid)]
            finally:
                server.kill()


def _tree(pid: int) -> list[int]:
    below = [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]
    return [pid, *(each for child in below for each in _tree(child))]


def _taken(pids: list[int]) -> int:
    """Return the bytes of memory of processes, each page by its share. Files on disk do not count."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem")))


@contextlib.contextmanager
def _clone(path: str, size: int, *, one_copy: bool) -> Iterator[int]:
    """Yield the address of a machine's memory."""
    with microvm.connect(path) as connection:
        if one_copy:
            memory, page = microvm.map_one_copy(connection)
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        else:
            memory, page = aiouffd.Region(size), PAGE
            address = memory.address
        with microvm.hand_over(connection, (address, size), page, one_copy=one_copy):
            yield address
