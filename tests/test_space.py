"""`engine.space` and its backends over `FakeUffd`: whatever the kernel answers, in any order, no fault is lost."""

from __future__ import annotations

import asyncio
import errno
import logging
import struct
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from chance import cases, shortened
from engine_world import BASE, ELSEWHERE, PAGES, SIZE, Partly, World
from pattern import PAGE, Pattern, Slow, content

from aiouffd.engine.ahead.fill import complete
from aiouffd.engine.messages import serve_messages
from aiouffd.engine.runs import Op, Run
from aiouffd.engine.serve.bounds import Limits
from aiouffd.engine.serve.source import SourceBackend
from aiouffd.engine.statistics import Counter
from aiouffd.errors import LayoutChangingError, OperationError, SourceError
from aiouffd.testing import POISONED

if TYPE_CHECKING:
    import random

    from aiouffd.engine.space import Space


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Thousands of errors are provoked on purpose."""
    caplog.set_level(logging.ERROR, "aiouffd")
    logging.getLogger("aiouffd").propagate = True


_ERRNOS = (0, -errno.EAGAIN, -errno.EEXIST, -errno.ENOENT, -errno.ENOMEM, -errno.EFAULT, -errno.EINVAL)
Step = tuple[Any, ...]


def steps_by_chance(rng: random.Random, most: int) -> list[Step]:
    """Draw what a process does and a kernel answers: to a few pages, or to all of them."""
    pages = rng.sample(range(PAGES), rng.choice((2, 8, PAGES)))

    def step() -> Step:
        name = rng.choice(("touch", "touch", "remove", "unmap", "move", "deliver", "retry", "fail"))
        if name == "deliver":
            return name, rng.choice((1, 2, 64))
        if name == "fail":
            return name, rng.choices(_ERRNOS, k=rng.randint(1, 4))
        return (name,) if name == "retry" else (name, rng.choice(pages), rng.randint(1, 5 if name == "touch" else 8))

    return [step() for _ in range(rng.randint(0, rng.choice((4, 12, most))))]


def test_no_fault_is_lost_and_no_byte_is_wrong() -> None:
    """After whatever a process and the kernel do, 2,000 times; steps that fail are as few as could be found."""
    for case in cases(2000, lambda rng: (steps_by_chance(rng, 60), rng.choice((0, 64 << 10)), rng.random() < 0.5)):
        with case as (steps, readahead, located):
            shortened(steps, partial(nothing_is_lost, readahead=readahead, located=located))


def nothing_is_lost(steps: list[Step], *, readahead: int, located: bool) -> None:
    """Touches, layout changes and refusals of every kind, read in any portions.

    At the end nobody sleeps. Every page that is there holds what the model says: the source's bytes, zeros where it
    was emptied; or it is poisoned, and then an error was told.
    """
    world = World(readahead, located=located)
    lies = refusals = False
    for name, *arguments in steps:
        if name == "fail":
            world.uffd.failures.extend(arguments[0])
            # EEXIST or ENOENT for a page that is missing and mapped is a lie; its toucher comes again.
            lies = lies or bool({-errno.EEXIST, -errno.ENOENT} & set(arguments[0]))
            refusals = refusals or bool({-errno.EFAULT, -errno.EINVAL} & set(arguments[0]))
        elif name == "retry":
            world.space.retry()
        else:
            getattr(world, name)(*arguments)
    world.uffd.failures.clear()
    world.serve_all()
    assert not world.uffd.asleep
    assert not world.space.flights
    for page, data in world.uffd.pages.items():
        if data is POISONED:
            assert world.errors
            assert refusals
        elif page in world.model:
            assert data == world.model[page]
    # And whoever touches now is served, for every page that is mapped.
    for page in world.model:
        world.uffd.touch(page, 9)
    world.serve_all()
    for page, expected in world.model.items():
        assert world.uffd.pages[page] in (expected, POISONED)


_ENDS = (-errno.ESRCH, -errno.ENOSPC)


def test_whatever_was_answered_before_the_process_ends() -> None:
    """And whatever was done, 500 times."""

    def draw(rng: random.Random) -> tuple[list[Step], list[int], int, int]:
        before = rng.choices(_ERRNOS, k=rng.randint(0, 6))
        return steps_by_chance(rng, 30), before, rng.choice(_ENDS), rng.choice((0, 64 << 10))

    for case in cases(500, draw):
        with case as drawn:
            told_once(*drawn)


def told_once(steps: list[Step], before: list[int], end: int, readahead: int) -> None:
    """ESRCH (ENOSPC of old) at any moment: the space is gone, once, and owes nobody anything."""
    world = World(readahead, located=True)
    told: list[Space] = []
    world.space.on_gone = told.append
    for name, *arguments in steps:
        if name == "fail":
            continue
        world.space.retry() if name == "retry" else getattr(world, name)(*arguments)
    world.uffd.failures.extend([*before, *[end] * 1000])
    for page in range(PAGES):
        world.touch(page, page)
    for _ in range(50):
        world.deliver(64)
        world.space.retry()
    if len(world.uffd.failures) < 1000:  # any was asked for
        assert told == [world.space]
        assert not world.space.deferred
        assert not world.space.remainders
        assert not world.space.flights


_WORDS = (0, BASE, BASE + 3 * PAGE, BASE + SIZE, BASE + 1, ELSEWHERE, 1 << 63, (1 << 64) - 1)


def messages_by_chance(rng: random.Random) -> list[bytes]:
    """Draw messages: random bytes, or those of an event, whose words may be addresses."""
    return [
        rng.randbytes(32)
        if rng.random() < 0.5
        else bytes([rng.choice((0x12, 0x14, 0x15, 0x16))])
        + rng.randbytes(7)
        + struct.pack("=3Q", *(rng.choice((rng.getrandbits(64), rng.choice(_WORDS))) for _ in range(3)))
        for _ in range(rng.randint(1, 8))
    ]


def survives(messages: list[bytes]) -> None:
    """Feed anything to the engine, and see that it serves afterwards."""
    world = World(0, located=True)
    data = b"".join(message for message in messages if message[0] != 0x13)  # a descriptor that is none of ours
    if data:
        serve_messages(world.space, memoryview(bytearray(data)), len(data), lambda *_: None)
    world.uffd.close()
    fresh = World(0, located=True)
    fresh.touch(3, 1)
    fresh.serve_all()
    assert fresh.uffd.pages[BASE + 3 * PAGE] == content(3 * PAGE, PAGE)
    fresh.uffd.close()


@pytest.mark.long
def test_any_message_is_survived() -> None:
    """5,000 reads of anything at all: the engine neither fails nor forgets how to serve."""
    for case in cases(5_000, messages_by_chance):
        with case as messages:
            survives(messages)


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_any_message_is_survived_at_length() -> None:
    """100,000 of them."""
    for case in cases(100_000, messages_by_chance):
        with case as messages:
            survives(messages)


def test_neighbours_are_one_copy() -> None:
    """With readahead, pages that continue each other come in one operation, which wakes them all."""
    world = World(64 << 10, located=True)
    for page in (1, 2, 3):
        world.touch(page, page)
    world.serve_all()
    seen = world.counters.snapshot()
    assert (seen.copies, seen.wakes) == (1, 0)


def test_a_dead_process_is_forgotten() -> None:
    """ESRCH ends the space, once, with nothing deferred."""
    world = World(0, located=True)
    told: list[Space] = []
    world.space.on_gone = told.append
    for page in range(3):
        world.touch(page, page)
    data = world.uffd.read_raw()
    world.uffd.exit()
    serve_messages(world.space, memoryview(bytearray(data)), len(data), lambda *_: None)
    assert told == [world.space]
    assert not world.space.deferred


def test_a_poison_that_is_refused_is_told_once_and_tried_again() -> None:
    """A kernel without POISON (before 6.6) answers EINVAL: told, no recursion; the page waits, as nothing is right."""
    world = World(0, located=False)
    world.touch(1, 1)
    world.uffd.failures.extend([-errno.EIO, *[-errno.EINVAL] * 4])
    world.deliver(64)
    for _ in range(3):
        world.space.retry()
    failed, refused = world.errors
    assert isinstance(failed, SourceError)
    assert isinstance(refused, OperationError)
    assert (refused.operation, refused.start, refused.errno) == ("UFFDIO_POISON", BASE + PAGE, errno.EINVAL)
    assert world.uffd.asleep == {BASE + PAGE: [1]}
    world.serve_all()
    assert world.uffd.pages == {BASE + PAGE: POISONED}


def test_a_layout_that_never_becomes_stable_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """EAGAIN for ever (kernels before mid-2026): an error at intervals, tried on, never dropped in silence."""
    monkeypatch.setattr("aiouffd.engine.deferred._REPORTED_AFTER_NS", 0)
    world = World(0, located=True)
    world.touch(1, 1)
    world.uffd.failures.extend([-errno.EAGAIN] * 10)
    world.deliver(64)
    for _ in range(5):
        world.space.retry()
    (error,) = world.errors
    assert isinstance(error, LayoutChangingError)
    assert (error.operation, error.start, error.len) == ("UFFDIO_COPY", BASE + PAGE, PAGE)
    world.uffd.failures.clear()
    world.serve_all()
    assert world.uffd.pages[BASE + PAGE] == content(PAGE, PAGE)


def test_a_shortage_of_memory_is_waited_for_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOMEM: tried again, told after a while; when it passes the page is there."""
    monkeypatch.setattr("aiouffd.engine.deferred._REPORTED_AFTER_NS", 0)
    world = World(0, located=True)
    world.touch(1, 1)
    world.uffd.failures.extend([-errno.ENOMEM] * 10)
    world.deliver(64)
    for _ in range(5):
        world.space.retry()
    assert [(error.operation, error.errno) for error in world.errors if isinstance(error, OperationError)] == [
        ("UFFDIO_COPY", errno.ENOMEM)
    ]
    world.uffd.failures.clear()
    world.serve_all()
    assert world.uffd.pages[BASE + PAGE] == content(PAGE, PAGE)


