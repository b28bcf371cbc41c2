"""What only the native reader does."""

from __future__ import annotations

import os
import random
import select
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest
from kinds import poke
from pattern import PAGE
from reading_rig import PAGES, SOURCE, Rig, Sharing, first
from scenario import play
from worlds import FEATURES, Sleeper

import aiouffd
from aiouffd.engine.kept import DUE, KEPT, LOOSE, PROTECTED, Kept
from aiouffd.engine.mappings import Mapping
from aiouffd.engine.statistics import Counters
from aiouffd.kernel import abi, libc
from aiouffd.kernel.abi import Feature, RegisterMode
from aiouffd.kernel.memory import ProcessMemory
from aiouffd.native.reader import WORDS, Keeps, NativeReader, Outcome
from aiouffd.store.view import View

if TYPE_CHECKING:
    from collections.abc import Callable


def strangers() -> None:
    """Scenario: with readahead, faults near a stream or near each other are the engine's."""
    rig = Rig("native")
    line = rig.reader._lines[rig.fd]
    line.opened = (
        rig.world.at(0),
        rig.world.at(PAGES),
        0,
        (None, rig.source.size, PAGE, 0, True, None, rig.source.memory()),
    )
    rig.reader._describe(rig.fd, line, near=PAGE)
    rig.reader._reader.watch(rig.fd, [rig.world.at(20), rig.world.at(22)])
    for thread, (page, is_plain) in enumerate(
        [(3, True), (4, False), (30, True), (29, False), (20, False), (21, False), (22, True), (10, True)]
    ):
        rig.world.touch(page, thread)
        if is_plain:
            rig.run(Outcome.IDLE)
            assert first(page).startswith(bytes(rig.world.got(thread)))  # type: ignore[arg-type]
        else:
            assert rig.left() == [page]
    rig.counts(faults=4, pages_fault=4)


def test_only_strangers_are_plain_with_readahead() -> None:
    """See the scenario."""
    play(strangers)


def mapped(path: str) -> None:
    """Scenario: of what is mapped piece by piece, the pages that are there now are plain; they are marked."""
    Path(path).write_bytes(b"".join(map(first, range(PAGES))))
    fd = os.open(path, os.O_RDONLY)
    view = View(PAGES * PAGE)
    view.show(2 * PAGE, 4 * PAGE, fd, 2 * PAGE)
    view.show(32 * PAGE, PAGE, fd, 32 * PAGE)
    rig = Rig("native")
    line = rig.reader._lines[rig.fd]
    plain = (None, PAGES * PAGE, PAGE, 0, False, None, (view.address, PAGES * PAGE, -2, view.marks))
    line.opened = (rig.world.at(0), rig.world.at(PAGES - 1), PAGE, plain)
    rig.reader._describe(rig.fd, line, near=0)
    for thread, (page, is_plain) in enumerate([(2, True), (0, False), (4, True), (5, False)]):
        rig.world.touch(page, thread)
        if is_plain:
            rig.run(Outcome.IDLE)
            assert first(page + 1).startswith(bytes(rig.world.got(thread)))  # type: ignore[arg-type]
        else:
            assert rig.left() == [page]
    assert [list(view.used()), list(view.used())] == [[(0, 64 << 10)], []]
    rig.world.touch(31, 8)
    rig.run(Outcome.IDLE)
    assert list(view.used()) == [(128 << 10, 64 << 10)]
    view.hide(2 * PAGE, 4 * PAGE)
    rig.world.touch(3, 9)
    assert rig.left() == [3]
    rig.counts(faults=3, pages_fault=3, copies=3)


def test_what_is_mapped_piece_by_piece(tmp_path: Path) -> None:
    """See the scenario."""
    play(mapped, str(tmp_path / "file"))


def told(note: Mock) -> list[int]:
    """Return the offsets that a recording was told of."""
    return [offset for call in note.call_args_list for offset in call.args[0]]


