"""The counterpart of the kernel's own stress test of userfaultfd: pages bounce between two areas while they are used.

Of each page, the first bytes are a pthread mutex, then comes a counter. Lockers take the mutex of a page, wherever
the page is at that time, and count; readers resolve the faults of that; carriers bring over all pages in the
meantime, and protect them against writing. When all have been brought, the areas change their parts. All that
touches a page does so without the GIL.

A bounce is in one of 16 modes: the pages are chosen at random or in a row; the rows are apart or the same (racing);
the pages are compared at the end, whole, or left to the lockers alone (verifying); readers poll or block in read(2).
"""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import select
import sys
import threading
import traceback
from collections import Counter
from typing import TYPE_CHECKING

from kinds import LARGE, SMALL, Memory, memory, on, pages_of, poke
from pattern import PAGE, content, peek
from scenario import play

import aiouffd
from aiouffd import FaultKind, Feature, PageFault, RegisterMode, Userfaultfd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

THREADS = 3
"""Of each sort."""

ROUNDS = 3
RANDOM, RACING, VERIFY, POLL = 1, 2, 4, 8
COUNTER, PAYLOAD = 64, 128

_libc = ctypes.CDLL(None)
for function in (_libc.pthread_mutex_init, _libc.pthread_mutex_lock, _libc.pthread_mutex_unlock):
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p][: 2 if function is _libc.pthread_mutex_init else 1]


def start(function: Callable[..., None], *arguments: object) -> threading.Thread:
    """Start a thread whose failure ends the process: the others would wait for it."""

    def run() -> None:
        try:
            function(*arguments)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


