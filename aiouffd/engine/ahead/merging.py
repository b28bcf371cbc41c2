"""Recordings of several runs made into one: which pages to bring, and in which order."""

from __future__ import annotations

from array import array
from collections import Counter
from typing import TYPE_CHECKING, Literal, TypeAlias

import attrs

from aiouffd.engine.ahead.trace import Trace, differ
from aiouffd.errors import TraceError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Order", "merged"]

Order: TypeAlias = Literal["union", "frequency", "last"]
"""What comes first: what any run touched early; what most runs touched; what the last run touched, in its order."""


def merged(
    named: Sequence[tuple[str, Trace]],
    order: Order = "union",
    *,
    at_least: int = 1,
    most: int | None = None,
    touched: bool = False,
) -> Trace:
    """Return one recording made of several, which carries no bytes of pages.

    How early a page was touched is its place in a run, as a share of that run's length: runs of different lengths have
    the same weight.

    Args:
        named: recordings and their names, for errors; the oldest first.
        order: of the pages.
        at_least: leave out the pages that fewer runs touched.
        most: bytes of pages, at most; the last ones are left out. None: no bound.
        touched: leave out the pages that only came along with others.

    Raises:
        TraceError: they are of different sources, sizes or pages.
        ValueError: there are none.
    """
    if not named:
        raise ValueError("there is nothing to merge")
    first = named[0][1]
    for name, trace in named[1:]:
        _check(first, trace, name)
    traces = [trace for _, trace in named]
    runs: Counter[int] = Counter()
    earliest: dict[int, float] = {}
    together: Counter[int] = Counter()  # places, as shares in millionths: their sum is exact
    for trace in traces:
        length = len(trace.offsets)
        for place, offset in enumerate(trace.offsets):
            share = place / length
            runs[offset] += 1
            earliest[offset] = min(earliest.get(offset, 1.0), share)
            together[offset] += round(share * 1_000_000)
    if order == "frequency":
        pages = sorted(runs, key=lambda offset: (-runs[offset], together[offset] / runs[offset], offset))
    else:
        pages = sorted(runs, key=lambda offset: (earliest[offset], offset))
    if order == "last":
        pages = list(dict.fromkeys([*traces[-1].offsets, *pages]))
    pages = [offset for offset in pages if runs[offset] >= at_least]
    along = set(runs).difference(*(set(trace.offsets).difference(trace.along) for trace in traces))
    if touched:
        pages = [offset for offset in pages if offset not in along]
    if most is not None:
        pages = pages[: most // first.page_size]
    known = next((trace.source for trace in traces if trace.source[0]), first.source)
    still = array("Q", [offset for offset in pages if offset in along])
    return attrs.evolve(first, offsets=array("Q", pages), source=known, along=still, pages=None)


def _check(first: Trace, other: Trace, name: str) -> None:
    if other.page_size != first.page_size:
        raise TraceError(name, f"it was recorded with pages of {other.page_size} bytes, not {first.page_size}")
    if other.size != first.size or differ(other.source, first.source):
        raise TraceError(name, "it was recorded from another source, or from another version of it, than the first one")
