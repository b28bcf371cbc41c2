"""`pager.client.shared`: one pager serves the Monitors of a process, and each of them as if it were alone."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pattern import PAGE, Gated, Pattern, Slow, content, peek, word
from processes import PATIENCE, kill
from scenario import ended, eventually, next_error, play, replaced, until

import aiouffd
from aiouffd.engine.statistics import Counter
from aiouffd.monitor.engines import pager as engines
from aiouffd.pager.client.shared import place
from aiouffd.pager.process import deaths

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 64 * PAGE
DATA = content(0, SIZE)


def monitor_of(data: Any = DATA, **options: Any) -> aiouffd.Monitor:
    """Return a Monitor of a new region, page by page."""
    source = aiouffd.BufferSource(data) if isinstance(data, bytes) else data
    return aiouffd.Monitor(aiouffd.Region(SIZE), source, **{"readahead": 0, **options})


def right(monitor: aiouffd.Monitor, *pages: int) -> None:
    """Touch pages, and look at what is there."""
    for page in pages or range(SIZE // PAGE):
        assert peek(monitor.region.address + page * PAGE) == word(page)


def one_serves_all() -> None:
    """Scenario: the same processes; options, counters and errors of each Monitor are its own."""
    with monitor_of() as one, monitor_of(readahead=SIZE) as other, monitor_of(aiouffd.ZeroSource(SIZE)) as zeros:
        assert one.pids == other.pids == zeros.pids
        right(one)
        eventually(lambda: one.statistics().faults, 64)
        assert other.statistics().faults == 0
        assert other.region[:] == DATA
        assert not any(zeros.region[:])
        counted = one.statistics()
        assert (counted.faults, counted.pages_fault, counted.pages_readahead, counted.spaces) == (64, 64, 0, 1)
        counted = other.statistics()
        assert counted.pages == 64
        assert counted.faults < 64
        assert zeros.statistics().pages_zero == 64
        with monitor_of() as late:
            assert late.pids == one.pids
            assert late.statistics().faults == 0
            right(late, 3)
            eventually(lambda: late.statistics().faults, 1)
        with pytest.raises(aiouffd.ClosedError):
            late.statistics()
        assert one.statistics().faults == 64
    print(*one.pids, flush=True)


def ends_while_it_lingers() -> None:
    """Scenario: what is called when the interpreter ends leaves no process behind, not even a dead one."""
    engines._shared._linger = 1000.0
    with monitor_of() as monitor:
        pids = monitor.pids
    atexit._run_exitfuncs()
    eventually(lambda: [pid for pid in pids if Path(f"/proc/{pid}").exists()], [])


def killed_while_it_lingers() -> None:
    """Scenario: the process ends, and cannot say so."""
    engines._shared._linger = 1000.0
    with monitor_of() as monitor:
        print(*monitor.pids, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def code_of_ones_own() -> None:
    """Scenario: a source that blocks its loop, and a handler, get pagers of their own; others go on."""

    class Blocks(Slow):
        async def read(self, offset: int, length: int) -> bytes:
            time.sleep(3600)  # noqa: ASYNC251 - the defect
            return await super().read(offset, length)

    with monitor_of() as ours, monitor_of(Pattern(SIZE)) as theirs, contextlib.ExitStack() as stack:
        blocked = stack.enter_context(monitor_of(Blocks(SIZE), on_exit="zeros"))
        assert len({ours.pids, theirs.pids, blocked.pids}) == 3
        threading.Thread(target=peek, args=(blocked.region.address,), daemon=True).start()
        eventually(lambda: blocked.statistics().in_flight, 1)
        right(ours)
        right(theirs)
        right(stack.enter_context(monitor_of()), 1)
        pids = blocked.pids
    assert all(ended(pid, 10) for pid in pids)  # though its memory is not closed there


def apart() -> None:
    """Scenario: a `Pager` serves those that it was passed to, whatever serves them, for as long as it is used."""
    with monitor_of() as shared, aiouffd.Pager() as pager:
        with monitor_of(Pattern(SIZE), engine=pager) as one, monitor_of(Pattern(SIZE), engine=pager) as other:
            assert one.pids == other.pids != shared.pids
            pids = one.pids
            right(one)
            right(other)
        with monitor_of(engine=pager) as one:
            assert one.pids == pids
    assert all(ended(pid, 10) for pid in pids)
    with contextlib.ExitStack() as stack:
        with pager:
            one = stack.enter_context(monitor_of(engine=pager))
            assert one.pids != pids
        right(one)
        other = stack.enter_context(monitor_of(engine=pager))
        assert other.pids == one.pids
        pids = one.pids
    assert all(ended(pid, 10) for pid in pids)
    with monitor_of(engine=aiouffd.Pager()) as one, monitor_of(engine=aiouffd.Pager()) as other:
        assert one.pids != other.pids
        pids = one.pids
    assert all(ended(pid, 10) for pid in pids)


@pytest.mark.parametrize("scenario", [code_of_ones_own, apart])
def test_who_shares(scenario: Callable[[], None]) -> None:
    """See the scenarios."""
    play(scenario)


def test_one_pager_serves_all_and_ends_with_the_process() -> None:
    """Where it lingers for the next Monitor, the process takes it along, without a word."""
    for scenario, status in (
        (one_serves_all, 0),
        (ends_while_it_lingers, 0),
        (killed_while_it_lingers, -signal.SIGKILL),
    ):
        output, errors = play(scenario, status=status)
        assert all(ended(int(pid), 4) for pid in output.split())
        assert not errors


async def tasks_come_and_go() -> None:
    """Scenario: tasks enter and leave at the same time, in any order."""
    rng = random.Random(5)

    async def use(number: int) -> tuple[int, ...]:
        data = bytes([number]) * SIZE
        async with monitor_of(data) as monitor:
            await asyncio.sleep(rng.random() / 20)
            await monitor.prefetch(0, 8 * PAGE)
            assert monitor.region[: 12 * PAGE] == data[: 12 * PAGE]
            await until(lambda: monitor.statistics().faults == 4)  # no others', and no longer than the test may take
            assert monitor.statistics().pages_prefetch == 8
            return monitor.pids

    pids = set(await asyncio.gather(*map(use, range(1, 25))))
    assert len(pids) == 1
    async with aiouffd.Pager() as pager, monitor_of(engine=pager) as one, monitor_of(engine=pager) as other:
        assert one.pids == other.pids not in pids


def test_tasks_come_and_go(loop: str) -> None:
    """See the scenario."""
    play(tasks_come_and_go, loop=loop)


def threads_come_and_go() -> None:
    """Scenario: threads enter and leave at the same time, while others touch, and the pager's processes are killed."""
    pids, wrong = set[tuple[int, ...]](), list[BaseException]()

    def use(number: int) -> None:
        rng = random.Random(number)
        try:
            for _ in range(4):
                with monitor_of(on_exit=rng.choice(["sigbus", "zeros", "populate"])) as monitor:
                    pids.add(monitor.pids)
                    right(monitor, *rng.sample(range(SIZE // PAGE), 24))
                    monitor.check()
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            wrong.append(error)

    with monitor_of() as steady:
        threads = [threading.Thread(target=use, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        # The last one kills a keeper whose worker is about to take over, and the worker that it takes over from.
        for page, which in enumerate([slice(1, 2), slice(0, 1), slice(0, 2)]):
            victims = steady.pids[which]
            for victim in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
            right(steady, page)
            replaced(steady, *victims)
        for thread in threads:
            thread.join()
        right(steady)
        steady.check()
    assert not wrong, wrong


def test_threads_come_and_go_while_the_pager_is_killed() -> None:
    """See the scenario."""
    play(threads_come_and_go)


def killed(which: str, gate: str) -> None:
    """Scenario: several Monitors, and -9 for the worker, the keeper, or both, with touches and a prefetch under way."""
    with contextlib.ExitStack() as stack:
        pager = stack.enter_context(aiouffd.Pager())
        monitors = [stack.enter_context(monitor_of(engine=pager)) for _ in range(3)]
        slow = stack.enter_context(monitor_of(Gated(SIZE, gate), engine=pager))
        for page, monitor in enumerate(monitors, 1):
            right(monitor, *range(page))
        future = slow._engine.prefetch([(0, 4 * PAGE)])  # type: ignore[union-attr]
        eventually(lambda: slow.statistics().in_flight > 0, expected=True)
        pids = slow.pids
        victims = {"worker": pids[1:], "keeper": pids[:1], "both": pids}[which]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        for monitor in monitors:
            right(monitor)
        Path(gate).touch()
        future.result(60)
        assert slow.region[PAGE] == 2
        replaced(slow, *victims)
        for page, monitor in enumerate(monitors, 1):
            monitor.check()
            counted = monitor.statistics()
            assert counted.pages >= SIZE // PAGE, (page, counted)
            assert counted.restarts == (which == "worker")
            assert counted.spaces == 1
        late = stack.enter_context(monitor_of(engine=pager))
        right(late)
        assert late.pids == slow.pids
        assert late.statistics().restarts == 0
        eventually(lambda: late.statistics().faults, SIZE // PAGE)


@pytest.mark.parametrize("which", ["worker", "keeper", "both"])
def test_processes_that_are_killed_cost_nobody_a_page(which: str, tmp_path: Path) -> None:
    """And each Monitor goes on counting."""
    play(killed, which, str(tmp_path / "gate"))


def given_up() -> None:
    """Scenario: no other keeper is started: all that it served are told, and poisoned; the next Monitor is served."""
    deaths.DEATHS, deaths.KILLED = 1, 0.0  # type: ignore[misc]
    with contextlib.ExitStack() as stack:
        monitors = [stack.enter_context(monitor_of()) for _ in range(2)]
        monitors.append(stack.enter_context(monitor_of(Pattern(SIZE))))
        right(monitors[0], 1)
        pids = monitors[0].pids
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        read, write = os.pipe()
        for monitor in monitors[:2]:
            with pytest.raises(aiouffd.PagerDiedError):
                next_error(monitor)
            eventually(lambda: monitor._registration._uffd, None)  # type: ignore[union-attr]  # noqa: B023 - called at once
            with pytest.raises(OSError, match="Bad address"):
                os.write(write, memoryview(monitor.region)[PAGE * 5 :][:PAGE])
        right(monitors[2])
        monitors[2].check()
        with monitor_of() as late:
            assert late.pids != pids
            right(late)
        os.close(read)
        os.close(write)


def dies_while_it_is_given_its_tenants() -> None:
    """Scenario: each pager dies when some tenants have been opened anew, now more of them, now fewer."""
    deaths.KILLED = 0.0  # type: ignore[misc]
    with contextlib.ExitStack() as stack:
        monitors = [stack.enter_context(monitor_of()) for _ in range(4)]
        for number, monitor in enumerate(monitors):
            right(monitor, *range(10 + number))
            eventually(lambda: monitor.statistics().pages, 10 + number)  # noqa: B023 - called at once
        client = monitors[0]._engine._client  # type: ignore[union-attr]
        started = 0
        while client._dead is None and started < 20:
            pair = client._requests.pair
            slots = pair.journal.counters.words
            # It may have opened tenants before the client knows of it: if it lived, it would serve on.
            eventually(lambda: pair.worker_pid and slots[Counter.SLOTS] > started % 4, expected=True)  # noqa: B023 - as above
            for pid in (pair.keeper_pid, pair.worker_pid):
                kill(pid)
            eventually(lambda: client._dead is not None or client._requests.pair is not pair, expected=True)  # noqa: B023
            started += 1
        print(started, flush=True)


def keepers_die_and_the_worker_lives() -> None:
    """Scenario: two deaths would be enough; the second keeper dies before its worker has taken anything over."""
    deaths.DEATHS, deaths.KILLED = 2, 0.0  # type: ignore[misc]
    with monitor_of() as monitor:
        right(monitor, 0)
        client = monitor._engine._client  # type: ignore[union-attr]
        client._takeover.begin = lambda: None
        for page in (1, 2):
            keeper = monitor.pids[0]
            os.kill(keeper, signal.SIGKILL)
            replaced(monitor, keeper)
            right(monitor, page)
        del client._takeover.begin
        client._takeover._due = 0.0
        client._waiter.wake()
        eventually(lambda: client._takeover.orphans, [])
        right(monitor, 3)
        monitor.check()


def test_nothing_is_given_up_while_somebody_serves() -> None:
    """A worker without a keeper, that is: those that are to succeed it may die as often as they like."""
    play(keepers_die_and_the_worker_lives)


def test_a_pager_that_dies_again_and_again_is_given_up() -> None:
    """After five deaths with no fault resolved, also where it has many tenants: to open them anew is no progress."""
    assert int(play(dies_while_it_is_given_its_tenants)[0]) == 5


def its_own_errors() -> None:
    """Scenario: what fails for one Monitor is told to that one; leaving ends its own requests only."""
    file = Path(os.environ["AIOUFFD_TEST_DIRECTORY"]) / "data"
    file.write_bytes(DATA)
    with monitor_of() as healthy, contextlib.ExitStack() as stack:
        failing = stack.enter_context(monitor_of(aiouffd.FileSource(file), retries=0))
        assert failing.pids == healthy.pids
        right(failing, 1)
        os.truncate(file, PAGE)
        with pytest.raises(aiouffd.SourceError):
            failing.prefetch_sync(8 * PAGE, PAGE)
        read, write = os.pipe()
        with pytest.raises(OSError, match="Bad address"):
            os.write(write, memoryview(failing.region)[9 * PAGE :][:PAGE])
        os.close(read)
        os.close(write)
        with pytest.raises(aiouffd.SourceError):
            next_error(failing)
        assert failing.statistics().pages_poisoned == 1
        assert healthy.statistics().pages_poisoned == 0
        healthy.check()
        right(healthy)
    with aiouffd.Pager() as pager, monitor_of(Slow(SIZE, 0.5), engine=pager) as stays:
        kept = stays._engine.prefetch([(0, PAGE)])  # type: ignore[union-attr]
        with monitor_of(Slow(SIZE, 1000.0), engine=pager) as leaves:
            dropped = leaves._engine.prefetch([(0, PAGE)])  # type: ignore[union-attr]
        with pytest.raises(aiouffd.ClosedError):
            dropped.result(60)
        kept.result(60)
        assert stays.region[0] == 1


def test_errors_go_to_whom_they_concern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """See the scenario."""
    monkeypatch.setenv("AIOUFFD_TEST_DIRECTORY", str(tmp_path))
    play(its_own_errors)


def test_a_pager_that_is_given_up() -> None:
    """See the scenario."""
    play(given_up)


def forked() -> None:
    """Scenario: a child starts a pager of its own, also in place of a `Pager` that its parent has entered."""
    with aiouffd.Pager() as pager, monitor_of(engine=pager) as apart_, monitor_of() as shared:
        right(shared, 1)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for engine, parents in ((None, shared), (pager, apart_)):
                    with monitor_of(engine=engine) as own:
                        assert own.pids != parents.pids
                        right(own)
                right(shared)  # by the parent's pager, where the user may fork so
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        pids = shared.pids
        right(shared)
        with monitor_of() as another:
            assert another.pids == pids
    with monitor_of() as late:
        assert late.pids != pids


def moved() -> None:
    """Scenario: what the process may open, or where, has changed: another pager serves. The first one goes on."""
    with monitor_of() as first, contextlib.ExitStack() as stack:
        known = [first]

        def is_another() -> None:
            monitor = stack.enter_context(monitor_of())
            assert monitor.pids not in {other.pids for other in known}
            known.append(monitor)
            right(monitor, 1)

        before = os.getcwd()  # noqa: PTH109 - that is what it is about
        os.chdir("/")
        is_another()
        os.chdir(before)
        assert stack.enter_context(monitor_of()).pids == first.pids
        os.environ["AWS_REGION"] = "elsewhere"  # a source may ask for it in the pager
        is_another()
        if os.geteuid() == 0:
            os.setgroups([65534])
            is_another()
            os.setegid(65534)
            is_another()
            os.setresuid(65534, 0, 0)
            is_another()
        right(first)


@pytest.mark.parametrize("scenario", [forked, moved])
def test_where_another_pager_serves(scenario: Callable[[], None]) -> None:
    """See the scenarios."""
    play(scenario)


def lingering() -> None:
    """Scenario: the last Monitor is left; the pager ends after a while, unless another comes."""
    engines._shared._linger = 0.5
    with monitor_of() as monitor:
        pids = monitor.pids
    for _ in range(3):
        with monitor_of() as monitor:
            assert monitor.pids == pids
            time.sleep(0.6)  # longer than a pager lingers: it is used
    assert all(ended(pid, 30) for pid in pids)
    with monitor_of() as monitor:
        assert monitor.pids != pids
        right(monitor)
        pids = monitor.pids
    engines._shared._linger = 1000.0
    with monitor_of() as monitor:
        assert monitor.pids == pids
    for pid in pids:  # nobody is served: no other takes its place
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: engines._shared._current, {})
    with monitor_of() as monitor:
        right(monitor)


def test_a_pager_lingers() -> None:
    """See the scenario."""
    play(lingering)


def given_up_while_it_lingers() -> None:
    """Scenario: whoever comes next ends it, and its thread may want to end it, too, for which that needs the lock."""
    engines._shared._linger = 1000.0
    with monitor_of():
        (client,) = engines._shared._current.values()
    stop, free = client.stop, []

    def look() -> None:
        if engines._shared._lock.acquire(blocking=False):
            engines._shared._lock.release()
            free.append(True)

    def stopping(**options: bool) -> None:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        stop(**options)

    client.stop = stopping  # type: ignore[method-assign]
    client._dead = aiouffd.PagerDiedError("it was given up")
    with monitor_of() as monitor:
        right(monitor, 0)
        assert client not in engines._shared._users
    assert free == [True]


def test_a_pager_that_is_given_up_while_it_lingers() -> None:
    """See the scenario."""
    play(given_up_while_it_lingers)


STOPPED = """
import os, signal, aiouffd
monitor = aiouffd.Monitor(aiouffd.Region(1 << 20), aiouffd.BufferSource(bytes(1 << 20)))
monitor.__enter__()
for pid in monitor.pids:
    os.kill(pid, signal.SIGSTOP)
"""


def test_a_program_ends_whose_pager_was_stopped() -> None:
    """It has not left the block: the kernel unmaps the region only once the pager has read of it."""
    subprocess.run([sys.executable, "-c", STOPPED], check=True, timeout=PATIENCE)


def test_what_decides_where_a_pager_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as long as nothing changes; it can be had where there is no /proc, too."""
    before = place()
    assert place() == before
    monkeypatch.chdir(tmp_path)
    elsewhere = place()
    assert elsewhere != before
    monkeypatch.setenv("AIOUFFD_ANY", "1")
    assert place() not in (before, elsewhere)
    monkeypatch.setattr("aiouffd.pager.client.shared._NAMESPACES", "/nowhere")
    assert place() == place()


FORKS_MEANWHILE = """
import os, signal, sys, threading, aiouffd
imports, forks = threading.Event(), threading.Event()
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "aiouffd.pager.client.client" and not forks.is_set():
            imports.set()
            forks.wait()
sys.meta_path.insert(0, Finder())
os.register_at_fork(before=forks.set)
def start():
    with aiouffd.Pager():
        pass
thread = threading.Thread(target=start)
thread.start()
imports.wait()
pid = os.fork()
if not pid:
    signal.alarm(20)
    import aiouffd.pager.client.client
    os._exit(0)
thread.join()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_fork_waits_while_the_client_is_imported() -> None:
    """The child could never import it: the lock of the module would be that of a thread that the child has not."""
    command = [sys.executable, "-W", "ignore", "-c", FORKS_MEANWHILE]  # 3.12 warns of a fork with threads
    assert subprocess.run(command, check=False, timeout=60).returncode == 0
