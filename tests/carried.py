"""Recordings that carry the bytes of pages."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from pattern import PAGE, content

import aiouffd
from aiouffd.engine.ahead.keeping import keep_pages
from aiouffd.engine.ahead.trace import Trace, fingerprint
from aiouffd.engine.serve.bounds import Limits

if TYPE_CHECKING:
    from pathlib import Path

COUNT = 700  # pages of the source; two units and a part of one are 256 pages each
SIZE = COUNT * PAGE - 100


def made(folder: Path, order: list[int], most: int = 1 << 30) -> tuple[Path, aiouffd.FileSource]:
    """Record the pages of a file, in this order; return the recording and the source."""
    image, path = folder / "image", folder / "trace"
    if not image.exists():
        image.write_bytes(content(0, SIZE))
    source = aiouffd.FileSource(image)
    Trace(PAGE, SIZE, array("Q", [page * PAGE for page in order]), fingerprint(source)).save(path)
    keep_pages(path, aiouffd.FileSource(image), most, Limits())
    return path, source


def carried(path: Path) -> dict[int, bytes]:
    """Return the pages whose bytes a recording carries and that have their hash."""
    trace, found = Trace.load(path), dict[int, bytes]()
    for number in range(0 if trace.pages is None else len(trace.pages)):
        assert trace.pages is not None
        unit = trace.pages.load(number)
        for offset, length, _ in () if unit is None else unit.parts:
            for at in range(offset, offset + length, PAGE):
                assert unit is not None
                data = unit.at_hand(at, min(PAGE, SIZE - at))
                assert data is not None
                found[at // PAGE] = bytes(data)
    return found
