"""`engine.flight`: cancelation told from others, and the end of tasks."""

from __future__ import annotations

import asyncio
import logging

import pytest
from engine_world import turns
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.engine.flight import Flight, Flights, canceled_from_outside, end_of, spawn, tasks_of
from aiouffd.engine.runs import FOR_FAULT


def test_a_flight_says_what_it_brings() -> None:
    """For logs."""
    flight = Flight(0x2000, 0x5000, 0x1000, 7, FOR_FAULT)
    assert repr(flight) == "<Flight [0x2000, 0x5000) of 0x1000>"
    assert (flight.length, flight.began_ns, flight.purpose, flight.wanted, flight.done) == (
        0x3000,
        7,
        FOR_FAULT,
        {},
        None,
    )


_RANGES = st.tuples(st.integers(0, 20), st.integers(1, 6)).map(lambda pair: (pair[0], sum(pair)))


@given(st.lists(st.tuples(st.sampled_from(["add", "discard", "remove"]), _RANGES), max_size=30), _RANGES)
def test_flights_by_address(steps: list[tuple[str, tuple[int, int]]], looked_at: tuple[int, int]) -> None:
    """As a dictionary of pages would have them."""
    flights, model, entered = Flights(), dict[int, Flight](), list[Flight]()
    for step, (start, end) in steps:
        if step == "add":
            entered.append(Flight(start, end, 0, 0, FOR_FAULT))
            flights.add(entered[-1])
            model |= dict.fromkeys(range(start, end), entered[-1])
        elif step == "discard" and entered:
            gone = entered.pop(start % len(entered))
            flights.discard(gone)
            model = {page: flight for page, flight in model.items() if flight is not gone}
        elif step == "remove":
            cut = flights.remove(start, end)
            assert {page: flight for low, high, flight in cut for page in range(low, high)} == {
                page: model.pop(page) for page in range(start, end) if page in model
            }
    assert [flights.get(page) for page in range(30)] == [model.get(page) for page in range(30)]
    assert [page in flights for page in range(30)] == [page in model for page in range(30)]
    assert set(flights) == set(model.values())
    assert bool(flights) == bool(model)
    start, end = looked_at
    assert flights.touches(start, end) == any(page in model for page in range(start, end))
    gaps = flights.gaps(start, end)
    assert [page for low, high in gaps for page in range(low, high)] == [
        page for page in range(start, end) if page not in model
    ]
    assert all(low < high for low, high in gaps)
    flights.clear()
    assert not flights


async def test_tasks_of_flights() -> None:
    """Each once, though a flight brings several pages; of some ranges only those that touch them."""
    flights = [Flight(start, start + 0x3000, start + 0x10000, 0, FOR_FAULT) for start in (0, 0x3000, 0x6000, 0x9000)]
    tasks = [asyncio.create_task(asyncio.sleep(0)) for _ in flights[1:]]
    for flight, task in zip(flights[1:], tasks, strict=True):
        flight.done = task
    assert sorted(map(id, tasks_of(flights * 2))) == sorted(map(id, tasks))
    assert tasks_of(flights, []) == []
    assert tasks_of(flights, [(0x12000, 0x1000), (0x15000, 0x1000)]) == tasks[:1]
    assert set(tasks_of(flights, [(0x15000, 0x4000)])) == {tasks[0], tasks[1]}
    await asyncio.gather(*tasks)


async def test_a_cancelation_from_outside() -> None:
    """Of the running task; an error, or the cancelation of something that it waited for, is none."""
    told: list[bool] = []

    async def work(inner: bool) -> None:
        waited: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if inner:
            waited.cancel()
        try:
            await waited
        except asyncio.CancelledError as error:
            told.append(canceled_from_outside(error))

    await work(inner=True)
    task = asyncio.create_task(work(inner=False))
    await turns()
    task.cancel()
    await task
    assert told == [False, True]
    assert not canceled_from_outside(ValueError())


def test_without_a_task_it_is_from_outside() -> None:
    """A coroutine that is closed by whoever drops it."""
    told: list[bool] = []

    async def work() -> None:
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError as error:
            told.append(canceled_from_outside(error))
            raise

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(None)

    def step() -> None:
        coroutine = work()
        coroutine.send(None)
        with pytest.raises(asyncio.CancelledError):
            coroutine.throw(asyncio.CancelledError())
        loop.stop()

    loop.call_soon(step)
    loop.run_forever()
    loop.close()
    assert told == [True]


async def test_tasks_are_canceled_and_waited_for() -> None:
    """None at all is no wait."""
    await end_of([])
    ended: list[int] = []

    async def work(number: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(number)

    tasks = {asyncio.create_task(work(number)) for number in range(3)}
    await turns()
    await end_of(tasks)
    assert sorted(ended) == [0, 1, 2]


async def test_a_task_that_does_not_end_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And logged: it may suppress its cancelation."""
    logging.getLogger("aiouffd").propagate = True
    monkeypatch.setattr("aiouffd.engine.flight._CANCEL_TIMEOUT", 0.01)
    through = asyncio.Event()

    async def stubborn() -> None:
        try:
            await through.wait()
        except asyncio.CancelledError:
            await through.wait()

    task = asyncio.create_task(stubborn())
    await turns()
    await end_of([task])
    assert not task.done()
    assert "1 reads or handlers were canceled and go on" in caplog.text
    through.set()
    await task


async def test_a_task_is_held_until_it_ends() -> None:
    """Also one that nobody else refers to: the loop does not hold it. What it returns, or raises, is its own."""
    tasks: set[asyncio.Task[int]] = set()
    spawn(tasks, asyncio.sleep(0, 5))
    (task,) = tasks
    assert await task == 5
    await turns(1)
    assert not tasks
