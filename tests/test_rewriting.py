"""`pager.process.rewriting`: a log that is written anew while its worker goes on says the same as the old one."""

from __future__ import annotations

import itertools
import struct
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiouffd.engine.mappings import Mappings
from aiouffd.kernel import abi
from aiouffd.pager.process import journal as journal_module
from aiouffd.pager.process import rewriting as module
from aiouffd.pager.process.journal import Journal, JournalFullError
from aiouffd.pager.process.replay import replay
from aiouffd.pager.process.rewriting import Rewriting
from aiouffd.pager.process.state import Kind, Meta, SpaceState, State

if TYPE_CHECKING:
    import asyncio

PAGE = 4096
PAGES = 64
BASE = 0x10000000


class Timers:
    """A loop whose timers are run by hand."""

    def __init__(self) -> None:
        self.due: list[Any] = []

    def call_later(self, _: float, function: Any) -> Timers:
        """Remember a call."""
        self.due.append(function)
        return self

    def cancel(self) -> None:
        """Forget it."""
        self.due.clear()


class Worker:
    """Does what a worker does: the journal first, then the change."""

    def __init__(self, most: int = PAGES, file: str = "") -> None:
        self.file = file
        self.journal = Journal.create()
        self.loop = Timers()
        self.meta = Meta()
        self.spaces: dict[int, SpaceState] = {}
        self.full = 0
        self.journal.next_identity = lambda: self.meta.next
        self.rewriting = Rewriting(
            self.journal,
            cast("asyncio.AbstractEventLoop", self.loop),
            state=lambda: State(self.meta, {}, dict(self.spaces)),
            space=self.spaces.get,
            on_full=self.on_full,
        )
        self.most = most

    def on_full(self) -> None:
        """Count."""
        self.full += 1

    def open(self) -> None:
        """Serve one more space, in pieces; perhaps of a file that others map, too."""
        identity, self.meta.next = self.meta.next, self.meta.next + 1
        space = SpaceState(identity, 100 + identity, PAGE, 0, 0, f"{identity}", file=self.file if identity % 3 else "")
        for page in range(0, self.most, 2):
            space.mappings.add(BASE + page * PAGE, BASE + (page + 2) * PAGE, page * 3 * PAGE)
        rows, _ = space.mappings.pack(0, 1 << 30)
        self.journal.append((Kind.SPACE, identity, space.content), (Kind.MAPPINGS, identity, rows))
        self.spaces[identity] = space

    def pick(self, which: int) -> SpaceState:
        """Return one of the spaces."""
        if not self.spaces:
            self.open()
        return list(self.spaces.values())[which % len(self.spaces)]

    def batch(self, which: int, changes: list[tuple[Any, ...]]) -> None:
        """Read some events of a space at once."""
        space = self.pick(which)
        self.journal.before_reading()
        self.journal.identity[0] = space.identity
        messages = [self.message(*change) for change in changes]
        self.journal.commit_events(space.identity, messages)
        for message in messages:
            self.apply(space, message)

    def message(self, kind: str, first: int, last: int) -> bytes:
        """Return a layout event."""
        start, end = sorted((BASE + first * PAGE, BASE + (last + 1) * PAGE))
        if kind == "fork":
            return struct.pack("=B7xI20x", abi.EVENT_FORK, 500 + first)
        if kind in ("move", "left"):  # of few places, so that what is moved and what UNMAP tells of are the same
            start, to = BASE + first % 4 * 5 * PAGE, BASE + last % 4 * 5 * PAGE
            if kind == "left":
                return struct.pack("=B7xQQ8x", abi.EVENT_UNMAP, start, start + 5 * PAGE)
            return struct.pack("=B7xQQQ", abi.EVENT_REMAP, start, to + (to == start) * 20 * PAGE, 5 * PAGE)
        if kind == "remap":
            return struct.pack("=B7xQQQ", abi.EVENT_REMAP, start, BASE + (last % 7) * 9 * PAGE, 5 * PAGE)
        code = abi.EVENT_REMOVE if kind == "remove" else abi.EVENT_UNMAP
        return struct.pack("=B7xQQ8x", code, start, end if end > start else start + PAGE)

    def apply(self, space: SpaceState, message: bytes) -> None:
        """Change what the space shows, as the worker's space does."""
        code = message[0]
        space.changed = space.changed or code != abi.EVENT_FORK
        if code == abi.EVENT_FORK:
            identity, self.meta.next = self.meta.next, self.meta.next + 1
            (fd,) = abi.FORK_MESSAGE.unpack(message)
            child = SpaceState(identity, fd, PAGE, 0, 0, space.token, is_child=True, changed=space.changed)
            child.file = space.file
            child.mappings = space.mappings.copy()
            self.spaces[identity] = child
        elif code == abi.EVENT_REMAP:
            space.mappings.remap(*abi.REMAP_MESSAGE.unpack(message), shared=bool(space.file))
        elif code == abi.EVENT_REMOVE:
            self.remove(space, *abi.RANGE_MESSAGE.unpack(message))
        else:
            space.mappings.unmapped(*abi.RANGE_MESSAGE.unpack(message))

    def remove(self, space: SpaceState, start: int, end: int) -> None:
        """Empty a range, and what shows the same pages of the file."""
        offsets = {offset(space.mappings, at) for at in range(start, end, PAGE)} - {-1}
        space.mappings.remove(start, end)
        for other in self.spaces.values() if space.file else ():
            for row in list(other.mappings) if other.file == space.file else ():
                for at in range(row.start, row.end, PAGE):
                    if offset(other.mappings, at) in offsets:
                        other.mappings.remove(at, at + PAGE)
                        other.changed = True

    def close(self, which: int) -> None:
        """Serve a space no longer."""
        identity = self.pick(which).identity
        del self.spaces[identity]
        self.journal.append((Kind.CLOSED, identity, b""))
        self.rewriting.closed()

    def ahead(self, which: int, filled: int) -> None:
        """Note how far a space was filled."""
        space = self.pick(which)
        space.filled = filled
        self.journal.append((Kind.AHEAD, space.identity, struct.pack("=qq", space.replayed, space.filled)))

    def begin(self) -> None:
        """Begin to write the log anew."""
        if not self.rewriting.is_running:
            self.rewriting._begin()

    def write(self) -> None:
        """Write a little."""
        if self.rewriting.is_running:
            self.rewriting._write(3)

    def check(self) -> None:
        """What the journal amounts to is what is served."""
        found = replay(self.journal.load()).state
        assert {identity: said(space) for identity, space in found.spaces.items()} == {
            identity: said(space) for identity, space in self.spaces.items()
        }
        assert max([0, *self.spaces]) < found.meta.next <= self.meta.next


