"""`native.watchdog`: nobody is ended who can still be served, or of whom it is not known."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pattern import PAGE, Pattern, word
from scenario import open_descriptors, play

import aiouffd
from aiouffd.kernel.abi import RegisterMode
from aiouffd.native.watchdog import LoopWatch, Watch

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 1 << 20
LIMIT = 0.4


def touched(address: int) -> tuple[threading.Thread, ctypes.Array[ctypes.c_char]]:
    """Begin to read eight bytes in a thread that does not hold the GIL meanwhile."""
    data = ctypes.create_string_buffer(8)
    thread = threading.Thread(target=ctypes.CDLL(None).memcpy, args=(data, ctypes.c_void_p(address), 8))
    thread.start()
    return thread, data


def others_start_slowly(directory: str) -> None:
    """Scenario: both are killed, and the next ones need several times the limit to start."""
    slow = Path(directory, "python")
    slow.write_text(f'#!/bin/sh\nsleep {5 * LIMIT}\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Pattern(SIZE), engine=aiouffd.Pager(stuck_limit=LIMIT)) as monitor:
        sys.executable = str(slow)
        for pid in monitor.pids:
            os.kill(pid, signal.SIGKILL)
        thread, data = touched(region.address + 5 * PAGE)
        thread.join()
        assert data.raw == word(5)


def test_others_that_start_slowly_are_waited_for(tmp_path: Path) -> None:
    """Python runs, and says so, however long that takes."""
    play(others_start_slowly, str(tmp_path))


@contextlib.contextmanager
def nobody_serves() -> Iterator[tuple[aiouffd.Userfaultfd, threading.Thread]]:
    """A thread waits for a page of memory that nobody serves; it gets it at the end."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Userfaultfd() as uffd:
        uffd.register(region.address, SIZE, RegisterMode.MISSING)
        thread, _ = touched(region.address)
        yield uffd, thread
        uffd.zeropage(region.address, PAGE)
        thread.join()


def ended_pipe() -> int:
    """Return what is readable at once, as when those that served have ended."""
    reading, writing = os.pipe()
    os.close(writing)
    return reading


def a_watch_ends_the_process(read: bool, others: int = 0) -> None:
    """Scenario: the others here would end as this one, if it were not for what they do."""
    with nobody_serves() as (uffd, _), contextlib.ExitStack() as watches:
        alive, _ = os.pipe()
        for _ in range(others):
            watch = watches.enter_context(contextlib.closing(Watch(uffd.fileno(), LIMIT)))
            watch.over(alive)
        if read:
            select.select([uffd], [], [])
            assert uffd.read()
        Watch(uffd.fileno(), LIMIT).over(ended_pipe())
        time.sleep(20)


@pytest.mark.parametrize("read", [False, True])
def test_a_watch_ends_the_process(read: bool) -> None:
    """Nobody serves, and somebody waits: with a message that is still to be read, or that one of the ended has read."""
    play(a_watch_ends_the_process, read, status=-signal.SIGABRT)


def test_a_watch_beside_many() -> None:
    """A process may have any number of regions, and each is watched."""
    play(a_watch_ends_the_process, False, 600, status=-signal.SIGABRT)


def many_in_a_child(others: int = 600) -> None:
    """Scenario: watches are closed, and others made; then the process forks."""
    with nobody_serves() as (uffd, _), contextlib.ExitStack() as watches:
        alive, _ = os.pipe()
        before = open_descriptors()

        def watch() -> contextlib.AbstractContextManager[Watch]:
            watch = Watch(uffd.fileno(), 60)
            watch.over(alive)
            return contextlib.closing(watch)

        for _ in range(3):
            with contextlib.ExitStack() as short:
                for _ in range(others):
                    short.enter_context(watch())
            assert open_descriptors() == before
        for _ in range(others):
            watches.enter_context(watch())
        child = os.fork()
        if not child:
            os._exit(open_descriptors() != before)
        assert os.waitpid(child, 0)[1] == 0


def test_a_child_has_none_of_many() -> None:
    """A userfaultfd that stays open in a forked child would keep its parent's memory registered there."""
    play(many_in_a_child)


STOPPER = """
import os, signal, sys, time
time.sleep(0.2)
os.kill(os.getppid(), signal.SIGSTOP)
time.sleep(3)
os.kill(os.getppid(), signal.SIGCONT)
"""


def stopped_for_long() -> None:
    """Scenario: the process is stopped for longer than the limit, and has others serve as soon as it runs again."""
    with nobody_serves() as (uffd, _):
        watch = Watch(uffd.fileno(), 2.0)
        with subprocess.Popen([sys.executable, "-c", STOPPER]) as stopper:
            watch.over(ended_pipe())
            stopper.wait()
            time.sleep(0.2)
            watch.close()


def test_time_for_which_the_process_was_stopped_does_not_count() -> None:
    """SIGSTOP, a debugger, a frozen cgroup: nothing could be started meanwhile."""
    play(stopped_for_long)


