"""`engine.serve.handler_backend`: what a handler's coroutines do, and what becomes of it."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Any

import pytest
from engine_world import BASE, ELSEWHERE, SIZE, World, turns
from pattern import PAGE, content

from aiouffd.engine.ahead.fill import complete, prefetch
from aiouffd.engine.runs import FOR_FAULT
from aiouffd.engine.serve.bounds import Limits
from aiouffd.engine.serve.handler import Batch, Fault, Handler
from aiouffd.engine.serve.handler_backend import HandlerBackend
from aiouffd.errors import ClosedError, HandlerError
from aiouffd.kernel.abi import FaultFlag
from aiouffd.ranges import Range
from aiouffd.testing import POISONED

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


def at(page: int, count: int = 1) -> Range:
    """Return the addresses of some pages."""
    return Range(BASE + page * PAGE, count * PAGE)


class Does(Handler):
    """Does what the test says."""

    def __init__(self, work: Callable[[Fault, Batch], Awaitable[object]]) -> None:
        self.work = work

    async def pagefault(self, fault: Fault, batch: Batch) -> None:
        """Do it."""
        await self.work(fault, batch)


async def touched(world: World, *pages: int) -> None:
    """Touch pages, and let the handlers run."""
    for page in pages:
        world.touch(page, page)
    world.deliver(64)
    await turns(20)


async def fill(fault: Fault, batch: Batch) -> None:
    """Do what is right."""
    batch.copy(fault.page, content(fault.offset, PAGE))


async def test_a_batch_may_fill_more_than_was_asked_for() -> None:
    """Each page is counted: that of the fault as such, the others as brought along."""

    async def work(_fault: Fault, batch: Batch) -> None:
        batch.copy(at(4, 3), content(4 * PAGE, 3 * PAGE))
        batch.zeropage(at(9, 2))

    world, told = World(0, source=Does(work)), list[Any]()
    world.backend.on_landed = lambda *landed: told.append(landed)
    await touched(world, 5)
    ((_, flight, steps, failure),) = told
    assert ([step[0] for step in steps], failure, set(flight.wanted)) == (["handler"], None, {at(5).start})
    assert sorted(world.uffd.pages) == [at(page).start for page in (4, 5, 6, 9, 10)]
    assert world.uffd.pages[at(9).start] == bytes(PAGE)
    found = world.counters.snapshot()
    assert (found.pages_fault, found.pages_readahead, found.pages_zero, sum(found.latency)) == (1, 4, 2, 1)
    assert not world.uffd.asleep


async def test_by_default_pages_are_zeros() -> None:
    """As without a handler of one's own."""
    world = World(0, source=Handler())
    await touched(world, 5)
    assert world.uffd.pages == {at(5).start: bytes(PAGE)}


