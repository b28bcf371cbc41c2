"""`engine.serve.precedence`: faults of all before what is brought ahead for any of them, by order."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

from engine_world import SIZE, Held, World, turns
from pattern import PAGE

from aiouffd.engine.serve.bounds import Limits
from aiouffd.engine.serve.gate import Gate
from aiouffd.engine.serve.precedence import Precedence
from aiouffd.engine.statistics import Counter

MIB = 1 << 20


async def test_one_step_in_each_turn_of_the_loop() -> None:
    """In order, and what is served meanwhile, in between: as often as the loop turns. Who has gone is passed over."""
    precedence, log = Precedence(), list[Any]()

    async def bring(name: str) -> None:
        for step in range(3):
            await precedence.turn()
            log.append((name, step))

    def serve(left: int) -> None:
        log.append("faults")
        if left:
            asyncio.get_running_loop().call_soon(serve, left - 1)

    gone = precedence.turn()
    gone.cancel()
    tasks = [asyncio.create_task(bring(name)) for name in "abc"]
    serve(20)
    await asyncio.gather(*tasks)
    steps = [at for at, item in enumerate(log) if item != "faults"]
    assert [log[at] for at in steps] == [(name, step) for step in range(3) for name in "abc"]
    assert all("faults" in log[one:other] for one, other in pairwise(steps))
    assert not precedence._is_turning


async def test_small_steps_are_made_together() -> None:
    """Eight pages in a turn of the loop, or what is as much together; none passes those that wait."""
    precedence, space = Precedence(), World(0).space
    space.others_wait = lambda _: True
    for _ in range(2):
        assert [precedence.may_step(space, PAGE) for _ in range(9)] == 8 * [True] + [False]
        await asyncio.sleep(0)  # a turn
    assert [precedence.may_step(space, 32 << 10) for _ in range(3)] == [True, True, False]
    await asyncio.sleep(0)
    assert not precedence.may_step(space, 2 * MIB)
    waits = precedence.turn()
    assert not precedence.may_step(space, PAGE)
    await waits
    assert precedence.may_step(space, PAGE)


async def test_more_small_steps_are_made_where_no_thread_waits() -> None:
    """It is looked for one after eight pages each, in all spaces; 32 pages are enough, and eight while one is read."""
    precedence, space, asked = Precedence(), World(0).space, list[Any]()

    def others_wait(brought: Any) -> bool:
        asked.append(brought)
        return len(asked) == 6

    space.others_wait = others_wait
    for made, looks in ((32, 3), (24, 6)):
        assert [precedence.may_step(space, PAGE) for _ in range(made + 1)] == made * [True] + [False]
        assert len(asked) == looks
        await asyncio.sleep(0)  # a turn
    assert not any(asked)  # none is left out
    precedence.urgent = 1
    assert [precedence.may_step(space, PAGE) for _ in range(9)] == 8 * [True] + [False]
    assert len(asked) == 6


async def test_small_steps_that_wait_are_made_together() -> None:
    """As many in a turn of the loop as may be made at once. A large one is alone; who has gone costs nothing."""
    precedence = Precedence()
    sizes = [PAGE, 2 * MIB, *9 * [8 << 10], 2 * MIB]
    steps = [precedence.turn(size=size) for size in sizes]
    steps[3].cancel()
    made: list[list[int]] = []
    while precedence._is_turning:
        await asyncio.sleep(0)
        made.append([number for number, step in enumerate(steps) if step.done() and not step.cancelled()])
    assert [each for each in made if each] == [[0], [0, 1], [0, 1, 2, *range(4, 11)], [0, 1, 2, *range(4, 12)]]


async def test_a_page_that_has_come_waits_for_nobody_if_it_is_touched() -> None:
    """What was read ahead is placed in its turn, or with the first fault that waits for it."""
    source = Held()
    world = World(0, source=source)
    others = [world.backend._precedence.turn() for _ in range(1000)]  # type: ignore[union-attr]
    bringing = asyncio.create_task(world.backend.bring(world.space, [(0, 2 * PAGE)], Counter.PAGES_PREFETCH))
    await turns(20)
    source.answer()
    await turns()
    assert world.counters.snapshot().copies == 0
    world.touch(1, 7)
    world.serve_all()
    await turns()
    assert world.counters.snapshot().copies == 1
    assert not others[-1].done()
    for other in others:
        other.cancel()
    await bringing


async def test_a_page_that_waits_to_be_read_is_read_if_it_is_touched() -> None:
    """It passes what is brought ahead of others."""
    source = Held()
    world = World(0, source=source, limits=Limits(concurrent_reads=1))
    ranges = [(page * PAGE, PAGE) for page in range(0, 8, 2)]
    bringing = [asyncio.create_task(world.backend.bring(world.space, [its], Counter.PAGES_PREFETCH)) for its in ranges]
    await turns()
    world.touch(6, 7)
    world.serve_all()
    gate = world.backend._reads._gate  # type: ignore[union-attr]
    gate._turn = 1  # it is no patient one's turn
    for read in range(4):
        await turns()
        source.answer(read)
    assert [offset // PAGE for offset, *_ in source.reads] == [0, 6, 2, 4]
    await asyncio.gather(*bringing)
    assert (gate.reads, gate.urgent) == (0, 0)


async def test_reads_ahead_are_few_while_others_wait() -> None:
    """While threads of another gate wait, and at least one; those of its own go by the gate's bounds."""
    precedence = Precedence()
    busy, other = Gate(100, 1 << 40, precedence), Gate(100, 1 << 40, precedence)
    assert busy.try_enter(PAGE)
    assert all(busy.try_enter(64 * MIB, urgent=False) for _ in range(2))  # whose threads wait are its own
    assert not other.try_enter(PAGE, urgent=False)
    for _ in range(2):
        busy.leave(64 * MIB, urgent=False)
    assert other.try_enter(64 * MIB, urgent=False)  # nothing else is ahead
    waiting = [asyncio.create_task(other.enter(2 * MIB, urgent=False)) for _ in range(4)]
    await turns()
    other.leave(64 * MIB, urgent=False)
    await turns()
    assert [task.done() for task in waiting] == [True, True, False, False]
    assert other.try_enter(PAGE) is False  # behind those that wait
    await other.enter(PAGE, urgent=True)  # and before them
    other.leave(PAGE)
    busy.leave(PAGE)
    await turns()
    assert all(task.done() for task in waiting)
    assert (busy.urgent, other.urgent, precedence.urgent, precedence._ahead) == (0, 0, 0, 8 * MIB)


async def test_who_gives_up_waiting_is_not_counted() -> None:
    """Else the others would be slow for ever."""
    precedence = Precedence()
    gate = Gate(1, SIZE, precedence)
    assert gate.try_enter(PAGE, urgent=False)
    tasks = [asyncio.create_task(gate.enter(PAGE, urgent=urgent)) for urgent in (True, False, True)]
    await turns()
    assert precedence.urgent == 2
    for task in tasks[:2]:
        task.cancel()
    await turns()
    assert precedence.urgent == 1
    gate.leave(PAGE, urgent=False)
    tasks[2].cancel()  # it was let in just now
    await turns()
    assert (gate.reads, gate.urgent, precedence.urgent, precedence._ahead) == (0, 0, 0, 0)
