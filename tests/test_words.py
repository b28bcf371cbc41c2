"""`report.words`: figures as people write them."""

from __future__ import annotations

import pytest

from aiouffd.report.words import duration, often, percent, several, size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1023, "1023 bytes"),
        (1536, "1.5 KiB"),
        (2 << 20, "2.0 MiB"),
        (3 << 50, "3072.0 TiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    """With the largest unit of which there is one, as far as there are units."""
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0 ns"), (9e-10, "1 ns"), (2.5e-6, "2.5 us"), (0.0384, "38 ms"), (9.94, "9.9 s"), (119, "119 s")),
        *((120, "2 min"), (6e6, "100,000 min")),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    """To two digits, or three."""
    assert duration(seconds) == text


def test_percents() -> None:
    """What is not nothing is not shown as nothing."""
    assert [percent(*pair) for pair in ((0, 0), (0, 5), (1, 3), (1, 1000), (1, 10**9), (5, 5))] == [
        *("0 %", "0 %", "33 %", "0.1 %", "0.01 %", "100 %")
    ]


@pytest.mark.parametrize(
    ("count", "text", "how_often"),
    [(0, "0 pages", "0 times"), (1, "1 page", "once"), (2048, "2,048 pages", "2,048 times")],
)
def test_one_is_no_plural(count: int, text: str, how_often: str) -> None:
    """Of a thing, and of how often it was; a word may have a plural of its own."""
    assert several(count, "page") == text
    assert often(count) == how_often
    assert several(count, "process", "processes").endswith("process" if count == 1 else "processes")
