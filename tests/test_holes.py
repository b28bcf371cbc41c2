"""`sources.holes`: what is known of a sparse file's holes, while a thread looks them up."""

from __future__ import annotations

import mmap
import os
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.sources.holes import Holes

PAGE = mmap.PAGESIZE
PAGES = 64


@given(st.sets(st.integers(0, PAGES - 1)), st.integers(1, 5))
def test_a_hole_is_what_has_no_data(data: set[int], step: int) -> None:
    """However much has been looked up: below that each page is data or a hole as it was written; behind it, unknown."""
    with tempfile.TemporaryFile() as file:
        file.truncate(PAGES * PAGE)
        for page in data:
            os.pwrite(file.fileno(), b"x", page * PAGE)
        holes = Holes(file.fileno(), PAGES * PAGE)
        while True:
            for page in range(PAGES):
                run = 0
                while page + run < PAGES and (page + run) not in data and (page + run) * PAGE < holes.known:
                    run += 1
                assert holes.at(page * PAGE, PAGES * PAGE) == run * PAGE
                assert holes.at(page * PAGE + 1, 5) == (5 if run else 0)
            if holes.complete:
                break
            holes.look_up(step)
        assert holes.known == PAGES * PAGE
        assert holes.at(PAGES * PAGE, PAGE) == 0


def test_no_bytes_have_no_holes() -> None:
    """There is nothing to look up."""
    holes = Holes(-1, 0)
    assert holes.complete
    assert holes.at(0, 0) == 0


def test_errors_are_the_callers() -> None:
    """A file system that fails."""
    with pytest.raises(OSError, match="Bad file descriptor"):
        Holes(-1, PAGE).look_up(1)


def test_only_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind them nothing is known."""
    monkeypatch.setattr("aiouffd.sources.holes._MAX_EXTENTS", 2)
    with tempfile.TemporaryFile() as file:
        file.truncate(10 * PAGE)
        for page in (1, 3, 5):
            os.pwrite(file.fileno(), b"x", page * PAGE)
        holes = Holes(file.fileno(), 10 * PAGE)
        holes.look_up(100)
        assert holes.complete
        assert holes.known == 4 * PAGE
        assert holes.at(2 * PAGE, 100 * PAGE) == PAGE
        assert holes.at(4 * PAGE, PAGE) == 0
