"""`engine.dispatcher` over pipes in place of descriptors: reading, looking again, timers, and what cannot be read."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
from functools import partial
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import pytest
from engine_world import BASE, PAGES, SIZE, Held, PipedUffd, World, turns
from pattern import PAGE, content
from scripted_reader import ScriptedReader

from aiouffd import native
from aiouffd.engine import dispatcher as module
from aiouffd.engine import reading
from aiouffd.engine.allowance import Allowance
from aiouffd.engine.dispatcher import Dispatcher
from aiouffd.engine.reading import PythonReader
from aiouffd.engine.retrying import Retrying
from aiouffd.engine.runs import Op, Run
from aiouffd.engine.statistics import Counter
from aiouffd.errors import OperationError
from aiouffd.native.reader import Outcome
from aiouffd.testing import POISONED

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aiouffd.engine.space import Space

native.reason()  # the native part is loaded once a process, and reads files for that


class Rig:
    """A dispatcher, and worlds that it serves."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher

    def world(self, readahead: int = 0, **options: Any) -> tuple[World, PipedUffd]:
        """Return a world that is being served, and its descriptor."""
        uffd = PipedUffd()
        world = World(readahead, uffd=uffd, **{"located": "source" not in options, **options})
        self.dispatcher.add(world.space)
        return world, uffd


class Defects:
    """What callbacks of the loop have raised."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def __call__(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Note it."""
        self.seen.append(context)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    """Run a dispatcher that sleeps at once, and none of whose callbacks may raise."""
    from aiouffd.engine.statistics import Counters

    loop, defects = asyncio.get_running_loop(), Defects()
    loop.set_exception_handler(defects)
    dispatcher = Dispatcher(loop, Counters(), spin_us=0)
    yield Rig(dispatcher)
    dispatcher.close()
    assert not defects.seen


@pytest.fixture
def python_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have dispatchers read in Python, as where there is no native part."""
    monkeypatch.setattr(module, "make_reader", PythonReader)


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition, as long as no callback has raised."""
    defects = asyncio.get_running_loop().get_exception_handler()
    async with asyncio.timeout(60):
        while not condition():
            assert not isinstance(defects, Defects) or not defects.seen
            await asyncio.sleep(0.001)


async def test_faults_are_served_on_the_loop(rig: Rig) -> None:
    """Of each of several descriptors."""
    worlds = [rig.world() for _ in range(3)]
    assert [world.counters.words[Counter.SPACES] for world, _ in worlds] == [1, 1, 1]
    for number, (world, uffd) in enumerate(worlds):
        for page in (number, 9):
            world.touch(page, 1)
        uffd.send()
    await until(lambda: not any(uffd.asleep for _, uffd in worlds))
    for number, (world, uffd) in enumerate(worlds):
        assert uffd.pages == {BASE + page * PAGE: content(page * PAGE, PAGE) for page in (number, 9)}
        assert not world.errors


async def test_what_is_deferred_is_tried_again_on_a_timer(rig: Rig) -> None:
    """No message comes to remind us; while it is in vain, the tries become rarer, and with the next they are not."""
    world, uffd = rig.world()
    tries: list[int] = []
    retry = world.space.retry

    def counted() -> None:
        tries.append(1)
        retry()

    world.space.retry = counted  # type: ignore[method-assign]
    uffd.failures.extend([-errno.EAGAIN] * 6)
    world.touch(1, 1)
    uffd.send()
    await until(lambda: uffd.pages)
    assert not uffd.asleep
    assert len(tries) >= 4
    assert rig.dispatcher._pause > module._RETRY
    rig.dispatcher._pause = module._RETRY
    rig.dispatcher._retry_all()
    assert rig.dispatcher._pause == 2 * module._RETRY
    uffd.failures.extend([-errno.EAGAIN] * 2)
    world.touch(2, 1)
    uffd.send()
    await until(lambda: uffd.asleep == {} and len(uffd.pages) == 2)
    assert rig.dispatcher._pause <= 4 * module._RETRY


