"""`engine.serve.pace`: how many reads ahead are under way."""

from __future__ import annotations

import asyncio

import pytest

from aiouffd.engine.serve.pace import Pace

MS = 1_000_000
SIZE = 2 << 20


class Clock:
    """The time that a `Pace` sees."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0
        monkeypatch.setattr("aiouffd.engine.serve.pace.perf_counter_ns", lambda: self.now)

    def answers(self, pace: Pace, count: int, took: int, size: int = SIZE) -> None:
        """Have `count` reads end, each of which took so many nanoseconds."""
        for _ in range(count):
            pace.enter()
            self.now += took
            pace.leave(size, self.now - took)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return a clock that stands still by itself."""
    return Clock(monkeypatch)


def test_a_source_that_takes_as_long_for_many_gets_many(clock: Clock) -> None:
    """One more for each answer that came as soon as the quickest, up to the bound."""
    pace = Pace(64)
    assert pace.limit(SIZE) == 4
    clock.answers(pace, 10, 5 * MS)
    assert pace.limit(SIZE) == 14
    clock.answers(pace, 100, 9 * MS)
    assert pace.limit(SIZE) == 64


def test_a_queue_gains_nothing(clock: Clock) -> None:
    """Answers that take longer and longer make no more of them; much longer ones make them fewer, never below four."""
    pace = Pace(64)
    clock.answers(pace, 10, MS)
    clock.answers(pace, 10, 4 * MS)
    assert pace.limit(SIZE) == 14
    clock.answers(pace, 6, 7 * MS)
    assert pace.limit(SIZE) == 8
    clock.answers(pace, 100, 7 * MS)
    assert pace.limit(SIZE) == 4


def test_small_reads_are_not_held_against_large_ones(clock: Clock) -> None:
    """They are quicker."""
    pace = Pace(64)
    clock.answers(pace, 1, MS // 10, size=4096)
    clock.answers(pace, 10, 2 * MS)
    assert pace.limit(SIZE) == 14


def test_small_reads_begin_with_many(clock: Clock) -> None:
    """Eight megabytes take no longer in two thousand pieces; a source that answers one by one shows it soon."""
    pace = Pace(64)
    assert [pace.limit(size) for size in (4096, 64 << 10, 256 << 10, 1 << 20)] == [64, 64, 16, 4]
    clock.answers(pace, 1, 5 * MS, size=8192)
    clock.answers(pace, 40, 60 * MS, size=8192)
    assert (pace.limit(8192), pace.limit(4096)) == (24, 64)


def test_it_begins_anew_after_a_while(clock: Clock) -> None:
    """The quickest read is of another time: the way to the source may be longer now."""
    pace = Pace(64)
    clock.answers(pace, 10, MS)
    clock.now += 11_000 * MS
    clock.answers(pace, 1, 50 * MS)
    assert pace.limit(SIZE) == 5
    clock.answers(pace, 10, 50 * MS)
    assert pace.limit(SIZE) == 15


@pytest.mark.parametrize("most", [0, 1, 2])
def test_a_low_bound_is_kept(clock: Clock, most: int) -> None:
    """But one read must be possible."""
    pace = Pace(most)
    clock.answers(pace, 3, MS)
    clock.answers(pace, 3, 9 * MS)
    assert pace.limit(SIZE) == max(most, 1)


async def test_room_comes_with_the_end_of_a_read() -> None:
    """For all that wait: each looks again."""
    pace = Pace(1)
    pace.enter()
    assert pace.is_full(SIZE)
    waiting = [asyncio.create_task(pace.room()) for _ in range(2)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    pace.leave(SIZE, 0)
    await asyncio.gather(*waiting)
    assert not pace.is_full(SIZE)
