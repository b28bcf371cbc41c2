"""Kills of the pager's processes, at random and at chosen moments: no fault is lost, no byte is wrong."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pattern import PAGE, Pattern, Slow, Touchers, content, peek, word
from processes import crash, forked, has_ended, kill
from scenario import ended, eventually, killed_when_this_thread_waits, play, replaced

import aiouffd
from aiouffd.kernel import libc
from aiouffd.kernel.memory import address_of

if TYPE_CHECKING:
    from collections.abc import Callable

KILLS = 200
SIZE = 256 << 20


def killed_at_work(monitor: aiouffd.Monitor, moment: float, busy: Callable[[], bool]) -> bool:
    """Kill the worker after so many seconds of its work; tell whether it was at work still.

    It has served something by then, however busy the machine is: five workers that serve nothing are given up.
    """
    before = served(monitor)
    while served(monitor) == before and busy():
        time.sleep(0.001)
    time.sleep(moment)
    return kill(monitor.pids[1]) and busy()


def served(monitor: aiouffd.Monitor) -> tuple[int, int]:
    """Return counters that go up with what is progress to the keeper."""
    seen = monitor.statistics()
    return seen.pages, seen.removes


def workers_die_while_threads_touch() -> None:
    """Scenario."""
    rng = random.Random(1)
    landed = 0
    while landed < KILLS:
        landed += kills_while_threads_touch(rng)
    print(landed)


def kills_while_threads_touch(rng: random.Random) -> int:
    """Touch a region with 16 threads; return how many kills have landed meanwhile."""
    landed = 0
    region = aiouffd.Region(SIZE)
    pages = list(range(SIZE // PAGE))
    rng.shuffle(pages)
    with aiouffd.Monitor(region, Pattern(SIZE), readahead=0) as monitor:
        touchers = Touchers(region.address, [pages[n::16] for n in range(16)])
        while touchers.alive:
            landed += killed_at_work(monitor, rng.uniform(0.002, 0.03), lambda: touchers.alive)
        touchers.join()
        monitor.check()
        assert monitor.statistics().restarts > 0
    assert not touchers.wrong, touchers.wrong[:5]
    return landed


@pytest.mark.long
def test_200_kills_of_the_worker_while_16_threads_touch() -> None:
    """Every byte is right, and no toucher waits for ever. How long one waits is measured by the benchmarks."""
    output, _ = play(workers_die_while_threads_touch)
    assert int(output.split()[-1]) >= 150


def tree(region: aiouffd.Region, rng: random.Random, pages: int, dropped: set[int]) -> bool:
    """Touch, drop, move and fork; tell whether every byte was right. What was dropped is zeros, in children as well."""
    for _ in range(120):
        page = rng.randrange(pages)
        choice = rng.random()
        if choice < 0.1:
            region.madvise(mmap.MADV_DONTNEED, page * PAGE, PAGE)
            dropped.add(page)
        elif choice < 0.13 and not move_away(region, page := min(page, pages - 4), 4, dropped):
            print("wrong after a move", page, file=sys.stderr)
            return False
        got = peek(region.address + page * PAGE)
        if got != (bytes(8) if page in dropped else word(page)):
            print("wrong", page, got, page in dropped, file=sys.stderr)
            return False
    children = [forked(in_child, region, rng.random(), pages, dropped) for _ in range(2)]
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if any(statuses):
        print("children's wait statuses:", statuses, file=sys.stderr)
    return not any(statuses)


def move_away(region: aiouffd.Region, page: int, count: int, dropped: set[int]) -> bool:
    """Move some pages to another address with mremap, look at them there, and move them back."""
    source, length = region.address + page * PAGE, count * PAGE
    flags = libc.MREMAP_MAYMOVE | libc.MREMAP_FIXED
    with mmap.mmap(-1, length) as room:
        target = address_of(room)
        libc.mremap(source, length, length, flags, target)
        right = all(
            peek(target + n * PAGE) == (bytes(8) if page + n in dropped else word(page + n)) for n in range(count)
        )
        libc.mremap(target, length, length, flags, source)
        # mmap's own object unmaps the place that it believes in: it must be mapped again.
        libc.mmap_fixed(target, length)
    return right


def in_child(region: aiouffd.Region, seed: float, pages: int, dropped: set[int]) -> bool:
    """As `tree`, for a child: what its parent had dropped must not come back."""
    for page in sorted(dropped):
        if peek(region.address + page * PAGE) != bytes(8):
            print("came back", page, file=sys.stderr)
            return False
    rng, free = random.Random(seed), [page for page in range(pages) if page not in dropped]
    for _ in range(60):
        page = rng.choice(free)
        if peek(region.address + page * PAGE) != word(page):
            print("wrong in child", page, file=sys.stderr)
            return False
    return True


def workers_die_while_a_tree_changes() -> None:
    """Scenario."""
    rng = random.Random(2)
    landed = 0
    while landed < KILLS:
        landed += kills_while_a_tree_changes(rng)
        rng.random()
    print(landed)


def kills_while_a_tree_changes(rng: random.Random) -> int:
    """Have a child change the memory that it shares with its parent's pager; return how many kills have landed."""
    size, landed = 16 << 20, 0
    region = aiouffd.Region(size)
    with aiouffd.Monitor(region, Pattern(size), readahead=0, fork="serve") as monitor:
        # What moves before the mapping has its first page gets the offset of its new place, and stays apart from its
        # neighbours when it is back: EFAULT for the next mremap of both.
        peek(region.address)
        dropped: set[int] = set()
        child = forked(lambda: all(tree(region, rng, size // PAGE, dropped) for _ in range(6)))
        while not has_ended(child):
            landed += killed_at_work(monitor, rng.uniform(0.002, 0.02), lambda: not has_ended(child))
        monitor.check()
        status = os.waitpid(child, 0)[1]
        assert status == 0, status
    return landed


@pytest.mark.long
def test_200_kills_of_the_worker_while_a_process_tree_drops_moves_and_forks() -> None:
    """Dropped pages stay zeros, moved ones keep their bytes, forked children see what their parents saw."""
    output, _ = play(workers_die_while_a_tree_changes, deadline=110)
    assert int(output.split()[-1]) >= 150


def layout_changes_survive() -> None:
    """Scenario."""
    for number in range(20):
        size = 4 << 20
        region = aiouffd.Region(size)
        with aiouffd.Monitor(region, Pattern(size), readahead=0) as monitor:
            assert region[: 8 * PAGE] == content(0, 8 * PAGE)
            region.madvise(mmap.MADV_DONTNEED, 0, 4 * PAGE)
            if number % 2:
                kill(monitor.pids[1])
            region.resize(size + (8 << 20))  # moves, most times
            if number % 3:
                kill(monitor.pids[1])
            assert region[: 4 * PAGE] == bytes(4 * PAGE)
            assert region[4 * PAGE : 16 * PAGE] == content(4 * PAGE, 12 * PAGE)
            assert region[size : size + PAGE] == bytes(PAGE)
            kill(monitor.pids[1])
            assert region[16 * PAGE : 64 * PAGE] == content(16 * PAGE, 48 * PAGE)


def test_removed_moved_and_grown_memory_survives_kills() -> None:
    """REMOVE and REMAP are not forgotten with the worker that read them."""
    play(layout_changes_survive)


def keeper_dies() -> None:
    """Scenario."""
    size = 4 << 20
    region = aiouffd.Region(size)
    with aiouffd.Monitor(region, Pattern(size), readahead=0, fork="serve") as monitor:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.read(read, 1)
            os._exit(0 if region[100 * PAGE : 108 * PAGE] == content(100 * PAGE, 8 * PAGE) else 1)
        region.madvise(mmap.MADV_DONTNEED, 0, PAGE)
        for number in range(5):
            keeper, worker = monitor.pids
            assert kill(keeper)
            page = 1 + number * 4
            assert region[page * PAGE : (page + 4) * PAGE] == content(page * PAGE, 4 * PAGE)  # served without a break
            replaced(monitor, keeper, worker)
            assert ended(worker)
        assert region[:PAGE] == bytes(PAGE)
        os.write(write, b"x")
        assert os.waitpid(child, 0)[1] == 0  # its descriptor went from worker to worker
        kill(monitor.pids[0])
        kill(monitor.pids[1])
        keeper, worker = monitor.pids
        # Without the GIL: while both are dead, the thread that starts another pair needs it.
        assert peek(region.address + 200 * PAGE) == word(200)
        assert peek(region.address) == bytes(8)
        monitor.check()


def test_kill_of_the_keeper() -> None:
    """The worker serves on, then hands over to another pair, forked children included; both at once come back too."""
    play(keeper_dies)


def opened_and_not_heard() -> None:
    """Scenario: a pager has opened all, and is killed with its keeper before this process hears the answer."""
    region = aiouffd.Region(16 * PAGE)
    read, write = os.pipe()
    with aiouffd.Monitor(region, Pattern(16 * PAGE), readahead=0, fork="serve") as monitor:
        child = os.fork()
        if child == 0:
            for page in (1, 2):
                os.read(read, 1)
                region.madvise(mmap.MADV_DONTNEED, page * PAGE, PAGE)
            os._exit(region[: 4 * PAGE] != content(0, PAGE) + bytes(2 * PAGE) + content(3 * PAGE, PAGE))
        client: Any = monitor._engine._client  # type: ignore[union-attr]
        handle = client._handle

        def deaf(message: dict[str, Any], fds: list[int]) -> None:
            opening = {item.message["id"] for item in client._requests.pending if item.message["op"] == "open"}
            if message.get("id") not in opening:
                handle(message, fds)

        os.write(write, b"x")
        eventually(lambda: monitor.statistics().removes, 1)
        for page, hears in ((4, deaf), (5, handle)):
            client._handle = hears
            pids = monitor.pids
            for pid in pids:
                kill(pid)
            replaced(monitor, *pids)
            assert peek(region.address + 8 * PAGE + page * PAGE) == word(8 + page)
            region.madvise(mmap.MADV_DONTNEED, page * PAGE, PAGE)
        os.write(write, b"x")
        assert os.waitpid(child, 0)[1] == 0
        assert region[: 8 * PAGE] == content(0, 4 * PAGE) + bytes(2 * PAGE) + content(6 * PAGE, 2 * PAGE)
        eventually(lambda: client._requests.pending, [])


def test_what_was_emptied_behind_an_answer_that_nobody_heard() -> None:
    """The journal counts, not what was asked for: the memory is opened as it shows now, forked children included."""
    play(opened_and_not_heard)


def five_deaths() -> None:
    """Scenario."""
    size = 1 << 20
    region = aiouffd.Region(size)
    with aiouffd.Monitor(region, Slow(size, 30.0), readahead=0, retries=0) as monitor:
        touchers = Touchers(region.address, [[5]])
        eventually(lambda: monitor.statistics().faults > 0, expected=True)
        for _ in range(5):
            worker = monitor.pids[1]
            crash(worker)
            replaced(monitor, worker)
        touchers.join()


def kills_without_progress() -> None:
    """Scenario: more workers are killed than may crash, while one page is waited for."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Slow(SIZE, 0.5), readahead=0) as monitor:
        touchers = Touchers(region.address, [[5]])
        eventually(lambda: monitor.statistics().faults > 0, expected=True)
        while monitor.statistics().restarts < 7:
            worker = monitor.pids[1]
            kill(worker)
            replaced(monitor, worker)
        touchers.join()
        assert not touchers.wrong
        monitor.check()


def test_a_pager_that_others_kill_is_not_given_up_at_once() -> None:
    """On a busy machine nothing may have been resolved between seven kills: it serves all the same."""
    play(kills_without_progress)


def test_five_deaths_without_progress_end_the_waiting() -> None:
    """A worker that dies again and again is given up: who waits gets SIGBUS, not a hang, and stderr says why."""
    _, errors = play(five_deaths, status=-signal.SIGBUS)
    assert "5 workers died with no fault resolved between them" in errors
    assert "poisoned" in errors


def all_die_while_the_gil_is_held() -> None:
    """Scenario: both are killed when this thread, and with it all of Python, waits for a page."""
    faulthandler.disable()  # a user's program has not enabled it
    size = 1 << 20
    region = aiouffd.Region(size)
    monitor = aiouffd.Monitor(region, Slow(size, 1000.0), engine=aiouffd.Pager(stuck_limit=0.5)).__enter__()
    with killed_when_this_thread_waits(monitor.pids):
        print(region[5 * PAGE])


def test_all_are_killed_while_a_thread_waits_with_the_gil_held() -> None:
    """Nothing in Python can run any more: it is said, and the process ends with a traceback of who touched."""
    _, errors = play(all_die_while_the_gil_is_held, status=-signal.SIGABRT)
    assert re.search(r"Thread \d+ waits for the page at 0x[0-9a-f]+, with the GIL held", errors), errors
    assert "in all_die_while_the_gil_is_held" in errors, errors


def all_die_while_python_is_busy() -> None:
    """Scenario: native code keeps the GIL for longer than the limit, but waits for no page."""
    size = 1 << 20
    region = aiouffd.Region(size)
    with aiouffd.Monitor(region, Pattern(size), engine=aiouffd.Pager(stuck_limit=0.2)) as monitor:
        before = monitor.pids
        for pid in before:
            kill(pid)
        ctypes.PyDLL(None).usleep(1_000_000)  # PyDLL: with the GIL held
        replaced(monitor, *before)
        assert region[5 * PAGE : 5 * PAGE + 8] == word(5)
        # Another pair, another watch: nothing is ended later on.
        assert peek(region.address + 9 * PAGE) == word(9)
        monitor.check()


def test_python_that_is_only_busy_is_not_ended() -> None:
    """Nobody waits: when Python runs again, others are started."""
    play(all_die_while_python_is_busy)


APPLICATION = """
import sys, time
sys.path[:0] = {path!r}
from pattern import Slow
import aiouffd, os
region = aiouffd.Region(1 << 20)
monitor = aiouffd.Monitor(region, Slow(1 << 20, {latency}), fork={fork!r}).__enter__()
print(*monitor.pids, flush=True)
if {fork!r} == "serve":
    child = os.fork()
    if child == 0:
        sys.stdin.readline()
        os._exit(region[4096] - 2)
    print(child, flush=True)
    time.sleep(100)
time.sleep(100)
"""


@pytest.mark.parametrize("latency", [0.001, 100.0])
def test_the_pager_ends_with_its_application(latency: float) -> None:
    """SIGKILL of the application: keeper and worker are gone within a second, whatever they were waiting for."""
    code = APPLICATION.format(path=[str(Path(__file__).parent.parent)], latency=latency, fork="dontfork")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
        process.wait()
        assert all(ended(pid) for pid in pids)


def test_forked_children_keep_the_pager() -> None:
    """After SIGKILL of the application its forked child is still served; when it has ended, the pager ends."""
    code = APPLICATION.format(path=[str(Path(__file__).parent.parent)], latency=0.001, fork="serve")
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        child = int(process.stdout.readline())
        process.kill()
        process.wait()
        assert not ended(pids[1], 0.7)
        process.stdin.write("\n")
        process.stdin.flush()
        assert ended(child)
        assert all(ended(pid) for pid in pids)