async def test_the_pause_between_tries_has_an_end(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 ms at most."""
    monkeypatch.setattr(module, "_SLOWEST_RETRY", 0.004)
    world, uffd = rig.world()
    uffd.failures.extend([-errno.EAGAIN] * 12)
    world.touch(1, 1)
    uffd.send()
    await until(lambda: uffd.pages)
    assert rig.dispatcher._pause == 0.004


async def test_deferred_runs_are_tried_again_when_messages_come(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that they waited for has run then."""
    monkeypatch.setattr(module, "_RETRY", 1000.0)
    world, uffd = rig.world()
    uffd.failures.extend([-errno.EAGAIN] * 1000)
    world.touch(1, 1)
    uffd.send()
    await until(lambda: world.space.deferred)
    await turns(50)
    assert len(uffd.failures) > 900
    uffd.failures.clear()
    await turns(50)
    assert uffd.asleep
    uffd.touch(BASE + 4 * PAGE, 2)
    world.uffd.touch(BASE + 5 * PAGE, 3)
    uffd.send()
    await until(lambda: not uffd.asleep)
    assert len(uffd.pages) == 3


async def test_windows_are_completed_while_nothing_comes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces; a space that was dropped meanwhile is passed over."""
    monkeypatch.setattr(module, "_BURST_NS", 10_000_000_000)
    world, uffd = rig.world()
    other, _ = rig.world()
    other.space.resolve_later([Run(Op.ZEROPAGE, BASE, 0, SIZE)])
    rig.dispatcher.drop(other.space)
    world.space.resolve_later([Run(Op.ZEROPAGE, BASE, 0, SIZE)])
    rig.dispatcher._ready()
    assert len(uffd.pages) == PAGES
    assert not rig.dispatcher._behind


async def test_the_loop_gets_a_turn_however_many_faults_there_are(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other callbacks run in between, and the descriptors are looked at again right after."""
    monkeypatch.setattr(module, "_BURST_NS", -1)
    world, uffd = rig.world()
    for page in range(8):
        world.touch(page, page)
    for _ in range(8):
        uffd.send(1)
    seen: list[int] = []
    for _ in range(40):
        seen.append(len(uffd.pages))
        await asyncio.sleep(0)
    await until(lambda: len(uffd.pages) == 8)
    assert len(set(seen)) > 1


async def test_a_process_that_is_gone_is_dropped(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no end-of-file: it is looked for; the heartbeat goes on."""
    monkeypatch.setattr(module, "_GONE_CHECK", 0.001)
    dropped: list[Space] = []
    idle: list[bool] = []
    rig.dispatcher._on_drop = dropped.append
    rig.dispatcher._on_idle = lambda: idle.append(True)
    world, uffd = rig.world()
    told: list[Space] = []
    world.space.on_gone = told.append
    rig.dispatcher._check_gone()
    assert rig.dispatcher._words[Counter.HEARTBEAT] == 1
    await until(lambda: rig.dispatcher._words[Counter.HEARTBEAT] > 3)
    assert rig.dispatcher.spaces
    uffd.exit()
    await until(lambda: not rig.dispatcher.spaces)
    assert (dropped, told, idle) == ([world.space], [world.space], [True])
    assert world.counters.words[Counter.SPACES] == 0
    rig.dispatcher.drop(world.space)  # once
    assert len(dropped) == 1


def fail(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Have the first three reads fail, and the next come soon; return what they fail with, as far as they have not."""
    failing = [number] * 3

    def preadv(*arguments: Any) -> int:
        if failing:
            raise OSError(failing.pop(), "")
        return os.preadv(*arguments)

    monkeypatch.setattr(module, "_PASSING_ERROR_PAUSE", 0.001)
    monkeypatch.setattr(reading, "_preadv", preadv)
    return failing


@pytest.mark.usefixtures("python_reader")
async def test_events_that_cannot_be_read_wait(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """EMFILE: a fork's descriptor finds no room. It is read again after each pause, and it is logged once."""
    logging.getLogger("aiouffd").propagate = True
    failing = fail(monkeypatch, errno.EMFILE)
    world, uffd = rig.world()
    world.touch(1, 1)
    uffd.send()
    await until(lambda: uffd.pages)
    assert not failing
    assert caplog.text.count("cannot be read, and wait") == caplog.text.count(os.strerror(errno.EMFILE)) == 1
    assert rig.dispatcher.spaces


@pytest.mark.usefixtures("python_reader")
async def test_nothing_spins_where_events_cannot_be_read(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where there is one descriptor either, which is read without epoll. One that is dropped is read no more."""
    monkeypatch.setattr(module, "_PASSING_ERROR_PAUSE", 3600)
    tried: list[int] = []

    def preadv(fd: int, *_arguments: Any) -> int:
        tried.append(fd)
        raise OSError(errno.EMFILE, "no room")

    monkeypatch.setattr(reading, "_preadv", preadv)
    world, uffd = rig.world()
    world.touch(1, 1)
    uffd.send()
    await turns(50)
    rig.dispatcher._retry_all()
    assert tried == [world.space.uffd.fileno()]
    rig.dispatcher._read_again(world.space)
    await turns(50)
    assert len(tried) == 2
    rig.dispatcher.drop(world.space)
    rig.dispatcher._read_again(world.space)
    await turns(50)
    assert len(tried) == 2


@pytest.mark.usefixtures("python_reader")
@pytest.mark.parametrize("before", [[], [errno.EINTR], [errno.EOPNOTSUPP]])
async def test_a_descriptor_that_is_broken_is_dropped(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, before: list[int]
) -> None:
    """Its owner learns why, and its threads get SIGBUS. An interrupted read is none; a flag is left out, once."""
    logging.getLogger("aiouffd").propagate = True
    number = before[0] if before == [errno.EOPNOTSUPP] else errno.EIO
    failing = [number, *before]

    def preadv(*_arguments: Any) -> int:
        raise OSError(failing.pop(), "broken")

    monkeypatch.setattr(reading, "_preadv", preadv)
    monkeypatch.setattr(reading, "_readv", preadv)
    world, uffd = rig.world()
    world.touch(1, 1)
    uffd.send()
    await until(lambda: not rig.dispatcher.spaces)
    (error,) = world.errors
    assert isinstance(error, OperationError)
    assert (error.operation, error.start, error.len, error.errno) == ("read", 0, 0, number)
    assert f"{world.space!r} cannot be read and is dropped: {os.strerror(number)}" in caplog.text
    assert uffd.pages[BASE + PAGE] is POISONED
    assert not uffd.asleep


@pytest.mark.usefixtures("python_reader")
async def test_a_descriptor_that_is_broken_is_tried_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where threads are to wait for what cannot be had. Its owner is told once."""
    logging.getLogger("aiouffd").propagate = True
    failing = fail(monkeypatch, errno.EIO)
    world, uffd = rig.world()
    world.space.retrying = Retrying(world.space)
    world.touch(1, 1)
    uffd.send()
    await until(lambda: uffd.pages)
    assert uffd.pages == {BASE + PAGE: content(PAGE, PAGE)}
    assert not failing
    assert len(world.errors) == 1
    assert caplog.text.count("events cannot be read, and wait") == 1


async def test_what_cannot_be_poisoned_is_not_dropped(rig: Rig) -> None:
    """It is read no more, and its descriptor stays open: else its threads would read zeros."""
    world, uffd = rig.world()
    uffd.failures.append(-errno.EINVAL)
    world.touch(1, 1)
    rig.dispatcher._broken(world.space, errno.EIO)
    uffd.send()
    await until(lambda: not rig.dispatcher._tasks)
    assert list(rig.dispatcher.spaces.values()) == [world.space]
    assert uffd.asleep
    assert not uffd.pages


@pytest.mark.usefixtures("python_reader")
@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM])
async def test_a_read_with_the_nowait_flag_is_refused(rig: Rig, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Before Linux 6.10, or by a seccomp filter: O_NONBLOCK is all there is, and nothing is lost."""
    flags_seen: list[int] = []

    def preadv(_fd: int, _buffers: Any, _offset: int, flags: int) -> int:
        flags_seen.append(flags)
        raise OSError(number, "refused")

    monkeypatch.setattr(reading, "_preadv", preadv)
    world, uffd = rig.world()
    world.touch(1, 1)
    uffd.send()
    await until(lambda: uffd.pages)
    assert flags_seen == [os.RWF_NOWAIT]


async def test_a_descriptor_whose_flag_is_taken_again_and_again_is_dropped(rig: Rig) -> None:
    """O_NONBLOCK belongs to the open file: others can clear it. Eight times it is set again."""
    world, uffd = rig.world()
    world.touch(1, 1)
    for number in range(module._MAX_NONBLOCK_RESETS):
        assert rig.dispatcher.spaces, number
        os.set_blocking(uffd.reader, True)
        rig.dispatcher._unblock(uffd.reader)
        assert not os.get_blocking(uffd.reader)
    await until(lambda: not rig.dispatcher.spaces)
    assert world.space.closing
    assert not uffd.asleep


@pytest.mark.usefixtures("python_reader")
async def test_the_fast_path_serves_what_it_is_open_for(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single message of a userfaultfd goes there first; what it leaves, and what is dropped, does not."""
    monkeypatch.setattr(module, "Userfaultfd", PipedUffd)
    served: list[int] = []
    world, uffd = rig.world()
    reader = rig.dispatcher._reader
    assert world.space.fast_path is reader

    def serve(_fd: int, slot: tuple[int, ...], _message: memoryview) -> bool:
        served.append(slot[1])
        return False

    monkeypatch.setattr(reader, "serve", serve)
    world.touch(3, 1)
    uffd.send()
    await until(lambda: uffd.pages)
    assert served == [1]
    for page in (4, 5):
        world.touch(page, 1)
    uffd.send()
    await until(lambda: len(uffd.pages) == 3)
    assert len(served) == 1
    rig.dispatcher.drop(world.space)
    assert world.space.fast_path is None


@pytest.mark.usefixtures("python_reader")
async def test_messages_that_came_with_a_dropped_descriptor_are_left(rig: Rig) -> None:
    """Dropped in the same look as it was readable: it is nobody's."""
    world, uffd = rig.world()
    other, _ = rig.world()
    world.touch(1, 1)
    uffd.send()
    fd = uffd.reader
    rig.dispatcher._reader.only(fd)
    rig.dispatcher._reader.dismiss(fd)
    rig.dispatcher._ready()
    assert not uffd.pages
    assert not other.errors


async def test_closing_drops_all_and_stops_the_timers() -> None:
    """Nothing is called afterwards."""
    from aiouffd.engine.statistics import Counters

    idle: list[bool] = []
    dispatcher = Dispatcher(asyncio.get_running_loop(), Counters(), on_idle=lambda: idle.append(True))
    rig = Rig(dispatcher)
    world, uffd = rig.world(source=Held())
    world.touch(1, 1)
    uffd.send()
    await until(lambda: world.space.flights)
    flight = next(iter(world.space.flights))
    dispatcher.close()
    assert flight.done is not None
    await turns()
    assert flight.done.cancelled()
    assert not dispatcher.spaces
    assert not idle
    assert dispatcher._checker.cancelled()
    dispatcher._schedule()
    assert dispatcher._timer is None


@pytest.fixture(params=["native", "python"])
def either_reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have dispatchers read in each way."""
    if request.param == "python":
        monkeypatch.setattr(module, "make_reader", PythonReader)


@pytest.mark.usefixtures("either_reader")
async def test_a_space_that_is_held_is_not_read(rig: Rig) -> None:
    """Its events stay where they are until it is released; the others are served."""
    world, uffd = rig.world()
    for _ in range(2):
        rig.dispatcher.hold(world.space, "journal")
    rig.dispatcher._read_again(world.space)
    assert not is_listened_to(rig, uffd)
    world.touch(1, 1)
    uffd.send()
    rig.dispatcher._ready()
    await turns(30)
    assert not uffd.pages
    other, its = rig.world()
    other.touch(2, 1)
    its.send()
    await until(lambda: its.pages)
    assert not uffd.pages
    rig.dispatcher.release(world.space, "journal")
    await until(lambda: uffd.pages)
    rig.dispatcher.release(world.space, "journal")
    world.touch(3, 1)
    uffd.send()
    await until(lambda: len(uffd.pages) == 2)


@pytest.mark.usefixtures("either_reader")
@pytest.mark.parametrize("arrival", [0, 20, 60])
async def test_a_fault_of_a_quiet_client_waits_for_one_turn_of_another(rig: Rig, arrival: int) -> None:
    """However many faults of others came before it; and these others get the same."""
    order: list[int] = []
    quiet, its = rig.world()
    storms = [rig.world() for _ in range(3)]
    came: list[int] = []
    for world, uffd in storms:
        world.touch(0, 0)
        uffd.send()
        await until(lambda uffd=uffd: uffd.pages)  # type: ignore[misc]

    def copied(number: int, copy: Callable[..., int], *arguments: int) -> int:
        if number and len(order) >= arrival and not came:
            came.append(len(order))
            quiet.touch(3, 3)
            its.send()
        order.extend([number] * (arguments[2] // PAGE))
        return copy(*arguments)

    for number, (_, uffd) in enumerate([(quiet, its), *storms]):
        uffd.try_copy = partial(copied, number, uffd.try_copy)  # type: ignore[method-assign]
    for world, uffd in storms:
        for page in range(1, PAGES):
            world.touch(page, page)
        uffd.send()
    await until(lambda: len(order) == 3 * (PAGES - 1) + 1)
    assert order.index(0) - came[0] <= 4
    for end in range(len(order)):
        counts = [order[:end].count(number) for number in (1, 2, 3)]
        assert max(counts) - min(counts) <= 4


@pytest.mark.usefixtures("either_reader")
async def test_who_has_got_least_comes_first(rig: Rig) -> None:
    """Also after a pause; and what it did not need before, it does not get later."""
    order: list[int] = []
    worlds = [rig.world() for _ in range(3)]

    def copied(number: int, copy: Callable[..., int], *arguments: int) -> int:
        order.append(number)
        return copy(*arguments)

    for number, (_, uffd) in enumerate(worlds):
        uffd.try_copy = partial(copied, number, uffd.try_copy)  # type: ignore[method-assign]
    pages = count()

    async def touched(*numbers: int, times: int = 1) -> list[int]:
        order.clear()
        for number in numbers:
            world, uffd = worlds[number]
            for page in islice(pages, times):
                world.touch(page, page)
            uffd.send()
        await until(lambda: len(order) == len(numbers) * times)
        await turns()  # looks in vain
        return order

    for number, times in enumerate((1, 2, 3)):
        await touched(number, times=times)
    assert await touched(2, 1, 0) == [0, 1, 2]
    await touched(1, times=5)
    assert await touched(1, 2) == [2, 1]
    await touched(2, times=2)
    assert await touched(2, 1) == [1, 2]


def limited(rig: Rig, events: float) -> tuple[World, PipedUffd, list[float]]:
    """Return a world whose client may have so many events a second, its descriptor, and the time, set by hand."""
    now, uffd = [1_000.0], PipedUffd()
    world = World(0, uffd=uffd, located=True)
    world.space.allowance = Allowance("a storm", events, None, world.counters, lambda: now[0])
    rig.dispatcher.add(world.space)
    return world, uffd, now


@pytest.mark.usefixtures("either_reader")
async def test_a_client_that_storms_waits_alone(rig: Rig) -> None:
    """What it has asked for too much is read later; a journal that is full meanwhile is another reason to wait."""
    storm, uffd, now = limited(rig, 2)
    allowance = storm.space.allowance
    assert allowance is not None
    for page in range(4):
        storm.touch(page, page)
    uffd.send()
    await until(lambda: len(uffd.pages) == 4)
    storm.touch(9, 9)
    uffd.send()
    quiet, its = rig.world()
    for page in range(8):
        quiet.touch(page, page)
        its.send()
        await until(lambda: len(its.pages) == page + 1)  # noqa: B023 - called at once
    assert len(uffd.pages) == 4
    rig.dispatcher.hold(storm.space, "journal")
    now[0] += 2.0
    allowance._refilled()
    await turns(30)
    assert len(uffd.pages) == 4
    assert rig.dispatcher.held("journal") == [storm.space]
    rig.dispatcher.release(storm.space, "journal")
    await until(lambda: len(uffd.pages) == 5)
    rig.dispatcher.hold(storm.space, "journal")
    allowance.read(9)
    rig.dispatcher.release(storm.space, "journal")
    assert not rig.dispatcher.held("journal")
    assert not is_listened_to(rig, uffd)
    now[0] += 9.0
    allowance._refilled()
    assert is_listened_to(rig, uffd)
    assert allowance._timer is None


async def test_a_process_that_ends_while_it_waits_is_noticed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As any other, though nothing is read of it. It leaves no timer."""
    storm, uffd, _ = limited(rig, 2)
    allowance = storm.space.allowance
    assert allowance is not None
    storm.touch(1, 1)
    storm.touch(2, 2)
    uffd.send()
    await until(lambda: rig.dispatcher._held)
    monkeypatch.setattr(uffd, "gone", lambda: True)
    rig.dispatcher._check_gone()
    assert not rig.dispatcher.spaces
    assert not rig.dispatcher._held
    assert not allowance.spaces
    assert allowance._timer is None


def is_listened_to(rig: Rig, uffd: PipedUffd) -> bool:
    """Tell whether epoll looks at a descriptor."""
    try:
        rig.dispatcher._epoll.modify(uffd.reader, select.EPOLLIN)
    except FileNotFoundError:
        return False
    return True


async def test_what_a_dropped_space_leaves(rig: Rig) -> None:
    """Nothing: the next one may have its number. A space that is not served is not dropped."""
    world, uffd = rig.world()
    stranger = World(0, uffd=PipedUffd())
    rig.dispatcher.drop(stranger.space)
    assert not stranger.space.closing
    os.set_blocking(uffd.reader, True)
    rig.dispatcher._unblock(uffd.reader)
    rig.dispatcher.hold(world.space, "journal")
    rig.dispatcher.drop(world.space)
    assert not rig.dispatcher._held
    assert not rig.dispatcher._blocking
    rig.dispatcher._read_again(world.space)
    stranger.space.close()


async def test_layout_events_are_kept_before_they_are_acted_on(rig: Rig) -> None:
    """By what messages land in: a successor needs them."""
    kept: list[tuple[Space, int]] = []
    landing = rig.dispatcher._landing
    landing.commit = lambda space, layout: kept.append((space, len(layout)))  # type: ignore[method-assign]
    world, uffd = rig.world()
    generation = world.space.mappings.generation
    uffd.madvise_dontneed(BASE, BASE + PAGE)
    uffd.send()
    await until(lambda: world.space.mappings.generation != generation)
    assert kept == [(world.space, 1)]


async def test_the_flag_of_a_single_descriptor_is_looked_after(rig: Rig) -> None:
    """It is read without epoll, which tells of the others. What is not served is left as it is."""
    _, uffd = rig.world()
    os.set_blocking(uffd.reader, True)
    rig.dispatcher._check_gone()
    assert not os.get_blocking(uffd.reader)
    _, other = rig.world()
    os.set_blocking(uffd.reader, True)
    rig.dispatcher._check_gone()
    assert os.get_blocking(uffd.reader)
    os.set_blocking(uffd.reader, False)
    os.set_blocking(other.writer, True)
    rig.dispatcher._unblock(other.writer)
    assert os.get_blocking(other.writer)


async def test_an_unknown_flag_is_left_out_at_once(rig: Rig) -> None:
    """Nothing was read, so there is more to look for; behind other errors there is not."""
    world, _ = rig.world()
    assert rig.dispatcher._broken(world.space, errno.EOPNOTSUPP)
    assert not rig.dispatcher._broken(world.space, errno.EINTR)
    assert rig.dispatcher.spaces


def scripted(
    rig: Rig, patch: pytest.MonkeyPatch, *found: tuple[Outcome, int, int, int], step: int = 0
) -> ScriptedReader:
    """Have a dispatcher find this; its clock goes on by `step` each time that it is read."""
    clock = count(1000, step)
    patch.setattr(module, "perf_counter_ns", lambda: next(clock))
    reader = ScriptedReader(*found)
    dispatcher: Any = rig.dispatcher
    dispatcher._landed_at = dispatcher._landing.buffer
    dispatcher._reader.end()
    dispatcher._reader = reader
    return reader


MESSAGES, IDLE, DUE, FAILED = Outcome.MESSAGES, Outcome.IDLE, Outcome.DUE, Outcome.FAILED


async def test_the_reader_is_told_whether_something_came(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the first look, nor behind an error: only then is it of use to look again."""
    world, uffd = rig.world()
    fd = uffd.reader
    reader = scripted(rig, monkeypatch, (MESSAGES, fd, 0, 0), (FAILED, fd, 0, errno.EINTR), (MESSAGES, fd, 0, 0))
    rig.dispatcher._ready()
    turn = module._BURST_NS
    assert reader.asked == [(turn, False, False), (turn, True, False), (turn, False, False), (turn, True, False)]
    assert rig.dispatcher._turn is None
    assert not world.errors


@pytest.mark.parametrize(("step", "looks"), [(module._BURST_NS - 1, 2), (module._BURST_NS, 1), (1, 3)])
async def test_a_turn_is_taken_when_it_is_due(rig: Rig, monkeypatch: pytest.MonkeyPatch, step: int, looks: int) -> None:
    """Whether the reader says so or the time is up: once, and then it is looked again."""
    _, uffd = rig.world()
    found = [(MESSAGES, uffd.reader, 0, 0)] * 2
    reader = scripted(rig, monkeypatch, *found, (DUE, -1, 0, 0), step=step)
    rig.dispatcher._ready()
    assert len(reader.asked) == looks
    assert all(turn_ns >= 0 for turn_ns, _, _ in reader.asked)
    handle = rig.dispatcher._turn
    assert handle is not None
    reader.found[:] = [(DUE, -1, 0, 0)]
    rig.dispatcher._ready()
    assert rig.dispatcher._turn is handle
    looked = len(reader.asked)
    await turns(3)
    assert len(reader.asked) == looked + 1
    assert reader.asked[-1][1:] == (False, False)
    assert rig.dispatcher._turn is None


async def test_windows_are_completed_between_looks(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """While there are any, the reader looks once; then as before."""
    world, _ = rig.world()
    world.space.resolve_later([Run(Op.ZEROPAGE, BASE, 0, SIZE)])
    reader = scripted(rig, monkeypatch)
    rig.dispatcher._ready()
    assert [once for _, _, once in reader.asked] == [True, False]
    assert len(world.uffd.pages) == PAGES


async def test_the_flag_is_set_again_where_epoll_says_so(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of poll means that O_NONBLOCK is missing; what else it says does not."""
    _, uffd = rig.world()
    fd = uffd.reader
    reader = scripted(rig, monkeypatch)
    os.set_blocking(fd, True)
    for events, blocking in ((select.EPOLLIN, True), (select.EPOLLIN | select.EPOLLERR, False)):
        reader.found.append((MESSAGES, fd, events, 0))
        rig.dispatcher._ready()
        assert os.get_blocking(fd) == blocking


async def test_only_what_is_deferred_is_tried_again(rig: Rig) -> None:
    """Behind messages of its own space; that may have been dropped by them."""
    world, uffd = rig.world()
    tries: list[int] = []
    world.space.retry = lambda: tries.append(1)  # type: ignore[method-assign]
    rig.dispatcher._afterwards(uffd.reader, 0)
    rig.dispatcher._afterwards(uffd.reader + 100, 0)
    assert not tries


async def test_what_is_put_off_without_a_message_is_tried_again(rig: Rig) -> None:
    """For instance what a prefetch brings."""
    world, uffd = rig.world()
    uffd.failures.append(-errno.EAGAIN)
    world.space.resolve([Run(Op.ZEROPAGE, BASE, 0, PAGE)])
    assert world.space.deferred
    await until(lambda: uffd.pages)


async def test_what_a_dispatcher_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for 50 us, checks for processes that are gone, and tells what it drops."""
    from aiouffd.engine.statistics import Counters

    monkeypatch.setattr(module, "_GONE_CHECK", 0.001)
    counters, dropped = Counters(), list[object]()
    dispatcher = Dispatcher(
        asyncio.get_running_loop(), counters, on_drop=dropped.append, on_idle=lambda: dropped.append("idle")
    )
    assert dispatcher.spin_us == 50
    assert dispatcher._pause == module._RETRY
    await until(lambda: counters.words[Counter.HEARTBEAT] > 1)
    world, _ = Rig(dispatcher).world()
    dispatcher.drop(world.space)
    assert dropped == [world.space, "idle"]
    dispatcher.close()


@pytest.mark.usefixtures("python_reader")
async def test_a_single_descriptor_needs_no_epoll(rig: Rig) -> None:
    """As long as it is the only one, and is not held."""

    def only() -> Any:
        reader: Any = rig.dispatcher._reader
        return reader._only

    first, its = rig.world()
    assert only() == ((its.reader, 0),)
    rig.dispatcher.hold(first.space, "journal")
    assert only() is None
    rig.dispatcher.release(first.space, "journal")
    assert only() == ((its.reader, 0),)
    _, others = rig.world()
    assert only() is None
    rig.dispatcher.drop(first.space)
    assert only() == ((others.reader, 0),)


@pytest.mark.usefixtures("python_reader")
async def test_what_the_fast_path_cannot_place_comes_all_the_same(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the window: each page that counts as present is there, or nobody would bring it any more."""
    monkeypatch.setattr(module, "Userfaultfd", PipedUffd)
    world, uffd = rig.world(16 * PAGE)
    world.touch(3, 1)
    uffd.send()
    await until(lambda: uffd.pages)
    assert len(uffd.pages) == 4
    assert world.space.readahead.missing(0, SIZE) == [(4 * PAGE, SIZE - 4 * PAGE)]
