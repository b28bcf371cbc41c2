"""`WriteTracker`: exactly the pages that were written."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
from pattern import PAGE, Pattern

import aiouffd
from aiouffd import Range, Region, WriteTracker

HUGE = 2 << 20


def pages(found: list[Range], size: int = PAGE) -> set[int]:
    """Return the numbers of the pages in ranges of offsets."""
    return {at // size for item in found for at in range(item.start, item.end, size)}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("populated", [False, True])
def test_exactly_what_was_written(shared: bool, populated: bool) -> None:
    """Random writes, a look, more writes: each look gives those since the last, present before or not."""
    rng = random.Random(4)
    count = 2000
    region = Region(count * PAGE + 1, shared=shared)
    if populated:
        np.frombuffer(region, np.uint8)[:] = 1
    with WriteTracker(region) as tracker:
        assert tracker.collect() == []
        for _ in range(5):
            written = set(rng.sample(range(count + 1), 300))
            for page in written:
                region[page * PAGE] = 2
            assert region[rng.choice(sorted(written)) * PAGE] == 2
            assert pages(tracker.collect()) == written
        assert tracker.collect() == []


def test_reading_is_not_writing() -> None:
    """A page that was only read is not reported, populated or not."""
    region = Region(64 * PAGE)
    region[5 * PAGE] = 1
    with WriteTracker(region) as tracker:
        assert sum(region[: 64 * PAGE]) == 1
        assert tracker.collect() == []


def test_more_ranges_than_fit_into_one_answer() -> None:
    """Every second page of many: the scan goes on where its vector was full."""
    count = 5000
    region = Region(count * PAGE)
    with WriteTracker(region) as tracker:
        for page in range(0, count, 2):
            region[page * PAGE] = 1
        found = tracker.collect()
        assert len(found) == count // 2
        assert pages(found) == set(range(0, count, 2))


def test_system_calls_write_too() -> None:
    """read(2) into the region is a write."""
    region = Region(8 * PAGE)
    read, write = os.pipe()
    os.write(write, b"x" * 100)
    with WriteTracker(region) as tracker:
        os.readv(read, [memoryview(region)[3 * PAGE : 3 * PAGE + 100]])
        assert tracker.collect() == [Range(3 * PAGE, PAGE)]
    os.close(read)
    os.close(write)


@pytest.mark.usefixtures("huge_pages")
@pytest.mark.parametrize("shared", [False, True])
def test_huge_pages_are_tracked(shared: bool) -> None:
    """A huge page is one page."""
    region = Region(3 * HUGE, page_size=HUGE, shared=shared)
    with WriteTracker(region) as tracker:
        region[HUGE + 5] = 1
        assert pages(tracker.collect(), HUGE) == {1}
        assert tracker.collect() == []


def test_one_owner_and_one_use() -> None:
    """A region that is served cannot be tracked, nor twice; outside its block it is closed."""
    region = Region(8 * PAGE)
    with aiouffd.Monitor(region, Pattern(8 * PAGE)), pytest.raises(aiouffd.BusyError):
        WriteTracker(region).__enter__()
    other = Region(8 * PAGE)
    with WriteTracker(other) as tracker, pytest.raises(aiouffd.BusyError):
        WriteTracker(other).__enter__()
    with pytest.raises(aiouffd.ClosedError):
        tracker.collect()
