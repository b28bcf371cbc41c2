"""`engine.serve.source`: what a fault brings, what flies, what is left of it when the layout or the source fails."""

from __future__ import annotations

import asyncio
import errno
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import pytest
from engine_world import BASE, ELSEWHERE, LOCATED, PAGES, SIZE, Held, Located, World, turns
from pattern import PAGE, Pattern, content

from aiouffd.engine.ahead.fill import prefetch
from aiouffd.engine.mappings import Mapping, Mappings
from aiouffd.engine.runs import Op
from aiouffd.engine.serve import bulk
from aiouffd.engine.serve import source as module
from aiouffd.engine.serve.handler import Batch, Fault, Handler
from aiouffd.engine.serve.source import SourceBackend
from aiouffd.engine.statistics import Counter
from aiouffd.errors import PagerError, ShortReadError, SourceError, SourceTimeoutError
from aiouffd.kernel import abi
from aiouffd.kernel.abi import FaultFlag
from aiouffd.sources.steps import cause_of
from aiouffd.testing import POISONED

if TYPE_CHECKING:
    from aiouffd.engine.flight import Flight
    from aiouffd.sources.steps import Steps


def at(page: int) -> int:
    """Return the address of a page."""
    return BASE + page * PAGE


@pytest.mark.parametrize("change", ["remove", "move", "move and another comes"])
async def test_bytes_that_land_after_a_change_of_the_layout(change: str) -> None:
    """They go where they are shown still, and nowhere else: an emptied page is zeros, not the source's bytes."""
    source = Held()
    world = World(0, source=source)
    world.touch(4, 1)
    world.deliver(64)
    await turns()
    if change == "remove":
        world.remove(4, 1)
    else:
        world.move(4, 1)
        if change == "move and another comes":
            while world.deliver(64):
                pass
            world.uffd.mremap(at(8), at(4), PAGE)
    while world.deliver(64):
        pass
    if change == "move and another comes":
        world.uffd.touch(at(4), 2)
        world.deliver(64)
        await turns()
    source.answer(0)
    await turns()
    world.serve_all()
    assert (at(4) in world.space.flights) == (change == "move and another comes")  # not the one that has landed
    if change == "remove":
        assert world.uffd.pages == {at(4): bytes(PAGE)}
    elif change == "move":
        assert world.uffd.pages == {}
    else:
        assert len(source.reads) == 2  # whoever waits there now has asked for what is there now
        assert source.reads[1][0] == 8 * PAGE
        source.answer(1)
        await turns()
        assert world.uffd.pages == {at(4): content(8 * PAGE, PAGE)}
        assert not world.uffd.asleep
    assert not world.space.flights


async def test_a_part_that_is_shown_still_is_kept() -> None:
    """And the rest is not taken for present; nobody is counted who was sent away."""
    source = Held()
    world = World(8 * PAGE, source=source)
    world.touch(0, 1)
    world.touch(1, 2)
    world.deliver(64)
    await turns()
    ((offset, length, _),) = source.reads
    assert (offset, length) == (0, 4 * PAGE)
    world.unmap(1, 2)
    world.serve_all()
    source.answer()
    await turns()
    assert sorted(world.uffd.pages) == [at(page) for page in (0, 3)]
    assert world.space.readahead.missing(0, 4 * PAGE) == [(PAGE, 2 * PAGE)]
    found = world.counters.snapshot()
    assert (found.pages_fault, found.pages_readahead) == (1, 1)


@pytest.mark.parametrize("readahead", [0, 16 * PAGE])
@pytest.mark.parametrize("located", [True, False])
def test_the_last_page_of_a_source_is_padded_with_zeros(readahead: int, located: bool) -> None:
    """Nothing behind the source's end is shown: not what lies behind it in memory, and not by the plain path."""
    kind: Any = Located if located else Pattern
    source = kind(SIZE)
    source.size = 5 * PAGE + 100
    world = World(readahead, source=source)
    for page in range(4, 8):
        world.touch(page, page)
        world.serve_all()
    assert world.uffd.pages[at(4)] == content(4 * PAGE, PAGE)
    assert world.uffd.pages[at(5)] == content(5 * PAGE, 100) + bytes(PAGE - 100)
    assert world.uffd.pages[at(6)] == world.uffd.pages[at(7)] == bytes(PAGE)


