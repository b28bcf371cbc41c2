"""The two readers, against the kernel: what they serve by themselves, and what they leave to the engine."""

from __future__ import annotations

import asyncio
import os
import tempfile
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from kinds import poke
from pattern import PAGE, content
from reading_rig import PAGES, SOURCE, TURN, Rig, Sharing, first
from scenario import play
from worlds import FEATURES, Sleeper

import aiouffd
from aiouffd import Feature, RegisterMode
from aiouffd.engine import capture as capture_module
from aiouffd.engine.capture import Capture
from aiouffd.engine.kept import ABSENT, DUE, EMPTIED, KEPT, LOOSE, PROTECTED
from aiouffd.engine.mappings import Mapping, Mappings
from aiouffd.engine.places import Places
from aiouffd.engine.resolver import Resolver
from aiouffd.kernel import abi
from aiouffd.kernel.memory import ProcessMemory
from aiouffd.kernel.pagemap import Pagemap
from aiouffd.native.reader import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

READERS = ["native", "python"]


def serves(kind: str) -> None:
    """Scenario: faults on pages of the source, alone and several at once."""
    rig = Rig(kind)
    rig.open(offset=PAGE)
    rig.run(Outcome.IDLE)
    rig.world.touch(3, 0)
    rig.run(Outcome.IDLE)
    assert first(4).startswith(bytes(rig.world.got(0)))  # type: ignore[arg-type]
    assert rig.identity[0] == 7
    rig.counts(faults=1, pages_fault=1, copies=1, bytes_fetched=PAGE, eexist=0)
    assert sum(rig.counters.snapshot().latency) == 1


def leaves(kind: str) -> None:
    """Scenario: before it is open, after it was closed, and where it was dismissed."""
    rig = Rig(kind)
    rig.world.touch(3, 0)
    assert rig.left() == [3]
    rig.open()
    rig.world.touch(4, 1)
    rig.run(Outcome.IDLE)
    rig.world.got(1)
    rig.reader.close(rig.fd)
    rig.world.touch(5, 2)
    assert rig.left() == [5]
    rig.counts(faults=1, pages_fault=1)
    rig.reader.dismiss(rig.fd)
    rig.world.touch(6, 3)
    outcome, _ = rig.reader.run(TURN, came=False, once=True)
    assert outcome == Outcome.IDLE
    assert [event[1] for event in rig.world.read()] == [6]  # nobody has read it


def bounds(kind: str) -> None:
    """Scenario: the source's last, partial page, and what is behind it."""
    rig = Rig(kind)
    rig.open()
    for thread, page in enumerate((SOURCE, SOURCE + 1, PAGES - 1)):
        rig.world.touch(page, thread)
        assert rig.left() == [page]
    rig.world.touch(SOURCE - 1, 5)
    rig.run(Outcome.IDLE)
    assert first(SOURCE - 1).startswith(bytes(rig.world.got(5)))  # type: ignore[arg-type]
    rig.counts(faults=1, pages_fault=1, copies=1)


def layout_first(kind: str) -> None:
    """Scenario: a fault, and the REMOVE of its page, in one read: nothing of that is plain."""
    rig = Rig(kind)
    rig.open()
    rig.world.touch(3, 0)
    rig.world.dontneed(3, 1)
    found = rig.run(Outcome.MESSAGES)
    assert found.length == 2 * abi.MESSAGE_SIZE
    assert [rig.landing[at] for at in (0, abi.MESSAGE_SIZE)] == [abi.EVENT_PAGEFAULT, abi.EVENT_REMOVE]
    rig.counts(faults=0, pages_fault=0, copies=0)
    assert rig.world.asleep(0)


def present(kind: str) -> None:
    """Scenario: a page that came between the fault and its turn: its thread is woken."""
    rig = Rig(kind)
    rig.open()
    rig.world.touch(3, 0)
    assert rig.world.uffd.try_copy(rig.world.at(3), rig.source.locate(3 * PAGE, PAGE), PAGE, 1) == PAGE
    if kind == "native":
        rig.run(Outcome.IDLE)
        assert first(3).startswith(bytes(rig.world.got(0)))  # type: ignore[arg-type]
        rig.counts(faults=1, pages_fault=0, copies=0, eexist=1, wakes=1)
    else:
        assert rig.left() == [3]


