"""`engine.serve.source`: what is brought ahead of faults, and in which order."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Any

import pytest
from engine_world import BASE, ELSEWHERE, LOCATED, PAGES, SIZE, Held, World, turns
from pattern import PAGE, Pattern, content

from aiouffd.engine.ahead.fill import prefetch
from aiouffd.engine.allowance import Allowance
from aiouffd.engine.flight import Flight
from aiouffd.engine.mappings import Mapping, Mappings
from aiouffd.engine.runs import FOR_FAULT
from aiouffd.engine.statistics import Counter
from aiouffd.errors import ClosedError, SourceError
from aiouffd.testing import POISONED

if TYPE_CHECKING:
    from collections.abc import Iterable


def at(page: int) -> int:
    """Return the address of a page."""
    return BASE + page * PAGE


def limits(**values: Any) -> Any:
    """Return limits."""
    from aiouffd.engine.serve.bounds import Limits

    return Limits(**values)


async def test_a_window_larger_than_a_read() -> None:
    """Is brought by several, so that the bound on bytes can hold."""
    source = Held()
    world = World(SIZE, source=source, limits=limits(bytes_in_flight=16 * PAGE))
    task = asyncio.create_task(prefetch(world.space, [(0, SIZE)]))
    for number in range(8):
        await turns(20)
        assert world.counters.snapshot().bytes_in_flight <= 16 * PAGE
        assert source.reads[number][1] == 4 * PAGE
        source.answer(number)
    await task
    assert world.uffd.pages == world.model


async def test_reads_of_faults_pass_those_ahead() -> None:
    """As far as the bound allows nothing more, a fault is let in first."""
    source = Held()
    world = World(0, source=source, limits=limits(bytes_in_flight=2 * PAGE))
    ahead = [
        asyncio.create_task(world.space.backend.bring(world.space, [(page * PAGE, PAGE)], Counter.PAGES_PREFETCH))
        for page in range(4)
    ]
    await turns()
    assert [read[0] // PAGE for read in source.reads] == [0, 1]
    for page in (20, 21):
        world.touch(page, page)
        world.deliver(64)
    await turns()
    for index in range(6):
        source.answer(index)
        await turns()
    assert [read[0] // PAGE for read in source.reads[2:]] == [2, 20, 21, 3]  # the first turn is a patient one's
    await asyncio.gather(*ahead)


async def test_prefetches_that_the_source_does_not_answer_keep_no_other_waiting() -> None:
    """A source that hangs, or pauses between its tries, for some of its pages."""
    source = Held()
    world = World(0, source=source)
    stuck = [asyncio.create_task(prefetch(world.space, [(page * PAGE, PAGE)])) for page in range(4)]
    await turns()
    other = asyncio.create_task(prefetch(world.space, [(8 * PAGE, PAGE)]))
    await turns()
    assert [read[0] // PAGE for read in source.reads] == [0, 1, 2, 3, 8]
    source.answer(4)
    await other
    assert not any(task.done() for task in stuck)
    for number in range(4):
        source.answer(number)
    await asyncio.gather(*stuck)


def test_what_a_toucher_in_order_wants_next_is_expected() -> None:
    """The source is told of the windows behind, so that it can have them at hand."""

    class Expecting(Pattern):
        def __init__(self) -> None:
            super().__init__(SIZE)
            self.expected: list[tuple[int, int]] = []

        def expect(self, offset: int, length: int) -> None:
            self.expected.append((offset // PAGE, length // PAGE))

    source = Expecting()
    world = World(4 * PAGE, source=source)
    for page in range(PAGES // 2):
        world.touch(page, 1)
        world.serve_all()
        while world.space.advance():
            pass
    assert source.expected
    assert all(0 < length <= 8 for _, length in source.expected)
    assert all(data == world.model[page] for page, data in world.uffd.pages.items())


async def test_small_reads_ahead_leave_a_quarter_to_faults() -> None:
    """However many are asked for, a fault is read at once."""
    source = Held()
    world = World(0, source=source, limits=limits(concurrent_reads=8))
    ranges = [(page * PAGE, PAGE) for page in range(0, 24, 2)]
    bringing = asyncio.create_task(world.backend.bring(world.space, ranges, Counter.PAGES_PREFETCH))
    await turns()
    ahead = [page * PAGE for page in range(0, 12, 2)]
    assert [offset for offset, *_ in source.reads] == ahead
    for page in (25, 27):
        world.touch(page, page)
        world.serve_all()
        await turns()
    assert [offset for offset, *_ in source.reads] == [*ahead, 25 * PAGE, 27 * PAGE]
    for number in range(14):
        source.answer(number)
        await turns()
    await bringing
    assert len(world.uffd.pages) == 14


@pytest.mark.parametrize(
    ("bounds", "asked"),
    [
        ({}, [0, 4, 8, 12, 16]),
        ({"concurrent_reads": 2}, [0, 4, 8, 12]),
        ({"bytes_in_flight": 16 * PAGE}, [0, 4, 8, 12]),
        ({"client_bytes": 1e9}, [0, 4, 8, 12]),
    ],
)
async def test_who_waits_for_a_window_of_a_far_source_is_followed_further(
    monkeypatch: pytest.MonkeyPatch, bounds: dict[str, Any], asked: list[int]
) -> None:
    """By as many windows as the pace and the bounds allow: each takes a way there and back."""
    monkeypatch.setattr("aiouffd.engine.readahead._SHARE_AHEAD", 1)
    source = Held()
    world = World(4 * PAGE, source=source, limits=limits(**bounds))
    if "client_bytes" in bounds:
        world.space.allowance = Allowance("a client", None, bounds["client_bytes"], world.counters)
    for page in (0, 4):
        world.touch(page, 1)
        world.deliver(64)
        await turns()
        source.answer(0 if page == 0 else 1)
        await turns()
    assert [read[0] // PAGE for read in source.reads] == [0, 4, 8]
    world.touch(8, 1)
    world.deliver(64)
    await turns()
    assert [read[:2] for read in source.reads] == [(page * PAGE, 4 * PAGE) for page in asked]
    for number in range(2, len(source.reads)):
        source.answer(number)
    await turns()
    assert world.uffd.pages == {at(page): content(page * PAGE, PAGE) for page in range(asked[-1] + 4)}
    backend: Any = world.backend
    assert backend._pace.under_way == 0


def test_what_is_in_memory_is_brought_one_window_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no way to it that takes time."""
    monkeypatch.setattr("aiouffd.engine.readahead._SHARE_AHEAD", 1)
    world = World(4 * PAGE, located=True)
    for page in range(0, 20, 4):
        world.space.readahead.windows(page * PAGE, 0, SIZE)
    world.backend.follow(world.space, at(16))
    assert [(run.dst, run.left) for run in world.space.remainders] == [(at(20), 4 * PAGE)]


