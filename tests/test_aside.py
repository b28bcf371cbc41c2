"""`store.aside`: a function that blocks, in a thread."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest

from aiouffd.store.aside import aside

if TYPE_CHECKING:
    from aiouffd.store.aside import Progress


async def test_it_returns_and_reports() -> None:
    """What the function does."""
    told = []

    def work(one: int, *, other: int, progress: Progress) -> int:
        progress(1, 2)
        return one + other

    assert await aside(work, 3, other=4, progress=lambda done, whole: told.append((done, whole))) == 7
    assert told == [(1, 2)]


async def test_errors_arrive() -> None:
    """As they were raised."""

    def work(*, progress: Progress) -> None:
        progress(1, 2)
        raise KeyError(5)

    with pytest.raises(KeyError):
        await aside(work)


async def test_canceling_waits_for_the_function() -> None:
    """It ends at its next report: nothing of it goes on behind the caller's back."""
    began, go, ended = threading.Event(), threading.Event(), threading.Event()
    went_on: list[bool] = []

    def work(*, progress: Progress) -> None:
        began.set()
        go.wait()
        try:
            progress(1, 2)
            went_on.append(True)
        finally:
            ended.set()

    task = asyncio.ensure_future(aside(work))
    await asyncio.to_thread(began.wait)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
    assert not went_on
