"""`engine.deadlines`: many waits, one timer."""

from __future__ import annotations

import asyncio

import pytest
from blocking import loop_factories

from aiouffd.engine.serve.deadlines import Deadlines


async def wait(deadlines: Deadlines, until: asyncio.Event) -> str:
    """Wait for an event, as long as is allowed; tell how it ended."""
    try:
        with deadlines:
            await until.wait()
    except TimeoutError:
        return "timeout"
    return "done"


def due(deadlines: Deadlines) -> float | None:
    """Return when the timer is up, by the loop's clock."""
    return None if deadlines._timer is None else deadlines._timer.when()


def expire(deadlines: Deadlines) -> None:
    """Be the timer."""
    assert deadlines._timer is not None
    deadlines._timer.cancel()
    deadlines._expire()


async def test_each_wait_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What began later ends later; what is done in time is left alone; one timer is set, for the next."""
    now = [100.0]
    monkeypatch.setattr("aiouffd.engine.serve.deadlines.monotonic", lambda: now[0])
    deadlines, never, soon = Deadlines(50.0), asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    first, good = (asyncio.create_task(wait(deadlines, until)) for until in (never, soon))
    await asyncio.sleep(0)
    assert due(deadlines) == pytest.approx(loop.time() + 50.0, abs=20.0)
    now[0] = 125.0
    second = asyncio.create_task(wait(deadlines, never))
    soon.set()
    assert await good == "done"
    now[0] = 149.9
    expire(deadlines)
    await asyncio.sleep(0)
    assert not first.done()
    assert due(deadlines) == pytest.approx(loop.time() + 0.1, abs=20.0)
    now[0] = 150.0
    expire(deadlines)
    assert await first == "timeout"
    assert not second.done()
    assert due(deadlines) == pytest.approx(loop.time() + 25.0, abs=20.0)
    now[0] = 175.0
    expire(deadlines)
    assert await second == "timeout"
    assert due(deadlines) is None
    assert await wait(deadlines, soon) == "done"
    deadlines.close()


async def test_a_cancellation_from_outside_stays_one() -> None:
    """Whoever cancels a wait gets CancelledError, also when its time is up in the same turn."""
    deadlines, never = Deadlines(0.01), asyncio.Event()
    task = asyncio.create_task(wait(deadlines, never))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    both = asyncio.create_task(wait(deadlines, never))
    await asyncio.sleep(0)
    both.cancel()
    deadlines._expired.add(both)  # as `_expire` does, in the same turn
    both.cancel()
    with pytest.raises(asyncio.CancelledError):
        await both


async def test_a_task_that_timed_out_can_be_used_on() -> None:
    """The cancellation that ended the wait is taken back: the task waits again, and is not canceled."""
    deadlines, never = Deadlines(0.01), asyncio.Event()

    async def twice() -> list[str]:
        answers = [await wait(deadlines, never), await wait(deadlines, never)]
        task = asyncio.current_task()
        assert task is not None
        assert not task.cancelling()
        return answers

    assert await asyncio.create_task(twice()) == ["timeout", "timeout"]


async def test_a_body_that_swallows_the_cancellation_goes_on() -> None:
    """As with asyncio.timeout: who ends in time after all has no TimeoutError, and is not canceled later."""
    deadlines = Deadlines(0.01)
    with deadlines:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            answer = "late, but here"
    assert answer == "late, but here"
    await asyncio.sleep(0.02)


async def test_no_limit_and_close() -> None:
    """None waits for ever; after close nothing is left on the loop."""
    event = asyncio.Event()
    task = asyncio.create_task(wait(Deadlines(None), event))
    await asyncio.sleep(0.02)
    event.set()
    assert await task == "done"

    deadlines = Deadlines(60.0)
    assert await wait(deadlines, event) == "done"
    deadlines.close()
    assert deadlines._timer is None
    assert not deadlines._waiting


def test_a_wait_whose_loop_is_gone_is_destroyed_in_silence(loop: str) -> None:
    """No task does that."""
    waiting = wait(Deadlines(5.0), asyncio.Event())

    async def main() -> None:
        task = asyncio.get_running_loop().create_task(waiting)
        await asyncio.sleep(0)
        task._log_destroy_pending = False  # type: ignore[attr-defined]

    with asyncio.Runner(loop_factory=loop_factories()[loop]) as runner:
        runner.run(main())
    waiting.close()


async def test_a_wait_behind_one_that_does_not_end_has_its_time() -> None:
    """The timer goes on by itself, and a task that stays on is passed over."""
    deadlines, never, through = Deadlines(0.01), asyncio.Event(), asyncio.Event()

    async def stays() -> str:
        with deadlines:
            try:
                await never.wait()
            except asyncio.CancelledError:
                await through.wait()
        return "late, but here"

    first = asyncio.create_task(stays())
    await asyncio.sleep(0.005)
    second = asyncio.create_task(wait(deadlines, never))
    async with asyncio.timeout(60):
        assert await second == "timeout"
    through.set()
    assert await first == "late, but here"