def offset(mappings: Mappings, address: int) -> int:
    """Return which offset an address shows; -1: none."""
    start, _, first = mappings.locate(address)
    return first if first < 0 else first + address - start


def said(space: SpaceState) -> tuple[Any, ...]:
    """Return all that a state says of a space; adjoining mappings may have been joined."""
    return (space.content, list(Mappings(space.mappings)))


_page = st.integers(0, PAGES - 1)
_which = st.integers(0, 5)
_change = st.tuples(st.sampled_from(["remove", "unmap", "remap", "fork", "move", "left"]), _page, _page)
_step = st.one_of(
    st.tuples(st.just("open")),
    st.tuples(st.just("batch"), _which, st.lists(_change, min_size=1, max_size=4)),
    st.tuples(st.just("close"), _which),
    st.tuples(st.just("ahead"), _which, _page),
    st.tuples(st.just("begin")),
    st.tuples(st.just("write")),
    st.tuples(st.just("write")),
    st.tuples(st.just("write")),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(_step, max_size=60), st.sampled_from(["", "one"]))
def test_whatever_happens_meanwhile(steps: list[tuple[Any, ...]], file: str) -> None:
    """Killed at any moment, also right behind the change to the new log: the journal says what was served."""
    worker = Worker(file=file)
    worker.journal.append((Kind.META, 0, b"{}"))
    for name, *arguments in steps:
        getattr(worker, name)(*arguments)
        worker.check()
    worker.rewriting.finish()
    worker.check()


