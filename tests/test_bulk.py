"""`engine.serve.bulk`: what is brought ahead, in large COPYs."""

from __future__ import annotations

import asyncio
import errno
import threading
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from engine_world import BASE, LOCATED, PAGES, SIZE, Held, World, turns
from pattern import PAGE, content

from aiouffd.engine import resolver, two_threads
from aiouffd.engine.resolver import DONTWAKE
from aiouffd.engine.runs import Op, Purpose, Run
from aiouffd.engine.serve import bulk
from aiouffd.engine.serve.bulk import place_at_hand, resolve_bulk
from aiouffd.engine.serve.precedence import Precedence
from aiouffd.engine.serve.source import SourceBackend
from aiouffd.engine.statistics import Counter

if TYPE_CHECKING:
    from collections.abc import Collection

    from aiouffd.engine.space import Space

PREFETCH = Purpose(Counter.PAGES_PREFETCH, [])


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four pages are large, and are divided."""
    monkeypatch.setattr(bulk, "_LARGE", 4 * PAGE)
    monkeypatch.setattr(two_threads, "_PART", 2 * PAGE)


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have parts of two pages where others may wait, and no other thread."""
    monkeypatch.setattr(two_threads, "SHORT_PART", 2 * PAGE)
    monkeypatch.setattr(bulk, "SHORT_PART", 2 * PAGE)
    two = two_threads.TwoThreads()
    two._runs = True  # nobody takes its offers
    monkeypatch.setattr(resolver, "two_threads", two)


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


