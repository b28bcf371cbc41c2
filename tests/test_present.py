"""`engine.present` against a set of integers."""

from __future__ import annotations

import itertools
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.engine import present
from aiouffd.engine.present import PresentPages
from aiouffd.ranges import RangeSet

PAGE = 4096
LAST = 2000  # pages, of four chunks

_ends = st.tuples(st.integers(0, LAST), st.integers(0, LAST)).map(sorted)


@given(
    st.lists(st.tuples(st.sampled_from(["add", "remove", "claim"]), _ends, st.floats(0, 0.999)), max_size=30),
    st.lists(_ends, min_size=1, max_size=5),
)
def test_it_is_a_set_of_pages(steps: list[tuple[str, list[int], float]], asked: list[list[int]]) -> None:
    """Added, removed and claimed in any order, within and across chunks."""
    pages, model = PresentPages(PAGE), set[int]()
    for kind, (low, high), place in steps:
        if kind == "add":
            pages.add(low * PAGE, high * PAGE)
            model |= set(range(low, high))
        elif kind == "remove":
            pages.remove(low * PAGE, high * PAGE)
            model -= set(range(low, high))
        elif low < high:
            at = low + int((high - low) * place)
            model.discard(at)
            begin = end = at
            while begin > low and begin - 1 not in model:
                begin -= 1
            while end < high and end not in model:
                end += 1
            assert pages.claim(at * PAGE, low * PAGE, high * PAGE) == (begin * PAGE, (end - begin) * PAGE)
            model |= set(range(begin, end))
    for low, high in asked:
        found = pages.missing(low * PAGE, high * PAGE)
        assert [page for start, length in found for page in range(start // PAGE, (start + length) // PAGE)] == [
            page for page in range(low, high) if page not in model
        ]
        assert all(length > 0 for _, length in found)
        assert all(one + length < other for (one, length), (other, _) in itertools.pairwise(found))
        assert all((page * PAGE in pages) == (page in model) for page in (low, high))


def test_all_is_forgotten_at_once() -> None:
    """Of whatever size: a defect of a source makes all doubtful."""
    pages = PresentPages(PAGE)
    pages.add(0, PAGE)
    pages.add(1 << 40, (1 << 40) + PAGE)
    pages.remove(0, sys.maxsize)
    assert 0 not in pages
    assert 1 << 40 not in pages


def test_memory_stays_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest chunks are forgotten where there are too many; the newest are known."""
    monkeypatch.setattr(present, "_MAX_CHUNKS", 4)
    pages = PresentPages(PAGE)
    for chunk in range(10):
        pages.add(chunk * 512 * PAGE, (chunk * 512 + 1) * PAGE)
    assert len(pages._chunks) == 4
    assert [chunk * 512 * PAGE in pages for chunk in range(10)] == [False] * 6 + [True] * 4
    assert pages.claim(0, 0, 2 * PAGE) == (0, 2 * PAGE)
    assert len(pages._chunks) == 4


EDGES = (0, 1, 2, 511, 512, 513, 1023, 1024, 1025, 1535, 1536, 2048)
INTERVALS = list(itertools.combinations(EDGES, 2))


def missing(model: RangeSet, low: int, high: int) -> list[tuple[int, int]]:
    """Return the gaps of a set of pages."""
    return [(gap.start * PAGE, gap.length * PAGE) for gap in model.gaps(low, high)]


@pytest.mark.parametrize("added", INTERVALS)
def test_each_edge_of_a_chunk(added: tuple[int, int]) -> None:
    """Against the same ranges without chunks: added, removed, claimed, and asked for."""
    for low, high in INTERVALS:
        pages, model = PresentPages(PAGE), RangeSet()
        pages.add(added[0] * PAGE, added[1] * PAGE)
        model.add(*added)
        assert pages.missing(low * PAGE, high * PAGE) == missing(model, low, high)
        pages.remove(low * PAGE, high * PAGE)
        model.remove(low, high)
        assert pages.missing(0, 2100 * PAGE) == missing(model, 0, 2100)
        assert all((page * PAGE in pages) == (page in model) for page in (*added, low, high, high - 1))
        pages.add(added[0] * PAGE, added[1] * PAGE)
        model.add(*added)
        at = (low + high) // 2
        model.remove(at, at + 1)
        (claimed,) = [gap for gap in model.gaps(low, high) if at in gap]
        assert pages.claim(at * PAGE, low * PAGE, high * PAGE) == (claimed.start * PAGE, claimed.length * PAGE)
        model.add(claimed.start, claimed.end)
        assert pages.missing(0, 2100 * PAGE) == missing(model, 0, 2100)


def test_nothing_is_kept_for_an_empty_range() -> None:
    """Nor for one that was asked for, or removed."""
    pages = PresentPages(PAGE)
    pages.add(5 * PAGE, 5 * PAGE)
    pages.remove(0, 4096 * PAGE)
    assert pages.missing(5 * PAGE, 5 * PAGE) == []
    assert 7 * PAGE not in pages
    assert not pages._chunks


@given(st.lists(st.lists(st.integers(0, LAST), max_size=20), max_size=5))
def test_single_pages_are_added_once(batches: list[list[int]]) -> None:
    """Those that are new are told, in order."""
    pages, model = PresentPages(PAGE), dict[int, None]()
    pages.add(7 * PAGE, 9 * PAGE)
    model.update({7: None, 8: None})
    for batch in batches:
        fresh = [page for page in dict.fromkeys(batch) if page not in model]
        assert pages.add_pages(page * PAGE for page in batch) == [page * PAGE for page in fresh]
        model.update(dict.fromkeys(fresh))
    assert all((page * PAGE in pages) == (page in model) for page in range(LAST + 1))
