"""`engine.present` against a set of integers."""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from aiouffd.engine import present
from aiouffd.engine.present import PresentPages

if TYPE_CHECKING:
    import pytest

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
