"""`engine.clock` against a dictionary of pages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aiouffd.engine.clock import Clock

PAGE = 4096
LIMIT = 64 * PAGE  # blocks of four pages
_ends = st.tuples(st.integers(0, 200), st.integers(0, 200)).map(sorted)


@given(st.lists(st.tuples(st.booleans(), _ends), max_size=40))
def test_it_counts_pages(steps: list[tuple[bool, list[int]]]) -> None:
    """Whatever comes and goes, each page counts once; and all of it can be dropped."""
    clock, model = Clock(PAGE, LIMIT), set[int]()
    for came, (low, high) in steps:
        pages = set(range(low, high))
        if came:
            clock.came(low * PAGE, (high - low) * PAGE)
            model |= pages
        else:
            assert clock.gone(low * PAGE, high * PAGE) == len(model & pages) * PAGE
            model -= pages
        assert clock.total == len(model) * PAGE
    for _ in range(2):  # those that came back are passed over once
        for start, end in clock.oldest(0, 0):
            assert clock.gone(start, end)
    assert clock.total == 0


def blocks(clock: Clock, *, drop: bool = True) -> list[int]:
    """Return the numbers of the blocks that would go, in order, and drop them."""
    found = []
    for start, end in clock.oldest(0, 0):
        found.append(start // clock.block)
        if drop:
            clock.gone(start, end)
    return found


def test_what_came_longest_ago_goes_first() -> None:
    """A page that comes makes its block new. What is coming is left out, and what cannot be dropped set aside."""
    clock = Clock(PAGE, LIMIT)
    assert clock.block == 4 * PAGE
    for number in (0, 1, 2, 0):
        clock.came(number * clock.block, PAGE)
    assert [start // clock.block for start, _ in clock.oldest(clock.block, clock.block + PAGE)] == [2, 0]
    assert blocks(clock) == [1]
    clock.came(2 * clock.block + PAGE, PAGE)
    assert blocks(clock) == [2]
    clock.reconsider()
    assert blocks(clock) == [0]


def test_what_came_back_is_spared_once() -> None:
    """A block that is missed after it was dropped is wanted more than one that was never missed."""
    clock = Clock(PAGE, LIMIT)
    for number in range(4):
        clock.came(number * clock.block, PAGE)
    clock.gone(0, clock.block)
    clock.came(0, PAGE)
    clock.came(4 * clock.block, PAGE)
    assert blocks(clock) == [1, 2, 3, 4]
    assert blocks(clock) == [0]


def test_the_size_of_a_block() -> None:
    """2 MiB, or less where the limit is small; a huge page at least."""
    assert [Clock(PAGE, limit).block for limit in (PAGE, 1 << 20, 1 << 40)] == [PAGE, 1 << 16, 2 << 20]
    assert Clock(2 << 20, 4 << 20).block == 2 << 20
