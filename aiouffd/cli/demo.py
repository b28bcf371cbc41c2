"""`aiouffd demo`: maps a file that an HTTP server holds, touches parts of it, and checks each touched byte."""

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

import click
import numpy as np
import rich.console
import rich.progress

import aiouffd
from aiouffd.cli import parameters
from aiouffd.kernel.pagemap import Pagemap
from aiouffd.ranges import RangeSet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiouffd.engine.statistics import Statistics

__all__ = ["command", "run"]

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


def make_input(path: Path, size: int, advance: rich.progress.Progress, task: rich.progress.TaskID) -> None:
    """Write `size` bytes that differ from page to page and are the same in each run."""
    rng = np.random.default_rng(20)
    block = rng.integers(0, 1 << 63, _BLOCK // 8, dtype=np.uint64)
    with path.open("wb") as file:
        for start in range(0, size, _BLOCK):
            file.write((block ^ np.uint64(start + 1)).tobytes()[: min(_BLOCK, size - start)])
            advance.update(task, completed=start)
    advance.update(task, completed=size)


@contextlib.contextmanager
def served(path: Path, latency: float) -> Iterator[str]:
    """Run the HTTP server in a process of its own; yield the URL of the file.

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


def run(*, size: int, threads: int, touches: int, latency: float) -> int:
    """Run the demo; return the exit status."""
    console = rich.console.Console()
    plain = not console.is_terminal or (console.encoding or "").lower().replace("-", "") != "utf8"
    directory = Path(tempfile.mkdtemp(prefix="aiouffd-demo-"))
    path = directory / "input.bin"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as for Ctrl-C: remove the files first
    try:
        columns = (
            rich.progress.TextColumn("{task.description:<34}"),
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TimeElapsedColumn(),
        )
        with rich.progress.Progress(*columns, console=console) as progress:
            make_input(path, size, progress, progress.add_task(f"making an input file of {size >> 20} MiB", total=size))
            check = Check(path)
            with served(path, latency) as url:
                opened = time.perf_counter()
                with aiouffd.open(url) as region:
                    ready = time.perf_counter() - opened
                    seconds, seen = use(region, check, threads=threads, touches=touches, progress=progress)
                    drawn = picture(region, max(20, min(console.width, 100) - 4), plain=plain)
            check.close()
        console.print()
        console.print(
            f"  mapped       {size:>13,} bytes over HTTP, usable after {ready * 1000:.0f} ms", highlight=False
        )
        console.print(f"  touched      {check.touched.total:>13,} bytes", highlight=False)
        console.print(
            f"  fetched      {seen.bytes_fetched:>13,} bytes ({seen.bytes_fetched / size:.1%})", highlight=False
        )
        console.print(f"  page faults  {seen.faults:>13,} in {seconds:.1f} s", highlight=False)
        p50, p99 = (seen.latency_ns(quantile) / 1e6 for quantile in (0.5, 0.99))
        console.print(f"  latency      p50 below {p50:.3f} ms, p99 below {p99:.3f} ms", highlight=False)
        console.print("\n  what is present:")
        for line in drawn:
            console.print(f"  |{line}|", highlight=False, markup=False)
        if check.wrong:
            console.print(f"\nWRONG: {len(check.wrong)} pieces differ from the file, the first at {check.wrong[0]:#x}")
            return 1
        console.print(f"\nEvery touched byte is right: {check.bytes:,} bytes compared with the file by checksum.")
        return 0
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@click.command("demo")
@click.option("--size", type=parameters.Size(), default="1G", show_default=True, help="Of the input file.")
@click.option("--threads", type=click.IntRange(1, 64), default=4, show_default=True, help="That touch at random.")
@click.option("--touches", type=click.IntRange(1), default=4000, show_default=True, help="Pages touched at random.")
@click.option("--latency-ms", type=float, default=0.0, show_default=True, help="Added to each answer of the server.")
def command(*, size: int, threads: int, touches: int, latency_ms: float) -> int:
    """Map a file that an HTTP server holds, touch parts of it, and check each touched byte."""
    return run(size=size, threads=threads, touches=touches, latency=latency_ms / 1000)
