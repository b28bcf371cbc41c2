"""What a worker's successor, or nobody's, does: descriptors whose numbers are used again, requests, the last resort."""

from __future__ import annotations

import asyncio
import mmap
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from pattern import PAGE, Pattern, Slow, Touchers, content, peek, word
from processes import crash, forked, has_ended, kill
from scenario import ended, eventually, play, replaced, until

import aiouffd
from aiouffd.pager.client import takeover
from aiouffd.server.server import Server
from aiouffd.sources.base import Descriptor

SIZE = 1 << 20


def children_come_and_go() -> None:
    """Scenario: the descriptor of the second child has the number that the first one's had."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Pattern(SIZE), readahead=0, fork="serve") as monitor:
        region.madvise(mmap.MADV_DONTNEED, 9 * PAGE, PAGE)
        assert os.waitpid(forked(lambda: True), 0)[1] == 0
        eventually(lambda: monitor.statistics().spaces, 1)
        read, write = os.pipe()

        def look() -> bool:
            os.read(read, 1)
            return peek(region.address + 5 * PAGE) == word(5) and peek(region.address + 9 * PAGE) == bytes(8)

        child = forked(look)
        eventually(lambda: monitor.statistics().forks, 2)  # fork(2) returns before it is counted
        for number in range(3):
            worker = monitor.pids[1]
            kill(worker)
            assert peek(region.address + (20 + number) * PAGE) == word(20 + number)
            replaced(monitor, worker)
        os.write(write, b"x")
        assert os.waitpid(child, 0)[1] == 0
        seen = monitor.statistics()
        assert (seen.restarts, seen.forks, seen.removes) == (3, 2, 1), seen
        monitor.check()


def test_a_child_has_the_descriptors_number_of_one_that_has_ended() -> None:
    """The successor closes neither of them, and serves the one that lives."""
    play(children_come_and_go)


def all_die_and_children_live() -> None:
    """Scenario: keeper and worker are killed at once, twice; a child has its own layout, and a child itself."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Pattern(SIZE), readahead=0, fork="serve") as monitor:
        reads: list[int] = []
        children: list[int] = []
        for number in range(3):
            read, write = os.pipe()

            def look(read: int = read, number: int = number) -> bool:
                region.madvise(mmap.MADV_DONTNEED, 9 * PAGE, PAGE)
                rights = [peek(region.address + number * PAGE) == word(number)]
                for page in (20, 40):
                    os.read(read, 1)
                    rights += [peek(region.address + page * PAGE) == word(page)]
                rights += [peek(region.address + 9 * PAGE) == bytes(8)]
                grandchild = forked(lambda: peek(region.address + 60 * PAGE) == word(60))
                return all(rights) and os.waitpid(grandchild, 0)[1] == 0

            children.append(forked(look))
            reads.append(write)
        assert peek(region.address + 9 * PAGE) == word(9)
        eventually(lambda: monitor.statistics().removes, 3)
        eventually(lambda: monitor.statistics().pages, 4)
        for page in (20, 40):
            pids = monitor.pids
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            for write in reads:
                os.write(write, b"x")
            assert peek(region.address + page * PAGE) == word(page)
            replaced(monitor, *pids)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
        eventually(lambda: monitor.statistics().spaces, 1)
        monitor.check()


def test_children_are_served_on_when_keeper_and_worker_are_killed_at_once() -> None:
    """Nobody but the pager has had their descriptors: they are in a socket that the application has, too."""
    play(all_die_and_children_live)


async def a_client_leaves(path: str) -> None:
    """Scenario."""

    def clients(server: Server) -> None:
        one, other = aiouffd.Region(SIZE), aiouffd.Region(SIZE)
        with aiouffd.Monitor(other, engine=aiouffd.ServedBy(path)):
            with aiouffd.Monitor(one, engine=aiouffd.ServedBy(path)):
                assert peek(one.address + PAGE) == word(1)
            assert peek(other.address + PAGE) == word(1)
            for number in range(3):
                worker = server.pids[1]
                kill(worker)
                assert peek(other.address + (2 + number) * PAGE) == word(2 + number)
                replaced(server, worker)

    async with Server(aiouffd.BufferSource(content(0, SIZE)), path) as server:
        await asyncio.to_thread(clients, server)


def test_a_client_has_left_before_the_worker_dies(tmp_path: Path, loop: str) -> None:
    """Its descriptor is closed: the successor does not look for it, and serves the others."""
    _, errors = play(a_client_leaves, str(tmp_path / "socket"), loop=loop)
    assert "given up" not in errors


