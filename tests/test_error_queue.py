"""The queue of errors that nobody has raised yet."""

from __future__ import annotations

import asyncio

import pytest

from aiouffd.errors import ClosedError, PagerDiedError, PagerError
from aiouffd.monitor.error_queue import ErrorQueue


def nothing() -> None:
    """More errors may come."""


def left() -> None:
    """No more errors can come."""
    raise ClosedError("left")


async def test_each_error_is_raised_once_and_in_order() -> None:
    """Whether they came before or while it was waited for, and from whichever thread."""
    queue = ErrorQueue()
    queue.put(PagerError("one"))
    with pytest.raises(PagerError, match="one"):
        await queue.wait(nothing)
    waiting = asyncio.ensure_future(queue.wait(nothing))
    await asyncio.sleep(0)
    await asyncio.to_thread(queue.put, PagerError("two"))
    with pytest.raises(PagerError, match="two"):
        await waiting
    queue.raise_next()


async def test_two_who_wait_get_an_error_each() -> None:
    """None is raised twice."""
    queue = ErrorQueue()
    waiting = [asyncio.ensure_future(queue.wait(nothing)) for _ in range(2)]
    await asyncio.sleep(0)
    queue.put(PagerError("one"))
    done, still = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert (len(done), len(still)) == (1, 1)
    queue.put(PagerError("two"))
    await asyncio.wait(still)
    assert sorted(str(task.exception()) for task in waiting) == ["one", "two"]


async def test_what_came_first_is_raised_before_the_end() -> None:
    """An error that was kept is not lost when no more can come."""
    queue = ErrorQueue()
    queue.put(PagerError("one"))
    with pytest.raises(PagerError, match="one"):
        await queue.wait(left)
    with pytest.raises(ClosedError):
        await queue.wait(left)


async def test_who_waits_is_woken_to_look_again() -> None:
    """The end of the Monitor is such a reason; canceling leaves nothing behind."""
    queue = ErrorQueue()
    ended: list[bool] = []

    def check() -> None:
        if ended:
            left()

    waiting = asyncio.ensure_future(queue.wait(check))
    canceled = asyncio.ensure_future(queue.wait(check))
    await asyncio.sleep(0)
    canceled.cancel()
    ended.append(True)
    queue.wake()
    with pytest.raises(ClosedError):
        await waiting
    with pytest.raises(asyncio.CancelledError):
        await canceled
    assert not queue._waiters


def test_a_flood_is_bounded_but_for_the_last_word() -> None:
    """A thousand errors are kept, and the pager's death."""
    queue = ErrorQueue()
    for number in range(1500):
        queue.put(PagerError(str(number)))
    queue.put(PagerDiedError("given up"))
    kept = []
    while len(queue._errors):
        with pytest.raises(PagerError) as caught:
            queue.raise_next()
        kept.append(str(caught.value))
    assert kept[:2] == ["0", "1"]
    assert len(kept) == 1001
    assert "given up" in kept[-1]
