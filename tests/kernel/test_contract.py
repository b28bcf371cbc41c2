"""`aiouffd.testing.FakeUffd` keeps the kernel's rules: the same cases pass against it and against the kernel."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import select
import socket
from array import array
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pattern import PAGE
from scenario import HANG, play
from worlds import ELSEWHERE, FEATURES, FakeWorld, KernelWorld, World, world_of

import aiouffd
from aiouffd import Feature, Ioctl, RegisterMode, Userfaultfd
from aiouffd.engine.resolver import Resolver
from aiouffd.engine.statistics import Counters
from aiouffd.kernel.memory import address_of
from aiouffd.testing import FakeUffd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

A, B = b"A" * PAGE, b"B" * PAGE
ZEROS = bytes(8)
NOTHING = Feature(0)
END = (1 << 47) - PAGE if platform.machine() == "x86_64" else 1 << 52
"""No address of a process: TASK_SIZE of x86-64, and more than that of any arm64."""


def readable(world: World) -> bool:
    """Tell whether poll(2) says that there is something to read."""
    return bool(select.select([world.uffd], [], [], 0)[0])


def fault(page: int, thread: int) -> tuple[Any, ...]:
    """Return the message of a reading thread."""
    return ("fault", page, 0, thread)


# Cases: what each world must do.


def dontwake_leaves_sleepers(world: World) -> None:
    """The page is there for everybody, and who slept sleeps on until WAKE."""
    world.touch(1, thread=1)
    assert readable(world)
    assert world.read() == [fault(1, 1)]
    assert not readable(world)
    assert world.uffd.copy(world.at(1), A, wake=False) == PAGE
    world.touch(1, thread=2)
    assert world.got(2) == A[:8]
    assert world.asleep(1)
    world.uffd.wake(world.at(1), PAGE)
    assert world.got(1) == A[:8]
    for operation, found in ((world.uffd.zeropage, ZEROS), (world.uffd.poison, "poisoned")):
        world.touch(2, thread=3)
        operation(world.at(2), PAGE, wake=False)
        assert world.asleep(3)
        world.uffd.wake(world.at(2), PAGE)
        assert world.got(3) == found
        world.dontneed(2, 1)
        world.read()
    assert world.read() == []


def eexist_wakes_nobody(world: World) -> None:
    """Not the sleeper of the page that is there, nor those behind it."""
    for page in (1, 2):
        world.touch(page, thread=page)
    assert world.read() == [fault(1, 1), fault(2, 2)]
    world.uffd.copy(world.at(1), A, wake=False)
    operations: list[Callable[..., object]] = [
        lambda: world.uffd.copy(world.at(1), B + B),
        lambda: world.uffd.zeropage(world.at(1), 2 * PAGE),
        lambda: world.uffd.poison(world.at(1), 2 * PAGE),
    ]
    for operation in operations:
        with pytest.raises(aiouffd.PagePresentError):
            operation()
    assert world.asleep(1)
    assert world.asleep(2)
    assert world.pages() == {1: A[:8]}


def wake_without_a_page_is_a_new_message(world: World) -> None:
    """Read or not before: there is one message for each thread that sleeps, and it sleeps anew."""
    world.touch(1, thread=1)
    assert world.read() == [fault(1, 1)]
    world.uffd.wake(world.at(0), 4 * PAGE)
    world.rest()
    assert world.read() == [fault(1, 1)]
    world.touch(1, thread=2)
    world.uffd.wake(world.at(1), PAGE)
    world.rest()
    assert world.read() == [fault(1, 1), fault(1, 2)]
    world.uffd.wake(world.at(2), PAGE)
    assert world.asleep(1)
    assert world.read() == []
    world.uffd.copy(world.at(1), A)
    assert [world.got(1), world.got(2)] == [A[:8]] * 2


def one_wake_reaches_every_sleeper(world: World) -> None:
    """Of the whole address space, as far as the kernel says that it goes: WAKE looks at no mapping."""
    for page in (1, 7):
        world.touch(page, thread=page)
    assert world.read() == [fault(1, 1), fault(7, 7)]
    Resolver(world.uffd, PAGE, Counters()).wake_all(4 << 20)
    world.rest()
    assert world.read() == [fault(1, 1), fault(7, 7)]
    for page in (1, 7):
        world.uffd.copy(world.at(page), A)
        assert world.got(page) == A[:8]


def a_message_goes_with_its_sleeper(world: World) -> None:
    """Who is woken before his message was read has taken it back."""
    world.touch(1, thread=1)
    assert readable(world)
    world.uffd.copy(world.at(1), A)
    assert world.got(1) == A[:8]
    assert not readable(world)
    assert world.read() == []


def eagain_while_an_event_is_unread(world: World) -> None:
    """Each resolving operation, before it looks at anything else; WAKE, REGISTER and UNREGISTER do not look."""
    world.touch(5, thread=1)
    world.uffd.copy(world.at(0), A)
    world.dontneed(0, 2)
    assert world.waiting() == 1
    operations: list[Callable[..., object]] = [
        lambda: world.uffd.copy(world.at(4), A),
        lambda: world.uffd.copy(1, A),
        lambda: world.uffd.zeropage(world.at(4), PAGE),
        lambda: world.uffd.poison(world.at(4), PAGE),
        lambda: world.uffd.continue_(world.at(4), PAGE),
        lambda: world.uffd.writeprotect(world.at(4), PAGE, protect=True),
    ]
    for operation in operations:
        with pytest.raises(aiouffd.LayoutChangingError):
            operation()
    world.uffd.unregister(world.at(6), PAGE)
    world.uffd.register(world.at(6), PAGE, RegisterMode.MISSING)
    world.uffd.wake(world.at(5), PAGE)
    world.rest()
    assert world.pages() == {0: A[:8]}  # REMOVE is sent before the pages go
    assert world.read() == [fault(5, 1), ("remove", 0, 2)]
    assert world.waiting() == 0
    assert world.pages() == {}
    assert world.uffd.copy(world.at(4), A) == PAGE


def partial_copies(world: World) -> None:
    """The result is the bytes up to the first page that is there; the sleepers of these pages are woken, no others."""
    world.uffd.copy(world.at(3), A)
    for page in (1, 2, 4):
        world.touch(page, thread=page)
    assert world.uffd.copy(world.at(1), B * 4) == 2 * PAGE
    assert [world.got(1), world.got(2)] == [B[:8]] * 2
    assert world.asleep(4)
    assert world.uffd.zeropage(world.at(4), 3 * PAGE) == 3 * PAGE
    assert world.got(4) == ZEROS
    assert world.uffd.poison(world.at(0), 2 * PAGE) == PAGE
    assert world.pages() == {0: "poisoned", 1: B[:8], 2: B[:8], 3: A[:8], 4: ZEROS, 5: ZEROS, 6: ZEROS}


def faults_are_read_before_older_events(world: World) -> None:
    """A fault that came after an event is handed out before it."""
    world.dontneed(0, 1)
    world.touch(4, thread=1)
    assert world.read() == [fault(4, 1), ("remove", 0, 1)]


def copy_heals_what_is_poisoned(world: World) -> None:
    """COPY only: for ZEROPAGE and POISON it is a page that is there."""
    world.uffd.poison(world.at(1), PAGE)
    world.touch(1, thread=1)
    assert world.got(1) == "poisoned"
    for operation in (world.uffd.zeropage, world.uffd.poison):
        with pytest.raises(aiouffd.PagePresentError):
            operation(world.at(1), PAGE)
    assert world.uffd.copy(world.at(0), A + B) == 2 * PAGE
    world.touch(1, thread=2)
    assert world.got(2) == B[:8]
    with pytest.raises(aiouffd.PagePresentError):
        world.uffd.poison(world.at(1), PAGE)


def enoent_outside_and_over_an_end(world: World) -> None:
    """A run lies within one registered mapping, or it is not begun."""
    world.uffd.unregister(world.at(4), PAGE)
    for page, count in ((7, 2), (-1, 2), (8, 1), (3, 2), (4, 1), (3, 3)):
        operations: list[Callable[..., object]] = [
            lambda at, count: world.uffd.copy(at, A * count),
            lambda at, count: world.uffd.zeropage(at, count * PAGE),
            lambda at, count: world.uffd.poison(at, count * PAGE),
            lambda at, count: world.uffd.continue_(at, count * PAGE),
            lambda at, count: world.uffd.writeprotect(at, count * PAGE, protect=True),
        ]
        for operation in operations:
            with pytest.raises(aiouffd.RangeGoneError):
                operation(world.at(page), count)
    assert world.pages() == {}
    world.uffd.register(world.at(4), PAGE, RegisterMode.MISSING)  # it is one mapping again
    assert world.uffd.copy(world.at(3), A * 3) == 3 * PAGE


def copies_until_one_fails(world: World) -> None:
    """Several by one call wake nobody, and end before the first that is not done, or not all of it."""
    data = A * 3
    source = address_of(data)
    for page in (0, 5):
        world.touch(page, thread=page + 1)
    world.read()
    world.uffd.copy(world.at(3), B)
    wanted = [(5, 1), (0, 1), (2, 2), (7, 1)]
    copies = array("Q", [word for page, count in wanted for word in (world.at(page), source, count * PAGE)])
    assert world.uffd.try_copies(copies, 0) == 2
    assert world.uffd.try_copies(copies[9:], 0) == 1
    assert world.uffd.try_copies(copies[:3], 0) == 0
    assert world.uffd.try_copies(copies[:0], 0) == 0
    assert sorted(world.pages()) == [0, 2, 3, 5, 7]
    assert world.asleep(1)
    assert world.asleep(6)
    world.uffd.wake(world.at(0), 8 * PAGE)
    assert (world.got(1), world.got(6)) == (A[:8], A[:8])


def copies_what_is_missing(world: World) -> None:
    """One call copies past what is there, and wakes no thread that waits for that; it says where it was refused."""
    data = b"".join(bytes([65 + page]) * PAGE for page in range(8))
    source = address_of(data)
    for page in (1, 2, 5):
        world.touch(page, thread=page + 1)
    world.read()
    for page in (1, 5):
        world.uffd.copy(world.at(page), B, wake=False)
    copied = partial(world.uffd.try_copy_missing, page=PAGE)
    came = copied(world.at(0), source, 8 * PAGE, 0)
    assert came == (8 * PAGE, 2, world.at(1), world.at(5), 5, 2, 0)
    assert [world.pages()[page][:1] for page in range(8)] == [b"A", b"B", b"C", b"D", b"E", b"B", b"G", b"H"]
    assert (world.asleep(2), world.got(3), world.asleep(6)) == (True, b"C" * 8, True)
    world.uffd.wake(came.first, came.last + PAGE - came.first)
    assert (world.got(2), world.got(6)) == (B[:8], B[:8])
    assert copied(world.at(5), source, 3 * PAGE, 1) == (3 * PAGE, 3, world.at(5), world.at(7), 3, 0, 0)
    assert copied(world.at(6), source, 2 * PAGE, 4) == (0, 0, 0, 0, 1, 0, -errno.EINVAL)


def einval(world: World) -> None:
    """Unaligned, empty, no addresses at all, unknown or unfit modes."""
    at = world.at(0)
    source = address_of(A)
    uffd = world.uffd
    for start, length in ((at + 1, PAGE), (at, 100), (at, 0), (1 << 62, PAGE), (END, PAGE)):
        results = [
            uffd.try_copy(start, source, length, 0),
            uffd.try_zeropage(start, length, 0),
            uffd.try_poison(start, length, 0),
            uffd.try_continue(start, length, 0),
            uffd.try_writeprotect(start, length, 1),
            uffd.try_wake(start, length),
        ]
        assert results == [-errno.EINVAL] * 6, (start, length)
        for operation in (lambda start, length: uffd.register(start, length, RegisterMode.MISSING), uffd.unregister):
            with pytest.raises(aiouffd.OperationError, match="EINVAL"):
                operation(start, length)
    assert uffd.try_copy(at, source, PAGE, 4) == -errno.EINVAL
    assert uffd.try_copy(at, source, PAGE, 2) == -errno.EINVAL  # not registered for write protection
    assert uffd.try_zeropage(at, PAGE, 2) == -errno.EINVAL
    assert uffd.try_poison(at, PAGE, 2) == -errno.EINVAL
    assert uffd.try_continue(at, PAGE, 0) == -errno.EINVAL  # anonymous
    assert uffd.try_continue(at, PAGE, 4) == -errno.EINVAL
    assert uffd.try_writeprotect(at, PAGE, 1) == -errno.ENOENT
    assert uffd.try_writeprotect(at, PAGE, 3) == -errno.EINVAL
    assert uffd.try_writeprotect(at, PAGE, 4) == -errno.EINVAL
    for mode in (RegisterMode(0), RegisterMode.MINOR, RegisterMode(1 << 20)):
        with pytest.raises(aiouffd.OperationError, match="EINVAL"):
            uffd.register(at, PAGE, mode)
    assert world.pages() == {}


def unregistering_lets_sleepers_read_zeros(world: World) -> None:
    """So does whoever touches afterwards; registered anew, what is missing is told again."""
    for page in (1, 2, 3):
        world.touch(page, thread=page)
    world.read()
    world.uffd.unregister(world.at(1), 2 * PAGE)
    assert [world.got(1), world.got(2)] == [ZEROS] * 2
    assert world.asleep(3)
    world.dontneed(2, 1)  # no event: nobody is to be told
    assert world.waiting() == 0
    world.uffd.unregister(world.at(1), 2 * PAGE)  # once more is nothing
    assert world.uffd.register(world.at(0), 8 * PAGE, RegisterMode.MISSING) & ~Ioctl.MOVE == (
        Ioctl.WAKE | Ioctl.COPY | Ioctl.ZEROPAGE | Ioctl.POISON
    )
    world.touch(2, thread=4)
    assert world.read() == [fault(2, 4)]
    assert world.pages() == {1: ZEROS}


def a_move_is_remap_and_then_unmap(world: World) -> None:
    """The second is there when the first has been read; until then, and between them, nothing is resolved."""
    world.uffd.copy(world.at(1), A)
    world.mremap(1, ELSEWHERE, 2)
    assert world.pages() == {ELSEWHERE: A[:8]}
    for expected in (("remap", 1, ELSEWHERE, 2), ("unmap", 1, 2)):
        with pytest.raises(aiouffd.LayoutChangingError):
            world.uffd.copy(world.at(4), A)
        assert world.waiting() == 1
        assert world.read() == [expected]
    assert world.waiting() == 0
    world.touch(ELSEWHERE + 1, thread=1)
    assert world.read() == [fault(ELSEWHERE + 1, 1)]
    assert world.uffd.copy(world.at(ELSEWHERE + 1), B) == PAGE
    assert world.got(1) == B[:8]
    with pytest.raises(aiouffd.RangeGoneError):
        world.uffd.copy(world.at(1), A)


def a_move_over_memory_unmaps_it_first(world: World) -> None:
    """What lay at the destination is told before the move is."""
    world.uffd.copy(world.at(5), B + B)
    world.uffd.copy(world.at(1), A)
    world.mremap(1, 5, 2)
    assert [world.read(), world.read(), world.read()] == [[("unmap", 5, 2)], [("remap", 1, 5, 2)], [("unmap", 1, 2)]]
    assert world.pages() == {5: A[:8]}


def a_move_to_where_another_has_left_is_told_before_that_is_unmapped(world: World) -> None:
    """The old place is free before its UNMAP has been read, and before it has been sent."""
    world.uffd.copy(world.at(5), A)
    world.mremap(1, ELSEWHERE, 2)
    world.mremap(5, 1, 2)
    told = []
    while found := world.read():
        told += found
    assert told == [("remap", 1, ELSEWHERE, 2), ("remap", 5, 1, 2), ("unmap", 1, 2), ("unmap", 5, 2)]
    assert world.pages() == {1: A[:8]}
    world.touch(2, thread=1)
    assert world.read() == [fault(2, 1)]
    world.uffd.copy(world.at(2), B)
    assert world.got(1) == B[:8]


def a_sleeper_of_unmapped_memory_waits_for_its_wake(world: World) -> None:
    """Munmap wakes nobody; woken, there is nothing any more."""
    world.touch(2, thread=1)
    world.read()
    world.munmap(1, 3)
    assert world.pages() == {}
    assert world.read() == [("unmap", 1, 3)]
    assert world.asleep(1)
    world.uffd.wake(world.at(2), PAGE)
    assert world.got(1) == "unmapped"
    assert world.read() == []


def each_mapping_has_its_own_remove(world: World) -> None:
    """One madvise over what was split is told piece by piece, each when the one before has been read."""
    world.uffd.unregister(world.at(3), PAGE)
    world.uffd.copy(world.at(0), A * 3)
    world.uffd.copy(world.at(4), A * 2)
    world.dontneed(1, 5)
    assert world.read() == [("remove", 1, 2)]
    assert world.pages().keys() == {0, 4, 5}
    assert world.read() == [("remove", 4, 2)]
    assert world.pages().keys() == {0}


def no_events_without_their_features(world: World) -> None:
    """Nobody sleeps; what was moved is not registered any more. Thread ids are 0."""
    world.touch(6, thread=1)
    assert world.read() == [fault(6, 0)]
    world.uffd.copy(world.at(0), A * 4)
    world.dontneed(0, 1)
    world.munmap(1, 1)
    world.mremap(2, ELSEWHERE, 2)
    assert world.waiting() == 0
    assert world.read() == []
    assert world.pages() == {ELSEWHERE: A[:8], ELSEWHERE + 1: A[:8]}
    world.dontneed(ELSEWHERE, 1)
    world.touch(ELSEWHERE, thread=2)
    assert world.got(2) == ZEROS
    with pytest.raises(aiouffd.RangeGoneError):
        world.uffd.copy(world.at(ELSEWHERE), A)


def closing_lets_go_with_zeros(world: World) -> None:
    """The last descriptor: who sleeps, and who comes, reads zeros."""
    world.touch(1, thread=1)
    world.uffd.close()
    assert world.got(1) == ZEROS
    world.touch(2, thread=2)
    assert world.got(2) == ZEROS


CASES: dict[Callable[[World], None], Feature] = {
    dontwake_leaves_sleepers: FEATURES,
    eexist_wakes_nobody: FEATURES,
    one_wake_reaches_every_sleeper: FEATURES,
    wake_without_a_page_is_a_new_message: FEATURES,
    a_message_goes_with_its_sleeper: FEATURES,
    eagain_while_an_event_is_unread: FEATURES,
    partial_copies: FEATURES,
    faults_are_read_before_older_events: FEATURES,
    copy_heals_what_is_poisoned: FEATURES,
    enoent_outside_and_over_an_end: FEATURES,
    copies_until_one_fails: FEATURES,
    copies_what_is_missing: FEATURES,
    einval: FEATURES,
    unregistering_lets_sleepers_read_zeros: FEATURES,
    a_move_is_remap_and_then_unmap: FEATURES,
    a_move_over_memory_unmaps_it_first: FEATURES,
    a_move_to_where_another_has_left_is_told_before_that_is_unmapped: FEATURES,
    a_sleeper_of_unmapped_memory_waits_for_its_wake: FEATURES,
    each_mapping_has_its_own_remove: FEATURES,
    no_events_without_their_features: NOTHING,
    closing_lets_go_with_zeros: FEATURES,
}


def run_case(kind: str, name: str) -> None:
    """Scenario: one case in one world."""
    case, features = next((case, features) for case, features in CASES.items() if case.__name__ == name)
    world = world_of(kind, 8, features)
    try:
        case(world)
    finally:
        world.close()


@pytest.mark.parametrize("kind", ["fake", "kernel"])
@pytest.mark.parametrize("name", [case.__name__ for case in CASES])
def test_the_kernel_and_the_fake_agree(name: str, kind: str) -> None:
    """The case, against one of them: its docstring says what it is."""
    if kind == "fake":
        run_case(kind, name)
    else:
        play(run_case, kind, name)


@contextlib.contextmanager
def fake_process() -> Iterator[tuple[Any, int, Callable[[], None]]]:
    """A descriptor, the address that it has registered, and how to end its process."""
    uffd = FakeUffd()
    uffd.register(0x7F0000000000, 8 * PAGE, RegisterMode.MISSING)
    yield uffd, 0x7F0000000000, uffd.exit


@contextlib.contextmanager
def real_process() -> Iterator[tuple[Any, int, Callable[[], None]]]:
    """The same, of a forked child."""
    ours, theirs = socket.socketpair()
    region = aiouffd.Region(8 * PAGE)
    child = os.fork()
    if child == 0:
        uffd = Userfaultfd(FEATURES)
        uffd.register(region.address, 8 * PAGE, RegisterMode.MISSING)
        socket.send_fds(theirs, [b"x"], [uffd.fileno()])
        theirs.recv(1)
        os._exit(0)
    _, fds, _, _ = socket.recv_fds(ours, 1, 1)

    def end() -> None:
        ours.send(b"x")
        os.waitpid(child, 0)

    with Userfaultfd.from_fd(fds[0], FEATURES) as uffd:
        yield uffd, region.address, end
    ours.close()
    theirs.close()


@pytest.mark.parametrize("process", [fake_process, real_process], ids=["fake", "kernel"])
def test_a_process_that_has_ended(process: Any) -> None:
    """ESRCH for what resolves, behind EINVAL and before ENOENT; ENOMEM for REGISTER and UNREGISTER; WAKE is done."""
    with process() as (uffd, base, end):
        assert not uffd.gone()
        assert uffd.copy(base, A) == PAGE
        end()
        assert uffd.gone()
        operations: list[Callable[..., object]] = [
            lambda: uffd.copy(base, A),
            lambda: uffd.copy(base - PAGE, A),
            lambda: uffd.zeropage(base + PAGE, PAGE),
            lambda: uffd.poison(base + PAGE, PAGE),
            lambda: uffd.continue_(base, PAGE),
            lambda: uffd.writeprotect(base, PAGE, protect=True),
        ]
        for operation in operations:
            with pytest.raises(aiouffd.TargetExitedError):
                operation()
        assert uffd.try_zeropage(base + 1, PAGE, 0) == -errno.EINVAL
        operations = [
            lambda: uffd.register(base, PAGE, RegisterMode.MISSING),
            lambda: uffd.unregister(base, PAGE),
        ]
        for operation in operations:
            with pytest.raises(aiouffd.OperationError, match="ENOMEM"):
                operation()
        uffd.wake(base, PAGE)
        assert uffd.read() == []


# At random: both do the same, step by step.

PAGES = 10
_page, _count = st.integers(0, PAGES - 1), st.integers(1, 5)
_operation = st.one_of(
    st.tuples(st.just("touch"), _page, st.just(1)),
    st.tuples(st.just("touch"), _page, st.just(1)),
    st.tuples(st.sampled_from(["copy", "copy_dontwake", "zeropage", "poison", "wake"]), st.integers(-1, PAGES), _count),
    st.tuples(st.sampled_from(["dontneed", "munmap", "mremap", "unregister", "register"]), _page, _count),
    st.tuples(st.just("read"), st.just(0), st.just(1)),
    st.tuples(st.just("read"), st.just(0), st.just(1)),
)


class Pair:
    """A fake and a kernel world that are done the same to."""

    def __init__(self) -> None:
        self.fake = FakeWorld(PAGES)
        self.kernel = KernelWorld(PAGES)
        self.threads = 0
        self.moves = 0
        self.emptying = range(0)  # by a madvise that has not returned, perhaps

    def both(self, act: Callable[[World], Any]) -> None:
        """Do it, and compare what came of it: the result, who sleeps, and every page."""
        found = []
        for world in (self.fake, self.kernel):
            try:
                result = act(world)
            except aiouffd.OperationError as error:
                result = f"{type(error).__name__} {errno.errorcode[error.errno or 0]}"
            world.rest()
            asleep = [thread for thread in range(self.threads) if world.asleep(thread)]
            found.append((result, asleep, world.waiting(), world.pages()))
        assert found[0] == found[1], f"the fake's, and the kernel's:\n{found[0]}\n{found[1]}"

    def do(self, name: str, page: int, count: int) -> None:
        """Do one operation, if there is anything that it could be done to."""
        start = self.fake.at(page)
        within = self.fake.uffd._within(start, start + count * PAGE)
        mapped = sum(min(area.end, start + count * PAGE) - max(area.start, start) for area in within) == count * PAGE
        if name == "touch":
            # A madvise over several mappings flushes the TLBs when it returns (Linux 6.16): as long as it sleeps in an
            # event, other processors may still see what it has emptied before, without a fault.
            if mapped and self.threads < 12 and not (self.fake.waiting() and page in self.emptying):
                thread = self.threads
                self.threads += 1
                self.both(lambda world: world.touch(page, thread))
        elif name == "read":
            self.both(lambda world: world.read())
        elif name in ("copy", "copy_dontwake"):
            self.both(lambda world: world.uffd.copy(world.at(page), (A + B) * 2 + A, wake=name == "copy"))
        elif name in ("zeropage", "poison", "wake"):
            self.both(lambda world: getattr(world.uffd, name)(world.at(page), count * PAGE))
        elif not mapped or self.fake.waiting():
            return  # no memory to be changed; or threads that wake up at once would race
        elif name == "mremap":
            if len(within) == 1:
                place = ELSEWHERE + self.moves * 8
                self.moves += 1
                self.both(lambda world: world.mremap(page, place, count))
        elif name == "register":
            self.both(lambda world: world.uffd.register(world.at(page), count * PAGE, RegisterMode.MISSING) and None)
        elif name == "unregister":
            self.both(lambda world: world.uffd.unregister(world.at(page), count * PAGE))
        else:
            self.emptying = range(page, page + count) if name == "dontneed" else range(0)
            self.both(lambda world: getattr(world, name)(page, count))


def compare(examples: int, running: str) -> None:
    """Scenario: random sequences on both."""

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.none() | _operation, min_size=50, max_size=50))
    def same(drawn: list[tuple[str, int, int] | None]) -> None:
        operations = [operation for operation in drawn if operation is not None]
        Path(running).write_text(repr(operations))  # for whoever finds this process hung
        pair = Pair()
        try:
            for operation in operations:
                pair.do(*operation)
        except Exception as error:
            error.add_note(f"the operations were {operations}")
            raise
        finally:
            pair.fake.close()
            pair.kernel.close()

    same()


def held_together(examples: int, deadline: float, path: Path) -> None:
    """Run the comparison; a hang tells the operations that it hung in."""
    try:
        play(compare, examples, str(path), deadline=deadline)
    except AssertionError as error:
        error.add_note(f"the last operations were {path.read_text()}")
        raise


@pytest.mark.long
def test_random_operations_come_to_the_same(tmp_path: Path) -> None:
    """Results, errnos, messages, sleepers and pages, after each of some thousand operations."""
    held_together(250, HANG, tmp_path / "running")


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_random_operations_come_to_the_same_at_length(tmp_path: Path) -> None:
    """Some hundred thousand."""
    held_together(8000, 1000.0, tmp_path / "running")
