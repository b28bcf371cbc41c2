"""Memory that is dropped and written back, while threads write: each page is compared with a model of it.

Each thread has pages of its own, and writes generations that name their page. Meanwhile pages are dropped, saved,
emptied and shared with forked children, and the pager's processes are killed. In the end the file is what the model
says.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from kinds import poke
from pattern import PAGE, content, peek, word
from processes import kill
from scenario import play, replaced

import aiouffd
from aiouffd.kernel import libc

PAGES = 256
SIZE = PAGES * PAGE
LIMIT = 64 * PAGE
THREADS = 3
SEED = int(os.environ.get("AIOUFFD_TEST_SEED", "1"))
SECONDS = float(os.environ.get("AIOUFFD_TEST_SECONDS", "600"))


class Writer(threading.Thread):
    """Reads and writes its own pages: every third one.

    Attributes:
        model: the first word of each page that was written; of one that was emptied, zeros.
        emptied: pages that do not show the file any more.
    """

    def __init__(self, monitor: aiouffd.Monitor, number: int, seed: int, ends: threading.Event, least: int) -> None:
        super().__init__()
        self.monitor, self.number, self.ends, self.least = monitor, number, ends, least
        self.chance = random.Random(f"{seed}-{number}")
        self.model = dict[int, bytes]()
        self.emptied = set[int]()
        self.steps = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Take steps until the end, and as many as there are to be."""
        try:
            while self.steps < self.least or not self.ends.is_set():
                self.steps += 1
                self.step()
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            self.failure = error

    def step(self) -> None:
        """Compare a page, and perhaps write or empty it."""
        page = self.chance.randrange(PAGES // THREADS) * THREADS + self.number
        address, kind = self.monitor.region.address + page * PAGE, self.chance.random()
        assert peek(address) == self.model.get(page, word(page)), (self.steps, page)
        rest = bytes(8) if page in self.emptied else word(page)
        assert peek(address + PAGE - 8) == rest, (self.steps, page)
        if kind < 0.4:
            self.model[page] = (self.steps << 32 | page).to_bytes(8, "little")
            poke(address, self.model[page])
        elif kind < 0.401:
            self.model[page] = bytes(8)
            self.emptied.add(page)
            if self.monitor.region.fd >= 0:
                libc.madvise(address, PAGE, mmap.MADV_REMOVE)
            else:  # its own method is how an engine in this process learns of a change
                self.monitor.region.madvise(mmap.MADV_DONTNEED, page * PAGE, PAGE)


def disturb(monitor: aiouffd.Monitor, chance: random.Random, done: dict[str, int]) -> None:
    """Do what must not be seen in any page."""
    kind = chance.choice(("evict", "evict", "flush", "prefetch", "fork", "kill"))
    start = chance.randrange(PAGES)
    at, length = start * PAGE, chance.randint(1, min(PAGES - start, 32)) * PAGE
    if kind == "evict":
        monitor.evict_sync(at, length)
    elif kind == "flush":
        monitor.flush_sync(at, length)
    elif kind == "prefetch":
        monitor.prefetch_sync(at, length)
    elif not monitor.pids:
        return
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
            os._exit(int(data[8:16] not in (word(start), bytes(8))))
        assert os.waitpid(child, 0)[1] == 0
    done[kind] = done.get(kind, 0) + 1


def run(engine: str, path: str, seed: int, seconds: float, least: int) -> None:
    """Scenario: one program of a seed."""
    Path(path).write_bytes(content(0, SIZE))
    choice: Any = {"pager": aiouffd.Pager, "in_thread": aiouffd.InThread}[engine]()
    region = aiouffd.Region(SIZE, shared=engine == "pager" and seed % 2 == 1)  # else it becomes shared
    source = aiouffd.FileSource(path, writable=True)
    chance, done, ends = random.Random(seed), dict[str, int](), threading.Event()
    fork: Any = "serve" if engine == "pager" else None
    with aiouffd.Monitor(
        region, source, engine=choice, fork=fork, max_resident=LIMIT, write_back=True, readahead=8 * PAGE
    ) as monitor:
        writers = [Writer(monitor, number, seed, ends, least) for number in range(THREADS)]
        for writer in writers:
            writer.start()
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end or sum(done.values()) < least // 20:
                disturb(monitor, chance, done)
        finally:
            ends.set()
            for writer in writers:
                writer.join()
        for writer in writers:
            if writer.failure is not None:
                raise writer.failure
        monitor.flush_sync()
        data = Path(path).read_bytes()
        for writer in writers:
            for page in set(writer.model) - writer.emptied:
                assert data[page * PAGE : page * PAGE + 8] == writer.model[page], page
    print(f"seed {seed}: {sum(writer.steps for writer in writers)} steps, {done}")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("engine", ["pager", "in_thread"])
def test_pages_are_what_was_written(engine: str, tmp_path: Path) -> None:
    """Whatever is done meanwhile, in memory and in the file."""
    play(run, engine, str(tmp_path / "file"), SEED, 0.0, 600)


@pytest.mark.nightly
@pytest.mark.timeout(int(SECONDS) + 300)
def test_pages_are_what_was_written_for_long(tmp_path: Path) -> None:
    """Many programs, for ten minutes or AIOUFFD_TEST_SECONDS."""
    end, seed = time.monotonic() + SECONDS, SEED
    while time.monotonic() < end:
        for engine in ("pager", "in_thread"):
            print(play(run, engine, str(tmp_path / "file"), seed, 10.0, 600)[0], end="")
        seed += 1