class Held:
    """A source of its own: its descriptors are the worker's as long as it is used."""

    def __init__(self, count: int) -> None:
        self.size = SIZE
        self.descriptors = [Descriptor(os.memfd_create("held")) for _ in range(count)]

    async def read(self, offset: int, length: int) -> bytes:
        """Return the bytes, as long as all descriptors are open."""
        for descriptor in self.descriptors:
            os.fstat(descriptor.fd)
        return content(offset, length)

    async def aclose(self) -> None:
        """Close them."""
        for descriptor in self.descriptors:
            os.close(descriptor.detach())


def many_descriptors() -> None:
    """Scenario."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Held(700), readahead=0) as monitor:
        assert peek(region.address + 7 * PAGE) == word(7)
        kill(monitor.pids[1])
        assert peek(region.address + 8 * PAGE) == word(8)


def test_a_source_with_more_descriptors_than_a_message_takes() -> None:
    """700 of them travel, and their numbers are still right for a successor."""
    play(many_descriptors)


async def sources_come_and_go(path: str) -> None:
    """Scenario: each client asks for a source of its own."""

    def clients(server: Server) -> None:
        def descriptors() -> int:
            return len(list(Path(f"/proc/{server.pids[1]}/fd").iterdir()))

        eventually(lambda: server.pids[1] > 0, expected=True)
        before = descriptors()
        for _ in range(6):
            region = aiouffd.Region(SIZE)
            with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path)):
                assert peek(region.address + PAGE) == word(1)
                assert descriptors() >= before + 20
            eventually(lambda: server.statistics().spaces, 0)
            # The source is closed by a task; since the first client, there is a pidfd.
            eventually(lambda: descriptors() <= before + 2, expected=True)

    async with Server(lambda *_: Held(20), path) as server:
        await asyncio.to_thread(clients, server)


def test_what_serves_nobody_any_more_holds_no_descriptors(tmp_path: Path, loop: str) -> None:
    """A source whose last client has left is closed, with all that came along with it."""
    play(sources_come_and_go, str(tmp_path / "socket"), loop=loop)


def a_cut_up_region() -> None:
    """Scenario: 20,000 mappings, which no packet holds, go to a pager that begins anew; and to one that takes over."""
    pages = 20_000
    region = aiouffd.Region(pages * PAGE)
    with aiouffd.Monitor(region, Pattern(pages * PAGE), readahead=0) as monitor:
        for page in range(0, pages, 2):
            region.madvise(mmap.MADV_DONTNEED, page * PAGE, PAGE)
        for page, dead in ((6, 1), (8, 2)):
            keeper, worker = pids = monitor.pids
            for pid in pids[:dead]:
                kill(pid)
            assert peek(region.address + page * PAGE) == bytes(8)
            assert peek(region.address + (page + 1) * PAGE) == word(page + 1)
            replaced(monitor, keeper, worker)


def test_more_mappings_than_a_message_takes() -> None:
    """They arrive all the same, by either way."""
    play(a_cut_up_region)


class Behind(Slow):
    """Has page 0 when page 5 has been asked for, and page 5 when there was time to answer for page 0."""

    asked = False

    async def read(self, offset: int, length: int) -> bytes:
        """Return the bytes, later."""
        if offset == 5 * PAGE:
            self.asked = True
            for _ in range(100):  # turns of the loop
                await asyncio.sleep(0)
        while offset == 0 and not self.asked:  # noqa: ASYNC110 - an event would be pickled
            await asyncio.sleep(self.latency)
        return await super().read(offset, length)


async def answers_that_nobody_reads() -> None:
    """Scenario: the answers to 3,000 prefetches come while the GIL is held."""
    region = aiouffd.Region(SIZE)
    async with aiouffd.Monitor(region, Behind(SIZE), readahead=0) as monitor:
        waiting = [asyncio.ensure_future(monitor.prefetch(0, PAGE)) for _ in range(3000)]
        await asyncio.ensure_future(monitor.prefetch(PAGE, PAGE))  # asked behind them: the worker has all of them
        assert region[5 * PAGE] == 6
        await asyncio.gather(*waiting)


def test_no_answer_is_lost_while_the_client_does_not_read(loop: str) -> None:
    """The socket is full; the worker keeps what does not fit, and every prefetch returns."""
    play(answers_that_nobody_reads, loop=loop)


async def requests_that_nobody_reads() -> None:
    """Scenario: the worker is stopped, and asked for more than its socket holds."""
    region = aiouffd.Region(SIZE)
    async with aiouffd.Monitor(region, Slow(SIZE, 0.01)) as monitor:
        worker = monitor.pids[1]
        os.kill(worker, signal.SIGSTOP)
        waiting = [asyncio.ensure_future(monitor.prefetch(0, PAGE)) for _ in range(3000)]
        await asyncio.sleep(0)
        os.kill(worker, signal.SIGCONT)  # comes to it only if the loop was not blocked
        await asyncio.gather(*waiting)


def test_asking_does_not_block_while_the_worker_does_not_read(loop: str) -> None:
    """What does not fit into the socket is sent later, in order."""
    play(requests_that_nobody_reads, loop=loop)


async def given_up_behind_a_canceled_prefetch() -> None:
    """Scenario."""
    region = aiouffd.Region(SIZE)
    async with aiouffd.Monitor(region, Slow(SIZE, 1000.0), readahead=0, on_exit="zeros") as monitor:
        prefetch = asyncio.ensure_future(monitor.prefetch(0, SIZE))
        await until(lambda: monitor.statistics().in_flight)
        prefetch.cancel()
        await asyncio.wait([prefetch])
        other = asyncio.ensure_future(monitor.prefetch(0, SIZE))
        told = asyncio.ensure_future(monitor.wait_error())
        await asyncio.to_thread(give_up, monitor)
        for waiting in (told, other):
            with pytest.raises(aiouffd.PagerDiedError):
                await waiting
        with pytest.raises(aiouffd.PagerDiedError):
            await monitor.prefetch(0, PAGE)


def test_whoever_waits_is_told_that_the_pager_is_given_up(loop: str) -> None:
    """Also if somebody has canceled a prefetch before."""
    play(given_up_behind_a_canceled_prefetch, loop=loop)


def signals_of(children: list[int]) -> list[int]:
    """Return by which signals children have ended."""
    return [-os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def give_up(monitor: aiouffd.Monitor) -> None:
    """Have five workers crash that resolve nothing."""
    for _ in range(5):
        worker = monitor.pids[1]
        crash(worker)
        replaced(monitor, worker)


def children_of_a_pager_that_is_given_up() -> None:
    """Scenario: one child was forked before and waits, one will touch later, one is forked afterwards."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Slow(SIZE, 1000.0), readahead=0, fork="serve", on_exit="zeros") as monitor:
        read, write = os.pipe()
        read_last, write_last = os.pipe()
        waits = forked(lambda: peek(region.address + PAGE))
        later = forked(lambda: (os.read(read, 1), peek(region.address + 2 * PAGE)))
        last = forked(lambda: (os.read(read_last, 1), peek(region.address + 4 * PAGE)))
        eventually(lambda: monitor.statistics().in_flight, 1)
        eventually(lambda: monitor.statistics().forks, 3)  # a fork that is counted later is progress
        give_up(monitor)
        afterwards = forked(lambda: peek(region.address + 3 * PAGE))
        os.write(write, b"x")
        # The fork has settled the memory: of what is missing the child got nothing.
        assert signals_of([waits, later, afterwards]) == [signal.SIGBUS, signal.SIGBUS, signal.SIGSEGV]
        keeper = monitor.pids[0]
    # The owner has left; a child that lives still gets no zeros.
    os.write(write_last, b"x")
    assert signals_of([last]) == [signal.SIGBUS]
    assert ended(keeper)


