"""`monitor.engines.on_demand`: private memory with a limit, whose process drops what the pager asks for."""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from kinds import poke
from locking import MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT, lock_all, needs_root
from pattern import PAGE, content, peek, word
from processes import kill
from scenario import eventually, open_descriptors, play, replaced

import aiouffd
from aiouffd.kernel import libc, pagemap
from aiouffd.kernel.locked import is_locked
from aiouffd.kernel.pagemap import Pagemap
from aiouffd.monitor.engines.on_demand import may_be_dropped

pytestmark = pytest.mark.skipif(not may_be_dropped(), reason="Linux 6.18 moves pages in batches")

PAGES = 1024
SIZE = PAGES * PAGE
LIMIT = 128 * PAGE


def served() -> aiouffd.Monitor:
    """Return a Monitor of private memory with a limit."""
    return aiouffd.Monitor(aiouffd.Region(SIZE), aiouffd.BufferSource(content(0, SIZE)), max_resident=LIMIT)


def stopped() -> None:
    """Scenario: the process is stopped and goes on, again and again, and the worker is killed meanwhile."""
    with served() as monitor:
        region, model = monitor.region, bytearray(content(0, SIZE))
        mine, worker, ends = os.getpid(), monitor.pids[1], os.pipe()
        stopper = os.fork()
        if not stopper:
            os.close(ends[1])
            while select.select([ends[0]], [], [], 0.002)[0] == []:
                os.kill(mine, signal.SIGSTOP)
                time.sleep(0.004)
                if worker:
                    os.kill(worker, signal.SIGKILL)
                worker = 0
                os.kill(mine, signal.SIGCONT)
            os._exit(0)
        os.close(ends[0])
        for turn in range(6):
            for page in range(PAGES):
                assert peek(region.address + page * PAGE, PAGE) == model[page * PAGE : (page + 1) * PAGE], (turn, page)
                if page % 64 == 5:
                    poke(region.address + page * PAGE + 8, bytes([turn]))
                    model[page * PAGE + 8] = turn
        os.close(ends[1])
        os.waitpid(stopper, 0)
        assert region[:] == model
        assert monitor.statistics().resident <= LIMIT


def test_a_process_that_is_stopped() -> None:
    """What it is asked for waits, and is not lost; nor is what was written."""
    play(stopped)


