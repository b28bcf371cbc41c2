"""`engine.serve.precedence`: faults of all before what is brought ahead for any of them, by order."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest
from engine_world import SIZE, Held, World, turns
from pattern import PAGE

from aiouffd.engine.others import Others
from aiouffd.engine.serve import precedence as module
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


async def test_small_steps_are_made_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight pages in a turn of the loop, or what is as much together; none passes those that wait."""
    precedence, space = Precedence(), World(0).space
    monkeypatch.setattr(space.others, "wait", lambda _: True)
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


async def test_more_small_steps_are_made_where_no_thread_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked for one after eight pages each, in all spaces; 32 pages are enough, and eight while one is read."""
    precedence, space, asked = Precedence(), World(0).space, list[Any]()

    def others_wait(brought: Any) -> bool:
        asked.append(brought)
        return len(asked) == 6

    monkeypatch.setattr(space.others, "wait", others_wait)
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
    assert (gate.reads, gate._precedence.urgent) == (0, 0)


class Elsewhere(Others):
    """Has faults when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Any, int] = {}

    def turns(self, spaces: Any) -> dict[Any, int]:
        """Return a number for each."""
        assert spaces
        return dict(self.found)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the nanoseconds that it is, set by hand."""
    now = [10**9]
    monkeypatch.setattr(module, "perf_counter_ns", lambda: now[0])
    return now


def test_others_that_have_faulted_lately_are_known(clock: list[int]) -> None:
    """Looked for now and then. Who comes or goes has not faulted; nor has anybody where nothing is brought."""
    precedence, space = Precedence(), World(0).space
    space.others = others = Elsewhere()
    assert not precedence.others_fault()
    with precedence.brings(space):
        others.found["quiet"] = 7
        assert not precedence.others_fault()
        others.found |= {"quiet": 8, "new": 3}
        assert not precedence.others_fault()  # it was looked just now
        clock[0] += module._LOOK_NS
        assert precedence.others_fault()
        del others.found["new"]
        clock[0] += module._LATELY_NS - 1
        assert precedence.others_fault()
        clock[0] += module._LOOK_NS
        assert not precedence.others_fault()
        others.found["new"] = 9
        clock[0] += module._LOOK_NS
        assert not precedence.others_fault()
    others.found["quiet"] = 9  # long before the next look
    clock[0] += module._LATELY_NS
    with precedence.brings(space):
        assert not precedence.others_fault()


async def test_reads_ahead_are_few_while_others_fault(clock: list[int]) -> None:
    """Of all gates together, each by how far its source is; one is always under way."""
    precedence, space = Precedence(), World(0).space
    space.others = others = Elsewhere()
    near, far = Gate(100, 1 << 40, precedence), Gate(100, 1 << 40, precedence)
    for gate, way in ((near, 2), (far, 20)):
        gate.took(way * 1_250_000)
    assert (near.share, far.share) == (500_000, 5_000_000)
    with precedence.brings(space):
        assert all(near.try_enter(64 * MIB, urgent=False) for _ in range(2))  # nobody faults
        for count in range(2):
            others.found["quiet"] = count
            clock[0] += module._LOOK_NS
            assert precedence.others_fault() is (count > 0)
        assert not far.try_enter(PAGE, urgent=False)
        assert far.try_enter(PAGE)  # a fault
        for _ in range(2):
            near.leave(64 * MIB, urgent=False)
        assert far.try_enter(64 * MIB, urgent=False)  # nothing else is ahead
        waiting = [asyncio.create_task(far.enter(2 * MIB, urgent=False)) for _ in range(3)]
        waiting += [asyncio.create_task(near.enter(MIB // 16, urgent=False)) for _ in range(3)]
        await turns()
        assert not any(task.done() for task in waiting)
        far.leave(64 * MIB, urgent=False)
        await turns()
        assert [task.done() for task in waiting] == [True, True, False, True, False, False]
        far.leave(2 * MIB, urgent=False)
        await turns()
        assert [task.done() for task in waiting] == [True, True, True, True, False, False]
        far.leave(2 * MIB, urgent=False)
        await turns()
        assert all(task.done() for task in waiting)
    assert precedence.ahead == {near: 3 * MIB // 16, far: 2 * MIB}


async def test_a_source_that_does_not_answer_keeps_no_other_from_being_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gate gets a read after a while, though others fault all the time; and all, once they do no more."""
    monkeypatch.setattr(module, "_LATELY_NS", 1_000_000)
    precedence, fault = Precedence(), [True]
    monkeypatch.setattr(precedence, "others_fault", lambda: fault[0])
    hangs, gates = Gate(100, 1 << 40, precedence), [Gate(100, 1 << 40, precedence) for _ in range(2)]
    assert hangs.try_enter(2 * MIB, urgent=False)
    waiting = [asyncio.create_task(gate.enter(MIB, urgent=False)) for _ in range(3) for gate in gates]
    await turns()
    assert not any(task.done() for task in waiting)
    await asyncio.wait(waiting[:2])
    fault[0] = False
    await asyncio.wait(waiting)
    assert sum(precedence.ahead.values()) == 8 * MIB
    assert not precedence._refused


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
    assert (gate.reads, precedence.urgent, precedence.ahead) == (0, 0, {})
