"""`report.charts`: pictures that stretch."""

from __future__ import annotations

import base64
import io
import re
from xml.etree import ElementTree as ET

from PIL import Image

from aiouffd.report.charts import bars, film


def test_bars_are_stacked_up_to_the_largest() -> None:
    """In parts of a hundred; what is nothing is not drawn; titles are escaped."""
    root = ET.fromstring(bars([[1, 3], [0, 0], [2, 0]], ["<a>", "b", "c"], "what <it> is", [(1.5, "died & came")]))
    assert (root.get("viewBox"), root.get("preserveAspectRatio")) == ("0 0 3 100", "none")
    assert root.get("aria-label") == "what <it> is"
    assert [title.text for title in root.iter("title")] == ["<a>", "c", "died & came"]
    drawn = [tuple(one.get(name) for name in ("class", "x", "y", "height")) for one in root.iter("rect")]
    assert drawn == [("c0", "0", "75", "25"), ("c1", "0", "0", "75"), ("c0", "2", "50", "50")]
    assert [path.get("d") for path in root.iter("path")] == ["M1.5 0V100"]
    assert ET.fromstring(bars([], [], "nothing")).get("viewBox") == "0 0 1 100"


def pixels(html: str) -> Image.Image:
    """Return the image of an element."""
    found = re.search(r'src="data:image/png;base64,([^"]+)"', html)
    assert found is not None
    return Image.open(io.BytesIO(base64.b64decode(found[1]))).convert("RGBA")


def test_a_film_shows_what_had_come_when() -> None:
    """Offsets downwards, time to the right: what has come stays until a look says otherwise."""
    image = pixels(film([(0.0, [0, 0]), (5.0, [100, 0]), (7.5, [50, 100])], 10.0, "<x>"))
    assert image.size == (120, 2)
    opaque = [[image.getpixel((x, y))[3] for x in (0, 59, 60, 89, 90, 119)] for y in (0, 1)]  # type: ignore[index]
    assert opaque == [[0, 255, 255, 127, 127, 127], [0, 0, 0, 255, 255, 255]]
    assert image.getpixel((119, 1)) == (31, 119, 180, 255)
    assert 'alt="&lt;x&gt;"' in film([(0.0, [1])], 0.0, "<x>")


def test_a_film_of_a_region_that_grew() -> None:
    """It has had fewer cells before, or none."""
    image = pixels(film([(0.0, []), (1.0, [0, 100]), (2.0, [100, 100, 0, 0])], 3.0, "x"))
    assert image.size == (120, 4)
    assert [image.getpixel((50, y))[3] for y in range(4)] == [0, 0, 255, 255]  # type: ignore[index]
    assert [image.getpixel((119, y))[3] for y in range(4)] == [255, 255, 0, 0]  # type: ignore[index]