def bounded() -> None:
    """Scenario: there is room for three pages, and then for one more; the fast path is closed and opened between."""
    rig, bound, note = Rig("native"), Mock(share=3), Mock()
    rig.open(offset=PAGE, bound=bound, note=note)
    for thread, page in enumerate((4, 5, 4, 9, 12)):
        rig.world.touch(page, thread)
    assert rig.left() == [12]
    assert [call.args for call in bound.came.call_args_list] == [((page + 1) * PAGE, PAGE) for page in (4, 5, 9)]
    assert told(note) == [(page + 1) * PAGE for page in (4, 5, 9)]
    bound.share = 1
    rig.reader.close(rig.fd)
    rig.world.touch(20, 20)
    assert rig.left() == [20]
    rig.open(offset=PAGE, bound=bound)
    rig.world.touch(21, 21)
    rig.world.touch(22, 22)
    assert len(rig.left()) == 1
    assert bound.came.call_count == 4
    assert len(told(note)) == 3
    rig.reader.close(rig.fd)
    rig.open(note=note)  # without a limit
    for page in range(23, 27):
        rig.world.touch(page, page)
    rig.run(Outcome.IDLE)
    assert told(note)[3:] == [page * PAGE for page in range(23, 27)]
    rig.counts(copies=8, pages_fault=8)


def test_memory_with_a_limit() -> None:
    """As many pages come as there is room for, and each is told; a recording is told as well."""
    play(bounded)


