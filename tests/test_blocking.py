"""`blocking`: the loops of async tests, and the watch over the package's code."""

from __future__ import annotations

import asyncio
import contextlib
import time
import types
from pathlib import Path

import pytest
from blockbuster import BlockingError
from blocking import loop_factories, no_blocking

from aiouffd import TraceError
from aiouffd.engine.ahead.trace import Trace


@pytest.mark.parametrize("buffering", [-1, 0])
async def test_code_of_the_package_that_blocks_the_loop_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffering: int
) -> None:
    """Reading a file on the loop raises in code of the package; the test's own code may do it.

    `Path.read_bytes` reads with a buffer before Python 3.14, and without one since.
    """

    def read_bytes(path: Path) -> bytes:
        with path.open("rb", buffering) as file:
            return file.read()

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    path = tmp_path / "trace"
    path.write_bytes(b"x" * 100)
    with pytest.raises(BlockingError):
        Trace.load(path, 4096)
    with pytest.raises(TraceError):
        await asyncio.to_thread(Trace.load, path, 4096)


@pytest.mark.parametrize("watched", [False, True])
def test_plain_tests_are_not_watched(watched: bool) -> None:
    """The detector replaces functions of the whole process, so it is active in async tests only."""
    with no_blocking() if watched else contextlib.nullcontext():
        assert isinstance(time.sleep, types.BuiltinFunctionType) is not watched


async def test_each_loop_is_used(request: pytest.FixtureRequest) -> None:
    """The name in the test's id is that of the loop that runs it."""
    name = next(name for name in loop_factories() if name in request.node.name)
    assert type(asyncio.get_running_loop()).__module__.partition(".")[0] == name
