"""`sources.repeated`: a line for a server, not for each of its objects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiouffd import ObjectSource, ZeroSource
from aiouffd.sources.repeated import warn

if TYPE_CHECKING:
    import pytest


def test_each_object_is_counted_and_few_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """The first of each server and text, then the 10th and the 100th, with how many there were; no password is told."""
    for number in range(120):
        warn(ObjectSource(f"http://me:secret@host/{number}"), "is odd")
    warn(ObjectSource("http://other/0"), "is odd")
    warn(ObjectSource("http://other/1"), "is even")
    warn(ZeroSource(1), "is odd")
    warn(ZeroSource(2), "is odd")
    assert [record.getMessage() for record in caplog.records] == [
        "ObjectSource('http://host/0') is odd",
        "ObjectSource('http://host/9') is odd: 10 such objects of http://host so far",
        "ObjectSource('http://host/99') is odd: 100 such objects of http://host so far",
        "ObjectSource('http://other/0') is odd",
        "ObjectSource('http://other/1') is even",
        "ZeroSource(1) is odd",
    ]