async def rescued(*pages: int, **bounds: int) -> tuple[World, Held, asyncio.Task[None]]:
    """Return a world in which the read of pages 4 to 7 is under way, its source, and the task of that flight."""
    source = Held()
    world = World(8 * PAGE, source=source, limits=limits(**bounds))
    for page in pages:
        world.touch(page, page)
    world.deliver(64)
    await turns()
    (flight,) = world.space.flights
    assert (flight.start, flight.end, set(flight.wanted)) == (at(4), at(8), {at(page) for page in pages})
    assert flight.done is not None
    return world, source, flight.done


async def test_pages_that_have_moved_are_not_rescued() -> None:
    """The others that were waited for are, and the flight ends when they have come."""
    world, source, flight = await rescued(4, 5)
    world.move(4, 1)
    while world.deliver(64):
        pass
    source.answer(0, OSError(errno.EIO, "once"))
    await turns(20)
    assert [read[:2] for read in source.reads[1:]] == [(5 * PAGE, PAGE)]
    assert not flight.done()
    source.answer(1)
    await turns(20)
    assert world.uffd.pages == {at(5): content(5 * PAGE, PAGE)}
    assert flight.done()
    assert flight.exception() is None
    found = world.counters.snapshot()
    assert (found.pages_fault, found.pages_readahead) == (1, 0)


