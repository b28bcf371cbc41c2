"""A file on a file system that does not answer: no call on the event loop waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING

import fuse
import pytest
from pattern import PAGE, content
from scenario import play

import aiouffd

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 64 * PAGE

pytestmark = pytest.mark.skipif(fuse.possible() is not None, reason=str(fuse.possible()))


async def asked(directory: str) -> None:
    """Ask a source for everything that the engine asks on its loop; a call that waits never returns."""
    with fuse.mounted(directory, content(0, SIZE)) as (path, server):
        source = aiouffd.FileSource(path)
        other = aiouffd.FileSource(path)
        other._tells, other.sparse = False, True  # of another owner, with holes
        assert await source.read(0, SIZE) == content(0, SIZE)
        assert source.locate(0, SIZE) is not None
        fuse.silence(server)
        assert source.locate(0, SIZE) is not None
        assert source.page(0, PAGE) is not None
        assert source.read_nowait(0, PAGE) is None
        assert source.blank(0, SIZE, PAGE) == []
        assert source.hole(0, PAGE) == 0
        source.expect(0, SIZE)
        assert other.locate(0, PAGE) is None
        assert other.read_nowait(0, PAGE) is None
        assert other.hole(0, PAGE) == 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await source.read(0, PAGE)  # its attributes are asked for
                raise AssertionError("the file system has answered")
        await source.aclose()
        await other.aclose()
        del source, other  # close(2) waits for FUSE_FLUSH
        print("never waited", flush=True)
    os._exit(0)  # the threads that waited for the file system may not be through yet


def test_nothing_on_the_loop_waits(tmp_path: Path) -> None:
    """All questions are answered from what the kernel knows, or with None."""
    output, _ = play(asked, str(tmp_path))
    assert "never waited" in output
