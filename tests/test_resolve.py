"""`sources.resolve`: from what a user names to a source."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import aiouffd
from aiouffd.store.resolve import as_source

if TYPE_CHECKING:
    from pathlib import Path


def test_as_source(tmp_path: Path) -> None:
    """Paths, URLs, buffers and sources; an unknown scheme is said so."""
    path = tmp_path / "data.bin"
    path.write_bytes(b"data")
    assert isinstance(as_source(str(path)), aiouffd.FileSource)
    assert isinstance(as_source(path), aiouffd.FileSource)
    assert isinstance(as_source(path.as_uri()), aiouffd.FileSource)
    assert isinstance(as_source(bytearray(5)), aiouffd.BufferSource)
    assert isinstance(as_source("s3://bucket/key"), aiouffd.ObjectSource)
    zeros = aiouffd.ZeroSource(5)
    assert as_source(zeros) is zeros
    with pytest.raises(aiouffd.SourceError, match="gopher"):
        as_source("gopher://x/y")


@pytest.mark.parametrize("thing", [5, None, aiouffd.Handler(), aiouffd.ZeroSource])
def test_what_names_no_source(thing: object) -> None:
    """It is a TypeError that says what would."""
    with pytest.raises(TypeError, match="is no path, no URL, no buffer and no Source") as caught:
        as_source(thing)
    assert repr(thing) in str(caught.value)