def test_several_faults_of_one_wake_up_at_the_end_of_a_source() -> None:
    """The same, together."""
    for readahead in (0, 16 * PAGE):
        source = Located(SIZE)
        source.size = 5 * PAGE + 100
        world = World(readahead, source=source)
        for page in (2, 4, 5, 6, 9):
            world.touch(page, page)
        world.serve_all()
        assert not world.uffd.asleep
        assert world.uffd.pages[at(2)] == content(2 * PAGE, PAGE)
        assert world.uffd.pages[at(4)] == content(4 * PAGE, PAGE)
        assert world.uffd.pages[at(5)] == content(5 * PAGE, 100) + bytes(PAGE - 100)
        assert world.uffd.pages[at(6)] == world.uffd.pages[at(9)] == bytes(PAGE)


def test_a_window_that_was_not_placed_is_brought_by_the_general_path() -> None:
    """A COPY that is refused on the plain path is not forgotten, and its window counts once."""
    world = World(16 * PAGE, located=True)
    world.uffd.failures.append(-errno.EAGAIN)
    world.touch(5, 1)
    world.serve_all()
    assert not world.uffd.asleep
    found = world.counters.snapshot()
    assert found.pages == len(world.uffd.pages) == 4
    assert found.pages_fault == 1
    assert world.space.readahead.missing(0, SIZE) == [(0, 4 * PAGE), (8 * PAGE, SIZE - 8 * PAGE)]


@pytest.mark.parametrize("refusals", [[-errno.EAGAIN], [0, -errno.EAGAIN], [0, -errno.EAGAIN, -errno.EAGAIN]])
def test_a_page_among_several_that_is_refused(refusals: list[int]) -> None:
    """The others are served; it comes later; each is counted once."""
    for readahead in (0, 4 * PAGE):
        world = World(readahead, located=True)
        world.uffd.failures.extend(refusals)
        for page in (1, 9, 17, 18):
            world.touch(page, page)
        world.serve_all()
        assert not world.uffd.asleep
        assert all(data == world.model[page] for page, data in world.uffd.pages.items())
        found = world.counters.snapshot()
        assert found.pages == len(world.uffd.pages)
        assert found.pages_fault == 4
        assert found.bytes_fetched == found.pages * PAGE
        assert sum(found.latency) == 4


def test_what_is_present_already_is_not_counted() -> None:
    """EEXIST, alone and within a window: pages, and bytes out of memory."""
    for readahead in (0, 8 * PAGE):
        world = World(readahead, located=True)
        world.uffd.try_copy(at(5), LOCATED.address + 5 * PAGE, PAGE, 0)
        world.touch(4, 1)
        world.serve_all()
        asyncio.run(world.space.backend.bring(world.space, [(0, SIZE)], Counter.PAGES_PREFETCH))
        found = world.counters.snapshot()
        assert len(world.uffd.pages) == PAGES
        assert found.pages == PAGES - 1
        assert found.bytes_fetched == (PAGES - 1) * PAGE
        assert found.eexist == (1 if readahead else 2)  # a plain fault without readahead leaves no trace


async def let_go(source: Pattern, *pages: int) -> World:
    """Return memory of a source some of whose reads fail, where the threads that have touched some pages went on."""
    world = World(8 * PAGE, source=source)
    for page in pages:
        world.touch(page, page)
    world.deliver(64)
    await turns(40)
    assert not world.uffd.asleep
    return world


async def test_a_failed_window_costs_only_the_page_that_fails() -> None:
    """Each page that a thread waits for is asked for alone."""

    class Broken(Pattern):
        retries = 0
        read_nowait = None  # type: ignore[assignment]

        async def read(self, offset: int, length: int) -> bytes:
            if offset <= 5 * PAGE < offset + length:
                raise OSError(errno.EIO, "broken")
            return content(offset, length)

    world = await let_go(Broken(SIZE), 4, 5, 6)
    assert world.uffd.pages[at(4)] == content(4 * PAGE, PAGE)
    assert world.uffd.pages[at(5)] is POISONED
    assert world.uffd.pages[at(6)] == content(6 * PAGE, PAGE)
    (error,) = world.errors
    assert isinstance(error, SourceError)
    assert error.offset == 5 * PAGE
    assert world.counters.snapshot().source_errors == 1


