"""`engine.serve.presence`: when a prefetch says that it is done, each page is there, or it raises."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Any

import pytest
from engine_world import BASE, ELSEWHERE, PAGES, SIZE, Held, World, turns
from pattern import PAGE, Pattern, content

from aiouffd.engine.serve.handler import Batch, Fault, Handler
from aiouffd.engine.serve.presence import has_come, until_present
from aiouffd.engine.statistics import Counter
from aiouffd.errors import ClosedError, HandlerError, ShortReadError, SourceError
from aiouffd.kernel import abi
from aiouffd.kernel.abi import Feature
from aiouffd.testing import POISONED, FakeUffd

if TYPE_CHECKING:
    from collections.abc import Sequence


class Fills(Handler):
    """Fills each page when it is let through; fails for some, each so often."""

    def __init__(self, failures: dict[int, int] | None = None) -> None:
        self.failures = failures or {}
        self.through = asyncio.Event()
        self.asked: list[int] = []

    async def pagefault(self, fault: Fault, batch: Batch) -> None:
        """Fill it."""
        page = fault.offset // PAGE
        self.asked.append(page)
        await self.through.wait()
        if self.failures.get(page):
            self.failures[page] -= 1
            raise ValueError("once")
        batch.copy(fault.page, content(fault.offset, PAGE))


class Fails(Pattern):
    """Far away, and fails for some pages, each so often."""

    retries = 0
    read_nowait = None  # type: ignore[assignment]

    def __init__(self, failures: dict[int, int] | None = None) -> None:
        super().__init__(SIZE)
        self.failures = failures or {}
        self.through = asyncio.Event()
        self.asked: list[int] = []

    async def read(self, offset: int, length: int) -> bytes:
        """Return the bytes, when that is allowed."""
        pages = range(offset // PAGE, (offset + length) // PAGE)
        self.asked += pages
        await self.through.wait()
        for page in pages:
            if self.failures.get(page):
                self.failures[page] -= 1
                raise OSError(errno.EIO, "once")
        return content(offset, length)


KINDS: list[Any] = [Fills, Fails]


def all_there(world: World) -> bool:
    """Tell whether each page of the model is there, with its bytes."""
    return world.uffd.pages == world.model


async def come(kind: Any, readahead: int, uffd: FakeUffd | None = None) -> tuple[World, Any, bytes]:
    """Have three threads touch a page, and have it come; return the world, its source, and what two of them said."""
    source = kind()
    source.through.set()
    world = World(readahead, source=source, uffd=uffd)
    world.touch(5, 1)
    message = world.uffd.read_raw()
    world.touch(5, 2)
    world.touch(5, 3)
    late = world.uffd.read_raw()
    world.serve(message)
    await turns(20)
    assert 5 in source.asked
    assert not world.uffd.asleep
    return world, source, late


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("readahead", [0, 16 * PAGE])
async def test_messages_that_are_read_after_their_page_has_come(kind: Any, readahead: int) -> None:
    """Their threads had found the page missing before: it is not brought a second time."""
    world, source, late = await come(kind, readahead)
    world.serve(late[: abi.MESSAGE_SIZE])
    world.serve(late[abi.MESSAGE_SIZE :])
    await turns(20)
    assert len(source.asked) == len(world.uffd.pages)
    found = world.counters.snapshot()
    assert (found.faults, found.joined, sum(found.latency)) == (3, 2, 3)
    assert found.pages == len(world.uffd.pages)
    assert found.bytes_fetched == (found.pages * PAGE if kind is Fails else 0)
    assert not world.space.readahead.missing(5 * PAGE, 6 * PAGE)


async def test_a_late_message_among_others() -> None:
    """Each page is counted once, as what it was brought for."""
    world = World(0, source=Pattern(SIZE))
    world.touch(5, 1)
    late = world.uffd.read_raw()
    await world.space.backend.bring(world.space, [(5 * PAGE, PAGE)], Counter.PAGES_PREFETCH)
    world.touch(2, 2)
    world.serve(late + world.uffd.read_raw())
    assert sorted(world.uffd.pages) == [BASE + page * PAGE for page in (2, 5)]
    assert not world.uffd.asleep
    found = world.counters.snapshot()
    assert (found.pages_fault, found.pages_readahead, found.pages_prefetch) == (1, 0, 1)
    assert (found.joined, sum(found.latency), found.bytes_fetched) == (1, 2, 2 * PAGE)


async def test_a_page_on_its_way_has_not_come() -> None:
    """Though it counts as present: its sleepers are not sent around for nothing."""
    world = World(16 * PAGE, source=Held())
    world.touch(5, 1)
    world.deliver(64)
    assert not world.space.readahead.missing(5 * PAGE, 6 * PAGE)
    assert not has_come(world.space, BASE + 5 * PAGE, 5 * PAGE, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [errno.EAGAIN, errno.ENOMEM])
async def test_a_page_that_is_put_off_has_not_come(kind: Any, error: int) -> None:
    """It is not brought again, and its sleepers are not sent around until it can come."""
    source = kind()
    source.through.set()
    world = World(0, source=source)
    world.uffd.failures.extend([-error] * 100)
    for thread in range(5):
        world.touch(5, thread)
        world.deliver(1)
        await turns(20)
    assert not world.deliver(1)
    assert source.asked == [5]
    world.uffd.failures.clear()
    world.space.retry()
    assert not world.uffd.asleep
    assert world.uffd.pages == {BASE + 5 * PAGE: content(5 * PAGE, PAGE)}
    found = world.counters.snapshot()
    assert (found.faults, found.joined, found.pages_fault, found.pages) == (5, 4, 1, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("readahead", [0, 16 * PAGE])
@pytest.mark.parametrize("features", [abi.LAYOUT_EVENTS, abi.LAYOUT_EVENTS | Feature.THREAD_ID])
async def test_a_page_that_was_lost_without_an_event_comes_again(kind: Any, readahead: int, features: Feature) -> None:
    """However many threads find it missing, and whether or not the kernel says who they are."""
    world, source, _ = await come(kind, readahead, FakeUffd(features))
    source.asked.clear()
    for page in (4, 5):
        world.uffd.pages.pop(BASE + page * PAGE, None)
        for thread in range(3):
            world.touch(page, thread)
    for _ in range(5):
        world.deliver(64)
        await turns()
    assert not world.uffd.asleep
    assert source.asked == [4, 5]
    assert world.uffd.pages.items() <= world.model.items()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("readahead", [0, 16 * PAGE])
async def test_what_others_have_under_way_may_fail(kind: Any, readahead: int) -> None:
    """A prefetch leaves out what is being brought for another one; if that fails, it brings it itself."""
    source = kind({5: 1})
    world = World(readahead, source=source)
    async with world.dispatched():
        first = asyncio.create_task(world.space.backend.bring(world.space, [(0, SIZE)], Counter.PAGES_BACKGROUND))
        await turns()
        second = asyncio.create_task(world.space.backend.bring(world.space, [(0, SIZE)], Counter.PAGES_PREFETCH))
        await turns()
        source.through.set()
        with pytest.raises((SourceError, HandlerError), match="once"):
            await first
        await second
        assert all_there(world)


@pytest.mark.parametrize("kind", KINDS)
async def test_the_flight_of_a_fault_may_fail(kind: Any) -> None:
    """The toucher gets SIGBUS; a prefetch that had waited for it heals the page, or raises itself."""
    source = kind({5: 1})
    world = World(0, source=source)
    async with world.dispatched():
        world.touch(5, 1)
        world.deliver(64)
        await turns()
        prefetch = asyncio.create_task(world.space.backend.bring(world.space, [(0, SIZE)], Counter.PAGES_PREFETCH))
        await turns()
        source.through.set()
        await prefetch
        assert all_there(world)
        assert len(world.errors) == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_under_way_elsewhere_is_not_waited_for(kind: Any) -> None:
    """A source that does not answer for one page does not hold up a prefetch of others."""
    source = kind()
    world = World(0, source=source)
    async with world.dispatched():
        world.touch(5, 1)
        world.deliver(64)
        await turns()
        source.through = asyncio.Event()
        source.through.set()
        await world.space.backend.bring(world.space, [(9 * PAGE, 2 * PAGE)], Counter.PAGES_PREFETCH)
        assert source.asked == [5, 9, 10]
        assert set(world.uffd.pages) == {BASE + 9 * PAGE, BASE + 10 * PAGE}


async def test_what_begins_while_others_are_waited_for_may_fail() -> None:
    """A window fails, and one of its pages is asked for alone; meanwhile another fault begins to bring its rest."""
    source = Held()
    world = World(16 * PAGE, source=source)
    async with world.dispatched():
        world.touch(5, 1)
        world.deliver(64)
        await turns()
        offset, length, _ = source.reads[0]
        asked = [(offset, length)]
        prefetch = asyncio.create_task(world.space.backend.bring(world.space, asked, Counter.PAGES_PREFETCH))
        await turns()
        source.answer(0, OSError("a window"))
        await turns()
        assert source.reads[1][:2] == (5 * PAGE, PAGE)
        world.touch((offset + length) // PAGE - 1, 2)
        world.deliver(64)
        await turns()
        begun = len(source.reads)
        assert begun > 2
        source.answer(1)
        await turns()
        assert not prefetch.done()
        for index in range(2, begun):
            source.answer(index, OSError("the rest"))
        while not prefetch.done():
            await turns()
            for index in range(begun, len(source.reads)):
                if not source.reads[index][2].done():
                    source.answer(index)
        await prefetch
        assert all(BASE + at in world.uffd.pages for at in range(offset, offset + length, PAGE))


@pytest.mark.parametrize("kind", KINDS)
async def test_its_own_failure_is_raised_and_poisons_nothing(kind: Any) -> None:
    """And what has come is there."""
    source = kind({5: 99})
    source.through.set()
    world = World(0, source=source)
    async with world.dispatched():
        with pytest.raises((SourceError, HandlerError), match="once"):
            await world.space.backend.bring(
                world.space, [(page * PAGE, PAGE) for page in range(PAGES)], Counter.PAGES_PREFETCH
            )
        assert POISONED not in world.uffd.pages.values()
        assert not world.errors
        source.failures.clear()
        await world.space.backend.bring(world.space, [(0, SIZE)], Counter.PAGES_PREFETCH)
        assert all_there(world)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["move", "move back", "remove", "unmap"])
async def test_the_layout_changes_meanwhile(kind: Any, change: str) -> None:
    """What was under way for the old layout is dropped; what is shown in the new one is brought there."""
    source = kind()
    world = World(16 * PAGE, source=source)
    async with world.dispatched():
        prefetch = asyncio.create_task(world.space.backend.bring(world.space, [(0, SIZE)], Counter.PAGES_PREFETCH))
        await turns()
        if change.startswith("move"):
            world.move(8, 8)
            if change == "move back":
                world.deliver(64)
                world.deliver(64)
                world.uffd.mremap(ELSEWHERE + 8 * PAGE, BASE + 8 * PAGE, 8 * PAGE)
                world.model = {BASE + at: content(at, PAGE) for at in range(0, SIZE, PAGE)}
        else:
            getattr(world, change)(8, 8)
        while world.deliver(64):
            pass
        source.through.set()
        await prefetch
        if change == "remove":  # these are zeros when they are touched
            for page in range(8, 16):
                assert BASE + page * PAGE not in world.uffd.pages
                del world.model[BASE + page * PAGE]
        assert all_there(world)


@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_there_is_not_brought_again(kind: Any) -> None:
    """Touched or prefetched before, with readahead or without: not read again, not counted again."""
    for readahead in (0, 4 * PAGE):
        source = kind()
        source.through.set()
        world = World(readahead, source=source)
        async with world.dispatched():
            for page in (3, 17, 18):
                world.touch(page, 1)
            while world.uffd.asleep:  # noqa: ASYNC110 - the fake has no event
                await asyncio.sleep(0.001)
            for _ in range(2):
                await world.space.backend.bring(world.space, [(0, SIZE)], Counter.PAGES_PREFETCH)
            assert all_there(world)
            assert sorted(source.asked) == list(range(PAGES))
            assert world.counters.snapshot().pages == PAGES


async def test_a_page_that_the_handler_poisons_is_an_error() -> None:
    """It is not there, and no other try makes it be there."""

    class Poisons(Handler):
        async def pagefault(self, fault: Fault, batch: Batch) -> None:
            if fault.offset == 3 * PAGE:
                batch.poison(fault.page)
            else:
                batch.copy(fault.page, content(fault.offset, PAGE))

    world = World(0, source=Poisons())
    with pytest.raises(HandlerError, match="poisoned it"):
        await world.space.backend.bring(world.space, [(0, SIZE)], Counter.PAGES_PREFETCH)
    assert world.uffd.pages[BASE + 3 * PAGE] is POISONED


@pytest.mark.parametrize("located", [True, False])
async def test_what_the_kernel_refuses_is_raised(located: bool) -> None:
    """EFAULT is a file that was cut behind its mapping: the error reaches the caller, and nothing is poisoned."""
    world = World(0, located=located)
    world.uffd.failures.extend([0, -errno.EFAULT])
    with pytest.raises(ShortReadError, match="truncated"):
        await world.space.backend.bring(world.space, [(at * PAGE, PAGE) for at in (0, 2)], Counter.PAGES_PREFETCH)
    assert not world.errors
    assert world.uffd.pages == {BASE: content(0, PAGE)}
    await world.space.backend.bring(world.space, [(0, SIZE)], Counter.PAGES_PREFETCH)
    assert all_there(world)


async def test_a_handlers_bytes_that_the_kernel_refuses_are_raised() -> None:
    """As those of a source."""
    source = Fills()
    source.through.set()
    world = World(0, source=source)
    world.uffd.failures.extend([-errno.EFAULT])
    with pytest.raises(HandlerError, match="refused"):
        await world.space.backend.bring(world.space, [(0, PAGE)], Counter.PAGES_PREFETCH)
    assert not world.uffd.pages


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_put_off_is_waited_for(kind: Any, number: int) -> None:
    """EAGAIN while the layout changes, ENOMEM while memory is short: it is done when each page is there."""
    source = kind()
    source.through.set()
    world = World(0, source=source)
    async with world.dispatched():
        world.uffd.failures.extend([-number] * 7)
        await world.space.backend.bring(world.space, [(0, SIZE)], Counter.PAGES_PREFETCH)
        assert all_there(world)


async def test_a_shortage_of_memory_that_does_not_pass_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A toucher that had come upon it meanwhile is woken: it faults for itself, and is served."""
    monkeypatch.setattr("aiouffd.engine.space._NO_MEMORY_NS", 0)
    world = World(0, located=True)
    world.uffd.failures.extend([-errno.ENOMEM] * 2)
    prefetch = asyncio.create_task(world.space.backend.bring(world.space, [(0, 2 * PAGE)], Counter.PAGES_PREFETCH))
    await turns()
    world.uffd.failures.clear()
    world.uffd.failures.extend([-errno.ENOMEM] * 3)
    world.touch(0, 1)
    world.deliver(64)  # ENOMEM: it is covered by what was put off
    assert world.uffd.asleep
    world.space.retry()
    with pytest.raises(SourceError, match="ENOMEM"):
        await prefetch
    world.serve_all()
    assert not world.uffd.asleep
    assert world.uffd.pages[BASE] == content(0, PAGE)
    assert not world.errors