def neighbours(offset: int) -> None:
    """Scenario: of a file that others map, too, with readahead: what lies around a page, as `OneCopy.around` says."""
    chance, around = random.Random(7), 8 * PAGE
    rig, length = Sharing("native", offset), SOURCE * PAGE
    rig.put(*chance.sample(range(SOURCE), SOURCE * 3 // 4))
    came = set[int]()
    for page in chance.sample(range(SOURCE - offset // PAGE), 30):
        window = rig.file.around(page * PAGE + offset, offset, length, around)
        if page in came or window is None:
            continue
        pages = {(at - offset) // PAGE for at in range(window[0], sum(window), PAGE)}
        rig.reader.close(rig.fd)  # and opened anew: what is near a fault is the engine's for a while
        rig.share(around=around)
        rig.world.touch(page, page)
        rig.run(Outcome.IDLE)
        assert first(page + offset // PAGE).startswith(bytes(rig.world.got(page)))  # type: ignore[arg-type]
        came |= pages
        assert set(rig.world.pages()) == came
        rig.counts(pages_readahead=len(came) - rig.counters.snapshot().pages_fault, eexist=0)
    assert rig.counters.snapshot().continues > 3


def behind(page: int) -> None:
    """Scenario: neighbours that are there already, in front of a page or behind it."""
    rig = Sharing("native")
    rig.put(*range(8))
    assert rig.world.uffd.try_continue(rig.world.at(page), PAGE, 0) == PAGE
    rig.share(around=8 * PAGE)
    rig.world.touch(4, 0)
    rig.run(Outcome.IDLE)
    assert first(4).startswith(bytes(rig.world.got(0)))  # type: ignore[arg-type]
    assert set(rig.world.pages()) == {0: {0, 4, 5, 6, 7}, 2: {0, 1, 2, 4, 5, 6, 7}, 6: set(range(7))}[page]


def noted() -> None:
    """Scenario: a recording has what was touched, and so nothing else comes."""
    note = Mock()
    rig = Sharing("native")
    rig.put(*range(SOURCE))
    rig.share(around=8 * PAGE, note=note)
    for page in (3, 20):
        rig.world.touch(page, page)
        rig.run(Outcome.IDLE)
    assert told(note) == [page * PAGE for page in (3, 20)]
    assert set(rig.world.pages()) == {3, 20}


@pytest.mark.parametrize(
    ("scenario", "arguments"),
    [(noted, ()), *((behind, (page,)) for page in (0, 2, 6)), *((neighbours, (at * PAGE,)) for at in (0, 5))],
)
def test_what_others_have_brought(scenario: Callable[..., None], arguments: tuple[int, ...]) -> None:
    """See the scenarios."""
    play(scenario, *arguments)


def moved() -> None:
    """Scenario: a recorded space that shows the source in two places; first the one is served, and then the other."""
    noted: list[int] = []
    rig = Rig("native")
    for offset in (0, 8 * PAGE):
        plain = (rig.source.locate, rig.source.size, PAGE, 0, True, None, rig.source.memory())
        start = rig.world.at(offset // PAGE * 4)
        rig.reader.open(rig.fd, start, start + 8 * PAGE, offset, plain, None, noted.extend)
        readahead = SimpleNamespace(limit=8 * PAGE, is_at_random=True, around=PAGE, expected=list)
        rig.reader.refresh(SimpleNamespace(uffd=rig.world.uffd, readahead=readahead))
    rig.world.touch(3, 0)
    assert rig.left() == [3]
    rig.world.touch(34, 1)
    rig.run(Outcome.IDLE)
    assert noted == [10 * PAGE]


def test_what_is_served_is_what_was_opened_last() -> None:
    """Else what has come of another mapping is noted by a wrong offset."""
    play(moved)


class Writers(Rig):
    """Threads that write to protected pages, which nobody but the reader lets go."""

    def __init__(self) -> None:
        super().__init__("native", features=FEATURES | Feature.PAGEFAULT_FLAG_WP)
        self.threads: dict[int, Sleeper] = {}
        self.world.uffd.register(self.world.at(0), PAGES * PAGE, RegisterMode.MISSING | RegisterMode.WP)
        for page in range(12):
            self.world.uffd.try_copy(self.world.at(page), self.source.locate(page * PAGE, PAGE), PAGE, 0)
        self.protect(0, 12)
        self.pages = Kept(Mapping(self.world.at(1), self.world.at(12), PAGE), PAGES, PAGE, 3 * PAGE, self.counters)
        self.pages.states[:12] = bytes([DUE] * 6 + [PROTECTED] * 6)
        self.reader.keep(self.fd, self.pages)

    def protect(self, page: int, count: int, mode: int = abi.WRITEPROTECT_MODE_WP) -> None:
        """Protect pages."""
        self.world.uffd.try_writeprotect(self.world.at(page), count * PAGE, mode)

    def write(self, page: int) -> None:
        """Have a thread write to a page, and wait until that is told."""
        self.threads[page] = Sleeper(partial(poke, self.world.at(page), b"new"))
        self.threads[page].settle()

    def goes(self, page: int) -> None:
        """Find that a write goes on without the engine."""
        self.write(page)
        self.run(Outcome.IDLE)
        self.threads[page].join()

    def asked(self, page: int) -> None:
        """Find that the engine is asked, and nothing has changed."""
        before, room = bytes(self.pages.states), self.pages.native.left
        self.write(page)
        assert self.left() == [page]
        assert (bytes(self.pages.states), self.pages.native.left) == (before, room)
        self.protect(page, 1, 0)
        self.threads[page].join()
        self.protect(page, 1)

    def slots(self) -> list[int]:
        """Return which slots are memory."""
        return list(libc.mincore(self.pages.native.area, 3 * PAGE))

    def taken(self) -> dict[int, bytes]:
        """Return the bytes that were kept; their pages are read."""
        found = dict(self.pages.take(0, PAGES))
        self.pages.states[:] = self.pages.states.replace(bytes([KEPT]), bytes([LOOSE]))
        return found


def kept() -> None:
    """Scenario: writes to pages that are to be read, or were, or lie elsewhere; before and within a snapshot."""
    rig = Writers()
    states = rig.pages.states
    rig.asked(11)
    rig.pages.allow(Keeps.NONE_DUE)
    rig.goes(10)
    rig.protect(10, 1)
    rig.asked(10)  # protected by whoever else
    with ProcessMemory.own(rig.world.at(0)) as memory:
        rig.pages.begin(memory)
        rig.asked(1)
        rig.pages.allow(Keeps.DUE_KEPT)
        rig.asked(0)
        rig.goes(2)
        assert rig.slots() == [1, 1, 0]  # the next one is memory already
        for page in (3, 4, 9):
            rig.goes(page)
        assert bytes(states[:12]) == bytes([DUE] * 2 + [KEPT] * 3 + [DUE] + [PROTECTED] * 3 + [LOOSE] * 2 + [PROTECTED])
        assert (rig.pages.pages, rig.pages.is_full) == (3, True)
        rig.asked(5)  # there is no room
        assert rig.taken() == {page: first(page) for page in (2, 3, 4)}
        rig.open()
        rig.world.touch(30, 0)
        rig.goes(5)  # beside a plain fault, in one read
        assert first(30).startswith(bytes(rig.world.got(0)))  # type: ignore[arg-type]
        assert rig.taken() == {5: b"new" + first(5)[3:]}
        states[6:8] = bytes([DUE] * 2)
        rig.write(6)
        rig.write(7)
        rig.world.dontneed(40, 1)
        rig.reader._reader.configure(limit=abi.MESSAGE_SIZE)  # the event is not read with the fault
        assert rig.left() == [6]
        assert (states[6], rig.pages.is_full, rig.pages.pages) == (DUE, False, 4)  # the layout is changing
        rig.reader.dismiss(rig.fd)
        rig.reader.admit(rig.fd, 7, rig.counters)
        assert rig.left() == [7]
    rig.counts(write_faults=6, faults=7, pages_fault=1)


def test_writes_to_pages_of_a_snapshot() -> None:
    """They go on once the bytes are kept; what is not plain is the engine's."""
    play(kept)


def storm() -> None:
    """Scenario: sixteen threads fault at once, two of them on one page, one behind the source."""
    rig = Rig("native")
    rig.reader.only(rig.fd)
    rig.open()
    pages = [*range(0, 28, 2), 0, SOURCE + 3]
    for thread, page in enumerate(pages):
        rig.world.touch(page, thread)
    assert rig.left() == [SOURCE + 3]
    for thread, page in enumerate(pages[:-1]):
        assert first(page).startswith(bytes(rig.world.got(thread)))  # type: ignore[arg-type]
    rig.counts(faults=15, pages_fault=14, copies=14)


def test_a_storm_is_served_in_one_read() -> None:
    """All but what is not plain, which comes first in the landing."""
    play(storm)


class Beside:
    """Other memory, whose faults a rig's reader reads as well."""

    def __init__(self, rig: Rig) -> None:
        self.region, self.uffd, self.counters = aiouffd.Region(SOURCE * PAGE), aiouffd.Userfaultfd(), Counters()
        self.uffd.register(self.region.address, SOURCE * PAGE, RegisterMode.MISSING)
        fd, source = self.uffd.fileno(), rig.source
        os.set_blocking(fd, False)
        rig.epoll.register(fd, select.EPOLLIN)
        rig.reader.admit(fd, 8, self.counters)
        self.threads: list[Sleeper] = []
        plain = (source.locate, source.size, PAGE, 0, False, None, source.memory())
        rig.reader.open(fd, self.region.address, self.region.address + SOURCE * PAGE, 0, plain)

    def touch(self, *pages: int) -> None:
        """Have a thread wait for each."""
        self.threads += [Sleeper(partial(poke, self.region.address + page * PAGE, b"new")) for page in pages]
        for thread in self.threads:
            thread.settle()


def storms() -> None:
    """Scenario: two descriptors have twelve faults each; two others get one fault each when a turn is over.

    The first of these waits for the storm that has had no turn, either.
    """
    rig = Rig("native")
    all_of_them = [Beside(rig) for _ in range(4)]
    for storm in all_of_them[:2]:
        storm.touch(*range(12))
    for number, served in enumerate([[4, 0, 0, 0], [4, 4, 0, 0], [4, 4, 1, 0], [4, 4, 1, 1], [8, 4, 1, 1]]):
        outcome, _ = rig.reader.run(0, came=False, once=False)
        assert outcome == Outcome.DUE
        assert [one.counters.snapshot().pages_fault for one in all_of_them] == served
        if number in {0, 2}:
            all_of_them[2 + number // 2].touch(5)
    rig.run(Outcome.IDLE)
    assert [one.counters.snapshot().pages_fault for one in all_of_them] == [12, 12, 1, 1]
    for one in all_of_them:
        for thread in one.threads:
            thread.join()  # before its memory goes


def test_descriptors_take_turns() -> None:
    """A fault of one that had fewest waits for the rest of one turn, however many others have."""
    play(storms)


def test_nothing_is_read_after_the_end() -> None:
    """A call raises; C would read memory that was freed."""
    with select.epoll() as epoll:
        reader = NativeReader(epoll.fileno(), [0] * len(WORDS))
        reader.close()
        with pytest.raises(AttributeError):
            reader.run(0, came=False, once=True)
        with pytest.raises(AttributeError):
            reader.close()
