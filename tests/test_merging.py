"""`engine.ahead.merging`: recordings of several runs made into one."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import attrs
import pytest
from pattern import PAGE

from aiouffd.engine.ahead.merging import merged
from aiouffd.engine.ahead.trace import Trace
from aiouffd.errors import TraceError

if TYPE_CHECKING:
    from aiouffd.engine.ahead.merging import Order

SIZE = 1 << 20
SOURCE = bytes([1]) + bytes(30) + b"x"


def run_of(*pages: int, source: bytes = SOURCE, size: int = SIZE, page_size: int = PAGE) -> Trace:
    """Return a recording of pages, by their numbers."""
    return Trace(page_size, size, array("Q", [page * PAGE for page in pages]), source)


def pages(trace: Trace) -> list[int]:
    """Return the numbers of its pages."""
    return [offset // PAGE for offset in trace.offsets]


RUNS = [("a", run_of(1, 2, 3, 4)), ("b", run_of(9, 3)), ("c", run_of(5, 1, 3, 8, 7, 6, 11, 12))]


@pytest.mark.parametrize(
    ("order", "found"),
    [
        ("union", [1, 5, 9, 2, 3, 8, 7, 6, 4, 11, 12]),
        ("frequency", [3, 1, 5, 9, 2, 8, 7, 6, 4, 11, 12]),
        ("last", [5, 1, 3, 8, 7, 6, 11, 12, 9, 2, 4]),
    ],
)
def test_what_comes_first(order: Order, found: list[int]) -> None:
    """Each page of any run once; how early it was, is a share of its run."""
    assert pages(merged(RUNS, order)) == found
    assert pages(merged(RUNS, order, most=3 * PAGE + 1)) == found[:3]
    assert pages(merged(RUNS, order, at_least=2)) == [page for page in found if page in (1, 3)]
    assert pages(merged(RUNS, order, at_least=4)) == []


def test_what_came_along_in_all_runs_is_marked_still() -> None:
    """What one of them has touched is touched; the others can be left out."""
    one, other = run_of(1, 2, 3), run_of(3, 2, 4)
    runs = [
        ("a", attrs.evolve(one, along=array("Q", [2 * PAGE, 3 * PAGE]))),
        ("b", attrs.evolve(other, along=array("Q", [2 * PAGE, 4 * PAGE]))),
    ]
    assert [offset // PAGE for offset in merged(runs).along] == [2, 4]
    assert pages(merged(runs, touched=True)) == [1, 3]
    assert not merged(runs, touched=True).along


def test_what_they_are_of() -> None:
    """The same source, as far as it is known; one run alone is as it was."""
    unknown = run_of(7, source=bytes(32))
    assert merged([("a", unknown), *RUNS]).source == SOURCE
    assert merged([("a", unknown)]) == unknown
    others = [run_of(1, source=bytes([1]) + bytes(31)), run_of(1, size=2 * SIZE), run_of(1, page_size=2 * PAGE)]
    for other, why in zip(others, ("another source", "another source", "pages of 8192 bytes, not 4096"), strict=True):
        with pytest.raises(TraceError, match=why) as caught:
            merged([*RUNS, ("d", other)])
        assert "'d'" in str(caught.value) or "d:" in str(caught.value)
    with pytest.raises(ValueError, match="nothing to merge"):
        merged([])