def test_nobody_hangs_or_reads_zeros_when_the_pager_is_given_up() -> None:
    """Each of them gets SIGBUS, and the keeper ends with the last of them."""
    play(children_of_a_pager_that_is_given_up)


def the_keeper_dies_as_well() -> None:
    """Scenario."""
    region = aiouffd.Region(SIZE)
    monitor = aiouffd.Monitor(region, Slow(SIZE, 60.0), readahead=0, on_exit="zeros").__enter__()
    give_up(monitor)
    kill(monitor.pids[0])
    toucher = Touchers(region.address, [[7]])
    toucher.join()


def test_the_last_resort_dies_as_well() -> None:
    """The application settles its own memory then: SIGBUS, no hang."""
    play(the_keeper_dies_as_well, status=-signal.SIGBUS)


def forks_when_the_keeper_dies_as_well() -> None:
    """Scenario: nobody reads the fork's event any more, and the thread that would see to that wants the GIL."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Slow(SIZE, 60.0), readahead=0, fork="serve", on_exit="zeros") as monitor:
        give_up(monitor)
        kill(monitor.pids[0])  # it may live for a moment
        child = forked(lambda: peek(region.address + PAGE))
        assert signals_of([child]) == [signal.SIGSEGV]


def test_a_fork_when_the_last_resort_dies() -> None:
    """It does not hang: the memory is settled before. The child does not get what is missing."""
    play(forks_when_the_keeper_dies_as_well)


def no_process_can_be_started() -> None:
    """Scenario: the keeper dies, and for a while no other can be started."""
    region = aiouffd.Region(SIZE)
    real = subprocess.Popen
    refused: list[int] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if len(refused) < 8:
            refused.append(1)
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return real(*args, **kwargs)

    takeover._PAUSES = (0.01, 0.02, 0.03, 0.05)
    with aiouffd.Monitor(region, Pattern(SIZE), readahead=0) as monitor:
        keeper, worker = monitor.pids
        subprocess.Popen = refuse  # type: ignore[misc,assignment]
        kill(keeper)
        for page in range(64):
            assert peek(region.address + page * PAGE) == word(page)
        replaced(monitor, keeper, worker)
        monitor.prefetch_sync(0, SIZE, 10.0)
        monitor.check()


def test_the_worker_serves_on_until_another_keeper_can_be_started() -> None:
    """fork(2) was refused eight times: nothing is given up as long as somebody serves."""
    play(no_process_can_be_started)


class SlowToBuild(Pattern):
    """Arrives in a pager only when a file exists: what has to be imported there takes its time, too."""

    def __init__(self, size: int, gate: str) -> None:
        super().__init__(size)
        self.gate = gate

    def __reduce__(self) -> Any:
        return built_slowly, (self.size, self.gate)


def built_slowly(size: int, gate: str) -> Pattern:
    """Rebuild a source."""
    while not Path(gate).exists():
        time.sleep(0.001)
    return Pattern(size)


def a_slow_successor(gate: str) -> None:
    """Scenario: touch and empty memory all the time while a successor is being built, and when it takes over."""
    region = aiouffd.Region(64 * SIZE)
    Path(gate).touch()
    with aiouffd.Monitor(region, SlowToBuild(64 * SIZE, gate), readahead=0) as monitor:
        keeper, worker = monitor.pids
        Path(gate).unlink()
        kill(keeper)
        page = 0
        while page < 500 or not has_ended(worker):
            if page == 500:
                replaced(monitor, keeper, worker)
                assert not has_ended(worker)
                assert monitor.statistics().faults == page
                Path(gate).touch()
            assert peek(region.address + page * PAGE) == word(page)
            region.madvise(mmap.MADV_DONTNEED, page * PAGE, PAGE)
            page += 1
            time.sleep(0.001)
        assert all(peek(region.address + number * PAGE) == bytes(8) for number in range(page))
        assert peek(region.address + page * PAGE) == word(page)
        monitor.check()
        # The next one counts nothing before it has opened all anew.
        Path(gate).unlink()
        before, pids = monitor.statistics(), monitor.pids
        for pid in pids:
            kill(pid)
        while set(pids) & set(monitor.pids):
            assert monitor.statistics().faults == before.faults
        Path(gate).touch()
        assert peek(region.address + (page + 1) * PAGE) == word(page + 1)
        eventually(lambda: monitor.statistics().faults > before.faults, expected=True)


def test_the_predecessor_serves_while_its_successor_is_built(tmp_path: Path) -> None:
    """Nobody waits for what the successor has to import; what was emptied meanwhile stays empty. Counters go on."""
    play(a_slow_successor, str(tmp_path / "gate"))


def successors_die_while_they_take_over() -> None:
    """Scenario: the keeper is killed, and the first worker of the next one as soon as it is known."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Pattern(SIZE), readahead=0) as monitor:
        for page in range(10):
            keeper, worker = monitor.pids
            kill(keeper)
            eventually(lambda worker=worker: worker in monitor.pids, expected=False)  # type: ignore[misc]
            kill(monitor.pids[1])
            monitor.prefetch_sync(page * PAGE, PAGE)
            assert peek(region.address + page * PAGE) == word(page)
        monitor.check()


