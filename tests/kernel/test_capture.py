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
from aiouffd.engine.capture import Capture, Phase
from aiouffd.engine.mappings import Mapping, Mappings
from aiouffd.engine.places import Places
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
    """Stamps 1, 2, 3 and so on, each in a page of one half of the region that the seed chooses.

    Args:
        region: where they go.
        half: 0 or 1: the even or the odd pages.
        seed: chooses the pages.
    """

    def __init__(self, region: aiouffd.Region, half: int, seed: int) -> None:
        self.region, self.half, self.seed = region, half, seed
        self.lock = threading.Lock()
        self.stamps = itertools.count(1)
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
        """Compare an image with what it must be if it is of one moment; return the last stamp."""
        mine = range(self.half, PAGES, 2)
        found = {page: int.from_bytes(image[page * PAGE + 16 : page * PAGE + 24], "little") for page in mine}
        first = {page: int.from_bytes(content(page * PAGE + 16, 8), "little") for page in mine}
        last = max((stamp for page, stamp in found.items() if stamp != first[page]), default=0)
        model = first | dict(zip(itertools.islice(self.chosen(), last), itertools.count(1), strict=False))
        assert found == model, {page: (found[page], model[page]) for page in mine if found[page] != model[page]}
        return last


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

    features = aiouffd.Feature.PAGEFAULT_FLAG_WP

    def __init__(self) -> None:
        self.count = 0
        self.calls = list[tuple[int, int, int]]()
        self.has_no_process = False

    def gone(self) -> bool:
        """Tell whether its process has ended."""
        return self.has_no_process

    def register(self, start: int, length: int, modes: int) -> None:
        """Take note of nothing."""

    def try_writeprotect(self, start: int, length: int, mode: int) -> int:
        """Protect or lift."""
        self.count += 1
        if self.count in (2, 4):
            return -errno.EAGAIN
        self.calls.append((start, length, mode))
        return length


def fake_space(mappings: Mappings, **attributes: Any) -> Any:
    """Return what a capture needs of a space."""
    known = {"page_size": PAGE, "counters": Counters(), "resolver": Mock(), "closing": False, "is_gone": False}
    known |= {"capture": None, "bound": None, "fast_path": None} | attributes
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
    assert (capture.spaces, child.capture, len(child.on_changed)) == ([space, child], capture, 1)
    capture.spaces[1:] = [ended]
    uffd.has_no_process = True
    with pytest.raises(aiouffd.ClosedError):
        await capture.read(4, 8, [], lifts=False)
    await capture.end(None)
    assert uffd.calls[-1] == (start, 8 * PAGE, 0)
    space.uffd, space.capture = SimpleNamespace(features=aiouffd.Feature(0)), None
    with pytest.raises(aiouffd.UnsupportedError, match="PAGEFAULT_FLAG_WP"):
        await Capture.of([space], places, 1).begin(memory, pagemap, None, PAGE)


async def test_few_pages_are_protected_while_writes_are_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small its runs are, writes go on while most is protected; then only what may be open is looked at."""
    for name, value in {"_TURN_NS": 0, "_FEW": 2, "_BLOCK": 16 * PAGE}.items():
        monkeypatch.setattr(f"aiouffd.engine.capture.{name}", value)
    start, holes, looked_at, phases = 1 << 20, set(range(33, 48, 2)), list[tuple[int, int]](), list[Phase]()
    space = fake_space(Mappings([Mapping(start, start + 80 * PAGE, 0)]), backend=SimpleNamespace(source=None))

    def spans(address: int, length: int, *_: object) -> list[tuple[int, int]]:
        looked_at.append(((address - start) // PAGE, length // PAGE))
        return [(at, at + PAGE) for at in range(address, address + length, PAGE) if (at - start) // PAGE not in holes]

    def protect(_start: int, length: int, _mode: int) -> int:
        phases.append(capture.phase)
        return length

    space.uffd = SimpleNamespace(features=FakeUffd.features, register=Mock(), gone=lambda: False)
    space.uffd.try_writeprotect = protect
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
        assert capture.extents(14 * PAGE) == [Range(0, 2 * PAGE), Range(3 * PAGE, 11 * PAGE)]
        found = {at // PAGE: bytes(data[:1]) for at, data in await capture.read(0, 14, [], lifts=False)}
        assert found == {0: b"s", 3: b"s", 4: b"s", 8: b"s", 9: b"m", 10: b"s", 12: b"s"}
        assert sorted(fetched) == [(0, 1), (3, 1), (4, 4), (8, 1), (10, 2), (12, 2)]
        capture._changed(low, low + 4 * PAGE)
        capture.check()  # all of it was read
        await capture.end("layer")
        space.mappings = Mappings(rows)
        uffd.try_writeprotect = lambda *_: -errno.ENOENT
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