async def test_what_is_in_memory_needs_no_read_that_fails() -> None:
    """A URL that was deleted: its first page came with its size, but the window around it was to be read."""

    class Deleted(Pattern):
        locate = None

        def read_nowait(self, offset: int, length: int) -> bytes | None:  # type: ignore[override]
            return content(offset, length) if offset + length <= PAGE else None

        async def read(self, offset: int, length: int) -> bytes:
            raise SourceError("Deleted", offset, length, "HTTP status 404")

    world = await let_go(Deleted(SIZE), 0, 1, 3)
    assert world.uffd.pages[at(0)] == content(0, PAGE)
    assert [world.uffd.pages[at(page)] for page in (1, 3)] == [POISONED, POISONED]
    seen = world.counters.snapshot()
    assert (seen.source_errors, seen.pages_fault, seen.pages_readahead, seen.pages_poisoned) == (2, 1, 0, 2)


async def test_a_defect_while_single_pages_are_looked_for() -> None:
    """It costs them, and no hang."""

    class Defect(Pattern):
        locate = None

        def read_nowait(self, offset: int, length: int) -> bytes | None:  # type: ignore[override]
            if length == PAGE:
                raise ZeroDivisionError
            return None

        async def read(self, offset: int, length: int) -> bytes:
            raise SourceError("Defect", offset, length, "HTTP status 404")

    world = await let_go(Defect(SIZE), 1)
    assert world.uffd.pages[at(1)] is POISONED


@pytest.mark.parametrize("late", [True, False])
async def test_a_source_that_does_not_answer_is_not_asked_again_for_each_page(late: bool) -> None:
    """After a timeout the single pages get one try each; after another error as many as any read."""

    class Silent:
        size = SIZE
        retries = 3

        def __init__(self) -> None:
            self.asked: list[int] = []

        async def read(self, offset: int, length: int) -> bytes:
            self.asked.append(length)
            if length > PAGE and late:
                raise SourceTimeoutError("Silent", offset, length, "no answer")
            raise OSError(errno.EIO, "broken")

    source = Silent()
    world = World(8 * PAGE, source=source, limits=limits(backoff=0.0))
    world.touch(4, 1)
    world.deliver(64)
    for _ in range(200):
        await asyncio.sleep(0)
        if not world.uffd.asleep:
            break
    assert [source.asked.count(4 * PAGE), source.asked.count(PAGE)] == [4, 1 if late else 4]
    assert world.uffd.pages[at(4)] is POISONED


def limits(**values: Any) -> Any:
    """Return limits."""
    from aiouffd.engine.serve.bounds import Limits

    return Limits(**values)


async def test_faults_join_what_is_on_its_way() -> None:
    """Nothing is read twice; their threads go on when it lands, and are counted then."""
    source = Held()
    world = World(4 * PAGE, source=source)
    for page in (0, 1, 3):
        world.touch(page, page)
        world.deliver(64)
        await turns()
    assert [read[:2] for read in source.reads] == [(0, 4 * PAGE)]
    source.answer()
    await turns()
    found = world.counters.snapshot()
    assert (found.faults, found.joined, found.pages_fault, found.pages_readahead) == (3, 2, 3, 1)
    assert sum(found.latency) == sum(found.latency[:40]) == 3
    assert not world.uffd.asleep


async def test_a_source_that_gives_too_little() -> None:
    """A short read is an error: its page is poisoned, and nothing is padded."""

    class Short:
        size = SIZE
        retries = 0

        async def read(self, offset: int, length: int) -> bytes:
            return content(offset, length - 1)

    world = World(0, source=Short())
    world.touch(0, 1)
    world.deliver(64)
    await turns()
    (error,) = world.errors
    assert isinstance(error, ShortReadError)
    assert world.uffd.pages == {BASE: POISONED}


async def test_what_arrives_after_the_end_is_dropped() -> None:
    """The space was closed, or its process is gone: nothing is placed, nothing told."""
    for end in ("close", "gone"):
        source = Held()
        world = World(0, source=source)
        world.touch(0, 1)
        world.touch(1, 2)
        world.deliver(64)
        await turns()
        (world.space.close if end == "close" else world.space.gone)()
        for index in range(len(source.reads)):
            if not source.reads[index][2].done():
                source.answer(index, OSError("late") if index else None)
        await turns()
        assert not world.errors
        assert not world.uffd.pages


