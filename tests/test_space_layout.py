"""`engine.space`: what a change of the layout leaves, and who is let go."""

from __future__ import annotations

import errno

import pytest
from engine_world import BASE, ELSEWHERE, LOCATED, SIZE, Held, World, turns
from pattern import PAGE

from aiouffd import RegisterMode
from aiouffd.engine.flight import Flight
from aiouffd.engine.messages import emptied
from aiouffd.engine.runs import FOR_FAULT, Op, Run
from aiouffd.engine.statistics import Counter
from aiouffd.errors import OperationError, SourceError


def test_several_faults_share_one_wake() -> None:
    """Pages of one wake-up are copied without waking, then woken at once."""
    world = World(0, located=True)
    for page in (1, 9, 17):
        world.touch(page, page)
    world.serve_all()
    seen = world.counters.snapshot()
    assert (seen.copies, seen.wakes, seen.pages_fault) == (3, 1, 3)


def test_what_its_owner_empties_is_zeros() -> None:
    """As a REMOVE event, for a region whose owner tells in place of the kernel."""
    world = World(0, located=True)
    emptied(world.space, BASE + 4 * PAGE, BASE + 6 * PAGE)
    assert world.space.mappings.locate(BASE + 4 * PAGE) == (BASE + 4 * PAGE, BASE + 6 * PAGE, -1)
    assert world.space.mappings.locate(BASE + 6 * PAGE)[2] == 6 * PAGE
    assert world.counters.snapshot().wakes == 1


def test_everyone_is_woken_and_given_back() -> None:
    """A successor wakes all by one WAKE; a space that is left gives its memory back, gone mappings aside."""
    world = World(0, located=True)
    world.space.mappings.unmap(BASE + 8 * PAGE, BASE + 16 * PAGE)
    for page in (1, 20):
        world.uffd.touch(BASE + page * PAGE, page)
    world.uffd.read_raw()
    world.space.wake_all()
    assert world.counters.snapshot().wakes == 1
    assert len(world.uffd._faults) == 2  # each has faulted anew
    world.uffd.munmap(BASE + 16 * PAGE, BASE + SIZE)
    world.uffd.read_raw()
    world.space.unregister()
    assert world.uffd.mappings == [(BASE + 8 * PAGE, BASE + 16 * PAGE)]


def test_who_waits_outside_of_all_mappings_is_woken() -> None:
    """What mremap(2) has made longer is in no mapping: no event tells of it."""
    world = World(0, located=True)
    for start in (ELSEWHERE, 1 << 16):
        world.uffd.register(start, PAGE, RegisterMode.MISSING)
        world.uffd.touch(start, 7)
    assert len(world.uffd.read_raw()) == 2 * 32
    world.space.wake_all()
    assert len(world.uffd.read_raw()) == 32  # the lowest addresses are no one's
    world.space.mappings.add(1 << 16, (1 << 16) + PAGE, -1)
    world.space.wake_all()
    assert len(world.uffd.read_raw()) == 2 * 32


def test_the_woken_range_is_of_whole_pages() -> None:
    """A change may begin and end anywhere."""
    world = World(0, located=True)
    asked: list[tuple[int, int]] = []
    world.uffd.try_wake = lambda start, length: asked.append((start, length)) or 0  # type: ignore[method-assign,func-returns-value,redundant-expr]
    world.space.changed(BASE + 100, BASE + PAGE + 1)
    world.space.changed(BASE, BASE + PAGE)
    assert asked == [(BASE, PAGE + PAGE), (BASE, PAGE)]


