"""The fast path against a model: what is open is served from the right place, and nothing else is served at all."""

from __future__ import annotations

import errno
import random
import sys
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
from engine_world import BASE, LOCATED, SIZE, World
from hypothesis import given, settings

from aiouffd.engine import plain
from aiouffd.engine.mappings import Mapping, Mappings
from aiouffd.engine.plain import SLOT, FastPath
from aiouffd.engine.readahead import Readahead
from aiouffd.engine.statistics import Counter, Counters
from aiouffd.kernel import abi

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.engine.plain import PlainSource

PAGE = 4096
START = 0x7000_0000_0000
DESCRIPTORS = st.integers(0, 5)


class Kernel:
    """What UFFDIO_COPY was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int, int, int]] = []
        self.refusal = 0
        self.done = 0

    def ioctl(self, fd: int, request: int, argument: bytearray) -> int:
        """Take a note, and answer."""
        assert request == abi.UFFDIO_COPY
        dst, src, length, mode, done = abi.COPY_ARGUMENT.unpack(argument)
        assert done == 0
        self.asked.append((fd, dst, src, length, mode))
        if self.refusal:
            # What is shorter does not come back from a call that fails since Python 3.14.
            assert len(argument) > 1024 or sys.version_info < (3, 14)
            abi.COPY_ARGUMENT.pack_into(argument, 0, dst, src, length, mode, self.done or -self.refusal)
            raise OSError(self.refusal, "refused")
        abi.COPY_ARGUMENT.pack_into(argument, 0, dst, src, length, mode, length)
        return 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Stand in for the kernel."""
    made = Kernel()
    monkeypatch.setattr(plain, "_ioctl", made.ioctl)
    return made


def fault(page: int, flags: int = 0, event: int = abi.EVENT_PAGEFAULT) -> memoryview:
    """Return a message."""
    return memoryview(bytearray(abi.PAGEFAULT_MESSAGE.pack(event, flags, START + page * PAGE + 17, 1)))


def serve(path: FastPath, fd: int, message: memoryview) -> bool:
    """Serve as the dispatcher does."""
    return path.serve(fd, SLOT.unpack_from(path.slots, fd * SLOT.size), message)


def at(base: int) -> Callable[[int, int], int | None]:
    """Return where a source lies that begins at `base`."""
    return lambda offset, _length: base + offset


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["admit", "dismiss", "open", "close", "fault"]),
            DESCRIPTORS,
            st.integers(0, 12),
            DESCRIPTORS,
        ),
        max_size=60,
    )
)
def test_only_what_is_open_is_served(steps: list[tuple[str, int, int, int]]) -> None:
    """Each step on a descriptor; a fault is served if its page is in what is open, out of that one's source."""
    kernel = Kernel()
    sources: list[PlainSource] = [
        (at(1 << (40 + number)), 10 * PAGE, PAGE, number & 2, False, None, None) for number in range(6)
    ]
    opened: dict[int, tuple[int, int] | None] = {}  # descriptor -> first page, number
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "_ioctl", kernel.ioctl)
        path = FastPath({})
        for kind, fd, page, number in steps:
            if kind == "admit":
                path.admit(fd, fd + 100, Counters()) if fd not in opened else None
                opened.setdefault(fd, None)
            elif fd not in opened:
                continue
            elif kind == "dismiss":
                path.dismiss(fd)
                del opened[fd]
                assert SLOT.unpack_from(path.slots, fd * SLOT.size)[0] < 0
            elif kind == "open":  # eight pages, of which the last may be behind the end of the source
                path.open(fd, START + page * PAGE, START + (page + 8) * PAGE, 4 * PAGE, sources[number])
                opened[fd] = (page, number)
            elif kind == "close":
                path.close(fd)
                opened[fd] = None
            else:
                open_for = opened[fd]
                expected = open_for is not None and 0 <= page - open_for[0] < 6
                assert serve(path, fd, fault(page)) == expected
                if open_for is not None and expected:
                    source = (1 << (40 + open_for[1])) + (4 + page - open_for[0]) * PAGE
                    assert kernel.asked.pop() == (fd, START + page * PAGE, source, PAGE, open_for[1] & 2)
                assert not kernel.asked
        used = {sources[number] for _, number in filter(None, opened.values())}
        assert {source for source in path._sources if source is not None} == used  # the others' sources are let go


