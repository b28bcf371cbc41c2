"""`engine.serve.bulk`: what is brought ahead, in large COPYs."""

from __future__ import annotations

import asyncio
import errno

import pytest
from engine_world import BASE, LOCATED, PAGES, SIZE, World
from pattern import PAGE, content

from aiouffd.engine import two_threads
from aiouffd.engine.resolver import DONTWAKE
from aiouffd.engine.runs import Op, Purpose, Run
from aiouffd.engine.serve import bulk
from aiouffd.engine.serve.bulk import resolve_bulk
from aiouffd.engine.statistics import Counter

pytestmark = pytest.mark.timeout(30)
PREFETCH = Purpose(Counter.PAGES_PREFETCH, [])


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four pages are large, and are divided."""
    monkeypatch.setattr(bulk, "_LARGE", 4 * PAGE)
    monkeypatch.setattr(two_threads, "_PART", 2 * PAGE)


def copy_of(page: int, count: int) -> Run:
    """Return a run that a prefetch has counted."""
    return Run(
        Op.COPY,
        BASE + page * PAGE,
        page * PAGE,
        count * PAGE,
        LOCATED.address + page * PAGE,
        None,
        PREFETCH,
    )


def noting(world: World, calls: list[tuple[int, int, int]]) -> None:
    """Note what is copied."""
    try_copy = world.uffd.try_copy

    def copy(dst: int, src: int, length: int, mode: int) -> int:
        calls.append(((dst - BASE) // PAGE, length // PAGE, mode))
        return try_copy(dst, src, length, mode)

    world.uffd.try_copy = copy  # type: ignore[method-assign]


async def test_large_runs_are_divided_and_others_not() -> None:
    """Neighbours count together. Whoever waits for any of it goes on, and each COPY is counted."""
    world, calls = World(0, located=True), list[tuple[int, int, int]]()
    noting(world, calls)
    for page in (1, 11, 20):
        world.touch(page, page)
    zeros = Run(Op.ZEROPAGE, BASE + 20 * PAGE, 20 * PAGE, 4 * PAGE)
    resolve_bulk(world.space, [copy_of(2, 2), zeros, copy_of(10, 3), copy_of(0, 2)])
    assert sorted(calls) == [(0, 2, DONTWAKE), (2, 2, DONTWAKE), (10, 3, DONTWAKE)]
    wanted = {BASE + page * PAGE: content(page * PAGE, PAGE) for page in [*range(4), *range(10, 13)]}
    assert world.uffd.pages == wanted | {BASE + page * PAGE: bytes(PAGE) for page in range(20, 24)}
    assert not world.uffd.asleep
    assert world.counters.snapshot().copies == 3


@pytest.mark.parametrize(("present", "partly"), [([], 0), ([0], 0), ([3, 4, 9], 2)])
async def test_what_is_there_already_is_counted_once(present: list[int], partly: int) -> None:
    """A COPY ends before it; the rest comes, and the sleepers of all pages are woken."""
    world = World(0, located=True)
    for page in present:
        world.uffd.copy(BASE + page * PAGE, content(page * PAGE, PAGE), wake=False)
    world.touch(5, 1)
    await world.backend.bring(world.space, [(0, SIZE)], Counter.PAGES_PREFETCH)
    assert world.uffd.pages == world.model
    assert not world.uffd.asleep
    found = world.counters.snapshot()
    assert (found.pages_prefetch, found.eexist, found.partial) == (PAGES - len(present), len(present), partly)


async def test_what_the_layout_does_not_allow_comes_later() -> None:
    """While an event is unread, nothing comes; what was emptied stays empty, also where its COPY was put off."""
    world = World(0, located=True)
    world.touch(7, 1)
    world.remove(8, 6)
    task = asyncio.create_task(world.backend.bring(world.space, [(0, SIZE)], Counter.PAGES_PREFETCH))
    await asyncio.sleep(0)
    assert not world.uffd.pages
    assert sum(run.left for run in world.space.deferred) == SIZE
    async with world.dispatched():
        await task
    for page in range(8, 14):
        assert world.uffd.touch(BASE + page * PAGE) in (None, bytes(PAGE))
        world.serve_all()
    assert world.uffd.pages == world.model
    assert not world.uffd.asleep


async def test_a_process_that_is_gone_gets_nothing() -> None:
    """And an error of the kernel is the caller's."""
    world = World(0, located=True)
    world.uffd.failures.extend([-errno.EFAULT] * 100)
    with pytest.raises(Exception, match="was the file truncated"):
        await world.backend.bring(world.space, [(0, SIZE)], Counter.PAGES_PREFETCH)
    assert not world.errors
    world.uffd.failures.clear()
    world.uffd.exit()
    resolve_bulk(world.space, [copy_of(0, 8)])
    assert world.space.is_gone


@pytest.mark.parametrize("attribute", ["bound", "allowance"])
def test_what_is_counted_before_it_comes_is_not_divided(monkeypatch: pytest.MonkeyPatch, attribute: str) -> None:
    """Memory that is bounded, and clients with a limit: as what comes for faults."""
    world = World(0, located=True)
    setattr(world.space, attribute, object())
    asked: list[list[Run]] = []
    monkeypatch.setattr(world.space, "resolve", asked.append)
    resolve_bulk(world.space, [copy_of(0, 8)])
    assert [run.left for (run,) in asked] == [8 * PAGE]