def test_what_a_change_drops_is_not_counted_and_not_taken_for_present() -> None:
    """Put off or still to come; the parts that are shown still stay."""
    world = World(8 * PAGE, located=True)
    words = world.counters.words
    for purpose_pages, keep in ((8, world.space.resolve_later), (8, None)):
        world.space.readahead.brought(0, purpose_pages * PAGE)
        words[Counter.PAGES_READAHEAD] = purpose_pages
        run = Run(Op.COPY, BASE, 0, purpose_pages * PAGE, LOCATED.address, None, FOR_FAULT)
        if keep is not None:
            keep([run])
        else:
            world.uffd.failures.append(-errno.EAGAIN)
            world.space.resolve([run])
        losses = world.space.readahead.losses
        world.space.mappings.unmap(BASE + 2 * PAGE, BASE + 4 * PAGE)
        world.space.changed(BASE + 2 * PAGE, BASE + 4 * PAGE)
        assert world.space.readahead.missing(0, 8 * PAGE) == [(2 * PAGE, 2 * PAGE)]
        assert world.space.readahead.losses > losses
        assert words[Counter.PAGES_READAHEAD] == 6
        kept = [*world.space.deferred, *world.space.remainders]
        assert [(part.dst - BASE, part.left) for part in kept] == [(0, 2 * PAGE), (4 * PAGE, 4 * PAGE)]
        world.space.deferred.clear()
        world.space.remainders.clear()
        world.space.mappings.add(BASE, BASE + SIZE, 0)


@pytest.mark.parametrize("limit", [1, 64])
def test_two_threads_move_memory_at_once(limit: int) -> None:
    """To where the first has left, as the kernel may choose: its UNMAP comes after the REMAP of the second."""
    world = World(0, located=True)
    world.uffd.mremap(BASE, ELSEWHERE, 4 * PAGE)
    world.uffd.mremap(BASE + 8 * PAGE, BASE, 4 * PAGE)
    while world.deliver(limit):
        pass
    moved = {ELSEWHERE: BASE, BASE: BASE + 8 * PAGE, BASE + 3 * PAGE: BASE + 11 * PAGE}
    for page in moved:
        world.uffd.touch(page)
        world.serve_all()
    assert world.uffd.pages == {page: world.model[source] for page, source in moved.items()}


async def test_what_flies_over_a_change_is_forgotten() -> None:
    """Its pages in the changed range are not joined any more, and not taken for present."""
    source = Held()
    world = World(8 * PAGE, source=source)
    world.touch(0, 1)
    world.deliver(64)
    await turns()
    assert world.space.flights.gaps(BASE, BASE + 5 * PAGE) == [(BASE + 4 * PAGE, BASE + 5 * PAGE)]
    losses = world.space.readahead.losses
    world.space.changed(BASE + 2 * PAGE, BASE + 3 * PAGE)
    assert world.space.flights.gaps(BASE, BASE + 4 * PAGE) == [(BASE + 2 * PAGE, BASE + 3 * PAGE)]
    assert world.space.readahead.missing(0, 4 * PAGE) == [(2 * PAGE, PAGE)]
    assert world.space.readahead.losses == losses + 1
    source.answer()
    await turns()


@pytest.mark.parametrize("closes", ["changed", "refuse", "close"])
def test_the_fast_path_is_given_back(closes: str) -> None:
    """With a change of the layout, and when the space is left."""
    world = World(0, located=True)
    closed: list[int] = []

    class Path:
        def close(self, fd: int) -> None:
            closed.append(fd)

    world.space.fast_path = Path()  # type: ignore[assignment]
    fd = world.uffd.fileno()
    if closes == "changed":
        world.space.changed(BASE, BASE + PAGE)
    else:
        getattr(world.space, closes)()
    assert closed == [fd]


