"""A file in the page cache: touched in order, or prefetched."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import aiouffd
from aiouffd.kernel.memory import address_of
from benchmarks import fuse
from benchmarks.contestants import PAGE, content, monitored, warm
from benchmarks.native import touch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["copied", "file_of", "mapped", "prefetched", "shown_by_fuse", "touched"]

_STEP = 2 << 20  # bytes of one COPY


@contextlib.contextmanager
def file_of(size: int) -> Iterator[Path]:
    """Write the content to a file, which is removed at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="aiouffd-benchmark-") as directory:
        path = Path(directory) / "file"
        path.write_bytes(content(size).map or b"")
        os.sync()  # or its write-back would be measured
        yield path


def _in_order(size: int) -> np.ndarray:
    return np.arange(size // PAGE, dtype=np.uint32)


def touched(path: Path) -> float:
    """Ours, with defaults; microseconds a page, as all figures here."""
    pages = _in_order(path.stat().st_size)
    warm(path.stat().st_size)
    with monitored(path.stat().st_size, aiouffd.FileSource(path)) as arena:
        return touch(arena.address, pages) / len(pages) * 1e6


def prefetched(path: Path, engine: type[aiouffd.Pager | aiouffd.InThread]) -> float:
    """Ours: a prefetch of all."""
    size = path.stat().st_size
    region = aiouffd.Region(size)
    warm(size)
    with aiouffd.Monitor(region, aiouffd.FileSource(path), engine=engine(), on_exit="zeros") as monitor:
        before = time.perf_counter()
        monitor.prefetch_sync(0, size)
        seconds = time.perf_counter() - before
        touch(region.address, _in_order(size))
    return seconds / (size // PAGE) * 1e6


def copied(size: int, path: Path | None = None) -> float:
    """COPY in large calls, out of memory or out of a new mapping of the file. Nobody waits for it."""
    if path is None:
        return _copied(size, address_of(content(size).map))
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapping:
        return _copied(size, address_of(mapping))


def _copied(size: int, source: int) -> float:
    warm(size)
    region = aiouffd.Region(size)
    with aiouffd.Userfaultfd() as uffd:
        uffd.register(region.address, size, aiouffd.RegisterMode.MISSING)
        before = time.perf_counter()
        for at in range(0, size, _STEP):
            done = uffd.try_copy(region.address + at, source + at, _STEP, 0)
            if done != _STEP:
                raise AssertionError(done)
        seconds = time.perf_counter() - before
        touch(region.address, _in_order(size))
    return seconds / (size // PAGE) * 1e6


def mapped(path: Path) -> float:
    """The file itself, mapped."""
    array = np.memmap(path, np.uint8, "r")
    return touch(array.ctypes.data, _in_order(len(array))) / (len(array) // PAGE) * 1e6


def shown_by_fuse(path: Path) -> float:
    """The file, mapped through a file system in Python."""
    warm(path.stat().st_size)
    with fuse.mounted(path) as shown:
        return mapped(shown)