@pytest.mark.parametrize("step", [2, 8, 40])
async def test_a_fault_of_another_comes_between_two_parts(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Of large runs and of small ones, where some pages are there already; all comes, and is counted once."""
    monkeypatch.setattr(bulk, "_LARGE", step * PAGE)
    alone(monkeypatch)
    world = World(0, located=True)
    world.space.readahead.brought(3 * PAGE, PAGE)
    for page in (3, 5, 6, 9):
        world.uffd.copy(BASE + page * PAGE, content(page * PAGE, PAGE), wake=False)
    seen: list[int] = []

    def others_wait(brought: Collection[Space], _: int) -> bool:
        assert list(brought) == [world.space]
        return len(world.uffd.pages) > max(seen, default=0)

    async def others() -> None:  # what the loop does between two steps
        while True:
            seen.append(len(world.uffd.pages))
            await asyncio.sleep(0)

    monkeypatch.setattr(world.space.others, "serve", others_wait)
    other = asyncio.create_task(others())
    await world.backend.bring(world.space, [(0, SIZE)], Counter.PAGES_PREFETCH)
    other.cancel()
    assert world.uffd.pages == world.model
    assert max(now - before for before, now in pairwise(seen)) <= 4  # two parts, where the first page of one is there
    found = world.counters.snapshot()
    assert (found.pages_prefetch, found.bytes_fetched) == (PAGES - 4, (PAGES - 4) * PAGE)
    assert isinstance(world.backend, SourceBackend)
    assert not world.backend._precedence.brought


@pytest.mark.parametrize(
    ("ranges", "waits", "steps"),
    [
        ([(0, SIZE)], PAGES, [[2]] * (PAGES // 2)),
        ([(0, SIZE)], 3, [[2], [2], [2], [PAGES - 6]]),
        ([(page * PAGE, PAGE) for page in range(0, 18, 2)], 2, [[1, 1], [1, 1], [1] * 5]),
    ],
)
async def test_a_step_begins_when_others_have_had_a_turn(
    monkeypatch: pytest.MonkeyPatch, ranges: list[tuple[int, int]], waits: int, steps: list[list[int]]
) -> None:
    """As long as they wait, each second step is a short one, and the source is asked for no more than that."""
    alone(monkeypatch)
    world = World(0, located=True)
    assert isinstance(world.backend, SourceBackend)
    asked: list[list[int]] = [[]]
    approach, turn = world.backend._approach, world.backend._precedence.turn
    looks = 0

    def approached(space: Space, offset: int, length: int, *others: Any) -> Any:
        asked[-1].append(length // PAGE)
        return approach(space, offset, length, *others)

    def others_wait(_: Collection[Space], __: int) -> bool:
        nonlocal looks
        looks += 1
        return looks <= waits

    def turned() -> asyncio.Future[None]:
        if asked[-1]:
            asked.append([])
        assert len(world.uffd.pages) == sum(map(sum, asked))  # nothing is left over a turn: the layout may change
        return turn()

    monkeypatch.setattr(world.backend, "_approach", approached)
    monkeypatch.setattr(world.backend._precedence, "turn", turned)
    monkeypatch.setattr(world.space.others, "serve", others_wait)
    await world.backend.bring(world.space, ranges, Counter.PAGES_PREFETCH)
    assert [step for step in asked if step] == steps
    assert len(world.uffd.pages) == sum(length for _, length in ranges) // PAGE


def test_who_serves_others_is_told_when_the_step_has_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have taken long to ask for what is placed then: that is no reason to leave it off."""
    now, untils, world = [0], list[int](), World(0, located=True)

    def serve(_: Collection[Space], until_ns: int) -> bool:
        untils.append(until_ns)
        return False

    monkeypatch.setattr(bulk, "perf_counter_ns", lambda: now[0])
    monkeypatch.setattr(world.space.others, "serve", serve)
    steps = bulk.Steps(world.space, [(0, 4 * PAGE)], Precedence(), local=True)
    assert not steps.wait()
    now[0] = 10
    assert steps.take() == (0, 4 * PAGE, True)
    steps.runs.append(copy_of(0, 4))
    assert steps.end()
    assert untils == [bulk._LONGEST_NS] + [bulk._LONGEST_NS + 10] * (len(untils) - 1)
    assert len(untils) > 1


async def test_all_comes_though_others_wait_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a source that is not local, whose bytes are at hand."""
    alone(monkeypatch)
    world = World(0, located=True)
    assert isinstance(world.backend, SourceBackend)
    world.backend._extents.local = False
    monkeypatch.setattr(world.space.others, "serve", lambda *_: True)
    await world.backend.bring(world.space, [(0, SIZE)], Counter.PAGES_PREFETCH)
    assert world.uffd.pages == world.model


def test_what_others_wait_for_already_leaves_off_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as if nothing had been asked for; the next time, something comes."""
    alone(monkeypatch)
    world, words = World(0, located=True), [int(Counter.PAGES_PREFETCH), int(Counter.BYTES_FETCHED)]
    for word, count in zip(words, (8, 8 * PAGE), strict=True):
        world.counters.words[word] += count
    assert resolve_bulk(world.space, [copy_of(0, 8)], lambda: True, lets=True) == [(0, 8 * PAGE)]
    assert not world.uffd.pages
    assert [world.counters.words[word] for word in words] == [0, 0]
    assert [length for _, length in resolve_bulk(world.space, [copy_of(0, 8)], lambda: True)] == 3 * [2 * PAGE]
    assert len(world.uffd.pages) == 2


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


def parts(*pages: int, count: int = 2) -> list[tuple[int, int, int]]:
    """Return parts of two pages each, and where their bytes lie."""
    return [(page * PAGE, count * PAGE, LOCATED.address + page * PAGE) for page in pages]


async def test_small_parts_are_placed_without_a_run_for_each() -> None:
    """Whoever waits for some of them goes on, though its page is on its way; what is there already is left."""
    world = World(0, source=Held())
    for page in (9, 21):
        world.touch(page, page)
    world.deliver(64)
    await turns()
    world.uffd.copy(BASE + 5 * PAGE, content(5 * PAGE, PAGE))
    assert place_at_hand(world.space, parts(20, 4, 8, 12), Counter.PAGES_REPLAY) == [(4 * PAGE, 2 * PAGE)]
    assert {at: world.uffd.pages[BASE + at * PAGE] for at in (20, 21, 8, 9, 12, 13)} == {
        at: content(at * PAGE, PAGE) for at in (20, 21, 8, 9, 12, 13)
    }
    assert not world.uffd.asleep
    found = world.counters.snapshot()
    # One of the COPYs found a page that was there: each call counts, as in any resolver.
    assert (found.pages_replay, found.bytes_shared, found.copies) == (6, 6 * PAGE, 4)
    assert world.space.readahead.missing(20 * PAGE, 22 * PAGE) == []
    assert world.space.readahead.missing(12 * PAGE, 14 * PAGE) == []
    await world.backend.aclose()


async def test_many_small_parts_are_placed_by_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of both is, and nobody is woken before both are done."""
    monkeypatch.setattr(bulk, "_MANY", 2)
    world, threads = World(0, located=True), set[int]()
    plain = world.uffd.try_copies
    both = threading.Barrier(2, timeout=60)

    def noting(*copies: Any) -> int:
        if threading.get_ident() not in threads:
            threads.add(threading.get_ident())
            both.wait()
        return plain(*copies)

    monkeypatch.setattr(world.uffd, "try_copies", noting)
    for page in (4, 14):
        world.uffd.copy(BASE + page * PAGE, content(page * PAGE, PAGE))
    wanted = parts(2, 4, 6, 8, 10, 12, 14, 16)
    left = await asyncio.to_thread(place_at_hand, world.space, wanted, Counter.PAGES_REPLAY)
    assert left == [(4 * PAGE, 2 * PAGE), (14 * PAGE, 2 * PAGE)]
    assert len(threads) == 2
    for page in (2, 6, 8, 10, 12, 16):
        assert world.uffd.pages[BASE + page * PAGE] == content(page * PAGE, PAGE)
    found = world.counters.snapshot()
    assert (found.pages_replay, found.copies) == (12, 8)
    await world.backend.aclose()


async def test_what_is_not_that_simple_is_left() -> None:
    """Where the layout is another one, is changing, or there is nobody any more."""
    world = World(0, located=True)
    wanted = parts(1, 20)
    everything = [(offset, length) for offset, length, _ in wanted]
    world.space.mappings.unmap(BASE + 10 * PAGE, BASE + 11 * PAGE)
    assert place_at_hand(world.space, wanted, Counter.PAGES_REPLAY) == everything
    world = World(0, located=True)
    world.space.mappings.add(BASE + 4 * SIZE, BASE + 5 * SIZE, 0)  # each page is shown twice
    assert place_at_hand(world.space, wanted, Counter.PAGES_REPLAY) == everything
    world = World(0, located=True)
    world.remove(30, 1)  # its event is not read: EAGAIN
    assert place_at_hand(world.space, wanted, Counter.PAGES_REPLAY) == everything
    world.deliver(64)
    assert place_at_hand(world.space, wanted, Counter.PAGES_REPLAY) == []
    world.space.gone()
    assert place_at_hand(world.space, parts(24), Counter.PAGES_REPLAY) == [(24 * PAGE, 2 * PAGE)]
