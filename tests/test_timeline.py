"""`report.timeline`: counts by time, and looks at the memory, in bounded memory."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from aiouffd.report.timeline import Film, Timeline


@given(st.lists(st.tuples(st.floats(0, 1e7), st.integers(0, 1 << 40))))
def test_nothing_is_lost_however_long_it_takes(events: list[tuple[float, int]]) -> None:
    """Each count is in the part of its time; there are never more than 200 parts, whose width doubles."""
    timeline = Timeline(2)
    for at, count in events:
        timeline.add(at, at, (count, 1))
        assert len(timeline.rows) <= 200
    assert timeline.width in [0.1 * 2**power for power in range(60)]
    expected: dict[int, list[int]] = {}
    for at, count in events:
        row = expected.setdefault(int(at / timeline.width), [0, 0])
        row[0] += count
        row[1] += 1
    assert {index: row for index, row in enumerate(timeline.rows) if row[1]} == expected


def test_what_nobody_could_look_at_is_spread() -> None:
    """Over all parts since the last look; what comes as it should is in its own."""
    timeline = Timeline(1, width=1.0)
    timeline.add(0.5, 1.5, [7])
    timeline.add(1.5, 5.5, [9])
    assert timeline.rows == [[0], [8], [2], [2], [2], [2]]
    timeline.add(5.5, 1000.0, [10**9])
    assert sum(row[0] for row in timeline.rows) == 16 + 10**9
    assert all(row[0] > 10**9 // 200 for row in timeline.rows[1:])


def test_neighbors_are_joined_when_it_is_full() -> None:
    """An odd one at the end stays alone."""
    timeline = Timeline(1, width=1.0)
    for at in (0, 1, 2, 199.5):
        timeline.add(at, at, [1])
    timeline.add(199.5, 200, [5])
    assert (timeline.width, len(timeline.rows)) == (2.0, 101)
    assert [timeline.rows[index] for index in (0, 1, 99, 100)] == [[2], [1], [1], [5]]
    timeline.add(800, 801, [1])
    assert (timeline.width, timeline.rows[0]) == (8.0, [3])


def test_a_film_keeps_the_first_look_and_the_last() -> None:
    """Every second one is dropped when there are too many; what is hardly there is shown, and all is all."""
    film = Film(1.0)
    for at in range(1000):
        if at >= film.due or at == 999:
            film.add(float(at), [0.0, 1e-9, at / 1000, 1.0], 0.0)
        assert len(film.looks) <= 96
    assert (film.looks[0], film.looks[-1]) == ((0.0, [0, 1, 0, 100]), (999.0, [0, 1, 100, 100]))
    times = [at for at, _ in film.looks]
    assert len(times) > 48
    assert max(later - sooner for sooner, later in itertools.pairwise(times)) <= 32
    film.add(1000.0, [], 0.5)
    assert film.due == 1250.0