def test_what_takes_more_than_a_copy_is_left(kernel: Kernel) -> None:
    """Other events and faults, what is not at hand, what the source or the kernel refuses: not done, not counted."""
    counters = Counters()
    path = FastPath({})
    path.admit(3, 1, counters)

    def page(offset: int, _length: int) -> int | None:
        if offset == PAGE:
            raise OSError("broken")
        return None if offset == 2 * PAGE else 1 << 40

    path.open(3, START, START + 8 * PAGE, 0, (page, 1 << 20, PAGE, 0, False, None, None))
    assert not serve(path, 3, fault(0, event=abi.EVENT_REMOVE))
    assert not serve(path, 3, fault(0, flags=int(abi.FaultFlag.WP)))
    assert not serve(path, 3, fault(0, flags=int(abi.FaultFlag.MINOR)))
    assert not serve(path, 3, fault(1))
    assert not serve(path, 3, fault(2))
    assert not kernel.asked
    kernel.refusal = errno.EAGAIN
    assert not serve(path, 3, fault(0))
    assert sum(counters.words) == 0
    kernel.refusal = 0
    assert serve(path, 3, fault(0, flags=int(abi.FaultFlag.WRITE)))
    assert counters.words[Counter.FAULTS] == counters.words[Counter.PAGES_FAULT] == counters.words[Counter.COPIES] == 1
    assert counters.words[Counter.BYTES_FETCHED] == PAGE


class Space:
    """What the fast path needs of one."""

    def __init__(self, limit: int = 16 * PAGE) -> None:
        self.readahead = Readahead(PAGE, limit, 4 * PAGE)
        self.is_bringing = False