async def test_a_page_that_was_moved_and_moved_back_is_there_when_it_has_come() -> None:
    """It is not fetched again: a page that keeps moving would be, for ever."""
    source = Held()
    world = World(8 * PAGE, source=source)
    asked = asyncio.ensure_future(prefetch(world.space, [(4 * PAGE, 4 * PAGE)]))
    await turns()
    world.move(4, 1)
    world.serve_all()
    world.uffd.mremap(ELSEWHERE + 4 * PAGE, at(4), PAGE)
    world.serve_all()
    source.answer(0)
    await turns(20)
    assert world.uffd.pages == {at(page): content(page * PAGE, PAGE) for page in range(4, 8)}
    assert len(source.reads) == 1
    assert asked.done()


async def test_who_is_being_rescued_is_let_go_in_the_end() -> None:
    """When the space is being left."""
    world, source, _ = await rescued(4, 5)
    source.answer(0, OSError(errno.EIO, "broken"))
    await turns(20)
    assert len(source.reads) == 3
    world.space.refuse()
    assert world.uffd.pages == {at(4): POISONED, at(5): POISONED}


@pytest.mark.parametrize("offset", [0, 8 * PAGE])
def test_who_comes_upon_a_window_that_is_being_brought_has_the_next_one_brought(offset: int) -> None:
    """Within the mapping that shows it; where nothing of the source is shown there is none."""
    world = World(16 * PAGE, located=True)
    world.space.mappings = Mappings([Mapping(at(4), at(20), offset)])
    asked: list[tuple[int, int, int]] = []

    def follow(*place: int) -> tuple[tuple[int, int], tuple[int, int]] | None:
        asked.append(place[:3])  # type: ignore[arg-type]
        return ((offset + 8 * PAGE, 4 * PAGE), (offset + 12 * PAGE, 0)) if len(asked) == 1 else None

    world.space.readahead.follow = follow  # type: ignore[method-assign,assignment]
    world.backend.follow(world.space, at(6))
    assert asked == 2 * [(offset + 2 * PAGE, offset, offset + 16 * PAGE)]
    assert [(run.dst, run.offset, run.left) for run in world.space.remainders] == [
        (at(12), offset + 8 * PAGE, 4 * PAGE)
    ]
    world.space.mappings.remove(at(6), at(7))
    world.backend.follow(world.space, at(6))
    assert len(asked) == 2


async def test_what_has_come_by_another_way_is_not_counted() -> None:
    """A page that is there when its bytes land."""
    source = Held()
    world = World(0, source=source)
    task = asyncio.create_task(world.backend.bring(world.space, [(4 * PAGE, 2 * PAGE)], Counter.PAGES_PREFETCH))
    await turns()
    world.uffd.pages[at(4)] = content(4 * PAGE, PAGE)
    source.answer()
    await task
    assert world.counters.snapshot().pages == 1


@pytest.mark.parametrize("how", ["is_gone", "closing"])
async def test_who_is_gone_while_a_page_is_being_rescued_is_told_nothing(how: str) -> None:
    """Nothing is poisoned, either."""
    world, source, _ = await rescued(4)
    source.answer(0, OSError(errno.EIO, "broken"))
    await turns(20)
    setattr(world.space, how, True)
    source.answer(1, OSError(errno.EIO, "broken"))
    await turns(20)
    assert not world.errors
    assert not world.uffd.pages