def changes() -> None:
    """Scenario: native code unmaps, empties and moves parts while others are dropped; their places get other memory."""
    with served() as monitor:
        region, ends = monitor.region, threading.Event()
        half = SIZE // 2
        failed = list[object]()

        def reads() -> None:
            try:
                while not ends.is_set():
                    for page in range(half // PAGE):
                        assert peek(region.address + page * PAGE, 64) == content(page * PAGE, 64), page
            except BaseException as error:  # noqa: BLE001 - told by the main thread
                failed.append(error)

        reader = threading.Thread(target=reads)
        reader.start()
        for number, start in enumerate(range(half, SIZE, 8 * PAGE)):
            address = region.address + start
            assert peek(address + PAGE, 8) == content(start + PAGE, 8)
            if number % 3 == 0:
                libc.madvise(address, 4 * PAGE, mmap.MADV_DONTNEED)
                assert ctypes.string_at(address, 4 * PAGE) == bytes(4 * PAGE)
            else:
                libc.munmap(address, 4 * PAGE)
                libc.mmap_fixed(address, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                ctypes.memset(address, 7, 4 * PAGE)
            assert peek(address + 5 * PAGE, 8) == content(start + 5 * PAGE, 8)
        before = monitor.pids
        kill(before[1])
        replaced(monitor, before[1])
        monitor.evict_sync(0, SIZE)
        ends.set()
        reader.join()
        assert not failed
        for number, start in enumerate(range(half, SIZE, 8 * PAGE)):
            found = ctypes.string_at(region.address + start, 4 * PAGE)
            assert found == (bytes(4 * PAGE) if number % 3 == 0 else b"\7" * 4 * PAGE), start


def test_other_memory_is_not_dropped() -> None:
    """Nor is what was emptied the source's again."""
    play(changes)


def threads() -> int:
    """Return how many threads this process has."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def left() -> None:
    """Scenario: Monitors are entered and left; nothing of them stays."""
    with served() as monitor:
        assert monitor.region[:PAGE] == content(0, PAGE)
        before: Any = None
        for on_exit in ("sigbus", "zeros", "populate") * 2:
            region = aiouffd.Region(LIMIT)
            source = aiouffd.BufferSource(content(0, LIMIT))
            with aiouffd.Monitor(region, source, max_resident=LIMIT, readahead=0, on_exit=on_exit) as other:
                assert region[:PAGE] == content(0, PAGE)
                other.evict_sync(0, LIMIT)
                assert region.fd < 0
                assert region[PAGE] == content(PAGE, 1)[0]
            if on_exit != "sigbus":
                assert region[2 * PAGE] == (content(2 * PAGE, 1)[0] if on_exit == "populate" else 0)
            del other, region, source
            if on_exit == "populate" and before is None:  # what is opened once is there
                before = threads(), open_descriptors()
        eventually(lambda: (threads(), open_descriptors()), before)


def test_nothing_stays() -> None:
    """Neither threads nor descriptors, whatever becomes of what is missing."""
    play(left)


def apart(kind: str) -> None:
    """Scenario: a page of each block is another mapping, or cannot be dropped; the others are."""
    with served() as monitor:
        address = monitor.region.address
        for place in range(address + 3 * PAGE, address + SIZE, 8 * PAGE):
            if kind == "read only":
                libc.mprotect(place, PAGE, mmap.PROT_READ)
            elif kind == "another mapping":
                libc.madvise(place, PAGE, mmap.MADV_DONTDUMP)
            else:
                assert monitor._registration is not None
                assert monitor._registration.uffd.try_poison(place, PAGE, 0) == PAGE
        pages = [page for page in range(PAGES) if kind != "poisoned" or page % 8 != 3]
        for page in pages * 2:
            assert peek(address + page * PAGE, 64) == content(page * PAGE, 64), page
        stay = PAGES // 8 if kind == "read only" else 0
        figures = monitor.statistics()
        assert figures.resident <= LIMIT + stay * PAGE
        assert figures.pages_evicted >= 2 * (len(pages) - stay) - LIMIT // PAGE
        with Pagemap() as pages_of:
            there = sum(run.length for run in pages_of.present(address, SIZE))
        assert there <= LIMIT + PAGES // 8 * PAGE


@pytest.mark.parametrize("kind", ["read only", "another mapping", "poisoned"])
def test_one_page_keeps_no_others(kind: str) -> None:
    """Neither what may not be dropped, nor the end of a mapping, nor what could not be had."""
    play(apart, kind)


def locked(order: str) -> None:
    """Scenario: the process locks its memory between making a region and its Monitor; or it did, when it made it."""
    if order == "before":
        lock_all(MCL_FUTURE)
    region = aiouffd.Region(SIZE)
    lock_all(MCL_FUTURE if order == "between" else MCL_CURRENT | MCL_ONFAULT)
    assert is_locked(region.address) == (order == "before")
    with aiouffd.Monitor(region, aiouffd.BufferSource(content(0, SIZE)), max_resident=LIMIT) as monitor:
        for page in range(PAGES):
            assert peek(region.address + page * PAGE) == word(page)
            assert page % 16 or sum(each.length for each in monitor.residency()) <= LIMIT
        assert monitor.statistics().pages_evicted >= PAGES - LIMIT // PAGE


@needs_root
@pytest.mark.parametrize("order", ["between", "before"])
def test_a_process_that_locks_its_memory(order: str) -> None:
    """The kernel moves pages between memory only that is locked, and between such that is not."""
    play(locked, order)


def unreadable() -> None:
    """Scenario: a process that has given up its rights may not read its own pagemap."""
    pagemap._PATH = "/proc/none"  # type: ignore[misc]
    with served() as monitor:
        assert monitor.region[:] == content(0, SIZE)
        assert monitor.region.fd >= 0
        assert monitor.statistics().resident <= LIMIT


def test_a_pagemap_that_cannot_be_read() -> None:
    """Its memory becomes shared."""
    play(unreadable)
