"""`engine.common_file`: what one process empties of shared memory is zeros in each, as of a memfd that nobody serves.

Several processes share a region: a parent, its children, and theirs. Each has mapped a memfd besides, in which the
source's bytes were from the beginning on. Whatever is done is done to both, by the same process. Meanwhile pages are
dropped, saved and captured, and the pager's processes are killed.
"""

from __future__ import annotations

import ast
import itertools
import mmap
import os
import random
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
from kinds import HUGE, place, poke
from pattern import PAGE, content, peek
from processes import kill
from scenario import eventually, play, replaced

import aiouffd
from aiouffd.kernel import libc
from aiouffd.kernel.memory import address_of

if TYPE_CHECKING:
    from collections.abc import Iterator

PROCESSES = 5
STEPS = 250
KINDS = {"look": 60, "write": 12, "remove": 9, "forget": 3, "unmap": 1, "move": 3, "stay": 3}
KINDS.update(prefetch=2, fork=4, kill=2)
FORMS: dict[str, dict[str, Any]] = {
    "as many as come": {},
    "private, with a limit": {"max_resident": 12},
    "shared, with a limit": {"max_resident": 12},
    "written back": {"max_resident": 12, "write_back": True},
    "huge": {},
}


@attrs.define(eq=False)
class Process:
    """What one of the processes does, by itself.

    Attributes:
        size: bytes of a page.
        served: where each page lies that is served; those that were unmapped are left out.
        twin: where the page lies that nobody serves.
    """

    size: int
    served: dict[int, int]
    twin: dict[int, int]

    def look(self, page: int) -> tuple[bytes, bytes] | None:
        """Return the page's first and last bytes, as it is served, and as it is to be."""
        if page not in self.served:
            return None
        found, expected = (peek(place[page]) + peek(place[page] + self.size - 8) for place in (self.served, self.twin))
        return found, expected

    def write(self, page: int, value: bytes) -> None:
        """Write to a page."""
        for start, _ in self._both(page, 1):
            poke(start, value)

    def remove(self, page: int, count: int) -> None:
        """Empty pages."""
        for start, length in self._both(page, count):
            libc.madvise(start, length, mmap.MADV_REMOVE)

    def forget(self, page: int, count: int) -> None:
        """Empty the page tables. The kernel tells of this as of `remove`: what is missing would be emptied."""
        for at in range(page, page + count):
            self.look(at)
            for start, length in self._both(at, 1):
                libc.madvise(start, length, mmap.MADV_DONTNEED)

    def unmap(self, page: int, count: int) -> None:
        """Unmap pages."""
        for start, length in self._both(page, count):
            libc.munmap(start, length)
        for at in range(page, page + count):
            self.served.pop(at, None)
            self.twin.pop(at, None)

    def move(self, page: int, count: int) -> None:
        """Move pages to another place."""
        for at in [at for at in range(page, page + count) if at in self.served]:
            for places in (self.served, self.twin):
                places[at] = self.move_one(places[at])

    def stay(self, page: int, count: int) -> None:
        """Move pages to another place, and leave the old one, too: both show the file, and either is used from now on.

        Private memory that is left so is zeros, and the kernel tells of both by the same event.
        """
        flags = libc.MREMAP_MAYMOVE | libc.MREMAP_FIXED | libc.MREMAP_DONTUNMAP
        for at in [at for at in range(page, page + count) if at in self.served]:
            for places in (self.served, self.twin):
                moved = libc.mremap(places[at], self.size, self.size, flags, place(self.size))
                places[at] = moved if at % 2 else places[at]

    def move_one(self, start: int) -> int:
        """Move a page; return where it lies."""
        flags = libc.MREMAP_MAYMOVE | libc.MREMAP_FIXED
        return libc.mremap(start, self.size, self.size, flags, place(self.size))

    def _both(self, page: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield where the mapped ones of some pages lie, joined, of both."""
        for places in (self.served, self.twin):
            runs: list[tuple[int, int]] = []
            for start in (places[at] for at in range(page, page + count) if at in places):
                if runs and sum(runs[-1]) == start:
                    runs[-1] = (runs[-1][0], runs[-1][1] + self.size)
                else:
                    runs.append((start, self.size))
            yield from runs


def serve(process: Process, sockets: list[tuple[socket.socket, socket.socket]], number: int) -> None:
    """Do what is asked for by a socket, until its end; in a forked child."""
    mine = sockets[number][1]
    sockets[number][0].close()
    while request := mine.recv(1 << 10):
        kind, *arguments = ast.literal_eval(request.decode())
        if kind == "end":
            break
        if kind == "fork":
            fork(process, sockets, *arguments)
            answer = None
        else:
            answer = getattr(process, kind)(*arguments)
        mine.send(repr(answer).encode())
    os._exit(0)


def fork(process: Process, sockets: list[tuple[socket.socket, socket.socket]], number: int) -> None:
    """Have another process, which is asked by a socket."""
    if not os.fork():
        try:
            serve(process, sockets, number)
        finally:
            os._exit(1)


class Program:
    """What is done to a region, by chance.

    Args:
        form: of the region.
        path: of the source.
        seed: of chance.
    """

    def __init__(self, form: str, path: str, seed: int) -> None:
        self.size, self.pages = (HUGE, 6) if form == "huge" else (PAGE, 40)
        length = self.pages * self.size
        self.options = dict(FORMS[form])
        if "max_resident" in self.options:
            self.options["max_resident"] *= self.size
        self.chance = random.Random(seed)
        self.twin = mmap.mmap(-1, length)
        self.twin[:] = content(0, length)
        Path(path).write_bytes(self.twin)
        self.source = aiouffd.FileSource(path, writable=self.options.get("write_back", False))
        self.path = Path(path)
        self.region = aiouffd.Region(length, page_size=self.size, shared=not form.startswith("private"))
        self.sockets = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(PROCESSES)]
        self.alive = [0]
        self.emptied = set[int]()
        self.own = Process(self.size, self._places(self.region.address), self._places(address_of(self.twin)))
        self.kinds = {**KINDS, "evict": 6 * bool(self.options), "snapshot": form != "huge"}
        self.kinds["stay"] *= form != "huge"  # the kernel refuses it

    def _places(self, start: int) -> dict[int, int]:
        return {page: start + page * self.size for page in range(self.pages)}

    def run(self) -> None:
        """Take steps, and compare all in the end."""
        ahead = 4 * self.size * self.chance.randrange(2)
        with aiouffd.Monitor(self.region, self.source, fork="serve", readahead=ahead, **self.options) as monitor:
            try:
                for step in range(STEPS):
                    self.step(monitor, step)
                for page, who in itertools.product(range(self.pages), self.alive):
                    self.ask(who, "look", page)
                if self.options.get("write_back"):
                    monitor.flush_sync()
                    for page in set(range(self.pages)) - self.emptied:
                        part = slice(page * self.size, (page + 1) * self.size)
                        assert self.path.read_bytes()[part] == self.twin[part], page
            finally:
                for number in self.alive[1:]:
                    self.sockets[number][0].send(b"('end',)")
            eventually(lambda: monitor.statistics().spaces, 1)

    def step(self, monitor: aiouffd.Monitor, step: int) -> None:
        """Do something."""
        chance, (kind,) = self.chance, self.chance.choices(list(self.kinds), list(self.kinds.values()))
        who, page = chance.choice(self.alive), chance.randrange(self.pages)
        count = chance.randint(1, min(6, self.pages - page))
        if kind == "fork":
            if len(self.alive) < PROCESSES:
                self.ask(who, "fork", len(self.alive))
                self.alive.append(len(self.alive))
                # Killed right behind its read, all of a pager takes the child's only descriptor along.
                eventually(lambda: monitor.statistics().spaces, len(self.alive))
        elif kind == "kill":
            before = monitor.pids
            victims = chance.choice((before[1:], before))
            for pid in victims:
                kill(pid)
            if chance.randrange(2):
                replaced(monitor, *victims)
        elif kind == "prefetch":
            monitor.prefetch_sync(page * self.size, count * self.size)
        elif kind == "evict":
            monitor.evict_sync(page * self.size, count * self.size)
        elif kind == "snapshot":
            image = self.path.with_suffix(".image")
            try:
                monitor.snapshot_sync(image)
            except aiouffd.PagerDiedError:  # that of the step before: it has been replaced when the next answers
                monitor.snapshot_sync(image)
            assert image.read_bytes() == self.twin[:], step
        elif kind == "write":
            self.ask(who, kind, page, (step + 1 << 20).to_bytes(8, "little"))
        elif kind == "look":
            self.ask(who, kind, page)
        elif who or kind not in ("unmap", "move", "stay"):  # a snapshot is of the memory that the parent has
            if kind in ("remove", "forget"):  # it is not saved any more
                self.emptied.update(range(page, page + count))
            self.ask(who, kind, page, count)

    def ask(self, number: int, kind: str, *arguments: Any) -> None:
        """Have a process do something; compare what it finds."""
        if number:
            self.sockets[number][0].send(repr((kind, *arguments)).encode())
            found = ast.literal_eval(self.sockets[number][0].recv(1 << 10).decode())
        elif kind == "fork":
            fork(self.own, self.sockets, *arguments)
            found = None
        else:
            found = getattr(self.own, kind)(*arguments)
        assert found is None or found[0] == found[1], (number, kind, arguments, found)


def program(form: str, path: str, seed: int) -> None:
    """Scenario."""
    Program(form, path, seed).run()


@pytest.mark.parametrize("form", [form for form in FORMS if form != "huge"])
def test_a_file_of_memory_is_one(form: str, tmp_path: Path) -> None:
    """Whichever process empties, writes, moves or unmaps what, before or after it has forked."""
    play(program, form, str(tmp_path / "file"), int(os.environ.get("AIOUFFD_TEST_SEED", "1")))


def moved(path: str) -> None:
    """Scenario: a child has moved a page that is there; then a snapshot is taken, and the child touches the page."""
    region = aiouffd.Region(8 * PAGE, shared=True)
    with aiouffd.Monitor(region, aiouffd.BufferSource(content(0, 8 * PAGE)), fork="serve") as monitor:
        assert peek(region.address) == content(0, 8)
        asked = socket.socketpair()
        if not os.fork():
            start = Process(PAGE, {}, {}).move_one(region.address)
            asked[1].send(b"moved")
            asked[1].recv(1)
            os._exit(peek(start) != content(0, 8))
        assert asked[0].recv(5) == b"moved"
        monitor.snapshot_sync(path)
        asked[0].send(b"1")
        assert os.wait()[1] == 0


def test_a_page_that_was_moved_before_a_snapshot(tmp_path: Path) -> None:
    """It is mapped with protection, as all others: the kernel refuses that where it was not registered so."""
    play(moved, str(tmp_path / "image"))


def stayed(limit: int | None) -> None:
    """Scenario: shared memory is moved, and its old place is left; missing pages are touched there, then here."""
    expected = [content(at, 8) for at in range(0, 8 * PAGE, PAGE)]
    for killed in (), (1,), (0, 1):
        region = aiouffd.Region(8 * PAGE, shared=limit is None)
        source = aiouffd.BufferSource(content(0, 8 * PAGE))
        options: dict[str, Any] = {"readahead": 0, "max_resident": limit, "fork": "serve"}  # so it becomes shared
        with aiouffd.Monitor(region, source, engine=aiouffd.Pager(), **options) as monitor:
            assert peek(region.address) == expected[0]
            old = range(region.address, region.address + 8 * PAGE, PAGE)
            flags = libc.MREMAP_MAYMOVE | libc.MREMAP_FIXED | libc.MREMAP_DONTUNMAP
            here = libc.mremap(region.address, 8 * PAGE, 8 * PAGE, flags, place(8 * PAGE))
            pids = monitor.pids
            for at in killed:
                kill(pids[at])
            for page in range(6):
                assert peek(old[page]) == peek(here + page * PAGE) == expected[page], (killed, page)
            libc.madvise(here + 5 * PAGE, 2 * PAGE, mmap.MADV_REMOVE)
            assert [peek(at) for at in old[4:]] == [expected[4], bytes(8), bytes(8), expected[7]]
            libc.munmap(here, 8 * PAGE)
            assert [peek(at) for at in old[4:6]] == [expected[4], bytes(8)]


@pytest.mark.parametrize("limit", [None, 4 * PAGE])
def test_shared_memory_that_stays_where_it_was_moved_from(limit: int | None) -> None:
    """MREMAP_DONTUNMAP leaves a place that shows the same file: what is missing there is the source's, for both."""
    play(stayed, limit)


def unheard() -> None:
    """Scenario: the page tables of a shared region are emptied, of pages that are there, and of others."""
    region = aiouffd.Region(8 * PAGE, shared=True)
    region.madvise(mmap.MADV_DONTNEED)
    with aiouffd.Monitor(region, aiouffd.BufferSource(content(0, 8 * PAGE)), readahead=0):
        assert region[:PAGE] == content(0, PAGE)
        region.madvise(mmap.MADV_DONTNEED)
        assert region[:] == content(0, 8 * PAGE)


def test_a_shared_region_keeps_its_bytes() -> None:
    """MADV_DONTNEED changes none of a memfd, also where they have not come yet."""
    play(unheard)


@pytest.mark.usefixtures("huge_pages")
def test_a_file_of_huge_pages_is_one(tmp_path: Path) -> None:
    """The same."""
    play(program, "huge", str(tmp_path / "file"), int(os.environ.get("AIOUFFD_TEST_SEED", "1")))