async def test_pages_that_are_rescued_pass_those_that_are_brought_ahead() -> None:
    """Threads wait for them."""
    world, source, _ = await rescued(4, concurrent_reads=1)
    backend: Any = world.backend
    backend._reads._gate._turn = 1  # it is no patient one's turn
    ahead = asyncio.create_task(backend.bring(world.space, [(20 * PAGE, PAGE)], Counter.PAGES_PREFETCH))
    waiting = asyncio.create_task(backend._reads.read(24 * PAGE, PAGE, urgent=True))
    await turns()
    source.answer(0, OSError(errno.EIO, "once"))
    await turns(20)
    for index in (1, 2, 3):
        source.answer(index)
        await turns(20)
    assert [read[0] // PAGE for read in source.reads[1:]] == [24, 4, 20]
    await asyncio.gather(ahead, waiting)


@pytest.mark.parametrize(
    ("length", "starts", "together"),
    [
        (1, range(0, 20, 2), [4, 4, 2]),
        (3, range(0, 32, 4), [3, 3, 2]),
        (4, range(0, 30, 5), [2, 2, 2]),
    ],
)
async def test_what_is_brought_ahead_comes_in_portions(
    monkeypatch: pytest.MonkeyPatch, length: int, starts: range, together: list[int]
) -> None:
    """Of so many runs, or of so many bytes: faults come in between."""
    monkeypatch.setattr("aiouffd.engine.serve.bulk._MAX_RUNS", 4)
    monkeypatch.setattr("aiouffd.engine.serve.bulk.MAX_READ", 8 * PAGE)
    world = World(0, located=True)
    resolve, portions = world.space.resolve, list[int]()

    def note(runs: Any) -> None:
        portions.append(len(runs))
        resolve(runs)

    world.space.resolve = note  # type: ignore[method-assign]
    ranges = [(start * PAGE, length * PAGE) for start in starts]
    await world.backend.bring(world.space, ranges, Counter.PAGES_PREFETCH)
    assert portions == together
    assert len(world.uffd.pages) == length * len(starts)


async def test_a_read_ahead_that_is_canceled_leaves_room() -> None:
    """Also one that has not begun."""
    source = Held()
    world = World(0, source=source)
    backend: Any = world.backend
    for begins in (True, False):
        task = asyncio.create_task(prefetch(world.space, [(0, PAGE)]))
        await turns(20 if begins else 1)
        assert backend._pace.under_way == 1
        for flight in world.space.flights:
            assert flight.done is not None
            flight.done.cancel()
        await turns()
        assert backend._pace.under_way == 0
        world.space.readahead.forget(0, SIZE)
        task.cancel()
        await turns()


@pytest.mark.parametrize("how", ["error", "is_gone", "closing"])
async def test_what_is_brought_ahead_ends_with_the_first_failure(how: str) -> None:
    """Or with the space: what was begun is waited for, nothing more is begun."""
    source = Held()
    world = World(0, source=source, limits=limits(concurrent_reads=2))
    ranges = [(page * PAGE, PAGE) for page in range(0, 20, 2)]
    task = asyncio.create_task(world.backend.bring(world.space, ranges, Counter.PAGES_PREFETCH))
    await turns()
    asked = len(source.reads)
    if how != "error":
        setattr(world.space, how, True)
    for index in range(asked):
        source.answer(index, OSError(errno.EIO, "broken") if how == "error" else None)
    await turns(20)
    assert len(source.reads) <= asked + (how == "error")
    for index in range(asked, len(source.reads)):
        source.answer(index)
    with pytest.raises(SourceError if how == "error" else ClosedError):
        await task
    assert not world.errors


async def test_a_defect_of_a_source_ahead_says_where() -> None:
    """It is the caller's, and no page is poisoned."""

    class Defect(Pattern):
        def locate(self, offset: int, length: int) -> int:
            if offset >= 8 * PAGE:
                raise ValueError("odd")
            return LOCATED.locate(offset, length)

    source = Defect(SIZE)
    world = World(0, source=source)
    with pytest.raises(SourceError) as caught:
        await world.backend.bring(world.space, [(0, PAGE), (8 * PAGE, 2 * PAGE)], Counter.PAGES_PREFETCH)
    assert str(caught.value) == str(SourceError(repr(source), 8 * PAGE, 2 * PAGE, "ValueError: odd"))
    assert list(world.uffd.pages) == [BASE]


@pytest.mark.parametrize(
    ("flying", "parts"),
    [
        ((), [(0, 6)]),
        ((0,), [(1, 5)]),
        ((5,), [(0, 5)]),
        ((2, 3), [(0, 2), (4, 2)]),
        ((0, 2, 5), [(1, 1), (3, 2)]),
        ((6,), [(0, 6)]),
        (range(6), []),
    ],
)
def test_what_is_on_its_way_is_not_brought_again(flying: Iterable[int], parts: list[tuple[int, int]]) -> None:
    """Only what is left of a window."""
    world = World(0)
    for page in flying:
        world.space.take_off(Flight(at(page), at(page + 1), page * PAGE, 0, FOR_FAULT))
    gaps = world.space.flights.gaps(BASE, BASE + 6 * PAGE)
    assert gaps == [(at(start), at(start + length)) for start, length in parts]
    assert [world.space.flights.touches(at(page), at(page + 2)) for page in range(6)] == [
        bool({page, page + 1} & set(flying)) for page in range(6)
    ]
