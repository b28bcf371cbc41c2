"""A pager under load for a while: what it holds does not grow."""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import time
from pathlib import Path

import pytest
from pattern import PAGE, Slow, peek, word
from scenario import play

import aiouffd

SIZE = 64 << 20


class Watched(Slow):
    """Writes down, now and then, how many tasks the loop has that it runs on."""

    def __init__(self, size: int, path: str) -> None:
        super().__init__(size, 0.0)
        self.path = path
        self.next = 0.0

    async def read(self, offset: int, length: int) -> bytes:
        """Return the bytes."""
        if time.monotonic() > self.next:
            self.next = time.monotonic() + 0.2
            Path(self.path).write_text(str(len(asyncio.all_tasks())))
        return await super().read(offset, length)


def holds(pid: int) -> tuple[int, int, int]:
    """Return descriptors, threads and resident KiB of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    numbers = dict(line.split(":", 1) for line in status.splitlines())
    return len(list(Path(f"/proc/{pid}/fd").iterdir())), int(numbers["Threads"]), int(numbers["VmRSS"].split()[0])


def soak(seconds: float, growth: float, path: str) -> None:
    """Scenario: touch, prefetch, drop, fork, fail; look at the worker now and then."""
    rng = random.Random(9)
    region = aiouffd.Region(SIZE)
    samples = []
    tasks: list[int] = []
    dropped: set[int] = set()
    with aiouffd.Monitor(region, Watched(SIZE, path), fork="serve", retries=1) as monitor:
        end = time.monotonic() + seconds
        next_sample = time.monotonic() + seconds / 5
        while time.monotonic() < end:
            for _ in range(50):
                page = rng.randrange(SIZE // PAGE)
                got = peek(region.address + page * PAGE)
                assert got == (bytes(8) if page in dropped else word(page)), page
            if rng.random() < 0.3:
                monitor.prefetch_sync(rng.randrange(SIZE // 2), SIZE // 16)
            if rng.random() < 0.2:
                page = rng.randrange(SIZE // PAGE - 8)
                region.madvise(mmap.MADV_DONTNEED, page * PAGE, 8 * PAGE)
                dropped.update(range(page, page + 8))
            if rng.random() < 0.1:
                child = os.fork()
                if child == 0:
                    os._exit(peek(region.address) not in (word(0), bytes(8)))
                assert os.waitpid(child, 0)[1] == 0
            if len(dropped) == SIZE // PAGE:
                break
            if time.monotonic() > next_sample:
                next_sample += seconds / 20
                while monitor.statistics().spaces > 1:  # children that have ended are noticed within half a second
                    time.sleep(0.01)
                samples.append(holds(monitor.pids[1]))
                tasks.append(int(Path(path).read_text() or 0))
        monitor.check()
    # The first half fills caches and the allocator's arenas; from then on all is flat.
    first, last = samples[len(samples) // 2], samples[-1]
    print(samples, tasks)
    assert max(tasks) < 100, tasks  # a prefetch has up to 64 reads under way
    assert last[0] <= first[0] + 1
    assert last[1] <= first[1]
    assert last[2] <= first[2] * growth + 4096


@pytest.mark.long
def test_soak_20_s(tmp_path: Path) -> None:
    """Descriptors, threads, tasks and memory of the worker are flat; every byte is right."""
    play(
        soak, 20.0, 1.25, str(tmp_path / "tasks"), deadline=60
    )  # the allocator still settles; a leak of any use of it doubles


@pytest.mark.nightly
@pytest.mark.timeout(800)
def test_soak_10_min(tmp_path: Path) -> None:
    """The same for ten minutes."""
    output, _ = play(soak, 600.0, 1.05, str(tmp_path / "tasks"), deadline=700)
    print(output)
