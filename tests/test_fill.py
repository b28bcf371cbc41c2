"""`engine.ahead.fill`: traces replayed, everything brought in the background, and until nothing is missing."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import time
from array import array
from typing import TYPE_CHECKING, Any

import attrs
import pytest
from engine_world import BASE, ELSEWHERE, PAGES, SIZE, Held, World, turns
from pattern import PAGE, Pattern, content

from aiouffd.engine.ahead import fill as module
from aiouffd.engine.ahead.fill import bring_ahead, bring_early, complete, fill
from aiouffd.engine.ahead.keeping import keep_pages
from aiouffd.engine.ahead.trace import Trace
from aiouffd.engine.flight import Flight
from aiouffd.engine.mappings import ZEROS, Mapping, Mappings
from aiouffd.engine.runs import FOR_FAULT
from aiouffd.engine.serve.bounds import Limits
from aiouffd.engine.serve.source import SourceBackend
from aiouffd.engine.statistics import Counter
from aiouffd.errors import ClosedError, SourceError
from aiouffd.kernel.memory import address_of, unreadable
from aiouffd.sources.file import FileSource
from aiouffd.testing import FakeUffd

if TYPE_CHECKING:
    from pathlib import Path


def noted(world: World) -> list[tuple[list[tuple[int, int]], Counter]]:
    """Return a list of what the backend is asked to bring, in pages."""
    asked: list[tuple[list[tuple[int, int]], Counter]] = []
    bring = world.backend.bring

    async def note(space: Any, ranges: Any, cause: Counter) -> None:
        ranges = list(ranges)
        asked.append(([(offset // PAGE, length // PAGE) for offset, length in ranges], cause))
        await bring(space, ranges, cause)

    world.backend.bring = note  # type: ignore[method-assign]
    return asked


async def test_a_trace_is_replayed_and_then_the_rest_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this order, with progress that a successor goes on from."""
    monkeypatch.setattr("aiouffd.engine.ahead.trace._BATCH", 2)
    world = World(0, located=True)
    asked = noted(world)
    trace = Trace(PAGE, SIZE, array("Q", [9 * PAGE, 8 * PAGE, 3 * PAGE]))
    progress: list[tuple[int, int]] = []
    await bring_ahead(
        world.space, world.backend, trace, math.inf, lambda: progress.append((world.space.replayed, world.space.filled))
    )
    assert asked[0] == ([(8, 2)], Counter.PAGES_REPLAY)
    assert asked[1] == ([(3, 1)], Counter.PAGES_REPLAY)
    assert all(cause == Counter.PAGES_BACKGROUND for _, cause in asked[2:])
    assert progress == [(2, 0), (3, 0), (3, SIZE)]
    assert world.uffd.pages == world.model
    found = world.counters.snapshot()
    assert (found.pages_replay, found.pages_background) == (3, PAGES - 3)