def test_each_piece_lets_its_touchers_go() -> None:
    """And it is told whether there are more."""
    world = World(0, located=True)
    for page in (1, 20):
        world.touch(page, page)
    world.space.resolve_later(
        [Run(Op.ZEROPAGE, BASE, 0, SIZE // 2), Run(Op.ZEROPAGE, BASE + SIZE // 2, SIZE // 2, SIZE // 2)]
    )
    assert world.space.advance()
    assert list(world.uffd.asleep) == [BASE + 20 * PAGE]
    assert not world.space.advance()
    assert not world.uffd.asleep
    assert not world.space.advance()


@pytest.mark.parametrize("number", [errno.ESRCH, errno.ENOSPC])
def test_of_a_process_that_is_gone_no_page_is_missing(number: int) -> None:
    """Nothing is owed to it, however the kernel says so."""
    world = World(0, located=True)
    world.uffd.failures.append(-number)
    assert world.space.poison_if_missing(BASE) is True
    assert world.space.is_gone


def test_each_poisoned_page_is_counted_and_each_error_told() -> None:
    """With the space that it is of; a page that was emptied shows no offset, wherever it lies in its range."""
    world = World(0, located=True)
    told: list[tuple[object, object]] = []
    world.space.on_error = lambda space, error: told.append((space, error))
    world.space.poison([BASE, BASE + 4 * PAGE])
    assert world.counters.snapshot().pages_poisoned == 2
    error = SourceError("it", 0, 1, "no")
    world.space.report(error)
    assert told == [(world.space, error)]
    world.space.mappings.remove(BASE + 4 * PAGE, BASE + 8 * PAGE)
    assert world.space.run(Op.COPY, BASE + 6 * PAGE).offset == -1
    assert world.space.run(Op.COPY, BASE + 9 * PAGE).offset == 9 * PAGE


def test_a_kernel_that_knows_no_poison_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """Which page waits for ever, and what was refused."""
    world = World(0, located=True)
    world.uffd.failures.append(-errno.EINVAL)
    world.space.poison([BASE + 4 * PAGE])
    (error,) = world.errors
    assert isinstance(error, OperationError)
    assert (error.operation, error.start, error.len) == ("UFFDIO_POISON", BASE + 4 * PAGE, PAGE)
    assert f"the page at {BASE + 4 * PAGE:#x} cannot be had" in caplog.text
    assert world.space.deferred


def test_the_rest_of_a_window_is_told_of_once() -> None:
    """The piece that is waited for comes at once; the dispatcher is told when there begins to be a rest."""
    world = World(0, located=True)
    told: list[object] = []
    world.space.on_remainders = told.append
    world.space.resolve_windows([Run(Op.COPY, BASE, 0, SIZE, LOCATED.address)], [BASE + 20 * PAGE])
    assert BASE + 20 * PAGE in world.uffd.pages
    assert len(world.uffd.pages) == (64 << 10) // PAGE
    assert told == [world.space]
    world.space.resolve_later([Run(Op.ZEROPAGE, ELSEWHERE, 0, PAGE)])
    assert told == [world.space]
    world.space.remainders.clear()
    world.space.resolve_later([])
    assert told == [world.space]
    world.space.resolve_later([Run(Op.ZEROPAGE, BASE, 0, PAGE)])
    assert told == [world.space] * 2


@pytest.mark.parametrize(("flying", "woken"), [(None, 1), (2, 2), (20, 1)])
def test_one_wake_over_several_unless_others_wait_between(flying: int | None, woken: int) -> None:
    """For what is on its way: they would fault anew for nothing."""
    world = World(0, located=True)
    asked: list[tuple[int, int]] = []
    world.uffd.try_wake = lambda start, length: asked.append(((start - BASE) // PAGE, length // PAGE)) or 0  # type: ignore[method-assign,func-returns-value,redundant-expr]
    if flying is not None:
        start = BASE + flying * PAGE
        world.space.take_off(Flight(start, start + PAGE, flying * PAGE, 0, FOR_FAULT))
    ranges = [(BASE, BASE + PAGE), (BASE + 4 * PAGE, BASE + 6 * PAGE)]
    world.space.wake(ranges, each=False)
    assert asked == ([(0, 6)] if woken == 1 else [(0, 1), (4, 2)])
    asked.clear()
    world.space.wake(ranges, each=True)
    assert asked == [(0, 1), (4, 2)]


def test_what_is_put_off_is_counted() -> None:
    """Each run once, however often it is tried; zeros that cannot be mapped are copied."""
    world = World(0, located=True)
    world.uffd.failures.extend([-errno.EAGAIN] * 4)
    for page in (1, 3):
        world.space.resolve([Run(Op.ZEROPAGE, BASE + page * PAGE, page * PAGE, PAGE)])
    world.space.retry()
    assert world.counters.snapshot().deferred == 2
    world.space.write_protect = True
    (run,) = world.space.zeros(BASE, 0, 2 * PAGE, FOR_FAULT)
    assert (run.op, run.dst, run.left) == (Op.COPY, BASE, 2 * PAGE)
