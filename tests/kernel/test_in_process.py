"""`Monitor(engine=InProcess())`: the caller's own loop serves, and a native thread watches it."""

from __future__ import annotations

import asyncio
import functools
import mmap
import re
import signal
import threading
import time
from typing import Any

import pytest
from pattern import PAGE, Pattern, peek, word
from scenario import play

import aiouffd
from aiouffd import native

SIZE = 1 << 20
SOON = aiouffd.InProcess(stuck_warning=0.5, stuck_limit=1.0)


async def stuck_loop(where: str) -> None:
    """Scenario."""
    region = aiouffd.Region(1 << 20)
    async with aiouffd.Monitor(region, Pattern(1 << 20), engine=aiouffd.InProcess(stuck_warning=0.5, stuck_limit=1.0)):
        if where == "loop":
            _ = region[4096]  # the loop's own thread: nobody is left to serve it
        else:
            thread = threading.Thread(target=lambda: region[4096])  # holds the GIL while it waits
            thread.start()
            thread.join()


@pytest.mark.parametrize("where", ["loop", "thread"])
def test_a_loop_that_is_stuck_behind_its_own_fault_is_ended(where: str, loop: str) -> None:
    """The message names thread, address and the way out; then SIGBUS, with the traceback of the line that touched."""
    _, errors = play(stuck_loop, where, loop=loop, status=-signal.SIGABRT)
    assert "engine=InProcess()" in errors
    assert "prefetch" in errors
    assert re.search(r"thread \d+ has been waiting for the page at 0x[0-9a-f]+000", errors)
    assert "in stuck_loop" in errors or "in main" in errors or "<lambda>" in errors


async def busy_loop() -> None:
    """Scenario: a loop that is only late."""
    region = aiouffd.Region(1 << 20)
    async with aiouffd.Monitor(region, Pattern(1 << 20), engine=aiouffd.InProcess(stuck_warning=0.2, stuck_limit=30.0)):
        waiting = asyncio.ensure_future(asyncio.to_thread(peek, region.address + 5 * PAGE))
        await asyncio.sleep(0.2)
        waiting = asyncio.ensure_future(asyncio.to_thread(peek, region.address + 64 * PAGE))
        time.sleep(1.0)  # noqa: ASYNC251 - blocks the loop on purpose
        assert await waiting == word(64)


def test_a_loop_that_is_only_late_loses_nothing(loop: str) -> None:
    """The guard's look at the message takes nothing away: when the loop comes back it serves the fault."""
    play(busy_loop, loop=loop)


class Writes(aiouffd.Handler):
    """Is told of writes, and lets them go on."""

    async def write(self, fault: aiouffd.Fault, batch: aiouffd.Batch) -> None:
        """Allow it."""
        batch.unprotect(fault.page)


async def stuck_behind(kind: str) -> None:
    """Scenario: the loop's own thread touches a page that is protected, or that only the file has."""
    region = aiouffd.Region(SIZE, shared=kind == "minor")
    source: Any = Writes() if kind == "write" else Pattern(SIZE)
    if kind == "minor":
        other = aiouffd.Region.from_fd(region.fd)
        other[:PAGE] = bytes(PAGE)
    async with aiouffd.Monitor(region, source, readahead=0, engine=SOON) as monitor:
        if kind == "write":
            await monitor.prefetch(0, PAGE)
        region[0] = 1


@pytest.mark.parametrize(("kind", "words"), [("write", "to which it wants to write, for 1."), ("minor", " for 1.")])
def test_every_kind_of_fault_is_ended(kind: str, words: str) -> None:
    """A write to a protected page, and a page that only the file has: POISON would change neither."""
    _, errors = play(stuck_behind, kind, status=-signal.SIGABRT)
    assert "a thread has been waiting for a page for 0." in errors
    assert words in errors
    assert "in stuck_behind" in errors
    assert errors.count("The process is aborted") == 1


async def warned_only() -> None:
    """Scenario: there is a warning and no limit; the loop's thread is let go by another."""
    region = aiouffd.Region(SIZE)
    engine = aiouffd.InProcess(stuck_warning=0.2, stuck_limit=None)
    async with aiouffd.Monitor(region, Pattern(SIZE), engine=engine) as monitor:
        waiting = asyncio.ensure_future(asyncio.to_thread(peek, region.address))
        assert await waiting == word(0)
        thread = threading.Thread(target=peek, args=(region.address + 100 * PAGE,))
        thread.start()
        time.sleep(1.0)  # noqa: ASYNC251 - blocks the loop on purpose
        await asyncio.to_thread(thread.join)
        assert monitor.statistics().faults >= 2


def test_a_warning_without_a_limit() -> None:
    """It is written once, and the loop goes on."""
    _, errors = play(warned_only)
    assert errors.count("a thread has been waiting for a page") == 1
    assert "ended" not in errors


async def quiet() -> None:
    """Scenario: nothing is stuck, in a process where warnings are errors."""
    region = aiouffd.Region(SIZE)
    for _ in range(2):
        async with aiouffd.Monitor(region, Pattern(SIZE), on_exit="zeros", engine=SOON):
            for page in range(20):
                assert await asyncio.to_thread(peek, region.address + page * PAGE) == word(page)
            await asyncio.sleep(1.5)
        region.madvise(mmap.MADV_DONTNEED)


def test_nothing_is_written_where_nothing_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """No warning of Python's either; where warnings are errors, nothing dies of one."""
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    assert play(quiet, fresh=True) == ("", "")


async def without_the_native_part() -> None:
    """Scenario: two Monitors, one after the other."""
    native._load = functools.cache(lambda: (None, "aiouffd was installed without a C compiler"))
    for _ in range(2):
        region = aiouffd.Region(SIZE)
        async with aiouffd.Monitor(region, Pattern(SIZE), engine=SOON):
            assert await asyncio.to_thread(peek, region.address + 3 * PAGE) == word(3)


def test_without_the_native_part() -> None:
    """It serves, and says once that nothing watches."""
    _, errors = play(without_the_native_part)
    assert errors.count("nothing watches over event loops") == 1
    assert "without a C compiler" in errors


def test_forked_children_are_refused() -> None:
    """fork() would wait for the loop with the GIL held: both options are named before anything is done."""
    with pytest.raises(ValueError, match=r'InProcess.*fork="serve"'):
        aiouffd.Monitor(aiouffd.Region(PAGE), engine=aiouffd.InProcess(), fork="serve")
