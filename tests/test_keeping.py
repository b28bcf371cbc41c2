"""`engine.ahead.keeping`: how a recording comes to carry bytes."""

from __future__ import annotations

import os
from array import array
from typing import TYPE_CHECKING

import pytest
from carried import SIZE, carried, made
from pattern import PAGE, Pattern, content

import aiouffd
from aiouffd.engine.ahead.keeping import keep_pages, save_with_pages
from aiouffd.engine.ahead.merging import merged
from aiouffd.engine.ahead.trace import Trace
from aiouffd.engine.serve.bounds import Limits
from aiouffd.errors import TraceError

if TYPE_CHECKING:
    from pathlib import Path


def test_a_recording_stays_where_its_pages_cannot_be_read(tmp_path: Path) -> None:
    """It has no pages then."""
    path, _ = made(tmp_path, [1, 2], most=0)
    assert not carried(path)
    changed = aiouffd.FileSource(tmp_path / "image")
    os.utime(tmp_path / "image", ns=(1, 1))
    with pytest.raises(aiouffd.SourceError, match="was written"):
        keep_pages(path, changed, 1 << 20, Limits(retries=0))
    assert list(Trace.load(path).offsets) == [PAGE, 2 * PAGE]
    assert not (tmp_path / "trace.part").exists()


def test_a_source_is_closed_also_where_the_recording_cannot_be_read(tmp_path: Path) -> None:
    """It is a copy that nobody else has."""
    closed = []

    class Closes(Pattern):
        async def aclose(self) -> None:
            closed.append(self)

    (tmp_path / "trace").write_bytes(b"no recording")
    for name in ("trace", "nowhere"):
        with pytest.raises((TraceError, OSError)):
            keep_pages(tmp_path / name, Closes(SIZE), 1 << 20, Limits())
    assert len(closed) == 2


def test_merging_keeps_what_is_there(tmp_path: Path) -> None:
    """Of the version that the last one has; a unit that is damaged is read again, or left out."""
    first, _ = made(tmp_path, [1, 2, 3])
    one = Trace.load(first)
    other = Trace.load(made(tmp_path, [9, 2])[0])
    whole = merged([("one", one), ("other", other)])
    assert whole.pages is None
    both = tmp_path / "both"
    assert save_with_pages(whole, both, [one, other], 1 << 20) == 4
    assert carried(both) == {page: content(page * PAGE, PAGE) for page in (1, 2, 3, 9)}
    assert save_with_pages(whole, both, [one, other], 0) == 0
    assert Trace.load(both).pages is None
    os.utime(tmp_path / "image", ns=(1, 1))
    later = Trace.load(made(tmp_path, [5])[0])
    assert save_with_pages(merged([("one", one), ("later", later)]), both, [one, later], 1 << 20) == 1
    assert set(carried(both)) == {5}


def test_those_that_are_carried_already_are_not_read_again(tmp_path: Path) -> None:
    """Only the others are, each once."""

    class Counting:
        size, identity = SIZE, ("counting",)
        read_of: list[int] = []  # noqa: RUF012

        async def read(self, offset: int, length: int) -> bytes:
            self.read_of.extend(range(offset // PAGE, (offset + length) // PAGE))
            return content(offset, length)

    path = tmp_path / "trace"
    Trace(PAGE, SIZE, array("Q", [PAGE, 2 * PAGE])).save(path)
    assert keep_pages(path, Counting(), 1 << 20, Limits()) == 2
    before = Trace.load(path)
    Trace(PAGE, SIZE, array("Q", [3 * PAGE, 2 * PAGE, PAGE, 4 * PAGE])).save(path)
    assert keep_pages(path, Counting(), 1 << 20, Limits(), [before]) == 4
    assert Counting.read_of == [1, 2, 3, 4]
    assert carried(path) == {page: content(page * PAGE, PAGE) for page in (1, 2, 3, 4)}
