"""`engine.protect` against a set of pages."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from aiouffd.engine.protect import WrittenPages
from aiouffd.ranges import Range

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