@pytest.mark.parametrize("kind", KINDS)
async def test_a_space_that_is_closed_meanwhile(kind: Any) -> None:
    """It is served no longer: that is an error, and no silent end."""
    source = kind()
    world = World(0, source=source)
    prefetch = asyncio.create_task(world.space.backend.bring(world.space, [(0, SIZE)], Counter.PAGES_PREFETCH))
    await turns()
    world.space.close()
    with pytest.raises(ClosedError):
        await prefetch


async def test_a_process_that_changes_its_layout_all_the_time_does_not_keep_the_loop_busy() -> None:
    """Between two passes there is a pause, which grows."""
    source = Held()
    world = World(0, source=source)
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def paused(seconds: float) -> None:
        if seconds > 0.005:
            pauses.append(seconds)
            seconds = 0
        await sleep(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "sleep", paused)
        prefetch = asyncio.create_task(world.space.backend.bring(world.space, [(0, PAGE)], Counter.PAGES_PREFETCH))
        for number in range(120):
            while len(source.reads) == number:
                await sleep(0)
            where = BASE if number % 2 == 0 else ELSEWHERE
            world.uffd.mremap(where, ELSEWHERE if where == BASE else BASE, PAGE)
            while world.deliver(64):
                pass
            source.answer()
            await sleep(0)
        while len(source.reads) == 120:
            await sleep(0)
        source.answer()
        await prefetch
    assert pauses == sorted(pauses)
    assert pauses[0] < 0.02
    assert pauses[-1] == 1.0
    assert list(world.uffd.pages.values()) == [content(0, PAGE)]


