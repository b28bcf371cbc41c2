"""`loops.run`: the watch that it keeps over the package's code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from blockbuster import BlockingError
from loops import run

from aiouffd.engine.ahead.trace import Trace

if TYPE_CHECKING:
    from pathlib import Path


@run
async def test_what_blocks_the_loop_is_found(tmp_path: Path) -> None:
    """A file that is read on the loop, by code of the package, is an error; the test's own code may."""
    path = tmp_path / "trace"
    path.write_bytes(b"x" * 100)
    with pytest.raises(BlockingError):
        Trace.load(path, 4096)
