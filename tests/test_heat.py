"""`report.heat`: the picture of a recording."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

from aiouffd.report.heat import heat_map

PAGE = 4096
MIB = 1 << 20


def cells(svg: str) -> list[tuple[float, int, float]]:
    """Return column, row and darkness of what is drawn; the picture is XML without a script."""
    root = ET.fromstring(svg)
    assert {re.sub("{.*}", "", item.tag) for item in root.iter()} <= {"svg", "title", "style", "text", "rect"}
    return [
        ((float(item.get("x", "")) - 90) / 8, (int(item.get("y", "")) - 30) // 8, float(item.get("fill-opacity", "")))
        for item in root.iter()
        if item.get("class") == "h"
    ]


def test_where_and_when() -> None:
    """The order to the right, offsets downwards, the darker the more pages; names are no markup."""
    ahead = heat_map([page * PAGE for page in range(256)], PAGE, MIB, "<b> & c")
    assert "&lt;b&gt; &amp; c: 256 pages of 4,096 bytes, 1.0 MiB of 1.0 MiB" in ahead
    found = cells(ahead)
    assert [row for _, row, _ in found] == sorted(row for _, row, _ in found)
    assert (found[0][:2], found[-1][:2]) == ((0, 0), (95, 63))
    assert max(dark for *_, dark in found) == 1
    back = cells(heat_map([page * PAGE for page in reversed(range(256))], PAGE, MIB, "x"))
    assert (back[0][:2], back[-1][:2]) == ((0, 63), (95, 0))


def test_few_pages_and_none() -> None:
    """A column for each, over the whole width; a source that is smaller than a row."""
    assert cells(heat_map([0, 63 * PAGE], PAGE, 64 * PAGE, "x")) == [(0, 0, 1), (48, 63, 1)]
    assert cells(heat_map([], PAGE, 0, "x")) == []
    assert cells(heat_map([0], PAGE, 10, "x")) == [(0, 0, 1)]