@pytest.mark.parametrize(
    ("loss", "forgets", "again"),
    [
        ("untold", True, []),
        ("untold", False, [(PAGE, PAGE)]),
        ("forgotten", True, [(PAGE, PAGE)]),
        ("layout", True, [(PAGE, PAGE)]),
        ("replaced", True, [(0, PAGE), (PAGE, PAGE)]),
    ],
)
async def test_ranges_are_looked_up_only_after_a_loss(loss: str, forgets: bool, again: list[tuple[int, int]]) -> None:
    """A pass during which readahead has forgotten nothing was the last, if readahead is told of every loss."""
    space = World(0, source=Fails()).space
    passes: list[list[tuple[int, int]]] = []

    async def one_pass(ranges: Sequence[tuple[int, int]]) -> None:
        passes.append(list(ranges))
        for offset, length in ranges:
            space.readahead.brought(offset, length)
        if len(passes) > 1:
            return
        if loss == "forgotten":
            space.readahead.forget(PAGE, 2 * PAGE)
        elif loss == "replaced":
            space.readahead = space.readahead.fresh()
        else:
            space.readahead.not_brought(PAGE, 2 * PAGE)
        if loss == "layout":
            space.mappings.unmap(BASE + 8 * PAGE, BASE + 9 * PAGE)

    await until_present(space, [(0, PAGE), (PAGE, PAGE)], one_pass, forgets=forgets)
    assert passes[1:] == ([again] if again else [])