def written(kind: str) -> None:
    """Scenario: a file that was written since: the engine reports it."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content(0, SOURCE * PAGE))
        file.flush()
        rig = Rig(kind, aiouffd.FileSource(file.name))
        rig.open()
        rig.world.touch(3, 0)
        rig.run(Outcome.IDLE)
        assert first(3).startswith(bytes(rig.world.got(0)))  # type: ignore[arg-type]
        os.utime(file.name, ns=(1, 1))
        rig.world.touch(4, 1)
        if kind == "native":  # the other asks the source, which looks again within a millisecond
            assert rig.left() == [4]


def shares(kind: str) -> None:
    """Scenario: pages of a file that others map, too: what is there is mapped, the rest is the engine's."""
    rig = Sharing(kind, offset=PAGE)
    rig.put(3, 4, 6, SOURCE - 1)
    rig.file.put_zeros(7 * PAGE, PAGE)
    rig.world.touch(2, 0)
    assert rig.left() == [2]  # before it is open
    rig.share()
    for thread, page in ((1, 3), (2, SOURCE - 2)):
        rig.world.touch(page, thread)
        rig.run(Outcome.IDLE)
    assert first(4).startswith(bytes(rig.world.got(1)))  # type: ignore[arg-type]
    assert first(SOURCE - 1).startswith(bytes(rig.world.got(2)))  # type: ignore[arg-type]
    os.pwrite(rig.file._file.fileno(), b"half of it", 12 * PAGE)
    for thread, page in enumerate((4, 6, SOURCE - 1, 11), 10):  # missing; zeros; the last, partial page; not complete
        rig.world.touch(page, thread)
        assert rig.left() == [page]
    rig.counts(faults=2, pages_fault=2, continues=2, pages_readahead=0, copies=0, bytes_fetched=0)
    rig.world.touch(5, 3)
    assert rig.world.uffd.try_continue(rig.world.at(5), PAGE, abi.CONTINUE_MODE_DONTWAKE) == PAGE
    if kind == "native":
        rig.run(Outcome.IDLE)
        assert first(6).startswith(bytes(rig.world.got(3)))  # type: ignore[arg-type]
        rig.counts(faults=3, pages_fault=2, continues=2, eexist=1, wakes=1)
    else:
        assert rig.left() == [5]
    rig.put(9, 10)
    rig.world.touch(8, 4)
    rig.world.dontneed(9, 1)
    rig.run(Outcome.MESSAGES)  # nothing is plain beside a layout event
    assert rig.world.asleep(4)
    rig.counts(continues=2)


STATES = bytes([LOOSE, PROTECTED, DUE, DUE, DUE, EMPTIED, ABSENT])


class Writers(Rig):
    """Threads that write to protected pages of a snapshot; what the reader leaves goes to `Capture.keeps`."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind, features=FEATURES | Feature.PAGEFAULT_FLAG_WP)
        uffd = self.world.uffd
        self.mapping = Mapping(self.world.at(0), self.world.at(len(STATES)), 0)
        uffd.register(self.mapping.start, len(STATES) * PAGE, RegisterMode.MISSING | RegisterMode.WP)
        for page in range(len(STATES)):
            uffd.try_copy(self.world.at(page), self.source.locate(page * PAGE, PAGE), PAGE, 0)
        self.engines = list[int]()
        self.threads = dict[int, Sleeper]()
        self.space: Any = SimpleNamespace(
            uffd=uffd,
            page_size=PAGE,
            counters=self.counters,
            mappings=Mappings([self.mapping]),
            backend=SimpleNamespace(source=None, written=self.lift),
            resolver=Resolver(uffd, PAGE, self.counters),
            fast_path=self.reader if kind == "native" else None,
            bound=None,
            capture=None,
            closing=False,
            is_gone=False,
            on_changed=set(),
        )
        self.capture = Capture.of([self.space], Places([self.mapping], ours=True), RegisterMode.MISSING)

    def lift(self, _space: Any, page: int, *_: int) -> None:
        """Let a writer go."""
        assert self.world.uffd.try_writeprotect(page, PAGE, 0) == PAGE

    def write_all(self) -> bytes:
        """Have pages of each state be written; return their states then."""
        states = self.capture._states
        states[:] = STATES
        self.world.uffd.try_writeprotect(self.mapping.start, len(STATES) * PAGE, abi.WRITEPROTECT_MODE_WP)
        for page in range(len(STATES)):
            thread = self.threads[page] = Sleeper(partial(poke, self.world.at(page), b"new"))
            thread.settle()
            assert thread.asleep
            outcome, _ = self.reader.run(TURN, came=False, once=True)
            if outcome == Outcome.MESSAGES:
                self.engines.append(page)
                if not self.capture.keeps(self.space, self.world.at(page), 0, 0):
                    self.lift(self.space, self.world.at(page))
        return bytes(states)


def first_writes(kind: str) -> None:
    """Scenario: first writes to pages of each state, while they are read, when there is no room, and after that."""

    async def run() -> None:
        capture_module._MOST_KEPT = 2 * PAGE
        rig = Writers(kind)
        capture = rig.capture
        with ProcessMemory.own(rig.mapping.start) as memory, Pagemap() as pagemap:
            await capture.begin(memory, pagemap, None, PAGE)
            assert rig.write_all() == bytes([LOOSE, LOOSE, KEPT, KEPT, DUE, EMPTIED, LOOSE])
            for page, thread in rig.threads.items():
                if page != 4:  # there is no room for it
                    thread.join()
            assert rig.threads[4].asleep
            found = await capture.read(2, 4, [], lifts=False)
            assert [(at // PAGE, bytes(data)) for at, data in found] == [(page, first(page)) for page in (2, 3)]
            rig.threads[4].join()
            assert (capture._states[4], capture.pages_kept) == (KEPT, 3)
            found = await capture.read(4, 5, [], lifts=False)
            assert [bytes(data) for _, data in found] == [first(4)]
            assert rig.engines == ([0, 4, 5, 6] if kind == "native" else [*range(7)])
            await capture.end("base")
            rig.engines.clear()
            assert rig.write_all() == bytes([LOOSE] * 5 + [EMPTIED, LOOSE])
            assert capture.pages_kept == 3
            for thread in rig.threads.values():
                thread.join()
            assert rig.engines == ([0, 2, 3, 4, 5, 6] if kind == "native" else [*range(7)])

    asyncio.run(run())


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("scenario", [serves, leaves, bounds, layout_first, present, written, shares, first_writes])
def test_both_readers_keep_the_same_rules(scenario: Callable[[str], None], kind: str) -> None:
    """See the scenarios."""
    play(scenario, kind)
