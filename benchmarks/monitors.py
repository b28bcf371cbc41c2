"""Many Monitors in one process: what one more of them costs."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

import aiouffd
from benchmarks.contestants import buffer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["COUNT", "entering", "leaving", "memory"]

COUNT = 30
_SIZE = 1 << 20


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
