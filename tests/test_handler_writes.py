"""`engine.serve.handler`: writes to protected pages, and layout events."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Any

import pytest
from engine_world import BASE, ELSEWHERE, World, turns
from pattern import PAGE

from aiouffd.engine.runs import FOR_FAULT, Op
from aiouffd.engine.serve.bounds import Limits
from aiouffd.engine.serve.handler import Batch, Fault, Handler, wants_writes
from aiouffd.engine.serve.handler_backend import HandlerBackend
from aiouffd.errors import HandlerError
from aiouffd.kernel import abi
from aiouffd.kernel.abi import FaultFlag
from aiouffd.kernel.events import Remap, Remove, Unmap
from aiouffd.ranges import Range

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiouffd.kernel.userfaultfd import Fork


def at(page: int, count: int = 1) -> Range:
    """Return the addresses of some pages."""
    return Range(BASE + page * PAGE, count * PAGE)


class Events(Handler):
    """Notes the events; fails for one."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    async def remap(self, event: Remap) -> None:
        """Note it."""
        await asyncio.sleep(0)
        self.seen.append(event)

    async def remove(self, event: Remove) -> None:
        """Fail."""
        raise ValueError("no")

    async def unmap(self, event: Unmap) -> None:
        """Note it."""
        self.seen.append(event)


async def test_events_come_one_after_the_other() -> None:
    """In their order, also behind one that failed, which is reported."""
    handler = Events()
    world = World(0, source=handler)
    world.remove(1, 1)
    world.serve_all()
    world.move(4, 1)
    world.serve_all()
    world.unmap(9, 2)
    world.serve_all()
    await turns(20)
    assert handler.seen == [
        Remap(at(4).start, ELSEWHERE + 4 * PAGE, PAGE),
        *([Unmap(at(4).start, at(5).start)] if Unmap(at(4).start, at(5).start) in handler.seen else []),
        Unmap(at(9).start, at(11).start),
    ]
    (error,) = world.errors
    assert "ValueError: no" in str(error)
    assert world.counters.snapshot().handler_errors == 1
    backend = world.backend
    assert isinstance(backend, HandlerBackend)
    await backend.aclose()


class Writes(Handler):
    """Is called for writes."""

    def __init__(self, work: Callable[[Fault, Batch], Awaitable[object]]) -> None:
        self.work = work

    async def write(self, fault: Fault, batch: Batch) -> None:
        """Do it."""
        await self.work(fault, batch)


async def test_writes_are_told_only_where_that_is_wanted() -> None:
    """A writer is let go in any case: after the call, after its failure, or at once."""
    seen: list[Fault] = []

    async def note(fault: Fault, _batch: Batch) -> None:
        seen.append(fault)

    async def fail(_fault: Fault, _batch: Batch) -> None:
        raise ValueError("no")

    async def protect(fault: Fault, batch: Batch) -> None:
        batch.protect(fault.page)

    for handler, ops in (
        (Handler(), [Op.UNPROTECT]),
        (Writes(note), [Op.UNPROTECT]),
        (Writes(fail), [Op.UNPROTECT]),
        (Writes(protect), [Op.PROTECT]),
    ):
        assert wants_writes(handler) == isinstance(handler, Writes)
        world = World(0, source=handler)
        asked: list[tuple[int, int]] = []
        world.space.resolve = lambda runs, asked=asked: asked.extend((run.op, run.dst) for run in runs)  # type: ignore[method-assign,misc]
        world.backend.written(world.space, at(3).start, int(FaultFlag.WP | FaultFlag.WRITE), 7)
        await turns(20)
        assert asked == [(op, at(3).start) for op in ops]
        assert not world.space.flights
        assert len(world.errors) == (1 if isinstance(handler, Writes) and handler.work is fail else 0)
    (fault,) = seen
    assert (fault.offset, fault.thread_id, fault.page) == (3 * PAGE, 7, at(3))
    assert not wants_writes(object())


class Held(Writes):
    """Its writes go on when the test says so."""

    def __init__(self, effect: Callable[[], object] = lambda: None) -> None:
        self.through = asyncio.Event()
        self.effect = effect
        super().__init__(self.hold)

    async def hold(self, _fault: Fault, _batch: Batch) -> None:
        """Wait."""
        await self.through.wait()
        self.effect()


def written(world: World, *pages: int) -> list[tuple[int, int]]:
    """Write to protected pages; return a list of what the kernel is then asked for: (op, address)."""
    asked: list[tuple[int, int]] = []
    world.space.resolve = lambda runs: asked.extend((run.op, run.dst) for run in runs)  # type: ignore[method-assign]
    for page in pages:
        world.backend.written(world.space, at(page).start, int(FaultFlag.WP | FaultFlag.WRITE), 7)
    return asked