async def test_a_successor_goes_on_where_its_predecessor_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the trace, and in the fill."""
    monkeypatch.setattr("aiouffd.engine.ahead.trace._BATCH", 2)
    world = World(0, located=True)
    world.space.replayed, world.space.filled = 2, 20 * PAGE
    asked = noted(world)
    await bring_ahead(world.space, world.backend, Trace(PAGE, SIZE, array("Q", [0, PAGE, 5 * PAGE])), math.inf)
    assert asked == [([(5, 1)], Counter.PAGES_REPLAY), ([(20, 12)], Counter.PAGES_BACKGROUND)]


def carrying(folder: Path, *pages: int) -> Trace:
    """Return a recording of these pages that carries their bytes."""
    image, path = folder / "image", folder / "trace"
    image.write_bytes(content(0, SIZE))
    Trace(PAGE, SIZE, array("Q", [page * PAGE for page in pages])).save(path)
    keep_pages(path, FileSource(image), 1 << 20, Limits())
    return Trace.load(path)


def damage(folder: Path, unit: int) -> None:
    """Change a byte of the last units of two pages each, counted from the end."""
    with (folder / "trace").open("r+b") as file:
        file.seek(-1 - 2 * PAGE * unit, os.SEEK_END)
        file.write(b"?")


async def test_bytes_that_a_recording_carries_come_whatever_the_layout_is(tmp_path: Path) -> None:
    """They are not fetched, where they cannot be placed by one call."""
    trace = await asyncio.to_thread(carrying, tmp_path, 9, 8, 3, 20)
    world = World(0, source=(source := Held()))
    world.unmap(15, 1)
    world.deliver(64)
    await bring_ahead(world.space, world.backend, trace, 0)
    assert source.reads == []
    assert set(world.uffd.pages) == {BASE + page * PAGE for page in (9, 8, 3, 20)}
    assert world.counters.snapshot().bytes_shared == 4 * PAGE
    await world.backend.aclose()


@pytest.mark.parametrize("damaged", [False, True])
async def test_bytes_that_a_recording_carries_are_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, *, damaged: bool
) -> None:
    """Those of a unit that is damaged are, and the pages that it does not carry."""
    monkeypatch.setattr("aiouffd.engine.ahead.pages._UNIT", 2 * PAGE)
    trace = await asyncio.to_thread(carrying, tmp_path, 9, 8, 3, 20, 21, 30)
    if damaged:
        await asyncio.to_thread(damage, tmp_path, 1)
    world = World(0, source=(source := Held()))
    whole = attrs.evolve(trace, offsets=array("Q", [*trace.offsets, PAGE]))
    replaying = asyncio.create_task(bring_ahead(world.space, world.backend, whole, 0))
    wanted = [(1, 1), (3, 1), (20, 1)] if damaged else [(1, 1)]
    while len(source.reads) < len(wanted) and not replaying.done():  # noqa: ASYNC110 - a thread reads the file
        await asyncio.sleep(0.001)
    assert [(offset // PAGE, length // PAGE) for offset, length, _ in source.reads] == wanted
    for index in range(len(wanted)):
        source.answer(index)
    await replaying
    assert set(world.uffd.pages) == {BASE + page * PAGE for page in (9, 8, 3, 20, 21, 30, 1)}
    assert all(data == world.model[at] for at, data in world.uffd.pages.items())
    assert world.counters.snapshot().pages_replay == 7
    assert ("damaged" in caplog.text) == damaged
    await world.backend.aclose()


async def test_pieces_from_far_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the way to the source is not waited for once a piece; `filled` is what is there without a gap."""
    monkeypatch.setattr(module, "_FAR", 2 * PAGE)
    monkeypatch.setattr("aiouffd.engine.serve.pace._FIRST", 0)  # small pieces begin with as few as large ones
    source = Held()
    world = World(0, source=source)
    filling = asyncio.create_task(fill(world.space, world.backend, math.inf, patience=0.0))
    await turns()
    assert [read[0] // PAGE for read in source.reads] == [0, 2, 4, 6]
    source.answer(1)
    await turns()
    assert world.space.filled == 0
    source.answer(0)
    await turns()
    assert world.space.filled == 4 * PAGE
    while not filling.done():
        for index, read in enumerate(source.reads):
            if not read[2].done():
                source.answer(index)
        await turns()
    await filling
    assert world.space.filled == SIZE
    assert world.uffd.pages == world.model


async def test_a_piece_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not waited for; what fails beside it is not said twice."""
    monkeypatch.setattr(module, "_FAR", 2 * PAGE)

    world = World(0, source=Held())
    asked, ended = list[int](), list[int]()

    async def bring(_space: Any, ranges: Any, _cause: Counter) -> None:
        number = len(asked)
        asked.append(ranges[0][0] // PAGE)
        try:
            await turns(50)
            if number < 2:
                raise SourceError("it", 2 * number * PAGE, 2 * PAGE, "failed")
            await asyncio.Event().wait()
        finally:
            ended.append(number)

    world.backend.bring = bring  # type: ignore[method-assign,assignment]
    with pytest.raises(SourceError) as raised:
        await fill(world.space, world.backend, math.inf, patience=0.0)
    assert raised.value.offset == 0
    assert asked == list(range(0, 2 * world.backend.pieces, 2))
    assert sorted(ended) == list(range(world.backend.pieces))
    assert world.space.filled == 0


async def test_without_trace_or_rate_nothing_is_brought() -> None:
    """A rate of 0 means no fill."""
    world = World(0, located=True)
    asked = noted(world)
    await bring_ahead(world.space, world.backend, None, 0)
    assert asked == []


@pytest.mark.parametrize("failure", [SourceError("it", 0, 1, "no"), ClosedError("it is served no longer")])
async def test_what_fails_ahead_is_left_to_faults(failure: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, unless the space is gone."""
    logging.getLogger("aiouffd").propagate = True
    world = World(0, located=True)

    async def bring(*_arguments: Any) -> None:
        raise failure

    world.backend.bring = bring  # type: ignore[method-assign,assignment]
    await bring_ahead(world.space, world.backend, None, math.inf)
    assert ("comes with its fault" in caplog.text) == isinstance(failure, SourceError)


async def test_the_rest_comes_where_a_replay_has_failed(caplog: pytest.LogCaptureFixture) -> None:
    """One page of a recording that cannot be had keeps no other from coming."""
    logging.getLogger("aiouffd").propagate = True
    world = World(0, located=True)
    original = world.backend.bring

    async def bring(space: Any, ranges: Any, cause: Counter) -> None:
        if cause == Counter.PAGES_REPLAY:
            raise SourceError("it", 0, 1, "no")
        await original(space, ranges, cause)

    world.backend.bring = bring  # type: ignore[method-assign]
    await bring_ahead(world.space, world.backend, Trace(PAGE, SIZE, array("Q", [9 * PAGE])), math.inf)
    assert caplog.text.count("comes with its fault") == 1
    assert world.uffd.pages == world.model


@pytest.mark.parametrize(("local", "patience", "pieces"), [(True, 0.05, 4), (True, 0.0, 1), (False, 0.05, 1)])
async def test_the_pieces(monkeypatch: pytest.MonkeyPatch, local: bool, patience: float, pieces: int) -> None:
    """Small ones of what is near, since a fault may have to wait for one; larger ones in a hurry, or from far away."""
    monkeypatch.setattr(module, "_NEAR", 8 * PAGE)
    monkeypatch.setattr(module, "_HURRY", 64 * PAGE)
    world = World(16 * PAGE, source=None if local else Far(SIZE))
    asked = noted(world)
    filling: list[int] = []
    resolve = world.space.resolve

    def seen(runs: Any) -> None:
        filling.append(world.space.filling)
        resolve(runs)

    world.space.resolve = seen  # type: ignore[method-assign]
    await fill(world.space, world.backend, math.inf, patience=patience)
    assert len(asked) == pieces
    assert set(filling) == {16 * PAGE if local and not patience else 0}
    assert world.space.filling == 0
    assert world.space.filled == SIZE
    assert world.uffd.pages == world.model


class Far(Pattern):
    """Not in memory."""

    read_nowait = None  # type: ignore[assignment]


async def test_progress_is_told_at_times_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """After so many bytes, so that a successor need not begin at the start."""
    monkeypatch.setattr(module, "_NEAR", 4 * PAGE)
    monkeypatch.setattr(module, "_SAVED", 8 * PAGE)
    world = World(0, located=True)
    told: list[int] = []
    await fill(world.space, world.backend, math.inf, lambda: told.append(world.space.filled // PAGE))
    assert told == [8, 16, 24, 32, 32]


async def test_the_rate_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece waits until those before it are due; a fast rate waits for nothing."""
    monkeypatch.setattr(module, "_NEAR", 8 * PAGE)
    slept: list[float] = []
    now = [100.0]

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(module, "monotonic", lambda: now[0])
    world = World(0, located=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aiouffd.engine.ahead.fill.asyncio.sleep", sleep)
        await fill(world.space, world.backend, SIZE / 8)
    assert [seconds for seconds in slept if seconds] == pytest.approx([2.0, 2.0, 2.0])


@pytest.mark.parametrize("rate", [math.inf, SIZE])
async def test_the_fill_waits_while_faults_come(monkeypatch: pytest.MonkeyPatch, rate: float) -> None:
    """For a moment without, and for so long at most; filled as fast as it goes, it goes before no others meanwhile."""
    monkeypatch.setattr(module, "_NEAR", 8 * PAGE)
    now, looks = [0.0], [0]

    async def sleep(seconds: float) -> None:
        now[0] += seconds
        if seconds == module._QUIET:
            looks[0] += 1
            assert (world.space in brought) == (rate == math.inf)
            world.counters.words[Counter.FAULTS] += 1

    monkeypatch.setattr(module, "monotonic", lambda: now[0])
    world = World(0, located=True)
    assert isinstance(world.backend, SourceBackend)
    brought = world.backend._precedence.brought
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aiouffd.engine.ahead.fill.asyncio.sleep", sleep)
        world.counters.words[Counter.FAULTS] = 0
        bring = world.backend.bring

        async def faulting(*arguments: Any) -> None:
            world.counters.words[Counter.FAULTS] += 1
            await bring(*arguments)

        world.backend.bring = faulting  # type: ignore[assignment,method-assign]
        await fill(world.space, world.backend, rate, patience=0.01)
    assert not brought
    assert 3 * 5 <= looks[0] <= 3 * 6


async def test_what_shows_no_source_is_left_out() -> None:
    """Removed ranges, and several mappings of one offset are brought together."""
    world = World(0, located=True)
    world.remove(4, 4)
    world.serve_all()
    await fill(world.space, world.backend, math.inf)
    assert sorted(world.uffd.pages) == [BASE + page * PAGE for page in range(PAGES) if page not in range(4, 8)]


class Unregistered(FakeUffd):
    """Its memory is registered later."""

    def __init__(self, *, registered: bool = False) -> None:
        super().__init__()
        self.registered = registered
        self.asked: list[tuple[int, int, int]] = []  # whether memory is registered

    def try_copy(self, dst: int, src: int, length: int, mode: int) -> int:
        """Find nothing before; behind, as the kernel, that memory which nobody may read cannot be copied."""
        if src == address_of(unreadable()):
            self.asked.append((dst, length, mode))
        if not self.registered:
            return -errno.ENOENT
        return -errno.EFAULT if src == address_of(unreadable()) else super().try_copy(dst, src, length, mode)


@pytest.mark.parametrize("how", ["registered", "late", "closed"])
async def test_what_is_handed_over_before_it_is_registered(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Is brought once it is, small mappings first; not at all when it is too late, or the space is closed."""
    monkeypatch.setattr(module, "_SMALL", 4 * PAGE)
    monkeypatch.setattr(module, "_NEAR", 4 * PAGE)
    uffd = Unregistered()
    world = World(0, located=True, uffd=uffd)
    starts = (0, 4, 20)
    world.space.mappings = Mappings(
        Mapping(BASE + start * PAGE, BASE + end * PAGE, offset * PAGE)
        for start, end, offset in ((0, 4, 0), (4, 20, 8), (20, 22, 26))
    )
    asked = noted(world)
    late = asyncio.Event()
    began = time.monotonic()
    task = asyncio.create_task(bring_early(world.space, world.backend, late))
    await asyncio.sleep(0.005)
    assert not asked
    assert len(uffd.asked) <= (time.monotonic() - began) * 1000 + 2  # it sleeps in between, on each loop
    if how == "late":
        late.set()
    elif how == "closed":
        world.space.close()
    else:
        uffd.registered = True
    await task
    if how == "registered":
        assert asked == [
            (brought, Counter.PAGES_BACKGROUND) for brought in ([(0, 4), (26, 2)], [(0, 4)], [(8, 16)], [(26, 2)])
        ]
        assert set(uffd.asked) == {(BASE + start * PAGE, PAGE, 0) for start in starts}
        assert uffd.pages[BASE + 20 * PAGE] == content(26 * PAGE, PAGE)
        assert len(uffd.pages) == 22
    else:
        assert not uffd.pages


async def test_what_fails_early_is_tried_again_by_others() -> None:
    """No error, and no fill behind it."""
    world = World(0, source=Held(), uffd=Unregistered(registered=True))

    async def bring(*_arguments: Any) -> None:
        raise SourceError("it", 0, 1, "no")

    world.backend.bring = bring  # type: ignore[method-assign,assignment]
    await bring_early(world.space, world.backend, asyncio.Event())


@pytest.mark.parametrize("source", [None, Far(SIZE)])
@pytest.mark.parametrize("readahead", [0, 16 * PAGE])
async def test_all_is_brought_whatever_was_known(source: Any, readahead: int) -> None:
    """What a predecessor had brought may have gone with its mapping: it is offered once more."""
    world = World(readahead, source=source, located=source is None)
    world.space.filled = SIZE
    world.space.born = -1
    await complete(world.space, world.backend)
    assert world.uffd.pages == world.model


async def test_a_read_that_had_failed_is_noticed() -> None:
    """Of the background, before all is brought: what it was to bring is not taken for present."""
    source = Held()
    world = World(16 * PAGE, source=source)
    background = asyncio.create_task(bring_ahead(world.space, world.backend, None, math.inf))
    await turns()
    finish = asyncio.create_task(complete(world.space, world.backend))
    await turns()
    source.answer(0, OSError(errno.EIO, "once"))
    answered = 1
    while not finish.done():
        await asyncio.sleep(0)
        if len(source.reads) > answered:
            source.answer(answered)
            answered += 1
    await finish
    await background
    assert world.uffd.pages == world.model


async def test_all_is_brought_while_the_layout_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page is offered to the kernel once, wherever it is by then."""
    monkeypatch.setattr(module, "_HURRY", 8 * PAGE)
    world = World(16 * PAGE, located=True)
    changes = iter([(8, 4), (16, 4)])
    bring = world.backend.bring

    async def changing(*arguments: Any) -> None:
        await bring(*arguments)
        for page, count in changes:
            world.move(page, count)
            while world.deliver(64):
                pass
            return

    world.backend.bring = changing  # type: ignore[method-assign,assignment]
    await complete(world.space, world.backend)
    assert world.uffd.pages == world.model
    assert ELSEWHERE + 8 * PAGE in world.uffd.pages
    assert world.space.mappings.locate(ELSEWHERE + 8 * PAGE)[2] != ZEROS
    seen = world.counters.snapshot()
    assert (seen.eexist, seen.enoent) == (0, 0)


async def test_what_had_no_mapping_is_brought_once_the_layout_has_changed() -> None:
    """The kernel knew none for some pages: they were on their way to another place, and count for nothing."""
    world = World(0, located=True)
    world.uffd.failures.extend([-errno.ENOENT] * 12)  # halved down to a page, and three more
    bring = world.backend.bring
    moved = False

    async def moving(*arguments: Any) -> None:
        nonlocal moved
        await bring(*arguments)
        if not moved:
            moved = True
            world.move(0, 4)
            while world.deliver(64):
                pass

    world.backend.bring = moving  # type: ignore[method-assign,assignment]
    await complete(world.space, world.backend)
    assert world.space.resolver.gone > 0
    assert world.uffd.pages == world.model


async def test_what_no_mapping_covers_is_given_up() -> None:
    """It was unmapped, and nobody has told: it is not offered again and again."""
    world = World(0, located=True)
    world.uffd.failures.extend([-errno.ENOENT] * 9)
    await complete(world.space, world.backend)
    assert world.space.resolver.gone > 0
    assert len(world.uffd.pages) < len(world.model)


async def test_what_is_known_to_be_there_is_not_offered_again() -> None:
    """As long as nothing makes that doubtful."""
    world = World(0, located=True)
    await complete(world.space, world.backend)
    asked = noted(world)
    await complete(world.space, world.backend)
    assert asked == []


async def test_a_process_that_goes_on_losing_pages_is_asked_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a second in the end; and so is one whose flights do not end."""
    world = World(0, located=True)
    slept: list[float] = []

    async def bring(*_arguments: Any) -> None:
        if len(slept) < 110:
            world.space.readahead.forget(0, PAGE)

    async def sleep(seconds: float) -> None:
        if seconds:
            slept.append(seconds)
        if len(slept) == 111:
            world.space.flights.clear()

    async def quiet(*_arguments: Any) -> None:
        if len(slept) == 110:
            world.space.take_off(Flight(BASE, BASE + PAGE, 0, 0, FOR_FAULT))

    world.backend.bring = bring  # type: ignore[method-assign,assignment]
    world.space.quiet = quiet  # type: ignore[method-assign,assignment]
    monkeypatch.setattr("aiouffd.engine.ahead.fill.asyncio.sleep", sleep)
    await complete(world.space, world.backend)
    assert slept[:100] == pytest.approx([number / 100 for number in range(1, 101)])
    assert set(slept[100:]) == {1.0}
    assert len(slept) == 111
