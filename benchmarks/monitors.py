"""What Monitors cost besides faults: the first of a process, one more of many, a page brought into many mappings."""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import aiouffd
from benchmarks.contestants import PAGE, buffer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["COUNT", "MAPPINGS", "bringing", "entering", "importing", "leaving", "memory", "starting"]

COUNT = 30
MAPPINGS = 10_000
_SIZE = 1 << 20
_PROGRAMS = {
    "peer": "import asyncio, uvloop, attrs",
    "import": "import aiouffd",
    "first": """import aiouffd
region = aiouffd.Region(1 << 20)
with aiouffd.Monitor(region, aiouffd.ZeroSource(1 << 20)):
    region[0]
""",
}


@contextlib.contextmanager
def _but_one() -> Iterator[aiouffd.Monitor]:
    """Enter all Monitors but the last one, and yield that."""
    source = buffer(_SIZE)
    with contextlib.ExitStack() as stack:
        for _ in range(COUNT - 1):
            stack.enter_context(aiouffd.Monitor(aiouffd.Region(_SIZE), source))
        yield aiouffd.Monitor(aiouffd.Region(_SIZE), source)


def _milliseconds(work: Callable[[], object]) -> float:
    before = time.perf_counter()
    work()
    return (time.perf_counter() - before) * 1e3


def entering() -> float:
    """Return the milliseconds that the last Monitor takes to enter."""
    with _but_one() as last:
        spent = _milliseconds(last.__enter__)
        last.__exit__(None, None, None)
    return spent


def leaving() -> float:
    """Return the milliseconds that the last Monitor takes to leave."""
    with _but_one() as last, contextlib.ExitStack() as stack:
        stack.enter_context(last)
        _ = last.region[0]
        return _milliseconds(stack.close)


def memory() -> float:
    """Return the MiB of all pagers of these Monitors: what each process shares is counted in parts (PSS)."""
    with _but_one() as last, last:
        return sum(map(_proportional, last.pids)) / 1024


def _proportional(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(rollup.split("\nPss:")[1].split()[0])


def starting(program: str) -> float:
    """Return the milliseconds that Python takes from its start to the end of a program of `_PROGRAMS`."""
    return _milliseconds(lambda: _run(_PROGRAMS[program]))


def importing(program: str) -> float:
    """Return the milliseconds of processor time that such a program takes, without what starting Python takes."""
    return _processor(_PROGRAMS[program]) - _processor("")


def _run(text: str) -> None:
    """Run a program as an installed package runs: its bytecode is there, from the first run on at the latest."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, "-c", text], check=True, env=kept)


def _processor(text: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _run(text)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1e3


def bringing(mappings: int) -> float:
    """Return the microseconds to prefetch a page of a region of so many mappings: every other page is emptied."""
    size = 2 * MAPPINGS * PAGE
    region = aiouffd.Region(size)
    with aiouffd.Monitor(region, buffer(size), on_exit="zeros") as monitor:
        for page in range(1, 2 * mappings, 2):
            region.madvise(mmap.MADV_DONTNEED, page * PAGE, PAGE)
        monitor.prefetch_sync(0, PAGE)
        before = time.perf_counter()
        for page in range(2, 202, 2):
            monitor.prefetch_sync(page * PAGE, PAGE)
        return (time.perf_counter() - before) * 1e4
