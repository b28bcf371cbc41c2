"""`engine.serve.pace`: how many reads ahead are under way."""

from __future__ import annotations

import asyncio
import heapq
import itertools

import pytest

from aiouffd.engine.flight import Flight
from aiouffd.engine.runs import FOR_FAULT
from aiouffd.engine.serve.pace import Pace

MS = 1_000_000
SIZE = 2 << 20


class Source:
    """Answers reads: each takes a way, and its turn on a line that all share. The time is what a `Pace` sees."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0
        self.way = self.turn = 0
        self._free = 0
        self._numbers = itertools.count()
        self._ends: list[tuple[int, int, Flight]] = []  # of those under way: when, and which
        monkeypatch.setattr("aiouffd.engine.serve.pace.perf_counter_ns", lambda: self.now)

    def begin(self, pace: Pace, count: int, size: int = SIZE) -> list[Flight]:
        """Begin reads, and return them."""
        for _ in range(count):
            pace.enter()
        return [Flight(0, size, 0, self.now, FOR_FAULT) for _ in range(count)]

    def answers(self, pace: Pace, count: int, size: int = SIZE) -> int:
        """Have as many reads under way as may be, until so many have ended; return how many these were at most."""
        most = 0
        for _ in range(count):
            while not pace.is_full(size):
                self._free = max(self._free, self.now) + self.turn
                (flight,) = self.begin(pace, 1, size)
                heapq.heappush(self._ends, (self._free + self.way, next(self._numbers), flight))
            most = max(most, pace.under_way)
            end, _, flight = heapq.heappop(self._ends)
            self.now = max(self.now, end)
            pace.leave(flight)
        return most


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Source:
    """Return one that answers at once."""
    return Source(monkeypatch)


@pytest.mark.parametrize("most", [64, 50])
def test_a_source_that_takes_as_long_for_many_gets_many(source: Source, most: int) -> None:
    """Twice as many with each round of answers, up to the bound; the first round is not believed."""
    pace = Pace(most)
    source.way = 5 * MS
    limits = []
    for _ in range(6):
        source.answers(pace, pace.limit(SIZE))
        limits.append(pace.limit(SIZE))
    assert limits == [4, 8, 16, 32, most, most]
    assert source.answers(pace, 2000) == most


def test_a_queue_gains_nothing(source: Source) -> None:
    """Where all that is asked for comes one by one, there are four; eight are tried now and then."""
    pace = Pace(64)
    source.turn = MS
    tried = [source.answers(pace, 4) for _ in range(200)]
    assert (min(tried), max(tried)) == (4, 8)
    assert tried.count(4) > 160


def test_as_many_as_the_line_takes(source: Source) -> None:
    """Behind a way of 10 ms, a line that takes 1 ms for each is used up by eleven."""
    pace = Pace(64)
    source.way, source.turn = 10 * MS, MS
    source.answers(pace, 100)
    assert pace.limit(SIZE) in (8, 16)


def test_answers_that_are_late_make_fewer_of_them(source: Source) -> None:
    """A source that was quick and is slow now has a queue; never below four."""
    pace = Pace(64)
    source.way = MS
    source.answers(pace, 200)
    assert pace.limit(SIZE) == 64
    source.way = 7 * MS
    source.answers(pace, 63 + 14)
    assert pace.limit(SIZE) == 50
    source.answers(pace, 100)
    assert pace.limit(SIZE) == 4


def test_small_reads_are_not_held_against_large_ones(source: Source) -> None:
    """They are quicker."""
    pace = Pace(64)
    source.way = MS // 10
    source.answers(pace, 1, size=4096)
    source.way = 2 * MS
    for _, _, flight in source._ends:
        pace.leave(flight)
    source._ends.clear()
    source.answers(pace, 8)
    assert pace.limit(SIZE) == 8


def test_small_reads_begin_with_many(source: Source) -> None:
    """Eight megabytes take no longer in two thousand pieces; a source that answers one by one shows it soon."""
    pace = Pace(64)
    assert [pace.limit(size) for size in (4096, 64 << 10, 256 << 10, 1 << 20)] == [64, 64, 16, 4]
    source.turn = MS
    source.answers(pace, 200, size=8192)
    assert pace.limit(8192) < 8
    assert pace.limit(4096) == 64


def test_what_is_not_full_says_nothing(source: Source) -> None:
    """A caller that asks for less has few answers, however far the source is."""
    pace = Pace(64)
    for _ in range(100):
        flights = source.begin(pace, 3)
        source.now += MS
        for flight in flights:
            pace.leave(flight)
    assert pace.limit(SIZE) == 4


def test_answers_that_come_together_count_all_the_same(source: Source) -> None:
    """The time in which nothing was asked for does not count: twice as many bring twice as much."""
    pace = Pace(64)
    for round_ in range(6):
        many = pace.limit(SIZE)
        source.now += 10 * round_ * MS
        flights = source.begin(pace, many)
        source.now += 5 * MS
        for flight in flights:
            pace.leave(flight)
    assert pace.limit(SIZE) == 64


def test_it_begins_anew_after_a_while(source: Source) -> None:
    """The quickest read is of another time: the way to the source may be longer now."""
    pace = Pace(64)
    source.way = MS
    source.answers(pace, 100)
    source.now += 11_000 * MS
    source.way = 50 * MS
    source.answers(pace, 1)
    assert pace.limit(SIZE) == 4
    source.answers(pace, 2000)
    assert pace.limit(SIZE) == 64


@pytest.mark.parametrize("most", [0, 1, 2])
def test_a_low_bound_is_kept(source: Source, most: int) -> None:
    """But one read must be possible."""
    pace = Pace(most)
    for source.way in (MS, 9 * MS):
        assert source.answers(pace, 40) == max(most, 1)
    assert pace.limit(SIZE) == max(most, 1)


async def test_room_comes_with_the_end_of_a_read(source: Source) -> None:
    """For all that wait: each looks again."""
    pace = Pace(1)
    (flight,) = source.begin(pace, 1)
    assert pace.is_full(SIZE)
    waiting = [asyncio.create_task(pace.room()) for _ in range(2)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    pace.leave(flight)
    await asyncio.gather(*waiting)
    assert not pace.is_full(SIZE)