def test_a_successor_that_dies_while_it_takes_over_is_replaced() -> None:
    """At once: the next worker is given what the first one has been given."""
    play(successors_die_while_they_take_over, deadline=50)


def goes_on(when: threading.Event, stopped: int) -> None:
    """Let a process go on that was stopped."""
    when.wait()
    os.kill(stopped, signal.SIGCONT)


async def a_client_comes_during_a_takeover(path: str) -> None:
    """Scenario: the worker without a keeper is stopped until another client has come."""

    def clients(server: Server, both: threading.Event) -> None:
        regions = [aiouffd.Region(SIZE) for _ in range(2)]
        monitors = [aiouffd.Monitor(region, engine=aiouffd.ServedBy(path)) for region in regions]
        with monitors[0]:
            keeper, worker = server.pids
            os.kill(worker, signal.SIGSTOP)
            kill(keeper)
            eventually(lambda: server.pids[0] != keeper, expected=True)
            threading.Thread(target=goes_on, args=(both, worker), daemon=True).start()
            with monitors[1]:
                for monitor, region in zip(monitors, regions, strict=True):
                    monitor.prefetch_sync(0, SIZE)
                    assert region[:] == content(0, SIZE)

    async with Server(aiouffd.BufferSource(content(0, SIZE)), path) as server:
        both = threading.Event()
        work = asyncio.create_task(asyncio.to_thread(clients, server, both))
        await until(lambda: len(server.clients) == 2)
        both.set()
        await work