def with_windows(
    counters: Counters, source: Callable[[int, int], int | None], blank: Any = None
) -> tuple[FastPath, Space]:
    """Return a fast path that is open for 32 pages, of which the last half page is behind the source's end."""
    space: Any = Space()
    path = FastPath({3: space})
    path.admit(3, 1, counters)
    path.open(3, START, START + 32 * PAGE, 0, (source, 31 * PAGE + PAGE // 2, PAGE, 0, True, blank, None))
    return path, space


def test_a_fault_brings_its_neighbourhood(kernel: Kernel) -> None:
    """By one COPY, counted as one fault and what came along; within the whole pages of the source."""
    counters = Counters()
    path, space = with_windows(counters, at(1 << 40))
    assert serve(path, 3, fault(5))
    assert serve(path, 3, fault(30))
    assert not serve(path, 3, fault(31))  # its end is zeros: not plain
    assert kernel.asked == [
        (3, START + 4 * PAGE, (1 << 40) + 4 * PAGE, 4 * PAGE, 0),
        (3, START + 28 * PAGE, (1 << 40) + 28 * PAGE, 3 * PAGE, 0),
    ]
    found = counters.snapshot()
    assert (found.faults, found.pages_fault, found.pages_readahead, found.copies) == (2, 2, 5, 2)
    assert (found.bytes_fetched, sum(found.latency)) == (7 * PAGE, 2)
    assert space.readahead.missing(0, 12 * PAGE) == [(0, 4 * PAGE), (8 * PAGE, 4 * PAGE)]


def test_what_belongs_to_a_stream_or_is_under_way_is_left(kernel: Kernel) -> None:
    """Large windows come in pieces, and flights and remainders have to be looked at: the backend does that."""
    path, space = with_windows(Counters(), at(1 << 40))
    assert serve(path, 3, fault(0))
    assert not serve(path, 3, fault(4))  # just behind
    assert len(kernel.asked) == 1
    assert space.readahead.missing(4 * PAGE, 8 * PAGE) == [(4 * PAGE, 4 * PAGE)]
    space.is_bringing = True
    assert not serve(path, 3, fault(20))
    assert len(kernel.asked) == 1
    assert space.readahead.missing(20 * PAGE, 24 * PAGE) == [(20 * PAGE, 4 * PAGE)]


@pytest.mark.parametrize("why", ["not in memory", "refused", "zeros"])
def test_the_window_of_a_fault_that_is_left_is_not_chosen_anew(kernel: Kernel, why: str) -> None:
    """The backend gets the same window; nothing is counted here."""

    def blank(offset: int, length: int, block: int) -> list[int]:
        return [0] if (offset, length, block) == (4 * PAGE, 4 * PAGE, 64 << 10) else []

    counters = Counters()
    path, space = with_windows(
        counters,
        (lambda _offset, _length: None) if why == "not in memory" else at(1 << 40),
        blank if why == "zeros" else None,
    )
    kernel.refusal = errno.EEXIST if why == "refused" else 0
    assert not serve(path, 3, fault(5))
    assert sum(counters.words) == 0
    assert space.readahead.missing(0, 32 * PAGE) == [(0, 4 * PAGE), (8 * PAGE, 24 * PAGE)]  # others are not forgotten
    assert space.readahead.windows(5 * PAGE, 0, 32 * PAGE) == [(4 * PAGE, 4 * PAGE)]


def test_a_source_that_raises_leaves_nothing_noted(kernel: Kernel) -> None:
    """It raises again where it is reported; what was chosen does not count as present."""

    def broken(_offset: int, _length: int) -> int:
        raise OSError("broken")

    path, space = with_windows(Counters(), broken)
    assert not serve(path, 3, fault(5))
    assert space.readahead.missing(0, 32 * PAGE) == [(0, 32 * PAGE)]
    assert not kernel.asked


@pytest.mark.parametrize(("done", "page", "served"), [(1, 4, True), (2, 5, True), (1, 5, False), (3, 7, False)])
def test_a_copy_that_met_a_page_that_was_present(kernel: Kernel, done: int, page: int, served: bool) -> None:
    """What it has placed is counted; the faulting page is among it, or the rest is for the backend."""
    counters = Counters()
    path, space = with_windows(counters, at(1 << 40))
    kernel.refusal, kernel.done = errno.EAGAIN, done * PAGE
    assert serve(path, 3, fault(page)) == served
    found = counters.snapshot()
    assert (found.faults, found.pages_fault, sum(found.latency)) == ((1, 1, 1) if served else (0, 0, 0))
    assert found.pages == done
    assert found.bytes_fetched == done * PAGE
    assert found.copies == 1
    if served:
        assert space.readahead.missing(4 * PAGE, 8 * PAGE) == [((4 + done) * PAGE, (4 - done) * PAGE)]
    else:
        assert space.readahead.windows(page * PAGE, 0, 32 * PAGE) == [((4 + done) * PAGE, (4 - done) * PAGE)]


@pytest.mark.parametrize(("windows", "calls"), [(False, 1), (True, 11)])
@pytest.mark.usefixtures("kernel")
def test_a_plain_fault_takes_few_calls(windows: bool, calls: int) -> None:
    """Each call of Python costs a tenth of a system call: the way of a plain fault is short."""
    if windows:
        path, _ = with_windows(Counters(), at(1 << 40))
    else:
        path = FastPath({})
        path.admit(3, 1, Counters())
        path.open(3, START, START + 64 * PAGE, 0, (at(1 << 40), 1 << 20, PAGE, 0, False, None, None))
    rng = random.Random(1)
    messages = [fault(rng.randrange(31)) for _ in range(8)]
    slot = SLOT.unpack_from(path.slots, 3 * SLOT.size)
    engine = tuple(f"aiouffd/engine/{name}.py" for name in ("plain", "readahead", "present"))
    seen: list[str] = []

    def profile(frame: Any, event: str, _argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.endswith(engine):
            seen.append(frame.f_code.co_name)

    for message in messages:
        seen.clear()
        sys.setprofile(profile)
        done = path.serve(3, slot, message)
        sys.setprofile(None)
        assert not done or len(seen) <= calls, seen
    assert done is not None


@pytest.mark.parametrize("tail", [0, 1, PAGE - 1])
@pytest.mark.parametrize("page", [5, 6])
def test_nothing_behind_the_end_of_the_source_is_shown(kernel: Kernel, tail: int, page: int) -> None:
    """The last, partial page is not plain: what lies behind it in memory is somebody else's."""
    path = FastPath({})
    path.admit(3, 1, Counters())
    path.open(3, START, START + 8 * PAGE, 0, (at(1 << 40), 5 * PAGE + tail, PAGE, 0, False, None, None))
    assert serve(path, 3, fault(4))
    assert not serve(path, 3, fault(page))
    assert [asked[1] for asked in kernel.asked] == [START + 4 * PAGE]


@pytest.mark.parametrize("readahead", [False, True])
@pytest.mark.parametrize("tail", [0, 1, PAGE - 1])
def test_nothing_behind_the_end_of_the_source_is_shown_to_several(readahead: bool, tail: int) -> None:
    """The same for the faults of one wake-up; what is left takes no neighbours for present."""
    world = World(16 * PAGE if readahead else 0, located=True)
    source: PlainSource = (LOCATED.locate, 5 * PAGE + tail, PAGE, 0, readahead, None, None)
    faults = [(BASE + page * PAGE, 0, page) for page in (5, 6, 20)]
    assert plain.serve_together(world.space, source, world.counters, faults, 0) == faults
    assert not world.uffd.pages
    assert world.space.readahead.missing(0, SIZE) == [(0, SIZE)]


def test_a_source_is_kept_as_long_as_a_descriptor_shows_it() -> None:
    """Then nothing keeps it, and its number is given to another."""

    def sources(path: FastPath) -> list[PlainSource | None]:
        return path._sources[1:]

    first, second, third = ((at(1 << 40), pages * PAGE, PAGE, 0, False, None, None) for pages in (1, 2, 3))
    path = FastPath({})
    for fd in (3, 4, 5):
        path.admit(fd, fd, Counters())
    path.open(3, START, START + PAGE, 0, first)
    path.open(4, START, START + PAGE, 0, first)
    path.open(5, START, START + PAGE, 0, second)
    assert sources(path) == [first, second]
    path.close(3)
    path.close(3)
    assert sources(path) == [first, second]
    path.dismiss(4)
    assert sources(path) == [None, second]
    path.open(3, START, START + PAGE, 0, third)
    assert sources(path) == [third, second]
    path.open(3, START, START + PAGE, 0, second)
    path.close(5)
    assert sources(path) == [None, second]


def test_what_is_known_of_a_descriptor() -> None:
    """Nothing before it is admitted, nor after it was dismissed; its mapping while it is open."""

    def slots() -> list[tuple[int, ...]]:
        return list(SLOT.iter_unpack(path.slots))

    nobody = (-1, 0, 0, 0, 0)
    path = FastPath({})
    path.admit(2, 70, Counters())
    assert slots() == [nobody, nobody, (70, 0, 0, 0, 0)]
    path.admit(3, 80, Counters())
    path.admit(0, 90, Counters())
    assert slots() == [(90, 0, 0, 0, 0), nobody, (70, 0, 0, 0, 0), (80, 0, 0, 0, 0)]
    path.open(2, START, START + PAGE, 5 * PAGE, (at(1 << 40), 9 * PAGE, PAGE, 0, False, None, None))
    assert slots()[2] == (70, 1, START, START + PAGE, 5 * PAGE)
    path.close(2)
    path.dismiss(3)
    assert slots() == [(90, 0, 0, 0, 0), nobody, (70, 0, 0, 0, 0), nobody]


@pytest.mark.parametrize("page", [1, 10])
def test_only_the_mapping_is_served(kernel: Kernel, page: int) -> None:
    """Beside it there may be another, which shows something else."""
    path = FastPath({})
    path.admit(3, 1, Counters())
    path.open(3, START + 2 * PAGE, START + 10 * PAGE, 4 * PAGE, (at(1 << 40), 1 << 20, PAGE, 2, False, None, None))
    for first in (2, 9):
        assert serve(path, 3, fault(first))
    assert not serve(path, 3, fault(page))
    assert kernel.asked == [(3, START + first * PAGE, (1 << 40) + (first + 2) * PAGE, PAGE, 2) for first in (2, 9)]


@pytest.mark.parametrize("readahead", [False, True])
def test_faults_are_counted_one_by_one(kernel: Kernel, monkeypatch: pytest.MonkeyPatch, readahead: bool) -> None:
    """Each with its time, and what came along; also those whose COPY met a page that was present."""
    monkeypatch.setattr(plain, "perf_counter_ns", lambda: 1 << 40)
    counters = Counters()
    asked: list[tuple[int, int]] = []

    def locate(offset: int, length: int) -> int:
        asked.append((offset, length))
        return (1 << 40) + offset

    if readahead:
        path, _ = with_windows(counters, locate)
    else:
        path = FastPath({})
        path.admit(3, 1, counters)
        path.open(3, START, START + 32 * PAGE, 0, (locate, 1 << 20, PAGE, 0, False, None, None))
    for page in (0, 8):
        assert serve(path, 3, fault(page))
    length = 4 * PAGE if readahead else PAGE
    assert asked == [(0, length), (8 * PAGE, length)]
    expected = [2, 2, 6 if readahead else 0, 2, 2 * length // PAGE]
    if readahead:
        kernel.refusal, kernel.done = errno.EAGAIN, PAGE
        for page in (20, 28):
            assert serve(path, 3, fault(page))
        expected = [4, 4, 6, 4, 10]
    found = counters.snapshot()
    assert [
        found.faults,
        found.pages_fault,
        found.pages_readahead,
        found.copies,
        found.bytes_fetched // PAGE,
    ] == expected
    assert found.latency[0] == sum(found.latency) == expected[0]


@pytest.mark.parametrize("number", [errno.EEXIST, errno.ENOENT, errno.ESRCH])
def test_only_a_copy_that_stopped_has_done_something(kernel: Kernel, number: int) -> None:
    """Else the kernel's answer is what was there before."""
    counters = Counters()
    path, _ = with_windows(counters, at(1 << 40))
    kernel.refusal, kernel.done = number, 4 * PAGE
    assert not serve(path, 3, fault(5))
    assert sum(counters.words) == 0


Call = tuple[str, int, int, int]


def together(
    *pages: int,
    readahead: int = 0,
    answers: tuple[int | None, ...] = (),
    mode: int = 2,
    size: int = SIZE,
    first: int = 0,
) -> tuple[World, list[Call], list[int]]:
    """Serve faults of one wake-up; return what the kernel was asked (what, page, pages, mode), and who is left."""
    world = World(readahead * PAGE, located=True)
    world.space.mappings = Mappings([Mapping(BASE, BASE + SIZE, first * PAGE)])
    asked: list[Call] = []
    script = list(answers)

    def copy(dst: int, src: int, length: int, mode: int) -> int:
        assert src == LOCATED.address + first * PAGE + dst - BASE
        asked.append(("copy", (dst - BASE) // PAGE, length // PAGE, mode))
        answer = script.pop(0) if script else None
        return length if answer is None else answer

    def wake(start: int, length: int) -> int:
        asked.append(("wake", (start - BASE) // PAGE, length // PAGE, 0))
        return 0

    world.uffd.try_copy = copy  # type: ignore[method-assign]
    world.uffd.try_wake = wake  # type: ignore[method-assign]
    source: PlainSource = (LOCATED.locate, size, PAGE, mode, readahead > 0, None, None)
    faults = [(BASE + page * PAGE, 0, page) for page in pages]
    left = plain.serve_together(world.space, source, world.counters, faults, 1 << 40)
    return world, asked, [thread for _, _, thread in left]


def counted(world: World) -> tuple[int, int, int, int, int]:
    """Return what was counted: faults, pages that came along, copies, pages fetched, latencies."""
    found = world.counters.snapshot()
    return (
        *(found.pages_fault, found.pages_readahead, found.copies),
        *(found.bytes_fetched // PAGE, found.latency[0]),
    )


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the clock."""
    monkeypatch.setattr(plain, "perf_counter_ns", lambda: 1 << 40)


@pytest.mark.usefixtures("stopped")
def test_one_wake_for_several() -> None:
    """Alone, the COPY wakes; several are woken together, or each where another waits between them."""
    world, asked, left = together(5)
    assert (asked, left, counted(world)) == ([("copy", 5, 1, 2)], [], (1, 0, 1, 1, 1))
    world, asked, left = together(1, 9, 17)
    assert asked == [*(("copy", page, 1, 3) for page in (1, 9, 17)), ("wake", 1, 17, 0)]
    assert (left, counted(world)) == ([], (3, 0, 3, 3, 3))
    world, asked, left = together(1, 9, 17, answers=(None, -errno.EAGAIN))
    assert asked == [*(("copy", page, 1, 3) for page in (1, 9, 17)), ("wake", 1, 1, 0), ("wake", 17, 1, 0)]
    assert (left, counted(world)) == ([9], (2, 0, 2, 2, 2))
    world, asked, left = together(1, 9, answers=(-errno.EEXIST, -errno.EEXIST))
    assert asked == [("copy", 1, 1, 3), ("copy", 9, 1, 2)]
    assert (left, counted(world)) == ([1, 9], (0, 0, 0, 0, 0))


@pytest.mark.usefixtures("stopped")
def test_faults_of_one_window_are_placed_by_one_copy() -> None:
    """Each is counted; if it is not placed, they are all left, and nothing is counted."""
    world, asked, left = together(4, 5, 7, readahead=4)
    assert (asked, left, counted(world)) == ([("copy", 4, 4, 2)], [], (3, 1, 1, 4, 3))
    world, asked, left = together(4, 5, 12, readahead=4)
    assert asked == [("copy", 4, 4, 3), ("copy", 12, 4, 3), ("wake", 4, 12, 0)]
    assert (left, counted(world)) == ([], (3, 5, 2, 8, 3))
    world, asked, left = together(4, 5, 12, readahead=4, answers=(-errno.EAGAIN,))
    assert asked == [("copy", 4, 4, 3), ("copy", 12, 4, 2)]
    assert (left, counted(world)) == ([4, 5], (1, 3, 1, 4, 1))


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize(
    ("pages", "left", "again", "counts"),
    [
        ((4, 5, 7), [], [("copy", 6, 2, 2)], (3, 1, 2, 4, 3)),
        ((5, 7), [], [("copy", 6, 2, 2)], (2, 2, 2, 4, 2)),
        ((6, 7), [6, 7], [], (0, 2, 1, 2, 0)),
    ],
)
def test_a_window_that_came_in_part(
    pages: tuple[int, ...], left: list[int], again: list[Call], counts: tuple[int, ...]
) -> None:
    """The rest comes with who waits there; if that is the fault itself, it is left. What has come is counted."""
    world, asked, rest = together(*pages, readahead=4, answers=(2 * PAGE,))
    assert rest == left
    assert asked == [("copy", 4, 4, 2), *again]
    assert counted(world) == counts


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize("readahead", [0, 4])
def test_offsets_are_those_of_the_mapping(readahead: int) -> None:
    """Wherever it begins in the source; what is behind the source's end, or shows none of it, is left."""
    _, asked, left = together(0, 12, 16, readahead=readahead, size=22 * PAGE, first=8)
    first, last = (4, 2) if readahead else (1, 1)
    assert asked == [("copy", 0, first, 3), ("copy", 12, last, 3), ("wake", 0, first, 0), ("wake", 12, last, 0)]
    assert left == [16]
    _, asked, left = together(3, 5, readahead=readahead, first=-1)
    assert (asked, left) == ([], [3, 5])


def test_a_window_ends_with_its_mapping(kernel: Kernel) -> None:
    """What lies behind it in the source is shown elsewhere, or nowhere."""
    path, _ = with_windows(Counters(), at(1 << 40))
    path.open(3, START, START + 6 * PAGE, 8 * PAGE, (at(1 << 40), 31 * PAGE, PAGE, 0, True, None, None))
    assert serve(path, 3, fault(5))
    assert kernel.asked == [(3, START + 4 * PAGE, (1 << 40) + 12 * PAGE, 2 * PAGE, 0)]


@pytest.mark.usefixtures("stopped")
def test_wake_ups_are_counted_one_by_one() -> None:
    """Each with all its faults."""
    world, _, _ = together(1, 9)
    source: PlainSource = (LOCATED.locate, SIZE, PAGE, 0, False, None, None)
    assert plain.serve_together(world.space, source, world.counters, [(BASE + 17 * PAGE, 0, 1)], 1 << 40) == []
    assert counted(world) == (3, 0, 3, 3, 3)


def test_memory_with_a_limit_is_left_to_the_engine() -> None:
    """It has as much to do for such a page as the fast path would save."""
    path = FastPath({})
    path.admit(3, 1, Counters())
    path.open(3, START, START + 64 * PAGE, 0, (at(1 << 40), 1 << 20, PAGE, 0, False, None, None), bound=1)
    assert SLOT.unpack_from(path.slots, 3 * SLOT.size) == (1, 0, 0, 0, 0)