async def test_a_defect_while_bytes_are_placed_is_an_error_of_their_page() -> None:
    """No hang, and no flight is left behind."""

    class Odd:
        size = SIZE
        retries = 0

        async def read(self, offset: int, length: int) -> Any:
            return memoryview(bytes(2 * length))[::2]

    world = World(0, source=Odd())
    world.touch(0, 1)
    world.deliver(64)
    await turns()
    assert world.uffd.pages == {BASE: POISONED}
    assert not world.space.flights
    (error,) = world.errors
    assert isinstance(error, SourceError)


def test_a_defect_of_locate_costs_its_page() -> None:
    """Alone and together: reported, poisoned, and nothing counts as present."""

    class Defect(Located):
        def locate(self, offset: int, length: int) -> int:
            raise KeyError(offset)

    for pages in ([3], [3, 9]):
        world = World(4 * PAGE, source=Defect(SIZE))
        for page in pages:
            world.touch(page, page)
        world.deliver(64)
        assert {page: data for page, data in world.uffd.pages.items() if data is POISONED} == {
            at(page): POISONED for page in pages
        }
        (error,) = world.errors
        assert isinstance(error, PagerError)
        assert world.space.readahead.missing(0, SIZE) == [(0, SIZE)]


async def test_closing_ends_what_is_under_way_and_the_source() -> None:
    """Its reads are canceled, then it is closed."""

    class Closed(Held):
        closed = 0

        async def aclose(self) -> None:
            self.closed += 1

    source = Closed()
    world = World(0, source=source)
    world.touch(0, 1)
    world.deliver(64)
    await turns()
    backend = world.backend
    assert isinstance(backend, SourceBackend)
    await backend.aclose()
    assert source.reads[0][2].cancelled()
    assert source.closed == 1
    assert not backend._tasks


def test_pages_that_show_no_source_are_zeros() -> None:
    """Removed ones, and memory that grew: alone, and beside others."""
    for readahead in (0, 8 * PAGE):
        world = World(readahead, located=True)
        world.remove(4, 2)
        world.serve_all()
        for page in (3, 4, 5, 6):
            world.touch(page, page)
        world.serve_all()
        while world.space.advance():
            pass
        assert world.uffd.pages[at(4)] == world.uffd.pages[at(5)] == bytes(PAGE)
        assert world.uffd.pages[at(3)] == content(3 * PAGE, PAGE)
        found = world.counters.snapshot()
        assert found.pages_zero == 2
        assert found.pages_fault == 4
        assert found.pages == len(world.uffd.pages)


def test_the_fast_path_is_opened_for_the_largest_mapping() -> None:
    """Also where there is none, or only zeros: then it stays closed."""
    opened: list[tuple[int, ...]] = []
    for mappings, expected in (
        (
            [Mapping(BASE, BASE + PAGE, 0), Mapping(ELSEWHERE, ELSEWHERE + 2 * PAGE, 8 * PAGE)],
            [(ELSEWHERE, ELSEWHERE + 2 * PAGE, 8 * PAGE)],
        ),
        ([Mapping(BASE, BASE + PAGE, -1)], []),
        ([], []),
    ):
        for readahead in (0, 4 * PAGE):
            world = World(readahead, located=True)
            world.space.mappings = Mappings(mappings)
            world.space.open_fast_path = lambda _source, *where: opened.append(where)  # type: ignore[method-assign]
            opened.clear()
            world.backend.opened(world.space)
            assert opened == expected


def test_recording_sees_each_fault() -> None:
    """So nothing is served on the plain path while touches are recorded."""
    touched: list[int] = []
    world = World(0, located=True)
    world.space.readahead.note = lambda offset, *_: touched.append(offset)
    for page in (3, 9, 9):
        world.touch(page, page)
        world.serve_all()
    assert touched == [3 * PAGE, 9 * PAGE]
    assert sorted(world.uffd.pages) == [at(3), at(9)]


async def test_a_read_that_fails_after_a_change_of_the_layout() -> None:
    """Costs nothing of what is there now: neither the page that has come in its place, nor who waits for that."""
    source = Held()
    world = World(0, source=source)
    world.touch(4, 1)
    world.deliver(64)
    await turns()
    world.move(4, 1)
    while world.deliver(64):
        pass
    world.uffd.mremap(at(8), at(4), PAGE)
    while world.deliver(64):
        pass
    source.answer(0, OSError(errno.EIO, "broken"))
    await turns(20)
    assert world.uffd.pages == {}
    assert len(world.errors) == 1