def test_a_client_that_comes_during_a_takeover_is_served(tmp_path: Path, loop: str) -> None:
    """As are those that were there."""
    play(a_client_comes_during_a_takeover, str(tmp_path / "socket"), loop=loop)


class Forks(Pattern):
    """Starts a process by fork(2) whenever it is rebuilt; that lives until a file is there."""

    def __init__(self, size: int, gate: str) -> None:
        super().__init__(size)
        self.gate = gate

    def __reduce__(self) -> Any:
        return forks, (self.size, self.gate)


def forks(size: int, gate: str) -> Pattern:
    """Rebuild it."""
    if os.fork() == 0:
        while not Path(gate).exists():
            time.sleep(0.01)
        os._exit(0)
    return Pattern(size)


def all_die_but_what_a_source_has_forked(gate: str) -> None:
    """Scenario."""
    region = aiouffd.Region(SIZE)
    try:
        with aiouffd.Monitor(region, Forks(SIZE, gate), readahead=0) as monitor:
            assert peek(region.address) == word(0)
            for pid in monitor.pids:
                kill(pid)
            assert peek(region.address + PAGE) == word(1)
    finally:
        Path(gate).touch()


def test_what_a_source_has_forked_is_not_taken_for_the_worker(tmp_path: Path) -> None:
    """Nothing is expected of it: another pager serves at once."""
    play(all_die_but_what_a_source_has_forked, str(tmp_path / "gate"))


def prefetches_while_keepers_die() -> None:
    """Scenario: a prefetch is asked for at every moment of a handover."""
    region = aiouffd.Region(64 * SIZE)
    with aiouffd.Monitor(region, Slow(64 * SIZE, 0.001), readahead=0) as monitor:
        for number in range(4):
            keeper = monitor.pids[0]
            kill(keeper)
            began = time.monotonic()
            page = 1000 * number
            while monitor.pids[0] == keeper or time.monotonic() - began < 0.5:
                monitor.prefetch_sync(page * PAGE, PAGE)
                page += 1
        monitor.check()


def test_a_prefetch_during_a_handover_is_done() -> None:
    """It waits for the successor, which knows of the memory before it is asked to bring any of it."""
    play(prefetches_while_keepers_die)


def the_table_is_full() -> None:
    """Scenario: a child's descriptor does not fit into the pager's table; half a second later it does."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Pattern(SIZE), readahead=0, fork="serve") as monitor:
        assert region[0] == 1
        worker = monitor.pids[1]
        limits = resource.prlimit(worker, resource.RLIMIT_NOFILE)
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (3, limits[1]))
        code = f"import resource, time; time.sleep(1); resource.prlimit({worker}, resource.RLIMIT_NOFILE, {limits})"
        later = subprocess.Popen([sys.executable, "-c", code])  # fork(2) waits with the GIL held
        child = forked(lambda: peek(region.address + 5 * PAGE) == word(5))
        assert os.waitpid(child, 0)[1] == 0
        assert later.wait() == 0
        assert peek(region.address + 40 * PAGE) == word(40)
        monitor.check()


def test_a_fork_whose_descriptor_does_not_fit_waits() -> None:
    """EMFILE when the event is read: it stays in the kernel's queue, and is read again; nothing is dropped."""
    _, errors = play(the_table_is_full)
    assert "RLIMIT_NOFILE" in errors