def test_a_shortage_of_memory_that_does_not_pass_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while the page is poisoned, and its toucher let go: no retry goes on for ever."""
    monkeypatch.setattr("aiouffd.engine.space._NO_MEMORY_NS", 0)
    world = World(0, located=True)
    world.touch(1, 1)
    world.uffd.failures.extend([-errno.ENOMEM] * 3)
    world.deliver(64)
    world.serve_all()
    assert world.uffd.pages == {BASE + PAGE: POISONED}
    assert not world.uffd.asleep
    assert any(isinstance(error, SourceError) and "ENOMEM" in str(error) for error in world.errors)


def test_what_is_put_off_is_put_off_once() -> None:
    """While the layout keeps changing, neither signals nor the WAKE of others make the list grow."""
    world = World(0, located=True)
    for page in range(8):
        world.touch(page * 2, page)
    world.uffd.failures.extend([-errno.EAGAIN] * 100_000)
    for _ in range(50):
        while world.deliver(64):
            assert len(world.space.deferred) <= 8
        world.space.retry()
        world.uffd.try_wake(BASE, SIZE)  # as a signal to each of them does
    assert len(world.space.deferred) == 8
    calls = 100_000 - len(world.uffd.failures)
    assert calls <= 50 * 3 * 8  # two when it faults, one when it is tried again
    world.uffd.failures.clear()
    world.serve_all()
    assert not world.uffd.asleep
    assert len(world.uffd.pages) == 8


@pytest.mark.parametrize("far", [False, True])
async def test_what_is_brought_ahead_is_there_when_that_is_said(far: bool) -> None:
    """Also where the kernel puts pages off, and where a change of the layout has let a flight fall."""
    world = World(64 * PAGE, located=False, source=Slow(SIZE) if far else None)

    pump = asyncio.create_task(world.dispatch())
    bring = world.space.backend.bring
    world.uffd.failures.extend([-errno.EAGAIN] * 5)
    await bring(world.space, [(0, 8 * PAGE)], Counter.PAGES_PREFETCH)
    assert sorted(world.uffd.pages) == [BASE + page * PAGE for page in range(8)]
    second = asyncio.create_task(bring(world.space, [(8 * PAGE, 8 * PAGE)], Counter.PAGES_PREFETCH))
    await asyncio.sleep(0)
    world.move(8, 8)
    await second
    await complete(world.space, world.space.backend)
    pump.cancel()
    assert world.uffd.pages == world.model


@pytest.mark.parametrize("at_hand", [True, False])
async def test_a_fault_brings_a_whole_block_while_all_is_brought(at_hand: bool) -> None:
    """At once, if it is at hand, since the pieces of a window take as long again; afterwards what it always brings."""
    source = await asyncio.to_thread(Partly, set() if at_hand else {31})
    world = World(16 * PAGE, located=True, source=source)
    backend = world.space.backend
    assert isinstance(backend, SourceBackend)
    bring = backend.bring
    found = []

    async def touched(space: Space, ranges: list[tuple[int, int]], cause: Counter) -> None:
        world.touch(21, 1)
        assert world.deliver(64)
        found.append(sorted(world.uffd.pages))
        source.through.set()
        await bring(space, ranges, cause)

    backend.bring = touched  # type: ignore[assignment,method-assign]
    await complete(world.space, backend)
    assert found == [[BASE + page * PAGE for page in (range(16, 32) if at_hand else range(20, 24))]]
    assert world.uffd.pages == world.model
    assert world.space.filling == 0


async def test_what_is_canceled_while_it_is_brought_is_brought_later() -> None:
    """What was at hand is there; nothing counts as there that is not."""
    source = await asyncio.to_thread(Partly, set(range(1, PAGES, 2)))
    world = World(2 * PAGE, located=True, source=source, limits=Limits(concurrent_reads=4))
    backend = world.space.backend
    assert isinstance(backend, SourceBackend)

    ranges = [(page * PAGE, PAGE) for page in range(PAGES)]
    prefetch = asyncio.create_task(backend.bring(world.space, ranges, Counter.PAGES_PREFETCH))
    for _ in range(5):
        await asyncio.sleep(0)
    assert sorted(world.uffd.pages) == [BASE + page * PAGE for page in (0, 2, 4)]  # three reads are under way
    prefetch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await prefetch
    source.through.set()
    await complete(world.space, backend)
    assert world.uffd.pages == world.model


async def test_a_source_that_breaks_while_all_is_brought() -> None:
    """The error says where; what came before is there, and the rest comes the next time."""
    world = World(2 * PAGE, located=True, source=await asyncio.to_thread(Partly, set(), 9))
    backend = world.space.backend

    ranges = [(page * PAGE, PAGE) for page in range(PAGES)]
    with pytest.raises(SourceError, match=r"OSError.*once") as caught:
        await backend.bring(world.space, ranges, Counter.PAGES_BACKGROUND)
    assert caught.value.offset == 9 * PAGE
    assert sorted(world.uffd.pages) == [BASE + page * PAGE for page in range(9)]
    await complete(world.space, backend)
    assert world.uffd.pages == world.model


class Gated:
    """Fails for more than a page; a read of a single page waits until it is let through."""

    size = SIZE
    retries = 0

    def __init__(self) -> None:
        self.failing, self.through = asyncio.Event(), asyncio.Event()

    async def read(self, offset: int, length: int) -> bytes:
        """Return the bytes, or fail, when that is allowed."""
        if length > PAGE:
            await self.failing.wait()
            raise SourceError("Gated", offset, length, "broken")
        await self.through.wait()
        return content(offset, length)


async def test_nobody_is_rescued_from_where_he_is_no_longer() -> None:
    """A read fails whose memory was moved away meanwhile: who waits for what lies there now must not join it."""
    source = Gated()
    world = World(16 << 10, located=False, source=source)
    world.touch(0, 1)
    world.deliver(1)  # a flight for its neighbourhood
    await asyncio.sleep(0)
    for move in ((BASE, ELSEWHERE), (BASE + 8 * PAGE, BASE)):
        world.uffd.mremap(*move, 4 * PAGE)
        world.serve_all()
    source.failing.set()
    for _ in range(10):
        await asyncio.sleep(0)
    world.uffd.touch(BASE, 2)
    world.deliver(1)
    source.through.set()
    for _ in range(100):
        await asyncio.sleep(0)
        world.serve_all()
    assert world.uffd.pages[BASE] == content(8 * PAGE, PAGE)


class Brittle(Pattern):
    """Raises, as a defect of a source would, for what begins at or behind `limit`."""

    def __init__(self, limit: int) -> None:
        super().__init__(SIZE)
        self.limit = limit

    def read_nowait(self, offset: int, length: int) -> bytes:
        """Return the bytes, or raise."""
        if offset + length > self.limit:
            raise ValueError("a defect")
        return content(offset, length)


def test_a_window_that_cannot_be_brought_ahead_costs_no_fault() -> None:
    """The faults of the same wake-up are served, and what was not brought is not taken for present."""
    source = Brittle(SIZE // 2)
    world = World(4 * PAGE, located=False, source=source)
    for page in range(PAGES // 2):
        world.touch(page, page)
        world.deliver(64)
        while world.space.advance():
            pass
    assert len(world.uffd.pages) == PAGES // 2
    assert list(world.space.readahead.missing(0, SIZE)) == [(SIZE // 2, SIZE // 2)]


def test_a_toucher_who_is_faster_than_the_pieces_is_let_go() -> None:
    """Also where what is behind his window cannot be brought."""
    world = World(4 * PAGE, located=False, source=Brittle(SIZE // 2))
    world.space.resolve_later([Run(Op.ZEROPAGE, BASE + (PAGES - 1) * PAGE, (PAGES - 1) * PAGE, PAGE)])
    world.space.readahead.follow = lambda *_: ((SIZE // 2, PAGE), (0, 0))  # type: ignore[method-assign]
    world.touch(PAGES - 1, 1)
    world.deliver(64)
    assert BASE + (PAGES - 1) * PAGE in world.uffd.pages


async def test_what_a_defect_has_kept_from_coming_is_not_taken_for_present() -> None:
    """Whoever asks for it later gets it."""
    source = Brittle(0)
    world = World(16 << 10, located=False, source=source)
    world.touch(0, 1)
    world.deliver(1)
    source.limit = SIZE
    await world.space.backend.bring(world.space, [(0, SIZE)], Counter.PAGES_PREFETCH)
    assert len(world.uffd.pages) == PAGES


def test_a_page_whose_window_is_being_brought_is_counted_as_a_fault() -> None:
    """It was counted as brought along; once only, also where it was counted before and has faulted anew."""
    world = World(0, located=True)
    words = world.counters.words
    followed: list[int] = []
    noted: list[int] = []
    world.space.readahead.note = lambda offset, _start, _length: noted.append(offset)
    world.backend.follow = lambda space, page: followed.append(page)  # type: ignore[method-assign] # noqa: ARG005
    words[Counter.PAGES_READAHEAD], words[Counter.PAGES_FAULT] = 9, 4
    world.space.resolve_later([Run(Op.ZEROPAGE, BASE, 0, 2 * PAGE)])
    assert world.space.hasten(BASE + PAGE, 0)
    assert (words[Counter.PAGES_READAHEAD], words[Counter.PAGES_FAULT]) == (8, 5)
    assert followed == [BASE + PAGE]
    assert noted == [PAGE]  # and not the one where its piece begins
    assert sum(world.counters.snapshot().latency) == 1
    assert not world.space.hasten(BASE + 9 * PAGE, 0)
    words[Counter.PAGES_READAHEAD] = 0
    world.space.resolve_later([Run(Op.ZEROPAGE, BASE + 4 * PAGE, 4 * PAGE, PAGE)])
    assert world.space.hasten(BASE + 4 * PAGE, 0)
    assert (words[Counter.PAGES_READAHEAD], words[Counter.PAGES_FAULT]) == (0, 5)


def test_a_toucher_of_a_window_that_is_being_brought_is_woken() -> None:
    """Its piece comes with a waking operation."""
    world = World(0, located=True)
    world.touch(3, 1)
    world.space.resolve_later([Run(Op.ZEROPAGE, BASE, 0, SIZE)])
    world.deliver(64)
    assert not world.uffd.asleep