@pytest.mark.parametrize("how", ["is_gone", "closing"])
@pytest.mark.parametrize("readahead", [0, 8 * PAGE])
async def test_what_fails_after_the_end_is_not_told(how: str, readahead: int) -> None:
    """The process has ended, or the space is being left: nobody is owed anything. Else each failure counts."""
    source = Held()
    world = World(readahead, source=source)
    for page in (4, 12):
        world.touch(page, page)
    world.deliver(64)
    await turns()
    for index in range(2):
        source.answer(index, OSError(errno.EIO, "broken"))
    await turns(20)
    for index in range(2, len(source.reads)):
        source.answer(index, OSError(errno.EIO, "broken"))
    await turns(20)
    assert world.counters.snapshot().source_errors == len(world.errors) == 2
    world.touch(20, 20)
    world.deliver(64)
    await turns()
    setattr(world.space, how, True)
    asked = len(source.reads)
    source.answer(-1, OSError(errno.EIO, "broken"))
    await turns(20)
    assert len(world.errors) == 2
    assert len(source.reads) == asked
    assert at(20) not in world.uffd.pages
    await world.backend.aclose()


async def test_what_lies_behind_the_end_is_not_asked_for() -> None:
    """Of the last page, only what there is."""
    source = Held(5 * PAGE + 100)
    world = World(0, source=source)
    world.touch(5, 1)
    world.deliver(64)
    await turns()
    assert source.reads[0][:2] == (5 * PAGE, 100)
    source.answer()
    await turns()
    assert world.uffd.pages == {at(5): content(5 * PAGE, 100) + bytes(PAGE - 100)}


async def test_a_defect_in_placing_bytes_is_an_error_that_says_where() -> None:
    """Of ours: it costs the page, and is told like an error of the source."""
    source = Held()
    world = World(0, source=source)
    resolve = world.space.resolve

    def odd(*_runs: object) -> None:
        world.space.resolve = resolve  # type: ignore[method-assign]
        raise RuntimeError("odd")

    world.space.resolve = odd  # type: ignore[method-assign,assignment]
    world.touch(4, 1)
    world.deliver(64)
    await turns()
    source.answer()
    await turns(20)
    assert [str(error) for error in world.errors] == [
        str(SourceError(repr(source), 4 * PAGE, PAGE, "RuntimeError: odd"))
    ]
    assert world.uffd.pages == {at(4): POISONED}


async def test_who_has_begun_to_wait_is_told_although_another_fault_has_failed() -> None:
    """A defect in serving one fault of a wake-up costs none of those whose reads are under way."""

    class Defect(Held):
        def hole(self, offset: int, _length: int) -> int:
            if offset == 9 * PAGE:
                raise RuntimeError("odd")
            return 0

    source = Defect()
    world = World(4 * PAGE, source=source)
    for page in (4, 9):
        world.touch(page, page)
    world.deliver(64)
    await turns()
    assert world.uffd.pages == {at(9): POISONED}
    assert {page for flight in world.space.flights for page in flight.wanted} == {at(4)}
    source.answer()
    await turns(20)
    assert not world.uffd.asleep


def test_what_the_kernel_refuses_is_an_error_of_the_source() -> None:
    """EFAULT: a file that was truncated behind its mapping; each is counted."""
    world = World(0, located=True)
    backend = world.backend
    assert isinstance(backend, SourceBackend)
    run = world.space.run(Op.COPY, at(4))
    gone = backend.refusal(run, errno.EFAULT)
    reason = "its bytes are there no longer: was the file truncated?"
    assert str(gone) == str(ShortReadError(repr(backend.source), 4 * PAGE, PAGE, reason))
    assert isinstance(gone, ShortReadError)
    other = backend.refusal(run, errno.ENOMEM)
    assert str(other) == str(SourceError(repr(backend.source), 4 * PAGE, PAGE, f"{run!r}: ENOMEM"))
    assert world.counters.snapshot().source_errors == 2