async def test_removed_pages_are_not_asked_for() -> None:
    """They are zeros, beside others that are asked for."""
    asked: list[int] = []

    async def work(fault: Fault, batch: Batch) -> None:
        asked.append(fault.offset // PAGE)
        await fill(fault, batch)

    world = World(0, source=Does(work))
    world.remove(4, 3)
    world.serve_all()
    await touched(world, 4)
    await touched(world, 5, 7)
    assert asked == [7]
    assert world.uffd.pages[at(4).start] == world.uffd.pages[at(5).start] == bytes(PAGE)
    found = world.counters.snapshot()
    assert (found.pages_fault, found.pages_zero) == (3, 2)
    world.uffd.failures.append(-errno.EEXIST)  # it has come by another way
    await touched(world, 6)
    found = world.counters.snapshot()
    assert (found.pages, found.pages_zero) == (3, 2)


async def test_who_waits_for_a_handler_is_let_go_in_the_end() -> None:
    """When the space is being left."""

    async def never(_fault: Fault, _batch: Batch) -> None:
        await asyncio.Event().wait()

    world = World(0, source=Does(never))
    await touched(world, 4, 9)
    world.space.refuse()
    assert world.uffd.pages == {at(4).start: POISONED, at(9).start: POISONED}


async def test_a_handler_that_raises_costs_its_page() -> None:
    """The error says which; another page is served on."""

    async def work(fault: Fault, batch: Batch) -> None:
        if fault.offset == 4 * PAGE:
            raise ValueError("no")
        await fill(fault, batch)

    world = World(0, source=Does(work))
    await touched(world, 4, 5)
    assert world.uffd.pages == {at(4).start: POISONED, at(5).start: content(5 * PAGE, PAGE)}
    (error,) = world.errors
    assert isinstance(error, HandlerError)
    assert "ValueError: no" in str(error)
    assert f"{at(4).start:#x}" in str(error)
    found = world.counters.snapshot()
    assert (found.handler_errors, found.in_flight) == (1, 0)


async def test_a_handler_that_does_nothing_is_an_error() -> None:
    """Unless the page is present after all: flushed before, or filled by another page's batch."""

    async def nothing(fault: Fault, batch: Batch) -> None:
        pass

    async def flushes(fault: Fault, batch: Batch) -> None:
        await fill(fault, batch)
        batch.flush()

    world = World(0, source=Does(nothing))
    await touched(world, 4)
    assert world.uffd.pages == {at(4).start: POISONED}
    assert "returned without resolving it" in str(world.errors[0])

    world = World(0, source=Does(flushes))
    await touched(world, 4)
    assert world.uffd.pages == {at(4).start: content(4 * PAGE, PAGE)}
    assert not world.errors
    assert not world.uffd.asleep
    assert world.counters.snapshot().pages == 1


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
async def test_whether_a_page_is_present_is_asked_until_the_kernel_says_so(number: int) -> None:
    """It does not say while the layout changes, nor while memory is short."""

    async def nothing(fault: Fault, _batch: Batch) -> None:
        world.uffd.pages[fault.page.start] = content(fault.offset, PAGE)
        world.uffd.failures.extend([-number] * 3)

    world = World(0, source=Does(nothing))
    await touched(world, 4)
    async with asyncio.timeout(60):
        while world.uffd.asleep:  # noqa: ASYNC110 - the fake has no event
            await asyncio.sleep(0.001)
    assert not world.errors
    assert world.uffd.pages == {at(4).start: content(4 * PAGE, PAGE)}


@pytest.mark.parametrize("number", [errno.ESRCH, errno.ENOENT])
async def test_a_page_whose_mapping_or_process_is_gone_is_no_error(number: int) -> None:
    """Nothing is owed to it any more."""

    async def nothing(_fault: Fault, _batch: Batch) -> None:
        world.uffd.failures.append(-number)

    world = World(0, source=Does(nothing))
    await touched(world, 4)
    assert not world.errors
    assert world.space.is_gone == (number == errno.ESRCH)


async def test_what_is_there_now_is_not_poisoned_for_what_was() -> None:
    """The page was moved away while it was being asked about; what has come in its place is not touched."""

    async def nothing(_fault: Fault, _batch: Batch) -> None:
        world.uffd.failures.extend([-errno.EAGAIN] * 1000)  # until the page has moved, however long that takes

    world = World(0, source=Does(nothing))
    await touched(world, 4)
    world.move(4, 1)
    while world.deliver(64):
        pass
    world.uffd.mremap(at(8).start, at(4).start, PAGE)
    while world.deliver(64):
        pass
    assert world.uffd.failures
    world.uffd.failures.clear()
    await asyncio.sleep(0.01)
    assert not world.uffd.pages
    assert not world.errors


@pytest.mark.parametrize("change", ["remove", "move"])
@pytest.mark.parametrize("how", ["copy", "zeropage", "poison"])
async def test_what_comes_after_a_change_of_the_layout_is_left_out(change: str, how: str) -> None:
    """A handler's bytes are for what was there when it was called, also those of other pages in its batch."""
    through = asyncio.Event()

    async def work(_fault: Fault, batch: Batch) -> None:
        await through.wait()
        if how == "copy":
            batch.copy(at(4, 3), content(4 * PAGE, 3 * PAGE))
        else:
            getattr(batch, how)(at(4, 3))

    world = World(0, source=Does(work))
    await touched(world, 4)
    getattr(world, change)(5, 1)
    while world.deliver(64):
        pass
    if change == "move":
        world.uffd.mremap(at(8).start, at(5).start, PAGE)
        while world.deliver(64):
            pass
    through.set()
    await turns(20)
    assert sorted(world.uffd.pages) == [at(4).start, at(6).start]
    assert not world.space.on_changed
    assert not world.errors


@pytest.mark.parametrize("change", ["remove", "move"])
async def test_the_layout_changes_before_the_handler_has_begun(change: str) -> None:
    """Both were read in one turn of the loop: what was emptied is zeros, and what was moved does not count as there."""
    world = World(0, source=Does(fill))
    world.touch(4, 1)
    world.deliver(64)
    getattr(world, change)(4, 1)
    while world.uffd._events:  # not further: its thread has not faulted anew
        world.deliver(64)
    await turns(20)
    while world.deliver(64):
        pass
    await complete(world.space, world.backend)
    assert world.uffd.pages == world.model
    assert not world.space.on_changed


async def test_a_page_that_was_moved_is_served_where_it_is() -> None:
    """Its thread faults anew there; what the first handler gives is used nowhere."""
    through = asyncio.Event()
    asked: list[int] = []

    async def work(fault: Fault, batch: Batch) -> None:
        asked.append(fault.page.start)
        await through.wait()
        await fill(fault, batch)

    world = World(0, source=Does(work))
    await touched(world, 4)
    world.move(4, 1)
    while world.deliver(64):
        pass
    there = ELSEWHERE + 4 * PAGE
    world.uffd.touch(there, 2)
    world.deliver(64)
    await turns()
    through.set()
    await turns(20)
    assert asked == [at(4).start, there]
    assert world.uffd.pages == {there: content(4 * PAGE, PAGE)}


async def test_a_handler_has_its_time() -> None:
    """Then its page is poisoned, with an error that says how long."""

    async def never(_fault: Fault, _batch: Batch) -> None:
        await asyncio.Event().wait()

    world = World(0, source=Does(never), limits=Limits(timeout=0.01))
    await touched(world, 4)
    async with asyncio.timeout(60):
        while world.uffd.asleep:  # noqa: ASYNC110 - the fake has no event
            await asyncio.sleep(0.001)
    assert "has not returned in 0.01 s" in str(world.errors[0])
    found = world.counters.snapshot()
    assert found.source_reads == 1
    assert found.source_ns >= 5_000_000
    assert world.uffd.pages == {at(4).start: POISONED}


async def test_so_many_handlers_at_once() -> None:
    """`concurrent_reads` bounds them."""
    through, running = asyncio.Event(), [0, 0]

    async def work(fault: Fault, batch: Batch) -> None:
        running[0] += 1
        running[1] = max(running)
        await through.wait()
        running[0] -= 1
        await fill(fault, batch)

    world = World(0, source=Does(work), limits=Limits(concurrent_reads=2))
    await touched(world, 1, 2, 3, 4)
    assert running[0] == 2
    through.set()
    await turns(40)
    assert running == [0, 2]
    assert len(world.uffd.pages) == 4


async def test_what_is_canceled_from_outside_is_no_error() -> None:
    """The backend closes: its handlers are canceled, and nothing is poisoned."""

    async def never(_fault: Fault, _batch: Batch) -> None:
        await asyncio.Event().wait()

    world = World(0, source=Does(never))
    await touched(world, 4)
    backend = world.backend
    assert isinstance(backend, HandlerBackend)
    await backend.aclose()
    assert not world.errors
    assert not world.uffd.pages
    assert world.counters.snapshot().in_flight == 0


@pytest.fixture(autouse=True)
def _nothing_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiouffd.engine.serve.handler_backend._said", {})


async def test_a_handler_is_closed_when_serving_ends(caplog: pytest.LogCaptureFixture) -> None:
    """After its calls; what it raises then is logged, and ends nothing else."""
    said: list[str] = []

    class Closing(Does):
        async def aclose(self) -> None:
            said.append("closed")
            raise LookupError("the session is lost")

    async def never(_fault: Fault, _batch: Batch) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            said.append("canceled")

    world = World(0, source=Closing(never))
    await touched(world, 4)
    backend = world.backend
    assert isinstance(backend, HandlerBackend)
    await backend.aclose()
    assert said == ["canceled", "closed"]
    assert "the session is lost" in caplog.text


async def test_a_cancelation_that_the_handler_comes_upon_is_its_error() -> None:
    """Of something that it has waited for."""

    async def comes_upon(_fault: Fault, _batch: Batch) -> None:
        raise asyncio.CancelledError

    world = World(0, source=Does(comes_upon))
    await touched(world, 4)
    assert "CancelledError" in str(world.errors[0])
    assert world.uffd.pages == {at(4).start: POISONED}


def told(handler: Handler, page: int, access: str, reason: str, thread: int = 0) -> str:
    """Return what an error says of a page."""
    who = f" of thread {thread}" if thread else ""
    fault = f"the fault{who} at {at(page).start:#x} (offset {page * PAGE:#x}, {access})"
    return str(HandlerError(repr(handler), fault, reason))


async def test_what_is_prefetched_is_asked_for_like_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of nobody, so many at once, each page that is missing once; no fault is counted."""
    monkeypatch.setattr("aiouffd.engine.serve.handler_backend._TOGETHER", 2)
    asked: list[Fault] = []
    through = asyncio.Event()

    async def work(fault: Fault, batch: Batch) -> None:
        asked.append(fault)
        await through.wait()
        await fill(fault, batch)

    world = World(0, source=Does(work))
    task = asyncio.create_task(prefetch(world.space, [(3 * PAGE, 5 * PAGE)]))
    await turns()
    assert len(asked) == 2
    through.set()
    await task
    assert asked == [Fault(at(page).start, FaultFlag(0), 0, at(page), page * PAGE) for page in range(3, 8)]
    assert world.uffd.pages == {at(page).start: content(page * PAGE, PAGE) for page in range(3, 8)}
    found = world.counters.snapshot()
    assert (found.pages_prefetch, found.pages_fault, sum(found.latency), found.in_flight) == (5, 0, 0, 0)


@pytest.mark.parametrize("how", ["raises", "poisons", "is_gone", "closing"])
async def test_a_prefetch_ends_with_the_first_that_fails(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """What was begun with it is done; nothing more is begun, and the error says which page it is."""
    monkeypatch.setattr("aiouffd.engine.serve.handler_backend._TOGETHER", 2)
    asked: list[int] = []

    async def work(fault: Fault, batch: Batch) -> None:
        asked.append(fault.offset // PAGE)
        await asyncio.sleep(0)
        if fault.offset != 3 * PAGE:
            await fill(fault, batch)
        elif how == "raises":
            raise ValueError("no")
        elif how == "poisons":
            batch.poison(fault.page)
        else:
            setattr(world.space, how, True)

    handler = Does(work)
    world = World(0, source=handler)
    with pytest.raises((HandlerError, ClosedError)) as caught:
        await prefetch(world.space, [(3 * PAGE, 8 * PAGE)])
    assert asked == [3, 4]
    if how in ("raises", "poisons"):
        reason = "raised ValueError: no" if how == "raises" else "poisoned it"
        assert str(caught.value) == told(handler, 3, "read", reason)
        assert at(4).start in world.uffd.pages
    assert not world.errors
    assert world.counters.snapshot().handler_errors == (1 if how == "raises" else 0)


async def test_each_failure_is_counted_and_says_whose_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """Handler, fault and reason, and one traceback; a page that has failed is no fault that was served."""

    async def work(fault: Fault, batch: Batch) -> None:
        if fault.offset >= 8 * PAGE:
            batch.copy(at(20, 4), content(20 * PAGE, 4 * PAGE))
        elif fault.offset != 6 * PAGE:
            raise ValueError("no")

    handler = Does(work)
    world = World(0, source=handler)
    await touched(world, 20)
    await touched(world, 4, 5, 6)
    assert [str(error) for error in world.errors] == [
        *(told(handler, page, "read", "raised ValueError: no", page) for page in (4, 5)),
        told(handler, 6, "read", "returned without resolving it", 6),
    ]
    found = world.counters.snapshot()
    assert (found.handler_errors, found.pages_fault, sum(found.latency), found.in_flight) == (3, 1, 1, 0)
    assert caplog.text.count("Traceback") == 1


async def test_a_recording_sees_what_was_asked_for() -> None:
    """The offsets of faults, in order."""
    touched_: list[int] = []
    world = World(0, source=Handler())
    world.space.readahead.note = lambda offset, *_: touched_.append(offset)
    backend = HandlerBackend(Handler(), world.counters, Limits())
    assert backend.local is False
    world.space.backend = backend
    await touched(world, 5, 2)
    assert sorted(touched_) == [2 * PAGE, 5 * PAGE]
    await prefetch(world.space, [(0, SIZE)])
    assert len(touched_) == 2
    assert FOR_FAULT.errors is None


@pytest.mark.parametrize("how", ["is_gone", "closing"])
async def test_a_handler_that_returns_after_the_end_is_asked_nothing(how: str) -> None:
    """The process has ended, or the space is being left: what it has done is dropped, and what it has not, too."""

    async def work(fault: Fault, batch: Batch) -> None:
        if fault.offset == 4 * PAGE:
            await fill(fault, batch)
        setattr(world.space, how, True)

    for page in (4, 5):
        world = World(0, source=Does(work))
        await touched(world, page)
        assert not world.uffd.pages
        assert not world.errors


async def test_zeros_are_counted_batch_by_batch() -> None:
    """As pages that were asked for, too."""

    async def work(fault: Fault, batch: Batch) -> None:
        batch.zeropage(Range(fault.page.start, 2 * PAGE))

    world = World(0, source=Does(work))
    await touched(world, 0, 8)
    found = world.counters.snapshot()
    assert (found.pages_zero, found.pages_fault, found.pages_readahead) == (4, 2, 2)
    assert world.space.readahead.missing(0, SIZE) == [(2 * PAGE, 6 * PAGE), (10 * PAGE, SIZE - 10 * PAGE)]