async def test_writes_are_on_their_way_until_they_have_been_told() -> None:
    """As many as there are; a change of the layout meanwhile harms nobody, and they do not join others."""
    world = World(0, source=Held())
    asked = written(world, 3, 5)
    await turns()
    assert world.counters.snapshot().in_flight == 2
    assert {flight.start for flight in world.space.flights} == {at(3).start, at(5).start}
    assert {flight.purpose for flight in world.space.flights} == {FOR_FAULT}
    world.space.changed(at(3).start, at(4).start)
    assert [flight.start for flight in world.space.flights] == [at(5).start]
    handler: Any = world.backend
    handler.handler.through.set()
    await turns(20)
    assert asked == [(Op.UNPROTECT, at(3).start), (Op.UNPROTECT, at(5).start)]
    assert world.counters.snapshot().in_flight == 0
    assert not world.errors


async def test_a_handler_of_writes_has_its_time() -> None:
    """Then its writer goes on, with an error that says who has failed for which fault, and each is counted."""
    handler = Held()
    world = World(0, source=handler, limits=Limits(timeout=0.01))
    asked = written(world, 3, 5)
    async with asyncio.timeout(60):
        while len(asked) < 2:  # noqa: ASYNC110 - the fake has no event
            await asyncio.sleep(0.001)
    assert [str(error) for error in world.errors] == [
        told(handler, page, "write", "has not returned in 0.01 s", 7) for page in (3, 5)
    ]
    found = world.counters.snapshot()
    assert (found.handler_errors, found.in_flight) == (2, 0)


async def test_a_write_whose_handler_fails_or_is_canceled() -> None:
    """A failure is told, and says what was raised; a backend that closes tells nothing, and lets nobody go."""

    async def fail(_fault: Fault, _batch: Batch) -> None:
        raise ValueError("no")

    world = World(0, source=Writes(fail))
    written(world, 3, 5)
    await turns(20)
    assert ["ValueError: no" in str(error) and "offset 0x" in str(error) for error in world.errors] == [True, True]
    assert world.counters.snapshot().handler_errors == 2
    world = World(0, source=Held())
    asked = written(world, 3)
    await turns()
    backend: Any = world.backend
    await backend.aclose()
    assert not asked
    assert not world.errors
    assert not world.space.flights
    assert world.counters.snapshot().in_flight == 0


@pytest.mark.parametrize("how", ["is_gone", "closing"])
async def test_nobody_is_let_go_who_is_gone(how: str) -> None:
    """The process has ended, or the space is being left."""
    world = World(0, source=Held(lambda: setattr(world.space, how, True)))
    asked = written(world, 3)
    await turns()
    backend: Any = world.backend
    backend.handler.through.set()
    await turns(20)
    assert not asked


async def test_errors_say_who_has_failed() -> None:
    """For events, and for what the kernel refuses; each is counted."""
    handler = Events()
    world = World(0, source=handler)
    for page in (1, 3):
        world.remove(page, 1)
        world.serve_all()
    await turns(20)
    assert [str(error) for error in world.errors] == [
        str(HandlerError(repr(handler), repr(Remove(at(page).start, at(page).end)), "raised ValueError: no"))
        for page in (1, 3)
    ]
    assert world.counters.snapshot().handler_errors == 2
    run = world.space.run(Op.COPY, at(4).start)
    backend: Any = world.backend
    for count in (3, 4):
        error = backend.refusal(run, errno.EFAULT)
        assert str(error) == str(HandlerError(repr(handler), repr(run), "the kernel refused it: errno 14"))
        assert world.counters.snapshot().handler_errors == count
    await backend.aclose()
    assert len(world.errors) == 2


def told(handler: Handler, page: int, access: str, reason: str, thread: int = 0) -> str:
    """Return what an error says of a page."""
    who = f" of thread {thread}" if thread else ""
    fault = f"the fault{who} at {at(page).start:#x} (offset {page * PAGE:#x}, {access})"
    return str(HandlerError(repr(handler), fault, reason))


async def test_the_descriptor_of_a_child_is_told() -> None:
    """It stays the engine's."""
    seen: list[Fork] = []

    class Forks(Handler):
        async def fork(self, event: Fork) -> None:
            seen.append(event)

    world = World(0, source=Forks())
    child = World(0, source=Handler()).space
    backend: Any = world.backend
    backend.layout(world.space, abi.EVENT_FORK, bytes(32), child)
    await turns()
    (event,) = seen
    assert event.uffd is child.uffd
    await backend.aclose()


async def test_by_default_a_write_is_let_go() -> None:
    """As if nobody had asked to be told."""
    world = World(0, source=Handler())
    batch = Batch(world.space)
    await Handler().write(Fault(at(3).start, FaultFlag.WP, 7, at(3), 3 * PAGE), batch)
    assert [(run.op, run.dst) for run in batch._runs] == [(Op.UNPROTECT, at(3).start)]