async def test_a_fault_that_has_waited_for_its_turn_is_told_so() -> None:
    """The queue is its cause, and not the source, which has answered at once."""
    source, told = Held(), list[tuple[int, str, list[int]]]()
    world = World(0, source=source, limits=limits(concurrent_reads=1))
    assert isinstance(world.backend, SourceBackend)

    def landed(space: Any, flight: Flight, noted: Steps, failure: BaseException | None) -> None:
        assert (space, failure) == (world.space, None)
        cause = cause_of(noted, flight.waited_ns, perf_counter_ns())
        told.append((flight.offset, cause, [thread for _, thread, *_ in flight.faults]))

    world.backend.on_landed = landed
    for page in (4, 9):
        world.touch(page, page)
    world.deliver(64)
    await turns()
    world.touch(4, 44)  # joins
    world.deliver(64)
    await asyncio.sleep(0.05)  # time that the second one spends in the queue
    for _ in range(2):
        source.answer()
        await turns()
    assert told == [(4 * PAGE, "source", [4, 44]), (9 * PAGE, "queue", [9])]


class Clock:
    """Stands for `perf_counter_ns`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1 << 40
        for name in ("messages", "flight", "space", "serve.handler_backend"):
            monkeypatch.setattr(f"aiouffd.engine.{name}.perf_counter_ns", lambda: self.now)


async def test_a_fault_that_joins_a_read_has_taken_the_time_since_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the time since the read began: most faults of a source that is far find their page on its way."""
    clock, source = Clock(monkeypatch), Held()
    world = World(4 * PAGE, source=source)
    for page, later in (4, 1 << 30), (5, 1 << 20), (6, 1 << 10):
        world.touch(page, page)
        world.deliver(64)
        await turns()
        clock.now += later
    assert len(world.space.flights) == 1
    source.answer()
    await turns(20)
    assert not world.uffd.asleep
    assert [bits for bits, count in enumerate(world.counters.snapshot().latency) if count] == [11, 21, 31]


async def test_a_fault_that_joins_a_prefetch_of_a_handler_has_taken_the_time_since_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As of a source."""
    clock, through = Clock(monkeypatch), asyncio.Event()

    class Waits(Handler):
        async def pagefault(self, fault: Fault, batch: Batch) -> None:
            await through.wait()
            batch.copy(fault.page, content(fault.offset, PAGE))

    world = World(0, source=Waits())
    task = asyncio.create_task(prefetch(world.space, [(3 * PAGE, PAGE)]))
    await turns()
    clock.now += 1 << 30
    world.touch(3, 3)
    world.deliver(64)
    await turns()
    clock.now += 1 << 20
    through.set()
    await task
    assert [bits for bits, count in enumerate(world.counters.snapshot().latency) if count] == [21]


@pytest.mark.parametrize(
    ("cause", "reads"),
    [
        (Counter.PAGES_BACKGROUND, [(0, 10), (13, 3)]),
        (Counter.PAGES_PREFETCH, [(0, 3), (5, 5), (13, 3)]),
    ],
)
async def test_a_fill_from_far_reads_over_little_that_is_there(
    monkeypatch: pytest.MonkeyPatch, cause: Counter, reads: list[tuple[int, int]]
) -> None:
    """Where it lies between two parts that are not: two reads cost more. It stays as it is, and counts as before."""
    monkeypatch.setattr(module, "_GAP", 2 * PAGE)
    source = Held()
    world = World(0, source=source)
    for page in (3, 4, 10, 11, 12):
        world.uffd.copy(BASE + page * PAGE, bytes([page]) * PAGE)
        world.space.readahead.brought(page * PAGE, PAGE)
    bringing = asyncio.create_task(world.backend.bring(world.space, [(0, 16 * PAGE)], cause))
    await turns()
    assert [(offset // PAGE, length // PAGE) for offset, length, _ in source.reads] == reads
    for read in range(len(reads)):
        source.answer(read)
    await bringing
    written = {BASE + page * PAGE: bytes([page]) * PAGE for page in (3, 4, 10, 11, 12)}
    assert world.uffd.pages == {at: data for at, data in world.model.items() if at < BASE + 16 * PAGE} | written
    assert (world.counters.words[cause], world.counters.words[Counter.EEXIST]) == (11, 0)


async def test_a_read_over_what_is_there_is_of_few_parts_and_ends_with_the_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each part is placed alone. What is behind the end is zeros."""
    monkeypatch.setattr(module, "_MAX_PARTS", 2)
    source = Held(8 * PAGE - 100)
    world = World(0, source=source)
    for page in (1, 3, 6):
        world.uffd.copy(BASE + page * PAGE, bytes([page]) * PAGE)
        world.space.readahead.brought(page * PAGE, PAGE)
    bringing = asyncio.create_task(world.backend.bring(world.space, [(0, 8 * PAGE)], Counter.PAGES_BACKGROUND))
    await turns()
    assert [(offset, length) for offset, length, _ in source.reads] == [(0, 3 * PAGE), (4 * PAGE, 4 * PAGE - 100)]
    for read in range(2):
        source.answer(read)
    await bringing
    came = [world.uffd.pages[BASE + page * PAGE] for page in (0, 2, 4, 5, 7)]
    assert came == [*(content(page * PAGE, PAGE) for page in (0, 2, 4, 5)), content(7 * PAGE, PAGE - 100) + bytes(100)]
    assert (world.counters.words[Counter.PAGES_BACKGROUND], world.counters.words[Counter.EEXIST]) == (5, 0)


