"""What the demos are made of: a file, a server, touches that are checked, a picture of what is present."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import rich.console
import rich.progress

from aiouffd.kernel.pagemap import Pagemap
from aiouffd.ranges import RangeSet

if TYPE_CHECKING:
    from collections.abc import Iterator

    import aiouffd
    from aiouffd.engine.statistics import Statistics

__all__ = ["Check", "columns", "make_input", "picture", "served", "use", "workplace"]

_PAGE = mmap.PAGESIZE
_BLOCK = 4 << 20


class Check:
    """Compares the bytes of the region with the bytes of the file, which it reads with pread(2), by CRC-32."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._lock = threading.Lock()
        self.touched: RangeSet = RangeSet()
        self.bytes: int = 0
        self.wrong: list[int] = []

    def compare(self, offset: int, data: memoryview) -> None:
        """Check bytes that were read through the region at `offset`."""
        right = zlib.crc32(os.pread(self._fd, len(data), offset)) == zlib.crc32(data)
        with self._lock:
            self.touched.add(offset, offset + len(data))
            self.bytes += len(data)
            if not right:
                self.wrong.append(offset)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def report(self, console: rich.console.Console) -> int:
        """Say whether all bytes were right; return the exit status."""
        if self.wrong:
            console.print(f"\nWRONG: {len(self.wrong)} pieces differ from the file, the first at {self.wrong[0]:#x}")
            return 1
        console.print(f"\nEvery touched byte is right: {self.bytes:,} bytes compared with the file by checksum.")
        return 0


def make_input(path: Path, size: int, progress: rich.progress.Progress, words: int = 0) -> None:
    """Write `size` bytes that differ from page to page and are the same in each run.

    Args:
        path: of the file.
        size: in bytes.
        progress: shows how far it is.
        words: how many words it consists of, so that it can be compressed; 0: they are random.
    """
    task = progress.add_task(f"making an input file of {size >> 20} MiB", total=size)
    rng = np.random.default_rng(20)
    block = rng.integers(0, 1 << 63, words or _BLOCK // 8, dtype=np.uint64)
    if words:
        block = block[rng.integers(0, words, _BLOCK // 8)]
    with path.open("wb") as file:
        for start in range(0, size, _BLOCK):
            file.write((block ^ np.uint64(start + 1)).tobytes()[: min(_BLOCK, size - start)])
            progress.update(task, completed=start)
    progress.update(task, completed=size)


@contextlib.contextmanager
def served(path: Path, latency: float) -> Iterator[str]:
    """Run the HTTP server in a process of its own; yield the URL of the file, or of the folder.

    The process has a session of its own: Ctrl-C must not end it while a thread waits for a page.
    """
    command = [sys.executable, "-P", "-m", "aiouffd.cli.demo_server", str(path), str(latency)]
    with subprocess.Popen(  # noqa: S603
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            if not url:
                raise RuntimeError("the HTTP server of the demo did not start")
            yield url
        finally:
            process.terminate()


def touch_at_random(
    region: aiouffd.Region, check: Check, pages: list[int], done: list[int], stop: threading.Event
) -> None:
    """Touch single pages, as a thread of an application does."""
    view = memoryview(region)
    for page in pages:
        if stop.is_set():
            return
        check.compare(page * _PAGE, view[page * _PAGE : (page + 1) * _PAGE])
        done[0] += 1


def use(
    region: aiouffd.Region, check: Check, *, threads: int, touches: int, progress: rich.progress.Progress
) -> tuple[float, Statistics]:
    """Touch pages at random, then a part in order, then a part with numpy; return the seconds and the statistics."""
    size = len(region)
    count = (size - 1) // _PAGE + 1
    rng = random.Random(1)  # noqa: S311
    pages = [rng.randrange(count) for _ in range(min(touches, count))]
    began = time.perf_counter()
    task = progress.add_task(f"{len(pages)} random pages, {threads} threads", total=len(pages))
    done = [0]
    stop = threading.Event()
    workers = [
        threading.Thread(target=touch_at_random, args=(region, check, pages[n::threads], done, stop))
        for n in range(threads)
    ]
    try:
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            progress.update(task, completed=done[0])
            workers[-1].join(0.05)
    finally:  # a thread that touches a missing page after the block has been left gets SIGBUS
        stop.set()
        for worker in workers:
            if worker.ident is not None:
                worker.join()
    progress.update(task, completed=len(pages))

    start, end = size // 4 // _PAGE * _PAGE, size // 2
    task = progress.add_task("a quarter in order", total=end - start)
    view = memoryview(region)
    for at in range(start, end, 1 << 20):
        piece = view[at : min(at + (1 << 20), end)]
        check.compare(at, piece)
        progress.update(task, completed=at + len(piece) - start)

    array = np.frombuffer(region, np.uint8)
    at = size // 8 * 7
    part = array[at : at + (16 << 20)]
    task = progress.add_task("numpy reductions", total=1)
    total = int(part.sum(dtype=np.uint64))
    check.compare(at, part.data)
    assert total == int(np.frombuffer(bytes(part), np.uint8).sum(dtype=np.uint64))
    progress.update(task, completed=1)
    assert region.monitor is not None
    return time.perf_counter() - began, region.monitor.statistics()


def picture(region: aiouffd.Region, width: int, *, plain: bool) -> list[str]:
    """Draw which parts of the region are present: a character for each part, fuller the more of it is present."""
    shades = " .:+#" if plain else " ░▒▓█"
    present = RangeSet()
    begin = region.address
    at = begin
    with Pagemap.open_if_possible() as pagemap:
        gaps = pagemap.missing(begin, region.mapped_length, region.fd, region.page_size)
    for gap in gaps:
        present.add(at - begin, gap.start - begin)
        at = gap.end
    present.add(at - begin, region.mapped_length)
    cells = width * 8
    lines = []
    row = ""
    for cell in range(cells):
        low, high = region.mapped_length * cell // cells, region.mapped_length * (cell + 1) // cells
        missing = sum(gap.length for gap in present.gaps(low, high))
        share = 1 - missing / max(1, high - low)
        row += shades[0 if share == 0 else min(4, 1 + int(share * 3.999))]
        if len(row) == width:
            lines.append(row)
            row = ""
    return lines


def columns() -> tuple[rich.progress.ProgressColumn, ...]:
    """Return what is shown of what is under way."""
    return (
        rich.progress.TextColumn("{task.description:<34}"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeElapsedColumn(),
    )


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """Yield a folder that is removed at the end, also when the process is told to end."""
    directory = Path(tempfile.mkdtemp(prefix="aiouffd-demo-"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as for Ctrl-C: remove the files first
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
