"""`sources.resolve`: from what a user names to a source."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

import aiouffd
from aiouffd.store.cached_source import CachedSource
from aiouffd.store.resolve import as_source

if TYPE_CHECKING:
    from pathlib import Path


def test_as_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(aiouffd.SourceError, match=r"gopher.*or what fsspec knows$"):
        as_source("gopher://x/y")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(aiouffd.SourceError, match=r"not installed: pip install 'aiouffd\[fsspec\]'"):
        as_source("hf://x/y")


@pytest.mark.parametrize("thing", [5, None, aiouffd.Handler(), aiouffd.ZeroSource])
def test_what_names_no_source(thing: object) -> None:
    """It is a TypeError that says what would."""
    with pytest.raises(TypeError, match="is no path, no URL, no buffer and no Source") as caught:
        as_source(thing)
    assert repr(thing) in str(caught.value)


def test_a_cache_is_of_what_is_far(tmp_path: Path) -> None:
    """Objects and snapshots; what is here is read as it is. A folder that is another's is refused."""
    cache = aiouffd.ChunkCache(tmp_path / "cache", 8 << 20)
    (tmp_path / "file").write_bytes(b"data")
    for far in ("https://host/x", str(tmp_path / "x.snap")):
        source = as_source(far, cache=cache, timeout=7.0)
        assert isinstance(source, CachedSource)
        assert source.cache is cache
        assert type(source.source) is type(as_source(far))
    for here in (tmp_path / "file", b"data", aiouffd.ZeroSource(5)):
        assert not isinstance(as_source(here, cache=cache), CachedSource)
        with pytest.raises(TypeError, match="cache= takes a ChunkCache"):
            as_source(here, cache=str(tmp_path))  # type: ignore[arg-type]
    (tmp_path / "cache").chmod(0o755)
    with pytest.raises(PermissionError, match="others may enter"):
        as_source("https://host/x", cache=cache)