@pytest.mark.parametrize("fails", [False, True])
async def test_what_is_there_between_two_parts_of_a_read_does_not_wait_for_it(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """A write to a protected page goes on; a page that was dropped meanwhile is brought by a read of its own."""
    monkeypatch.setattr(module, "_GAP", 2 * PAGE)
    source = Held()
    world = World(0, source=source)
    readahead = world.space.readahead
    for page in (3, 4):
        world.uffd.copy(BASE + page * PAGE, bytes([page]) * PAGE)
        readahead.brought(page * PAGE, PAGE)
    bringing = asyncio.create_task(world.backend.bring(world.space, [(0, 8 * PAGE)], Counter.PAGES_BACKGROUND))
    await turns()
    flags = int(FaultFlag.WP | FaultFlag.WRITE)
    world.serve(abi.PAGEFAULT_MESSAGE.pack(abi.EVENT_PAGEFAULT, flags, BASE + 3 * PAGE, 7))
    assert (world.counters.words[Counter.WRITE_FAULTS], world.counters.words[Counter.JOINED]) == (1, 0)
    del world.uffd.pages[BASE + 4 * PAGE]
    readahead.forget(4 * PAGE, 5 * PAGE)
    world.touch(4, 1)
    world.serve_all()
    await turns()
    assert [(offset // PAGE, length // PAGE) for offset, length, _ in source.reads] == [(0, 8), (4, 1)]
    source.answer(0, OSError(errno.EIO, "no bytes") if fails else None)
    if fails:
        with pytest.raises(SourceError):
            await bringing
        assert readahead.missing(0, 8 * PAGE) == [(0, 3 * PAGE), (4 * PAGE, 4 * PAGE)]
        assert not world.errors
        source.answer(1)
        await turns()
    else:
        await turns()
        assert BASE + 4 * PAGE not in world.uffd.pages
        source.answer(1)
        await bringing
        assert all(world.uffd.pages[BASE + page * PAGE] == content(page * PAGE, PAGE) for page in (0, 2, 5, 7))
    counted = world.counters.snapshot()
    assert (counted.pages_background, counted.pages_fault, counted.eexist) == (0 if fails else 6, 1, 0)
    assert world.uffd.pages[BASE + 4 * PAGE] == content(4 * PAGE, PAGE)
    assert world.uffd.pages[BASE + 3 * PAGE] == bytes([3]) * PAGE


async def test_reads_ahead_of_a_far_source_are_small_while_others_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes in has to be received and placed at once, and faults wait for that."""
    monkeypatch.setattr(bulk, "_FEW", 4 * PAGE)
    source = Held()
    world = World(0, source=source)
    fault = [False]
    monkeypatch.setattr(world.backend._precedence, "others_fault", lambda: fault[0])  # type: ignore[union-attr]
    for fault[0], pages in ((False, [8]), (True, [4, 4])):
        bringing = asyncio.create_task(world.backend.bring(world.space, [(0, 8 * PAGE)], Counter.PAGES_PREFETCH))
        done = 0
        while done < len(pages):
            await turns()
            source.answer(done)
            done += 1
        await bringing
        assert [length // PAGE for _, length, _ in source.reads] == pages
        source.reads.clear()
        world.space.readahead.forget(0, 8 * PAGE)
        world.uffd.pages.clear()
