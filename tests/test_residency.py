"""`kernel.residency`: what of a region has come, exactly."""

from __future__ import annotations

import re

import pytest
from pattern import PAGE

import aiouffd
from aiouffd.kernel.residency import picture, residency
from aiouffd.ranges import Range

SIZE = 64 * PAGE + 5


@pytest.mark.parametrize("shared", [False, True])
def test_what_was_touched_has_come(shared: bool) -> None:
    """Neighbours are joined; the last range ends with the region; a part is cut to what was asked for."""
    region = aiouffd.Region(SIZE, shared=shared)
    assert residency(region) == []
    for page in (1, 2, 9, 64):
        region[page * PAGE] = 1
    assert residency(region) == [Range(PAGE, 2 * PAGE), Range(9 * PAGE, PAGE), Range(64 * PAGE, 5)]
    assert residency(region, 2 * PAGE + 3, 8 * PAGE) == [Range(2 * PAGE + 3, PAGE - 3), Range(9 * PAGE, PAGE)]
    assert residency(region, 9 * PAGE + 7, 2) == [Range(9 * PAGE + 7, 2)]
    assert residency(region, 5 * PAGE, 0) == residency(region, 4 * PAGE, 5 * PAGE) == []


def shades(html: str) -> list[float]:
    """Return how dark the cells of a picture are."""
    return [float(shade) for shade in re.findall(r"rgba\(31,119,180,([\d.]+)\)", html)]


def test_a_picture_shows_how_much_of_each_cell_has_come() -> None:
    """A cell is a part of the region, and the last one may be smaller."""
    assert shades(picture(256, [Range(0, 3), Range(254, 2)])) == [1, 0.5] + [0] * 125 + [1]
    assert shades(picture(129, [Range(1, 1), Range(128, 1)])) == [0.5] + [0] * 63 + [1]
    assert shades(picture(1000, [Range(0, 1000)])) == [1] * 125
    assert shades(picture(2, [Range(1, 1)])) == [0, 1]
    assert "1,536 of 4,096 bytes have come" in picture(4096, [Range(0, 1536)])


def test_a_notebook_shows_a_region() -> None:
    """With what has come, and without once it is closed."""
    region = aiouffd.Region(PAGE)
    region[0] = 1
    assert region._repr_html_().startswith(f"<code>&lt;Region {PAGE} bytes at ")
    assert shades(region._repr_html_()) == [1] * 128
    region.close()
    assert shades(region._repr_html_()) == []
