"""`ranges` against a plain set of integers."""

from __future__ import annotations

import itertools
import platform
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aiouffd.ranges import Range, RangeSet, align_down, align_up, batched, joined, pieces

_operation = st.tuples(st.sampled_from(["add", "remove"]), st.integers(0, 60), st.integers(0, 20))


@given(st.lists(_operation, max_size=40), st.integers(0, 60), st.integers(0, 30))
@example([("add", 0, 2)], 1, 0)
def test_a_range_set_is_a_set(operations: list[tuple[str, int, int]], start: int, length: int) -> None:
    """After any additions and removals: membership, gaps and total are the model's; ranges are disjoint."""
    ranges, model = RangeSet(), set[int]()
    for name, low, size in operations:
        getattr(ranges, name)(low, low + size)
        (model.update if name == "add" else model.difference_update)(range(low, low + size))
    assert {value for item in ranges for value in range(item.start, item.end)} == model
    assert all((value in ranges) == (value in model) for value in range(90))
    assert ranges.total == len(model)
    listed = list(ranges)
    assert all(before.end < after.start for before, after in itertools.pairwise(listed))
    asked = set(range(start, start + length))
    assert {value for gap in ranges.gaps(start, start + length) for value in range(gap.start, gap.end)} == asked - model
    assert ranges.touches(start, start + length) == bool(asked & model)
    assert RangeSet(ranges) == ranges


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(1, 5)), max_size=100))
def test_a_bounded_set_forgets_and_never_invents(additions: list[tuple[int, int]]) -> None:
    """With a limit it holds at most so many ranges, and only what was added."""
    ranges, model = RangeSet(limit=5), set[int]()
    for start, length in additions:
        ranges.add(start, start + length)
        model.update(range(start, start + length))
        assert len(ranges) <= 5
    assert {value for item in ranges for value in range(item.start, item.end)} <= model


@given(st.integers(0, 1 << 60), st.sampled_from([1, 4096, 2 << 20]))
def test_alignment(value: int, alignment: int) -> None:
    """Down and up enclose the value, by less than the alignment."""
    assert align_down(value, alignment) <= value <= align_up(value, alignment)
    assert align_down(value, alignment) % alignment == align_up(value, alignment) % alignment == 0
    assert align_up(value, alignment) - align_down(value, alignment) in (0, alignment)


def test_a_range_is_half_open() -> None:
    """Its end is the first integer behind it."""
    item = Range(10, 5)
    assert (item.end, 10 in item, 14 in item, 15 in item) == (15, True, True, False)
    assert str(item) == "[0xa, 0xf)"


def test_ranges_have_an_order() -> None:
    """By their beginning, then by their length; other things have none with them."""
    first, longer, second = Range(0, 1), Range(0, 2), Range(1, 1)
    assert sorted([second, longer, first]) == [first, longer, second]
    assert first < longer <= second > longer >= first
    with pytest.raises(TypeError, match="not supported"):
        _ = first < (0, 2)  # type: ignore[operator]


def test_an_end_in_place_of_a_length_is_refused() -> None:
    """Of addresses, where it cannot be a length; `between` takes an end. So are negative numbers."""
    start = 0x7F12_3456_7000 if platform.machine() == "x86_64" else 0xFFFF_1234_5000
    assert Range.between(start, start + 4096) == Range(start, 4096)
    for wrong in ((start, start + 4096), (-1, 4), (0, -4)):
        with pytest.raises(ValueError, match=r"end passed as the length.*Range\.between"):
            Range(*wrong)
    with pytest.raises(ValueError, match="negative"):
        Range.between(8, 4)
    assert Range(0xFFFF_FFFF_FF60_0000, 4096).end == 0xFFFF_FFFF_FF60_1000  # the kernel's page for vsyscalls


def test_a_range_set_says_what_it_holds() -> None:
    """For errors and logs."""
    assert repr(RangeSet([Range(0, 16), Range(32, 16)])) == "RangeSet([[0x0, 0x10), [0x20, 0x30)])"
    assert repr(RangeSet()) == "RangeSet([])"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ([(0, 4)], [(0, 4)], True),
        ([(0, 4)], [(0, 5)], False),
        ([(1, 4)], [(0, 4)], False),
        ([(0, 4)], [(0, 2), (3, 4)], False),
    ],
)
def test_sets_are_equal_that_hold_the_same(
    one: list[tuple[int, int]], other: list[tuple[int, int]], same: bool
) -> None:
    """And nothing else is."""
    first, second = (RangeSet(Range.between(*ends) for ends in both) for both in (one, other))
    assert (first == second) is same
    assert first != one


def test_pieces_end_at_multiples_of_their_size() -> None:
    """In whole alignments, and with the range."""
    assert list(pieces(5, 23, 1, 8)) == [(5, 3), (8, 8), (16, 7)]
    assert list(pieces(8, 24, 8, 8)) == [(8, 8), (16, 8)]
    assert list(pieces(8, 8, 1, 8)) == []


def test_removing_touches_only_what_is_removed() -> None:
    """At both ends of a range, around several, and nothing at all."""
    for start, end, left in (
        (0, 4, [(4, 8), (10, 12)]),
        (6, 8, [(0, 6), (10, 12)]),
        (8, 10, [(0, 8), (10, 12)]),
        (2, 11, [(0, 2), (11, 12)]),
        (4, 4, [(0, 8), (10, 12)]),
        (5, 3, [(0, 8), (10, 12)]),
        (0, 12, []),
    ):
        ranges = RangeSet([Range.between(0, 8), Range.between(10, 12)])
        ranges.remove(start, end)
        assert [(item.start, item.end) for item in ranges] == left


def test_what_a_set_touches() -> None:
    """Ranges beside its own are not touched."""
    ranges = RangeSet([Range.between(4, 8), Range.between(10, 12)])
    touched = [ranges.touches(*ends) for ends in ((0, 4), (0, 5), (7, 8), (8, 10), (9, 11), (12, 20))]
    assert touched == [False, True, True, False, True, False]
    assert [str(gap) for gap in ranges.gaps(4, 12)] == ["[0x8, 0xa)"]


@given(st.lists(st.integers(), max_size=20), st.integers(1, 8))
def test_batches(items: list[int], most: int) -> None:
    """All items, in their order; each batch but the last is full, and none is empty. An iterator is no different."""
    some = list(batched(items, most))
    assert list(itertools.chain.from_iterable(some)) == items
    assert [len(batch) for batch in some[:-1]] == [most] * (len(some) - 1)
    assert all(some)
    assert list(batched(iter(items), most)) == some


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9))), st.integers(0, 9))
def test_parts_with_little_between_them_are_one(steps: list[tuple[int, int]], gap: int) -> None:
    """All that was in a part is in one; what lies between two of them is more than the gap."""
    parts, at = list[tuple[int, int]](), 0
    for distance, length in steps:
        parts.append((at + distance, length))
        at += distance + length
    found = joined(parts, gap)
    wanted = {value for start, length in parts for value in range(start, start + length)}
    wanted |= {
        value for (start, length), (after, _) in pairwise(parts) if after - start - length <= gap
        for value in range(start + length, after)
    }  # fmt: skip
    assert {value for start, length in found for value in range(start, start + length)} == wanted
    assert all(after - start - length > gap for (start, length), (after, _) in pairwise(found))