@pytest.mark.parametrize("file", ["", "one"])
@pytest.mark.parametrize("writes", [0, 1, 2, 5, 50])
def test_what_was_moved_away_before_and_comes_back(writes: int, file: str) -> None:
    """UNMAP tells of the old place when the log was written anew, or is being: what was moved back there stays."""
    worker = Worker(file=file)
    worker.journal.append((Kind.META, 0, b"{}"))
    worker.open()
    there = offset(worker.spaces[1].mappings, BASE)
    worker.batch(0, [("move", 0, 3)])
    worker.begin()
    for _ in range(writes):
        worker.write()
    worker.batch(0, [("move", 3, 0)])
    worker.batch(0, [("left", 0, 0)])
    worker.batch(0, [("left", 3, 0)])
    assert offset(worker.spaces[1].mappings, BASE) == there
    worker.check()
    worker.rewriting.finish()
    worker.check()
    worker.begin()
    worker.rewriting.finish()
    worker.check()


@pytest.mark.parametrize("writes", [2, 4, 40, 50])
@pytest.mark.parametrize("emptied", [0, 1])
def test_what_is_emptied_in_one_space_is_so_in_another(emptied: int, writes: int) -> None:
    """Whichever of the two has been written, or a part of it: the new log must know which offsets that are."""
    worker = Worker(file="one")
    worker.journal.append((Kind.META, 0, b"{}"))
    worker.open()
    worker.open()
    worker.begin()
    for _ in range(writes):
        worker.write()
    worker.batch(emptied, [("remove", 1, 2), ("remove", PAGES - 3, PAGES - 1)])
    assert all(offset(space.mappings, BASE + PAGE) == -1 for space in worker.spaces.values())
    worker.check()
    worker.rewriting.finish()
    worker.check()


def test_it_is_begun_when_the_log_has_grown() -> None:
    """Slices on a timer; the log is short then, and the next time comes when it is twice as long."""
    worker = Worker()
    worker.open()
    while not worker.rewriting.is_running:
        worker.batch(0, [("remove", 1, 2)])
    assert 1 << 17 < worker.journal.size < 1 << 18
    slices = 0
    while worker.loop.due:
        worker.loop.due.pop()()
        worker.batch(0, [("unmap", slices, slices)])
        slices += 1
    assert worker.journal.mirror is None
    assert slices
    assert worker.journal.size < 10_000
    assert worker.journal.threshold == 1 << 17
    worker.check()


def test_a_large_space_takes_many_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them is long; and what comes in between is not lost."""
    monkeypatch.setattr(module, "_SLICE_NS", 2)
    monkeypatch.setattr(module, "_ROWS", 10)
    monkeypatch.setattr(module, "perf_counter_ns", itertools.count().__next__)  # each look at the clock takes 1 ns
    worker = Worker(most=2000)
    worker.open()
    worker.begin()
    slices = 0
    while worker.rewriting.is_running:
        worker.loop.due.pop()()
        worker.batch(0, [("remove", slices * 7 % 2000, slices * 7 % 2000)])
        slices += 1
    assert slices > 100
    worker.check()


def test_a_log_that_cannot_be_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told while there is room for some reads, and what is said is kept; it is not written anew in vain."""
    monkeypatch.setattr(journal_module, "_LOG_SIZE", 1 << 20)
    monkeypatch.setattr(module, "_LEAST", 1 << 14)
    worker = Worker(most=2)
    written: list[int] = []
    change = worker.journal.change

    def count(size: int) -> None:
        written.append(size)
        change(size)

    def fill() -> None:
        while True:
            worker.open()
            worker.journal.before_reading()
            worker.journal.identity[0] = 1

    monkeypatch.setattr(worker.journal, "change", count)
    with pytest.raises(JournalFullError):
        fill()
    assert worker.full
    assert worker.journal.room < worker.journal.capacity // 16
    assert len(written) < 40
    worker.check()
    for _ in range(33):
        worker.batch(0, [("remove", 0, 0)] * 64)
    worker.check()
    while len(worker.spaces) > 10:
        worker.close(0)
    worker.rewriting.make_room()
    assert worker.journal.room > worker.journal.capacity // 2
    worker.check()
