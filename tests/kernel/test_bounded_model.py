"""Memory that is dropped, written back and captured, while threads write: all of it is compared with a model.

Each thread has pages of its own, and writes generations that name their page. Meanwhile pages are dropped, saved,
emptied, captured and shared with forked children, the region grows and shrinks, and the pager's processes are killed.
A snapshot has for each thread what it had written up to some step, and these steps can all have been the last ones of
one moment. In the end the file is what the model says.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import math
import mmap
import os
import random
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
from kinds import poke
from pattern import PAGE, content, peek, word
from processes import kill
from scenario import play, replaced

import aiouffd
from aiouffd.engine import bound
from aiouffd.errors import BusyError
from aiouffd.kernel import libc
from aiouffd.store import extract_sync

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PAGES = 256
SIZE = PAGES * PAGE
LIMIT = 64 * PAGE
THREADS = 3
SEED = int(os.environ.get("AIOUFFD_TEST_SEED", "1"))
SECONDS = float(os.environ.get("AIOUFFD_TEST_SECONDS", "600"))
STEPS = 1000
"""Steps that each writer takes at least."""
WEIGHTS = {"evict": 40, "flush": 12, "prefetch": 12, "resize": 6, "fork": 4, "kill": 1}
"""How often it is done what must not be seen in any page. None is done less often than its weight, nor half of all."""
SNAPSHOTS = 12
EMPTY = bytes(8)


@attrs.define(eq=False)
class Change:
    """A change of the first word of a page.

    Attributes:
        page: of the region.
        value: eight bytes; zeros: all of the page is.
        began: the common count before it.
        ended: that behind it.
    """

    page: int
    value: bytes
    began: int
    ended: float = math.inf


class Writer(threading.Thread):
    """Reads and writes its own pages: every third one.

    Attributes:
        lock: held while it takes a step.
        changes: what it has changed, in order.
        model: the first word of each page that was changed.
        emptied: pages that do not show the file any more.
    """

    def __init__(
        self, monitor: aiouffd.Monitor, number: int, seed: int, ends: threading.Event, count: Iterator[int]
    ) -> None:
        super().__init__()
        self.monitor, self.number, self.ends, self.count = monitor, number, ends, count
        self.chance = random.Random(f"{seed}-{number}")
        self.lock = threading.Lock()
        self.changes = list[Change]()
        self.model = dict[int, bytes]()
        self.emptied = set[int]()
        self.steps = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Take steps until the end, and as many as there are to be."""
        try:
            while self.steps < STEPS or not self.ends.is_set():
                with self.lock:
                    self.steps += 1
                    self.step()
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            self.failure = error

    def step(self) -> None:
        """Compare a page, and perhaps write or empty it."""
        page = self.chance.randrange(PAGES // THREADS) * THREADS + self.number
        address, kind = self.monitor.region.address + page * PAGE, self.chance.random()
        found = peek(address), peek(address + PAGE - 8)
        assert found == shown(page, self.model, self.emptied), (self.steps, page)
        if kind < 0.4:
            self.change(page, (self.steps << 32 | page).to_bytes(8, "little"))
        elif kind < 0.401:
            self.emptied.add(page)
            self.change(page, EMPTY)

    def change(self, page: int, value: bytes) -> None:
        """Write a value, or empty a page."""
        self.model[page] = value
        change = Change(page, value, next(self.count))
        self.changes.append(change)
        address = self.monitor.region.address + page * PAGE
        if value != EMPTY:
            poke(address, value)
        elif self.monitor.region.fd >= 0:
            libc.madvise(address, PAGE, mmap.MADV_REMOVE)
        else:  # its own method is how an engine in this process learns of a change
            self.monitor.region.madvise(mmap.MADV_DONTNEED, page * PAGE, PAGE)
        change.ended = next(self.count)

    def compare(self, image: Any) -> tuple[float, float]:
        """Compare an image with what was written up to some change; return between which counts that was."""
        pages = [*range(self.number, PAGES, THREADS)][: PAGES // THREADS]
        found = {page: (image[at : at + 8], image[at + PAGE - 8 : at + PAGE]) for page in pages for at in [page * PAGE]}
        changes = list(self.changes)
        written = {change.value: number for number, change in enumerate(changes, 1) if change.value != EMPTY}
        model, emptied = dict[int, bytes](), set[int]()
        fitting = list[int]()
        least = max([0, *(written[value] for value, _ in found.values() if value in written)])
        for number in range(len(changes) + 1):
            if number >= least and all(found[page] == shown(page, model, emptied) for page in pages):
                fitting.append(number)
            if number == len(changes) or (number >= least and changes[number].value != EMPTY):
                break
            change = changes[number]
            model[change.page] = change.value
            if change.value == EMPTY:
                emptied.add(change.page)
        differing = [page for page in pages if found[page] != shown(page, model, emptied)]
        assert fitting, (self.number, least, [(page, *found[page], *shown(page, model, emptied)) for page in differing])
        began = changes[fitting[0] - 1].began if fitting[0] else -1
        return began, changes[fitting[-1]].ended if fitting[-1] < len(changes) else math.inf


def shown(page: int, model: dict[int, bytes], emptied: set[int]) -> tuple[bytes, bytes]:
    """Return the first and the last word of a page."""
    return model.get(page, word(page)), EMPTY if page in emptied else word(page)


class Photographer:
    """Takes snapshots, one after the other, each of which is compared.

    Attributes:
        taken: how many.
        overtaken: how many were ended by a change of the layout, or a kill.
    """

    def __init__(self, monitor: aiouffd.Monitor, folder: Path, writers: Iterable[Writer]) -> None:
        self.monitor, self.folder, self.writers = monitor, folder, writers
        self.threads = ThreadPoolExecutor(1)
        self.taken = self.overtaken = 0
        self._number = 0
        self._last: Path | None = None
        self._task: Future[bytes | None] = self.threads.submit(self._take)

    def look(self) -> None:
        """Compare one that is there, and begin the next."""
        if not self._task.done():
            return
        image = self._task.result()
        if image is None:
            self.overtaken += 1
        else:
            moments = [writer.compare(image) for writer in self.writers]
            assert max(began for began, _ in moments) < min(ended for _, ended in moments), moments
            self.taken += 1
        self._task = self.threads.submit(self._take)

    def _take(self) -> bytes | None:
        self._number += 1
        place = self.folder / (f"{self._number}.snap" if self._number % 4 else "plain")
        rate = None if self._number % 3 else 20 * SIZE
        try:
            self.monitor.snapshot_sync(place, self._last if place.suffix else None, rate=rate)
        except (aiouffd.LayoutChangingError, aiouffd.PagerDiedError, BusyError):
            return None
        self._last = place if place.suffix else None
        if place.suffix:
            extract_sync(place, self.folder / "image")
        return (self.folder / ("image" if place.suffix else "plain")).read_bytes()

    def close(self) -> None:
        """Wait for the last one."""
        self.threads.shutdown()


def disturb(monitor: aiouffd.Monitor, writers: list[Writer], chance: random.Random, kind: str) -> None:
    """Do what must not be seen in any page."""
    start = chance.randrange(PAGES)
    at, length = start * PAGE, chance.randint(1, min(PAGES - start, 32)) * PAGE
    if kind == "evict":
        monitor.evict_sync(at, length)
    elif kind == "flush":
        monitor.flush_sync(at, length)
    elif kind == "prefetch":
        monitor.prefetch_sync(at, length)
    elif kind == "resize":
        with contextlib.ExitStack() as stack:
            for writer in writers:  # the region may move
                stack.enter_context(writer.lock)
            region = monitor.region
            region.resize(SIZE if len(region) > SIZE else SIZE + length - 100)
        assert region[SIZE:] == bytes(len(region) - SIZE)
    elif kind == "kill":
        before = monitor.pids
        victims = chance.choice((before[1:], before[:1], before))
        for pid in victims:
            kill(pid)
        replaced(monitor, *victims)
    else:
        child = os.fork()
        if not child:  # it reads what its parent's threads write on
            data = ctypes.string_at(monitor.region.address + at, PAGE)
            os._exit(int(data[8:16] not in (word(start), EMPTY)))
        assert os.waitpid(child, 0)[1] == 0


def run(engine: str, path: str, seed: int, seconds: float) -> None:
    """Scenario: one program of a seed."""
    sys.setswitchinterval(0.0001)  # of seconds: or each call of the main thread waits for the writers' turns
    Path(path).write_bytes(content(0, SIZE))
    bound._LARGE = 4 * PAGE  # so that they are dropped by another thread, too, where this process serves
    choice: Any = {"pager": aiouffd.Pager, "in_thread": aiouffd.InThread}[engine]()
    region = aiouffd.Region(SIZE, shared=engine == "pager" and seed % 2 == 1)  # else it becomes shared
    source = aiouffd.FileSource(path, writable=True)
    chance, ends, count = random.Random(seed), threading.Event(), itertools.count()
    fork: Any = "serve" if engine == "pager" else None
    weights = {kind: weight for kind, weight in WEIGHTS.items() if engine == "pager" or kind not in ("fork", "kill")}
    done = dict.fromkeys(weights, 0)
    with (
        tempfile.TemporaryDirectory(dir=Path(path).parent) as folder,
        aiouffd.Monitor(
            region, source, engine=choice, fork=fork, max_resident=LIMIT, write_back=True, readahead=8 * PAGE
        ) as monitor,
    ):
        writers = [Writer(monitor, number, seed, ends, count) for number in range(THREADS)]
        for writer in writers:
            writer.start()
        photographer = Photographer(monitor, Path(folder), writers)
        end = time.monotonic() + seconds
        try:
            while (
                time.monotonic() < end
                or photographer.taken < SNAPSHOTS
                or any(map(int.__lt__, done.values(), weights.values()))
            ):
                (kind,) = chance.choices(list(weights), list(weights.values()))
                disturb(monitor, writers, chance, kind)
                done[kind] += 1
                photographer.look()
        finally:
            ends.set()
            for writer in writers:
                writer.join()
            photographer.close()
        for writer in writers:
            if writer.failure is not None:
                raise writer.failure
        monitor.flush_sync()
        data = Path(path).read_bytes()
        for writer in writers:
            for page in set(writer.model) - writer.emptied:
                assert data[page * PAGE : page * PAGE + 8] == writer.model[page], page
    taken = {"snapshots": photographer.taken, "overtaken": photographer.overtaken}
    print(json.dumps({"seed": seed, "steps": sum(writer.steps for writer in writers), **taken, **done}))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("engine", ["pager", "in_thread"])
def test_pages_are_what_was_written(engine: str, tmp_path: Path) -> None:
    """Whatever is done meanwhile, in memory, in snapshots and in the file: thousands of steps, hundreds of troubles."""
    counts = json.loads(play(run, engine, str(tmp_path / "file"), SEED, 0.0)[0])
    assert counts["steps"] >= 3000, counts
    assert counts["snapshots"] >= 12, counts
    assert sum(counts.get(kind, 0) for kind in WEIGHTS) >= 70, counts


@pytest.mark.nightly
@pytest.mark.timeout(int(SECONDS) + 300)
def test_pages_are_what_was_written_for_long(tmp_path: Path) -> None:
    """Many programs, for ten minutes or AIOUFFD_TEST_SECONDS."""
    end, seed = time.monotonic() + SECONDS, SEED
    while time.monotonic() < end:
        for engine in ("pager", "in_thread"):
            print(play(run, engine, str(tmp_path / "file"), seed, 10.0)[0], end="")
        seed += 1