class Bounce:
    """All pages go from one area to the other, once.

    Attributes:
        verify: of each page, what its counter is: written under the page's mutex.
        faults: told, by kind.
        counted: how often the lockers have counted.
    """

    def __init__(self, uffd: Userfaultfd, source: Memory, target: Memory, verify: list[int], mode: int) -> None:
        self.uffd, self.source, self.target, self.verify, self.mode = uffd, source, target, verify, mode
        self.size, self.pages = target.page_size, target.pages
        self.faults: Counter[FaultKind] = Counter()
        self.counted = 0
        self._finished = False
        self._sum = threading.Lock()
        self._seen = {FaultKind.MISSING: threading.Event(), FaultKind.WP: threading.Event()}
        self._bell = aiouffd.Region(THREADS * PAGE)
        self._told, self._tell = os.pipe()

    def run(self) -> None:
        """Do it."""
        uffd, target = self.uffd, self.target
        os.set_blocking(uffd.fileno(), not self.mode & POLL)
        uffd.register(target.address, target.length, RegisterMode.MISSING | RegisterMode.WP)
        uffd.register(self._bell.address, len(self._bell), RegisterMode.MISSING)
        target.empty()  # a late COPY of the bounce before may have read, and so made, a page of zeros
        lockers = [start(self._lock, number) for number in range(THREADS)]
        readers = [start(self._read) for _ in range(THREADS)]
        carriers = [start(self._carry, number) for number in range(THREADS)]
        for thread in carriers:
            thread.join()
        self.source.empty()  # whoever copies from it now is told that the page is there
        self._finished = True
        for thread in lockers:
            thread.join()
        os.write(self._tell, b"x")
        if not self.mode & POLL:
            for number in range(THREADS):  # a reader that is told of one of these pages ends
                assert peek(self._bell.address + number * PAGE) == bytes(8)
        for thread in readers:
            thread.join()
        uffd.writeprotect(target.address, target.length, protect=False)
        uffd.unregister(target.address, target.length)
        uffd.unregister(self._bell.address, len(self._bell))
        os.close(self._told)
        os.close(self._tell)

    def _numbers(self, thread: int) -> Iterator[int]:
        if self.mode & RANDOM:
            rng = random.Random(self.mode << 8 | thread)
            while True:
                yield rng.randrange(self.pages)
        first = self.mode if self.mode & RACING else self.mode + thread * self.pages // THREADS
        for number in itertools.count(first):
            yield number % self.pages

    def _lock(self, thread: int) -> None:
        counted = 0
        for number in self._numbers(thread):
            page = self.target.page(number)
            _libc.pthread_mutex_lock(page)
            count = int.from_bytes(peek(page + COUNTER), "little")
            assert count == self.verify[number], (number, count, self.verify[number])
            poke(page + COUNTER, (count + 1).to_bytes(8, "little"))
            self.verify[number] = count + 1
            _libc.pthread_mutex_unlock(page)
            counted += 1
            if self._finished:
                break
        with self._sum:
            self.counted += counted

    def _copy(self, page: int) -> bool:
        """Bring a page, protected; tell whether it was not there before."""
        there = self.source.address + page - self.target.address
        try:
            done = self.uffd.copy(page, (ctypes.c_char * self.size).from_address(there), write_protect=True)
        except aiouffd.PagePresentError:
            self.uffd.wake(page, self.size)
            return False
        assert done == self.size
        return True

    def _resolve(self, fault: PageFault) -> None:
        page = fault.address & -self.size
        if fault.kind is FaultKind.WP:
            self.uffd.writeprotect(page, self.size, protect=False)
        else:
            assert fault.kind is FaultKind.MISSING
            self._copy(page)
        with self._sum:
            self.faults[fault.kind] += 1
        self._seen[fault.kind].set()

    def _read(self) -> None:
        bell = range(self._bell.address, self._bell.address + len(self._bell))
        while True:
            if self.mode & POLL:
                ready = select.select([self.uffd.fileno(), self._told], [], [])[0]
                if ready == [self._told]:
                    return
            last = False
            for event in self.uffd.read():
                assert isinstance(event, PageFault)
                if event.address in bell:
                    self.uffd.zeropage(event.address, PAGE)
                    last = True
                else:
                    self._resolve(event)
            if last:
                return

    def _carry(self, thread: int) -> None:
        assert self._seen[FaultKind.MISSING].wait(60)  # the lockers are first
        share = range(self.pages * thread // THREADS, self.pages * (thread + 1) // THREADS)
        half = len(share) // 2
        for number in share[:half]:
            if self._copy(self.target.page(number)):
                assert not self._copy(self.target.page(number))
        if share:
            self.uffd.writeprotect(self.target.page(share[0]), len(share) * self.size, protect=True)
        for number in share[half:]:
            self._copy(self.target.page(number))
        assert self._seen[FaultKind.WP].wait(60)  # as each page comes protected, who counts is told of


def stress(kind: str) -> None:
    """Scenario."""
    sys.setswitchinterval(0.0005)
    source, target = (memory(kind, pages_of(kind, 192)) for _ in range(2))
    size = source.page_size
    payload = [content(number * size, size)[PAYLOAD:] for number in range(source.pages)]
    for number, page in enumerate(source.addresses()):
        assert _libc.pthread_mutex_init(page, None) == 0
        poke(page + COUNTER, (1).to_bytes(8, "little"))
        poke(page + PAYLOAD, payload[number])
    verify = [1] * source.pages
    total = 0
    with Userfaultfd(Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED) as uffd:
        for mode in [*reversed(range(16))] * ROUNDS:
            bounce = Bounce(uffd, source, target, verify, mode)
            bounce.run()
            assert bounce.faults[FaultKind.MISSING] > 0
            assert bounce.faults[FaultKind.WP] > 0
            total += bounce.counted
            print(mode, bounce.counted, dict(bounce.faults))
            if mode & VERIFY:
                for number in range(target.pages):
                    data = target.read(number)
                    assert int.from_bytes(data[COUNTER:][:8], "little") == verify[number]
                    assert data[PAYLOAD:] == payload[number]
            source, target = target, source
    assert sum(verify) == total + len(verify)
    counts = [int.from_bytes(peek(page + COUNTER), "little") for page in source.addresses()]
    assert counts == verify


@on("stress", SMALL + LARGE)
def test_stress(kind: str) -> None:
    """No count is lost and no byte is wrong, whoever brings a page, and in whatever order."""
    play(stress, kind)
