"""`engine.capture`: a snapshot is the memory of one moment, whatever its threads write meanwhile.

Threads write sequences of stamps to pages that a seed chooses. So the highest stamp that a snapshot has of a sequence
says what each page has to hold: the last stamp up to that one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import random
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import Mock

import pytest
from kinds import poke
from pattern import PAGE, content, word
from scenario import play, until

import aiouffd
from aiouffd.engine.arming import NEITHER
from aiouffd.engine.capture import Capture, Phase
from aiouffd.engine.mappings import Mapping, Mappings
from aiouffd.engine.places import Places
from aiouffd.engine.resolver import Resolver
from aiouffd.engine.statistics import Counter, Counters
from aiouffd.kernel.memory import ProcessMemory
from aiouffd.ranges import Range

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGES = 512
SIZE = PAGES * PAGE
SEED = int(os.environ.get("AIOUFFD_TEST_SEED", "1"))
SECONDS = float(os.environ.get("AIOUFFD_TEST_SECONDS", "600"))
ENGINES: dict[str, Any] = {"pager": aiouffd.Pager, "in_thread": aiouffd.InThread}


class Sequence:
    """Stamps one after the other, each in a page of one half of the region that the seed chooses.

    They begin above what the source has, whose pages have their numbers: a stamp tells that it is one.

    Args:
        region: where they go.
        half: 0 or 1: the even or the odd pages.
        seed: chooses the pages.
    """

    def __init__(self, region: aiouffd.Region, half: int, seed: int) -> None:
        self.region, self.half, self.seed = region, half, seed
        self.lock = threading.Lock()
        self.stamps = itertools.count(PAGES + 1)
        self.pages = self.chosen()

    def chosen(self) -> Iterator[int]:
        """Yield the page of each stamp."""
        chance = random.Random(f"{self.seed}-{self.half}")
        while True:
            yield chance.randrange(PAGES // 2) * 2 + self.half

    def step(self, *, holds_gil: bool) -> None:
        """Write the next stamp: the next is not taken before this is written."""
        with self.lock:
            data, at = next(self.stamps).to_bytes(8, "little"), next(self.pages) * PAGE
            if holds_gil:
                self.region[at + 16 : at + 24] = data
            else:
                poke(self.region.address + at + 16, data)

    def check(self, image: Any) -> int:
        """Compare an image with what it must be if it is of one moment; return how many stamps it has."""
        mine = range(self.half, PAGES, 2)
        found = {page: int.from_bytes(image[page * PAGE + 16 : page * PAGE + 24], "little") for page in mine}
        first = {page: int.from_bytes(content(page * PAGE + 16, 8), "little") for page in mine}
        count = max(0, max(found.values()) - PAGES)
        model = first | dict(zip(itertools.islice(self.chosen(), count), itertools.count(PAGES + 1), strict=False))
        assert found == model, {page: (found[page], model[page]) for page in mine if found[page] != model[page]}
        return count


@contextlib.contextmanager
def writing(sequences: list[Sequence]) -> Iterator[None]:
    """Have three threads write inside the block: two of them with the GIL released, which share a sequence."""
    ends, failures = threading.Event(), list[BaseException]()

    def write(sequence: Sequence, *, holds_gil: bool) -> None:
        try:
            while not ends.is_set():
                sequence.step(holds_gil=holds_gil)
                time.sleep(0)
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            failures.append(error)

    threads = [
        threading.Thread(target=write, args=(sequences[half],), kwargs={"holds_gil": bool(half)}) for half in (0, 0, 1)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ends.set()
        for thread in threads:
            thread.join()
    assert not failures, failures


def of_one_moment(engine: str, shared: bool, folder: str, seed: int, rounds: int) -> None:
    """Scenario: snapshots one after the other, each compared with its sequences, and with the bytes nobody writes."""
    region = aiouffd.Region(SIZE, shared=shared)
    source = aiouffd.BufferSource(content(0, SIZE))
    place = Path(folder)
    with aiouffd.Monitor(region, source, engine=ENGINES[engine](), readahead=4 * PAGE) as monitor:
        saved, base, sequences = 0, None, [Sequence(region, half, seed) for half in (0, 1)]
        for number in range(rounds):
            name = place / (f"{number}.snap" if number % 3 else "plain")
            base = base if number % 3 else None
            with writing(sequences):
                saved += monitor.snapshot_sync(name, base, rate=20 * SIZE).pages_saved
            base = name if number % 3 else None
            with aiouffd.open(name) as found:
                image = found[:]
            stamps = [sequence.check(image) for sequence in sequences]
            assert all(image[at : at + 8] == word(at // PAGE) for at in range(0, SIZE, PAGE))
        last = asyncio.run(monitor.snapshot(place / "last.snap", base=place / f"{rounds - 1}.snap"))
        assert last.pages_saved == 0
        with aiouffd.open(place / "last.snap") as found:
            assert found[:] == region[:]
        assert saved, "no page was written between the moment and its reading"
        assert monitor.statistics().write_faults >= saved
        print(f"{engine}, shared={shared}, seed {seed}: {saved} pages were kept, of {sum(stamps)} steps")


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_snapshot_is_of_one_moment(engine: str, shared: bool, tmp_path: Path) -> None:
    """Threads with and without the GIL write on; files, layers and their bases are of one moment each."""
    play(of_one_moment, engine, shared, str(tmp_path), SEED, 6)


@pytest.mark.nightly
def test_snapshots_are_of_one_moment_for_long(tmp_path: Path) -> None:
    """Many programs, for ten minutes or AIOUFFD_TEST_SECONDS."""
    end = time.monotonic() + SECONDS
    for seed in itertools.count(SEED):
        for engine, shared in itertools.product(ENGINES, (False, True)):
            with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
                print(play(of_one_moment, engine, shared, folder, seed, 30)[0], end="")
        if time.monotonic() > end:
            break


class FakeMemory:
    """Of a process without memory: what is read is told."""

    file = -1
    start = 0

    def fileno(self) -> int:
        """Say that there is no descriptor."""
        return -1

    def __init__(self) -> None:
        self.read = list[int]()

    def page(self, address: int, length: int) -> bytes:
        """Return a page."""
        self.read.append(address)
        return bytes(length)


class FakeUffd:
    """Refuses its second and its fourth call, and notes what is protected and lifted."""

    features = aiouffd.Feature.PAGEFAULT_FLAG_WP | aiouffd.Feature.EVENT_UNMAP  # changes are told of

    def __init__(self) -> None:
        self.count = self.asked = 0
        self.is_changing = self.nothing = False
        self.calls = list[tuple[int, int, int]]()
        self.has_no_process = False

    def gone(self) -> bool:
        """Tell whether its process has ended."""
        return self.has_no_process

    def register(self, *_: int) -> None:
        """Take note of nothing."""

    try_wake = try_copy = try_zeropage = try_continue = try_poison = register

    def try_writeprotect(self, start: int, length: int, mode: int) -> int:
        """Protect or lift."""
        if mode == NEITHER:
            self.asked += 1
            return -errno.EAGAIN if self.is_changing else -errno.EINVAL
        self.count += 1
        if self.nothing:
            return -errno.ENOENT
        if self.count in (2, 4):
            return -errno.EAGAIN
        self.calls.append((start, length, mode))
        return length


def fake_space(mappings: Mappings, **attributes: Any) -> Any:
    """Return what a capture needs of a space."""
    known: dict[str, Any] = {
        "page_size": PAGE,
        "counters": Counters(),
        "closing": False,
        "is_gone": False,
        "capture": None,
    }
    known |= {"bound": None, "fast_path": None} | attributes
    known["resolver"] = Resolver(known["uffd"] or Mock(), PAGE, Counters())
    return SimpleNamespace(mappings=mappings, on_changed=set(), **known)


async def test_writes_are_held_back_until_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before that they are let go; behind it as soon as their bytes are kept, as far as there is room."""
    monkeypatch.setattr("aiouffd.engine.capture._MOST_KEPT", 2 * PAGE)
    start, there = 1 << 20, [(2 << 19, 258 << 12), (258 << 12, 260 << 12)]
    uffd, memory = FakeUffd(), cast("Any", FakeMemory())
    places = Places([(start, start + 8 * PAGE, 0)], ours=True)
    mappings = Mappings([Mapping(start, start + 8 * PAGE, 0)])
    space = fake_space(mappings, uffd=uffd, backend=SimpleNamespace(source=None))
    pagemap: Any = SimpleNamespace(spans=lambda *_: there)
    capture = Capture.of([space], places, 1)

    def write(page: int) -> bool:
        return not capture.keeps(space, start + page * PAGE, 0, 0)

    def lifted() -> list[int]:
        return [(at - start) // PAGE for at, _, mode in uffd.calls if mode == 0]

    task = asyncio.create_task(capture.begin(memory, pagemap, None, PAGE))
    await until(lambda: uffd.count >= 2)
    phases = [capture.phase]
    assert write(1)
    await until(lambda: uffd.count >= 4)
    assert [*phases, capture.phase] == [Phase.PROTECTING, Phase.HOLDING]
    assert not write(1)
    assert not write(2)
    assert await task is None
    assert lifted() == [1, 2]
    assert memory.read == [PAGE, 2 * PAGE]
    assert not write(3)  # there is no room for it
    assert capture.to_read(0, 8) == [(0, 4)]
    uffd.count = 1  # the layout is changing
    assert [at // PAGE for at, _ in await capture.read(0, 2, [], lifts=False)] == [1]
    assert (lifted(), capture.pages_kept) == ([1, 2], 2)
    await until(lambda: lifted() == [1, 2, 3])
    assert (capture.pages_kept, capture.pause_ns > 0) == (3, True)
    await capture.end("base")
    assert write(0)  # it is known from now on
    assert lifted() == [1, 2, 3]
    assert await capture.begin(memory, pagemap, "base", PAGE) == [Range(0, 4 * PAGE)]
    await capture.end("base")
    child = fake_space(mappings, uffd=FakeUffd(), backend=space.backend)
    ended = fake_space(mappings, uffd=None, closing=True)  # another child, which has ended
    assert Capture.of([space, child, ended], places, 1) is capture  # they were forked meanwhile
    await capture.begin(memory, pagemap, "base", PAGE)
    assert (capture.arming.spaces, child.capture, len(child.on_changed)) == ([space, child], capture, 1)
    capture.arming.spaces[1:] = [ended]
    uffd.has_no_process = True
    with pytest.raises(aiouffd.ClosedError):
        await capture.read(4, 8, [], lifts=False)
    await capture.end(None)
    assert capture.base == "base"  # what was written since stays known
    space.uffd, space.capture = SimpleNamespace(features=aiouffd.Feature(0)), None
    with pytest.raises(aiouffd.UnsupportedError, match="PAGEFAULT_FLAG_WP"):
        await Capture.of([space], places, 1).begin(memory, pagemap, None, PAGE)


class Memory:
    """Eight pages of a region, four of which are there; and a capture of it."""

    def __init__(self, **attributes: Any) -> None:
        self.start, self.there, self.uffd = 1 << 20, list(range(4)), FakeUffd()
        self.uffd.count = 4  # refuses nothing
        self.written, self.memory = list[int](), cast("Any", FakeMemory())
        places = Places([(self.start, self.start + 8 * PAGE, 0)], ours=True)
        self.mappings = Mappings([Mapping(self.start, self.start + 8 * PAGE, 0)])
        backend = SimpleNamespace(source=None, written=self.write_on, fetch=self.fetch)
        self.space = fake_space(self.mappings, uffd=self.uffd, backend=backend, **attributes)
        self.capture = Capture.of([self.space], places, 1)

    def write_on(self, _space: Any, address: int, *_: int) -> None:
        """Let a writer go."""
        self.written.append((address - self.start) // PAGE)

    async def fetch(self, _at: int, length: int) -> bytes:
        """Read the source."""
        return b"s" * length

    def spans(self, *_: int) -> list[tuple[int, int]]:
        """Tell which pages are there."""
        return [(self.start + page * PAGE, self.start + (page + 1) * PAGE) for page in self.there]

    async def begin(self, base: str | None = None) -> list[int] | None:
        """Let a moment be; return the pages that differ from the base."""
        changes = await self.capture.begin(self.memory, cast("Any", self), base, PAGE)
        return None if changes is None else [at // PAGE for run in changes for at in range(run.start, run.end, PAGE)]

    def write(self, page: int) -> bool:
        """Write to a protected page; tell whether it is let go by the usual way."""
        return not self.capture.keeps(self.space, self.start + page * PAGE, 0, 0)

    def change(self, page: int) -> None:
        """Have a page be emptied behind the region's back."""
        self.mappings.remove(self.start + page * PAGE, self.start + (page + 1) * PAGE)
        self.capture._changed(self.start + page * PAGE, self.start + (page + 1) * PAGE)


async def test_what_fails_keeps_its_base() -> None:
    """What was written since an earlier snapshot stays known, whenever the next one fails; also over a new layout."""
    memory = Memory()
    assert await memory.begin() is None
    await memory.capture.end("base")
    assert all([memory.write(1), memory.write(3)])
    assert await memory.begin("base") == [1, 3]
    assert await memory.capture.read(1, 2, [], lifts=False) == []
    assert not memory.write(3)
    assert memory.capture.pages_kept == 1
    memory.capture.fail(aiouffd.ClosedError("it was canceled"))
    await memory.capture.end(None)
    memory.uffd.count = 0  # one is taken, and the next refused: the layout is changing
    task = asyncio.create_task(memory.begin("base"))
    await until(lambda: memory.uffd.count > 1)
    assert memory.write(0)  # before its moment
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await memory.capture.end(None)
    memory.uffd.count = 4
    assert await memory.begin("base") == [0, 1, 3]
    for page in (0, 1, 3):
        await memory.capture.read(page, page + 1, [], lifts=False)
    memory.change(2)
    await memory.capture.end("next")
    assert await memory.begin("next") == [2]
    memory.change(4)
    await memory.capture.end(None)
    assert await memory.begin("next") == [2, 4]
    await memory.capture.end(None)
    assert [mode for *_, mode in memory.uffd.calls if not mode] == [0]  # nothing else was lifted but a write
    assert await memory.begin("another") is None
    await memory.capture.end(None)
    assert memory.capture.base is None
    assert memory.uffd.calls[-1] == (memory.start, 8 * PAGE, 0)


async def test_a_failure_lets_writers_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, though those that read may wait for something still."""
    monkeypatch.setattr("aiouffd.engine.capture._MOST_KEPT", PAGE)
    memory = Memory()
    await memory.begin()
    assert not any([memory.write(0), memory.write(1)])
    await asyncio.sleep(0)
    assert memory.written == []
    memory.capture.fail(aiouffd.ClosedError("it was canceled"))
    await asyncio.sleep(0)
    assert memory.written == [1]
    assert memory.write(2)
    with pytest.raises(aiouffd.ClosedError):
        await memory.capture.read(0, 4, [], lifts=False)


async def test_a_source_that_never_answers_is_given_up() -> None:
    """When the snapshot has failed: as when it is canceled."""
    memory, asked = Memory(), asyncio.Event()

    async def fetch(*_: int) -> bytes:
        asked.set()
        await asyncio.get_running_loop().create_future()
        return b""

    memory.space.backend.fetch = fetch
    await memory.begin()
    reads = asyncio.create_task(memory.capture.read(4, 8, [], lifts=False))
    await asked.wait()
    memory.capture.fail(aiouffd.ClosedError("it was canceled"))
    with pytest.raises(aiouffd.ClosedError, match="it was canceled"):
        await reads


async def test_a_layout_that_is_changing_is_waited_for() -> None:
    """munmap(2) tells of what it does when all pages have gone: what is lost meanwhile is not the source's."""
    memory = Memory()
    await memory.begin()
    memory.uffd.is_changing = True
    task = asyncio.create_task(memory.capture.read(0, 4, [2], lifts=False))
    await until(lambda: memory.uffd.asked > 4 or task.done())
    assert not task.done()
    memory.change(2)
    memory.uffd.is_changing = False
    with pytest.raises(aiouffd.LayoutChangingError):
        await task
    memory.uffd.is_changing = True
    with pytest.raises(aiouffd.LayoutChangingError):  # and it waits no longer than needed
        await memory.capture.read(0, 4, [3], lifts=False)


async def test_what_is_emptied_while_it_is_protected() -> None:
    """It is missing at the moment: a page that comes later is not protected, and not in the image."""
    memory = Memory()
    memory.uffd.count = 1  # the next is refused
    task = asyncio.create_task(memory.begin())
    await until(lambda: memory.uffd.count > 1)
    memory.there.remove(2)
    memory.change(2)
    memory.change(3)  # another page was moved there
    await task
    assert memory.capture.to_read(0, 8) == [(0, 2), (3, 4)]
    assert await memory.capture.read(2, 3, [], lifts=False) == []  # zeros


async def test_a_canceled_look_is_waited_for() -> None:
    """Its thread uses descriptors, which are closed when this has returned."""
    memory, looks, goes_on = Memory(), threading.Event(), threading.Event()

    def spans(*_: int) -> list[tuple[int, int]]:
        looks.set()
        goes_on.wait()
        return []

    memory.spans = spans  # type: ignore[method-assign]
    task = asyncio.create_task(memory.begin())
    await asyncio.to_thread(looks.wait)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0.001)
    done = task.done()
    goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not done


def bounded(shown: list[Any], write_back: object) -> Any:
    """Return what a capture needs of a bound whose pages show the source still where `shown` says it."""
    clean = SimpleNamespace(clean=lambda *_: [])
    return SimpleNamespace(written=clean, shows=lambda *_: True, places=lambda *_: shown, write_back=write_back)


async def test_a_write_while_the_layout_is_changing_waits() -> None:
    """Also where pages are dropped: what was read was moved there just now, perhaps."""
    memory = Memory(bound=bounded([], None))
    await memory.begin()
    memory.uffd.is_changing = True
    assert not memory.write(0)
    await until(lambda: memory.uffd.asked > 3)
    assert (memory.capture.pages_kept, memory.written) == (0, [])
    memory.uffd.is_changing = False
    await until(lambda: memory.written)
    assert (memory.capture.pages_kept, memory.written) == (1, [0])


@pytest.mark.parametrize("write_back", [None, "saves"])
@pytest.mark.parametrize("moved", [False, True])
async def test_missing_pages_that_are_moved(write_back: str | None, *, moved: bool) -> None:
    """What is written to them goes to the source still, which has not been read yet: then the snapshot ends."""
    shown = list[Any]()
    memory = Memory(bound=bounded(shown, write_back))
    await memory.begin()
    shown += ["elsewhere"] * moved
    memory.change(5)
    with pytest.raises(aiouffd.LayoutChangingError) if moved and write_back else contextlib.nullcontext():
        memory.capture.check()


async def test_few_pages_are_protected_while_writes_are_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small its runs are, writes go on while most is protected; then only what may be open is looked at."""
    for name, value in {"_TURN_NS": 0, "_FEW": 2, "_BLOCK": 16 * PAGE}.items():
        monkeypatch.setattr(f"aiouffd.engine.capture.{name}", value)
    start, holes, looked_at, phases = 1 << 20, set(range(33, 48, 2)), list[tuple[int, int]](), list[Phase]()

    def spans(address: int, length: int, *_: object) -> list[tuple[int, int]]:
        looked_at.append(((address - start) // PAGE, length // PAGE))
        return [(at, at + PAGE) for at in range(address, address + length, PAGE) if (at - start) // PAGE not in holes]

    def protect(_start: int, length: int, _mode: int) -> int:
        phases.append(capture.phase)
        return length

    uffd: Any = FakeUffd()
    uffd.try_writeprotect = protect
    backend = SimpleNamespace(source=None, data=lambda *_: [])
    space = fake_space(Mappings([Mapping(start, start + 80 * PAGE, 0)]), uffd=uffd, backend=backend)
    capture = Capture.of([space], Places([(start, start + 80 * PAGE, 0)], ours=True), 1)
    pagemap: Any = SimpleNamespace(spans=spans)
    task = asyncio.create_task(capture.begin(cast("Any", FakeMemory()), pagemap, None, PAGE))
    to_write = list(range(0, 32, 2))
    while not task.done():
        await asyncio.sleep(0)
        if capture.phase is Phase.PROTECTING and phases and to_write:
            assert not capture.keeps(space, start + to_write.pop() * PAGE, 0, 0)  # it goes on
            if len(to_write) == 8:
                holes.remove(37)
                space.counters.words[Counter.COPIES] += 1
    assert (await task, to_write, looked_at) == (None, [], [(0, 80), (32, 16)])
    assert capture.to_read(0, 80) == [(0, 33), (34, 35), (36, 39), *((at, at + 1) for at in range(40, 48, 2)), (48, 80)]
    assert 1 <= phases.count(Phase.HOLDING) <= 1 + 2
    listing = asyncio.create_task(capture.extents(80 * PAGE))
    await asyncio.sleep(0)
    assert not listing.done()
    assert [(item.start // PAGE, item.end // PAGE) for item in await listing] == capture.to_read(0, 80)


async def test_parts_of_an_image() -> None:
    """A client shows parts of its memory file at several addresses; the rest is as in the source."""
    low, high = 1 << 20, 1 << 24
    rows = [Mapping(low, low + 4 * PAGE, 8 * PAGE), Mapping(high, high + 4 * PAGE, 0)]
    places = Places(rows, ours=False)
    fetched = list[tuple[int, int]]()

    async def fetch(offset: int, length: int) -> bytes:
        fetched.append((offset // PAGE, length // PAGE))
        return b"s" * length

    source = SimpleNamespace(identity=("snapshot", "base"))
    backend = SimpleNamespace(source=source, fetch=fetch, data=lambda start, end: [(start, end)])
    uffd: Any = FakeUffd()
    uffd.count = 9
    space = fake_space(Mappings(rows), uffd=uffd, backend=backend)
    space.mappings.remove(high + 2 * PAGE, high + 3 * PAGE)  # a balloon has it
    file = os.memfd_create("memory")
    os.ftruncate(file, 12 * PAGE)
    for page in (1, 5, 9):
        os.pwrite(file, b"m" * PAGE, page * PAGE)
    with ProcessMemory(file) as memory:
        capture = Capture.of([space], places, None)
        changes = await capture.begin(memory, None, "base", PAGE)
        assert changes == [Range(PAGE, 2 * PAGE), Range(9 * PAGE, PAGE)]
        assert {call[:2] for call in uffd.calls} == {(high + PAGE, PAGE), (low + PAGE, PAGE)}
        assert not capture.keeps(space, low - PAGE, 0, 0)
        assert capture.keeps(space, low + PAGE, 0, 0)
        os.pwrite(file, b"n" * PAGE, 9 * PAGE)
        assert capture.to_read(0, 12) == [(1, 2), (9, 10)]
        assert await capture.extents(14 * PAGE) == [Range(0, 2 * PAGE), Range(3 * PAGE, 11 * PAGE)]
        found = {at // PAGE: bytes(data[:1]) for at, data in await capture.read(0, 14, [], lifts=False)}
        assert found == {0: b"s", 3: b"s", 4: b"s", 8: b"s", 9: b"m", 10: b"s", 12: b"s"}
        assert sorted(fetched) == [(0, 1), (3, 1), (4, 4), (8, 1), (10, 2), (12, 2)]
        capture._changed(low, low + 4 * PAGE)
        capture.check()  # all of it was read
        await capture.end("layer")
        space.mappings = Mappings(rows)
        uffd.nothing = True
        with pytest.raises(aiouffd.RangeGoneError, match="UFFDIO_WRITEPROTECT"):
            await capture.begin(memory, None, None, PAGE)


async def test_what_is_dropped_or_saved_meanwhile_is_as_it_was() -> None:
    """The source has the bytes of what is missing until its first write, before which they are kept."""
    start, there, clean = 1 << 20, [(2 << 19, 260 << 12)], [Range(2 * PAGE, 6 * PAGE)]
    places = Places([(start, start + 8 * PAGE, 0)], ours=True)
    uffd, dropped, fetched = FakeUffd(), {6}, list[tuple[int, int]]()
    uffd.count = 4  # refuses nothing more

    async def fetch(at: int, length: int) -> bytes:
        assert write(7)  # and the source gets it at once
        fetched.append((at // PAGE, length // PAGE))
        return b"s" * length

    space = fake_space(
        Mappings([Mapping(start, start + 8 * PAGE, 0)]),
        uffd=uffd,
        backend=SimpleNamespace(source=SimpleNamespace(identity=("snapshot", "first")), fetch=fetch),
        bound=SimpleNamespace(
            write_back=True,
            written=SimpleNamespace(clean=lambda *_: clean),
            shows=lambda _, page: (page - start) // PAGE not in dropped,
        ),
    )
    capture = Capture.of([space], places, 1)

    def write(page: int) -> bool:
        return not capture.keeps(space, start + page * PAGE, 0, 0)  # the bound lifts the protection, and notes that

    async def begin(base: str | None) -> list[Range] | None:
        pagemap: Any = SimpleNamespace(spans=lambda *_: there)
        return await capture.begin(cast("Any", FakeMemory()), pagemap, base, PAGE)

    assert await begin(None) is None
    assert capture.to_read(0, 8) == [(0, 4)]
    assert all([write(5), write(6)])
    assert capture.pages_kept == 1
    capture.dropped(start + PAGE, start + 2 * PAGE)
    assert capture.to_read(0, 8) == [(0, 1), (2, 4), (5, 6)]
    found = await capture.read(0, 8, [], lifts=False)
    assert fetched == [(1, 1), (4, 1), (6, 2)]
    assert [(at // PAGE, bytes(data[:1])) for at, data in found] == [
        *((1, b"s"), (4, b"s"), (6, b"s")),
        *((5, b"\0"), (7, b"\0")),
    ]
    await capture.end("second")
    there.clear()  # all of it was saved and dropped
    assert write(2)
    assert await begin("second") == [Range(at * PAGE, PAGE) for at in (2, 5, 7)]
    assert capture.to_read(0, 8) == []
    await capture.end(None)
    there.append((2 << 19, 260 << 12))
    assert await begin("first") == [Range(0, 2 * PAGE)]  # of the source's own snapshot differs what was written
    await capture.read(0, 4, [], lifts=True)
    await capture.end(None)
    assert [mode for *_, mode in uffd.calls] == [1, 1]  # nothing was lifted
