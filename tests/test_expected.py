"""`pager.process.answers`: what is read before it is asked for. The kernel tests ask all else."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from carried import made
from pattern import PAGE

from aiouffd.engine.ahead.trace import Trace
from aiouffd.engine.options import Service
from aiouffd.errors import TraceError
from aiouffd.pager.process import answers as module
from aiouffd.pager.process.answers import Answers
from aiouffd.pager.process.serialization import Pickles
from aiouffd.pager.process.tenancy import Arrivals

if TYPE_CHECKING:
    from pathlib import Path


def expecting(trace: Trace | None = None) -> Answers:
    """Return what answers; whatever is opened has this recording, and nothing is served."""
    served: Any = SimpleNamespace(arrivals=Arrivals(), find=lambda _: None, take_identity=lambda: 1)
    served.meta = SimpleNamespace(owner=1)

    async def open_origin(*_: object, **__: object) -> Any:
        return SimpleNamespace(identity=1, service=Service(None, trace=trace))

    served.open_origin = open_origin
    served.open = lambda *_: SimpleNamespace(wake_all=lambda: None)
    nothing: Any = None
    return Answers(served, nothing, Pickles.NEVER)


async def expect(answers: Answers, path: Path) -> None:
    """Ask to have the pages of a recording read."""
    file = await asyncio.to_thread(os.open, path, os.O_RDONLY)
    await answers.answer({"op": "expect"}, [file])
    while os.path.exists(f"/proc/self/fd/{file}"):  # noqa: ASYNC110, PTH110 - a thread closes it
        await asyncio.sleep(0.001)


async def test_a_replay_goes_on_with_what_was_read_for_it(tmp_path: Path) -> None:
    """And no other one does."""
    path, _ = await asyncio.to_thread(made, tmp_path, list(range(300)))
    trace = await asyncio.to_thread(Trace.load, path)
    answers = expecting(trace)
    await expect(answers, path)
    (units,) = answers._expected
    while set(units._read) != {0, 1}:  # noqa: ASYNC110 - a thread reads the file
        await asyncio.sleep(0.001)
    answers._replay_expected(None)
    answers._replay_expected(Trace(PAGE, PAGE, trace.offsets))
    assert answers._expected == [units]
    space = {"page_size": PAGE, "features": 0, "token": "x", "own": True, "mappings": []}
    config = os.memfd_create("config")
    os.write(config, b"{}")
    opening = {"op": "open", "token": "x", "own": 1, "space": space, "service": {"token": "y"}, "counts": []}
    null = os.open(os.devnull, os.O_RDONLY)
    await answers.answer(opening, [os.dup(null), config, null])
    os.close(config)
    os.close(null)
    assert trace.pages is not None
    assert (trace.pages.units, answers._expected) == (units, [])
    assert trace.pages.begin() is units
    assert units.is_wanted


async def test_what_is_not_replayed_after_all_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while. A recording without bytes is nothing to read, and none at all is an error."""
    monkeypatch.setattr(module, "_EXPECTED", 0.01)
    answers = expecting()
    path, _ = await asyncio.to_thread(made, tmp_path, [1, 2])
    await expect(answers, path)
    while answers._expected:  # noqa: ASYNC110 - a timer
        await asyncio.sleep(0.001)
    await asyncio.to_thread(lambda: Trace.load(path).save(path))
    await expect(answers, path)
    assert answers._expected == []
    await asyncio.to_thread(path.write_bytes, b"x")
    with pytest.raises(TraceError):
        await expect(answers, path)