def no_descriptors_left() -> None:
    """Scenario: who serves cannot be duplicated."""
    with nobody_serves() as (uffd, _):
        alive, _ = os.pipe()
        first, second = Watch(uffd.fileno(), LIMIT), Watch(uffd.fileno(), LIMIT)
        first.over(alive)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (max(int(it.name) for it in Path("/proc/self/fd").iterdir()) + 1, limits[1])
        )
        filling: list[int] = []
        with contextlib.suppress(OSError):
            while True:
                filling.append(os.dup(alive))
        second.over(alive)
        first.over(alive, alive)  # there is room for one of the two: the other would go unnoticed
        time.sleep(3 * LIMIT)
        first.close()
        second.close()


def test_who_is_not_known_may_serve() -> None:
    """Where descriptors cannot be duplicated (RLIMIT_NOFILE), nobody is watched, and that is said."""
    _, errors = play(no_descriptors_left)
    assert errors.count("nobody watches over the pager: Too many open files") == 2, errors


def told_late() -> None:
    """Scenario: the watch was closed before it is told who serves; another is told that nobody is known."""
    with nobody_serves() as (uffd, _):
        closed, unsure = Watch(uffd.fileno(), LIMIT), Watch(uffd.fileno(), LIMIT)
        closed.close()
        closed.over(ended_pipe())
        unsure.over(ended_pipe())
        unsure.over()
        time.sleep(3 * LIMIT)
        unsure.close()


def test_a_closed_watch_stays_closed() -> None:
    """Its descriptor may be another's by then."""
    play(told_late)


def settled_first() -> None:
    """Scenario: the region's descriptor is closed while it is watched over, and its number becomes another's."""
    region = aiouffd.Region(SIZE)
    uffd = aiouffd.Userfaultfd()
    uffd.register(region.address, SIZE, RegisterMode.MISSING)
    number = uffd.fileno()
    watch = Watch(number, LIMIT)
    watch.over(ended_pipe())
    uffd.unregister(region.address, SIZE)
    uffd.close()
    reading, writing = os.pipe()
    os.dup2(reading, number)
    os.write(writing, bytes(32))
    time.sleep(3 * LIMIT)
    watch.close()
    assert len(os.read(number, 64)) == 32


def test_a_region_that_is_settled_first() -> None:
    """Nothing is read from whatever has the descriptor's number then, and nobody is ended."""
    play(settled_first)


def forks_while_watched() -> None:
    """Scenario: the watchdog has duplicates of three descriptors when the process forks."""
    uffd, (reading, _) = aiouffd.Userfaultfd(), os.pipe()
    before = open_descriptors()
    watch = Watch(uffd.fileno(), float("inf"))
    watch.over(reading, reading)
    assert open_descriptors() == before + 3
    child = os.fork()
    if not child:
        os._exit(0 if open_descriptors() == before else 1)
    assert os.waitpid(child, 0)[1] == 0
    watch.close()
    assert open_descriptors() == before


def test_a_forked_child_has_none_of_the_watchdogs_descriptors() -> None:
    """The thread is its parent's."""
    play(forks_while_watched)


def limits_of_months() -> None:
    """Scenario: more milliseconds than 32 bits hold, and no end at all."""
    with nobody_serves() as (uffd, _):
        watches = [Watch(uffd.fileno(), limit) for limit in ((1 << 32) / 1000 + 0.1, float("inf"))]
        for watch in watches:
            watch.over(ended_pipe())
        time.sleep(3 * LIMIT)
        for watch in watches:
            watch.close()


def test_a_long_limit_is_a_long_one() -> None:
    """It does not wrap around."""
    play(limits_of_months)


def closed_by_the_program(loop: bool) -> None:
    """Scenario: all descriptors are closed, as a daemon does, and their numbers become those of pipes, all readable."""
    region = aiouffd.Region(SIZE)
    uffd = aiouffd.Userfaultfd()
    uffd.register(region.address, SIZE, RegisterMode.MISSING)
    words = (ctypes.c_uint64 * 2)()
    if loop:
        progress = ctypes.addressof(words), ctypes.addressof(words) + 8
        watch: Watch | LoopWatch = LoopWatch(
            uffd.fileno(), region.address, threading.get_native_id(), progress, warning=LIMIT / 2, limit=LIMIT
        )
    else:
        watch = Watch(uffd.fileno(), LIMIT)
        watch.over(ended_pipe())
    os.closerange(3, 64)
    pipes = [os.pipe() for _ in range(16)]
    for _, writing in pipes:
        os.write(writing, bytes(32))
    other = Watch(pipes[-1][0], LIMIT)
    other.over(pipes[0][1])
    time.sleep(3 * LIMIT)
    other.close()
    watch.close()
    assert [len(os.read(reading, 64)) for reading, _ in pipes] == [32] * 16


@pytest.mark.parametrize("loop", [False, True])
def test_descriptors_that_the_program_closes(loop: bool) -> None:
    """Nothing is read from, written to or closed of what has their numbers then, and nobody is ended."""
    _, errors = play(closed_by_the_program, loop, measured=False)
    assert not errors
