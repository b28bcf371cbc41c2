"""A pager under load for a while: what it holds does not grow."""

from __future__ import annotations

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


def holds(pid: int) -> tuple[int, int, int]:
    """Return descriptors, threads and resident KiB of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    numbers = dict(line.split(":", 1) for line in status.splitlines())
    return len(list(Path(f"/proc/{pid}/fd").iterdir())), int(numbers["Threads"]), int(numbers["VmRSS"].split()[0])


def soak(seconds: float, growth: float) -> None:
    """Scenario: touch, prefetch, drop, fork, fail; look at the worker now and then."""
    rng = random.Random(9)
    region = aiouffd.Region(SIZE)
    samples = []
    dropped: set[int] = set()
    with aiouffd.Monitor(region, Slow(SIZE, 0.0), fork="serve", retries=1) as monitor:
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
        monitor.check()
    # The first half fills caches and the allocator's arenas; from then on all is flat.
    first, last = samples[len(samples) // 2], samples[-1]
    print(samples)
    assert last[0] <= first[0] + 1
    assert last[1] <= first[1]
    assert last[2] <= first[2] * growth + 4096


def test_soak_20_s() -> None:
    """Descriptors, threads and memory of the worker are flat; every byte is right."""
    play(soak, 20.0, 1.25, deadline=60)  # the allocator still settles; a leak of any use of it doubles


@pytest.mark.nightly
@pytest.mark.timeout(800)
def test_soak_10_min() -> None:
    """The same for ten minutes."""
    play(soak, 600.0, 1.05, deadline=700)
