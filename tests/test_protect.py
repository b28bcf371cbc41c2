"""`engine.protect` against a set of pages."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from aiouffd.engine import protect
from aiouffd.engine.protect import WrittenPages
from aiouffd.ranges import Range

if TYPE_CHECKING:
    import pytest

PAGE = 4096
PAGES = 40
_ends = st.tuples(st.integers(0, PAGES * PAGE + PAGE), st.integers(0, PAGES * PAGE + PAGE)).map(sorted)


def whole(start: int, end: int) -> set[int]:
    """Return the pages that lie within [start, end), of those that there are."""
    return set(range(-(-start // PAGE), min(end // PAGE, PAGES)))


@given(st.sets(st.integers(0, PAGES - 1)), _ends, _ends)
def test_it_is_a_set_of_pages(noted: set[int], asked: list[int], forgotten: list[int]) -> None:
    """Whole pages that were not noted are clean; the last, partial page of a region counts as a page."""
    with WrittenPages.create(PAGES * PAGE - 1, PAGE) as written:
        for page in noted:
            written.note(page * PAGE + 7)
        assert len(written) == PAGES * PAGE
        found = {page for item in written.clean(*asked) for page in range(item.start // PAGE, item.end // PAGE)}
        assert found == whole(*asked) - noted
        low, high = (end & -PAGE for end in forgotten)
        written.forget(low, high)
        assert {page for page in range(PAGES) if page * PAGE in written} == noted - whole(low, high)


@given(st.sets(st.integers(0, PAGES - 1)), st.sets(st.integers(0, PAGES - 1)), st.integers(1, 9), st.integers(1, 5))
def test_what_is_begun_is_saved_once(noted: set[int], again: set[int], size: int, count: int) -> None:
    """In order, a little at a time. What is written again meanwhile stays, and what was not saved."""
    with WrittenPages.create(PAGES * PAGE, PAGE) as written:
        for page in noted:
            written.note(page * PAGE)
        at, begun, failed = 0, list[int](), set[int]()
        while runs := written.begin(at, PAGES * PAGE, size * PAGE, count):
            pages = [page for low, high in runs for page in range(low // PAGE, high // PAGE)]
            assert len(runs) <= count
            assert len(pages) <= size
            at, begun = runs[-1][1], begun + pages
            assert all(page * PAGE in written for page in pages)
            for page in again.intersection(pages):
                written.note(page * PAGE)
            saved = len(failed) > 2 or len(pages) != 2
            written.end(runs[0][0], at, saved=saved)
            failed |= set() if saved else set(pages)
        assert begun == sorted(noted)
        assert {page for page in range(PAGES) if page * PAGE in written} == noted & again | failed


def test_a_run_is_found_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the notes are cut to be looked at."""
    monkeypatch.setattr(protect, "_PART", 4)
    with WrittenPages.create(PAGES * PAGE, PAGE) as written:
        for first, end in ((0, 2), (3, 9), (11, 12), (15, 17), (39, 40)):
            written.note(first * PAGE, (end - first) * PAGE)
        runs = [(low // PAGE, high // PAGE) for low, high in written.runs(PAGE, PAGES * PAGE)]
        assert runs == [(1, 2), (3, 5), (5, 9), (11, 12), (15, 17), (39, 40)]
        assert written.clean(0, 10 * PAGE) == [Range(2 * PAGE, PAGE), Range(9 * PAGE, PAGE)]
        losses = written.losses
        written.forget(12 * PAGE, 15 * PAGE)
        assert written.losses == losses
        written.forget(12 * PAGE, 16 * PAGE)
        assert written.losses > losses


def test_notes_are_shared_and_holes_are_clean() -> None:
    """By whoever has the descriptor. What no note was made of takes no memory, and what lies behind is not clean."""
    with WrittenPages.create(1 << 40, PAGE) as written, WrittenPages(os.dup(written.fileno()), PAGE) as other:
        other.note(1 << 39)
        assert (1 << 39) in written
        assert list(written.ranges(0, 1 << 40)) == [Range(1 << 39, PAGE)]
        assert os.fstat(written.fileno()).st_blocks * 512 <= 2 << 20
        other.note(1 << 41)
        assert (1 << 41) in written
        assert written.clean(1 << 40, 1 << 41) == []
