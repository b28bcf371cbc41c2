"""`sources.concat`: several sources as one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pattern import PAGE, Sometimes, content

import aiouffd
from aiouffd.sources.concat import ConcatSource

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 256 * PAGE


async def test_several_sources_as_one(tmp_path: Path) -> None:
    """Each from a multiple of 2 MiB on, with something in between; located, read at once, or later, as each can."""
    path = tmp_path / "file"
    path.write_bytes(content(0, SIZE))
    whole = ConcatSource([aiouffd.FileSource(path), Sometimes(3 << 20), aiouffd.BufferSource(content(0, PAGE))])
    assert whole.starts == [0, 2 << 20, 6 << 20]
    assert whole.size == 8 << 20
    assert whole.locate(5 * PAGE, PAGE) is not None
    assert await whole.read(5 * PAGE, PAGE) == content(5 * PAGE, PAGE)
    assert await whole.read((2 << 20) + 5 * PAGE, PAGE) == content(5 * PAGE, PAGE)
    assert bytes(await whole.read(6 << 20, PAGE)) == content(0, PAGE)
    with pytest.raises(aiouffd.SourceError, match="not today"):
        await whole.read((2 << 20) + PAGE, PAGE)
    await whole.aclose()
