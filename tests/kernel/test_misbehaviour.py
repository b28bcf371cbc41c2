"""Sources and handlers that do what they should not: the fault ends all the same, and what was wrong is told."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from pattern import PAGE, Gated, Pattern, Slow, Touchers, content, peek, word
from scenario import ended, eventually, play, until

import aiouffd
from aiouffd.monitor.engines.pager import PagerEngine
from aiouffd.server.server import Server

SIZE = 1 << 20


def poke(address: int) -> int:
    """Touch a page by write(2): 1 where its byte was there, -1 where it was poisoned (EFAULT)."""
    libc = ctypes.CDLL(None)
    libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    _, pipe = os.pipe()
    result: int = libc.write(pipe, address, 1)
    return result


class ShortAtHand(Pattern):
    """`read_nowait` gives too little, and so does `read` for the page at 4096."""

    def read_nowait(self, offset: int, length: int) -> bytes:
        """Give too little."""
        return content(offset, length)[:100]

    async def read(self, offset: int, length: int) -> bytes:
        """Give all, mostly."""
        return content(offset, length)[: 100 if offset == PAGE else length]


class Scattered(Slow):
    """Gives a buffer of the right length, with gaps in it: what lies at its address is something else."""

    async def read(self, offset: int, length: int) -> Any:
        """Give every second byte of something."""
        return memoryview(content(offset, length) * 2)[::2]


class Unreadable(Slow):
    """Gives what is no buffer."""

    async def read(self, offset: int, length: int) -> Any:
        """Give None."""
        return None


class CancelsItself(Slow):
    """Comes upon the cancelation of something else."""

    async def read(self, offset: int, length: int) -> bytes:
        """Wait for what is canceled."""
        other = asyncio.ensure_future(asyncio.sleep(10))
        other.cancel()
        await other
        return content(offset, length)


class Exits(Slow):
    """Wants to end the program."""

    async def read(self, offset: int, length: int) -> bytes:
        """End it."""
        sys.exit(3)


def awkward(name: str) -> None:
    """Scenario."""
    region = aiouffd.Region(SIZE)
    source = globals()[name](SIZE)
    with aiouffd.Monitor(region, source, readahead=0, retries=1, timeout=2.0) as monitor:
        assert poke(region.address + PAGE) == -1
        eventually(lambda: len(monitor._errors._errors), 1)
        with pytest.raises(aiouffd.SourceError) as caught:
            monitor.check()
        assert (caught.value.offset, caught.value.length) == (PAGE, PAGE)
        if name == "ShortAtHand":
            assert isinstance(caught.value, aiouffd.ShortReadError)
            assert peek(region.address + 2 * PAGE) == word(2)  # from `read`
        assert monitor.statistics().restarts == 0


@pytest.mark.parametrize("name", ["ShortAtHand", "Scattered", "Unreadable", "CancelsItself", "Exits"])
def test_sources_that_break_their_word(name: str) -> None:
    """Too little at hand, a buffer with gaps, none at all, a stray cancelation, SystemExit: SourceError, SIGBUS."""
    play(awkward, name)


class Wayward(aiouffd.Handler):
    """Its page says how it fails."""

    async def pagefault(self, fault: aiouffd.Fault, batch: aiouffd.Batch) -> None:
        """Fail, or fill the page."""
        if fault.offset == PAGE:
            other = asyncio.ensure_future(asyncio.sleep(10))
            other.cancel()
            await other
        if fault.offset == 2 * PAGE:
            sys.exit(3)
        batch.copy(fault.page, content(fault.offset, PAGE))

    async def remove(self, event: aiouffd.Remove) -> None:
        """Be canceled, which must not be the end of all events."""
        raise asyncio.CancelledError


def writes_to_the_log() -> None:
    """Scenario."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Unreadable(SIZE), readahead=0, retries=0) as monitor:
        with pytest.raises(OSError, match="Bad address"):
            os.write(2, memoryview(region)[PAGE : PAGE + 100])
        eventually(lambda: len(monitor._errors._errors), 1)
        assert monitor.statistics().restarts == 0


def test_a_missing_page_is_written_where_the_pager_logs() -> None:
    """write(2) holds the pipe's lock while it waits for the page. The pager, which says why, does not wait."""
    _, errors = play(writes_to_the_log, deadline=60)
    assert "Unreadable" in errors


def wayward() -> None:
    """Scenario."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Wayward()) as monitor:
        assert [poke(region.address + page * PAGE) for page in range(4)] == [1, -1, -1, 1]
        region.madvise(4, 0, PAGE)  # MADV_DONTNEED
        region.madvise(4, 0, PAGE)
        eventually(lambda: len(monitor._errors._errors), 4)
        reasons = [error.reason for error in monitor._errors._errors if isinstance(error, aiouffd.HandlerError)]
        assert [reason.split()[1] for reason in reasons] == [
            "CancelledError:",
            "SystemExit:",
            "CancelledError:",
            "CancelledError:",
        ]
        assert monitor.statistics().restarts == 0


def test_handlers_that_are_canceled_or_exit() -> None:
    """HandlerError, SIGBUS for their page, and events go on being told."""
    play(wayward)


async def canceled_prefetch(gate: str) -> None:
    """Scenario: a thread waits for a page that a prefetch is bringing, which is canceled."""
    region = aiouffd.Region(SIZE)
    async with aiouffd.Monitor(region, Gated(SIZE, gate), engine=aiouffd.InProcess()) as monitor:
        prefetch = asyncio.ensure_future(monitor.prefetch(0, SIZE))
        await until(lambda: monitor.statistics().in_flight)
        joined = asyncio.ensure_future(asyncio.to_thread(peek, region.address + 5 * PAGE))
        await until(lambda: monitor.statistics().joined)
        prefetch.cancel()
        Path(gate).touch()
        assert await joined == word(5)
        monitor.check()


def test_canceling_a_prefetch_loses_no_fault(tmp_path: Path, loop: str) -> None:
    """Whoever has joined it gets his page."""
    play(canceled_prefetch, str(tmp_path / "gate"), loop=loop)


class Silent(Slow):
    """Never answers."""

    async def read(self, offset: int, length: int) -> bytes:
        """Hang."""
        await asyncio.sleep(1000)
        return b""


def many_wait_for_silence() -> None:
    """Scenario: 64 threads wait in one window of a source that hangs."""
    region = aiouffd.Region(SIZE)
    answers: list[int] = []

    def touch(page: int) -> None:
        answers.append(poke(region.address + page * PAGE))

    with aiouffd.Monitor(region, Silent(SIZE), timeout=1.0, retries=1) as monitor:
        threads = [threading.Thread(target=touch, args=(page,)) for page in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [-1] * 64
        assert monitor.statistics().source_errors == 64


def test_a_storm_of_failing_faults_ends_in_bounded_time() -> None:
    """They do not wait for each other's timeouts, which would be 64 seconds."""
    play(many_wait_for_silence)


def leaving_an_endless_read(kind: str) -> None:
    """Scenario."""
    region = aiouffd.Region(SIZE)
    answers: list[int] = []
    with aiouffd.Monitor(region, globals()[kind](SIZE), timeout=None) as monitor:
        pids = monitor.pids
        thread = threading.Thread(target=lambda: answers.append(poke(region.address)))
        thread.start()
        eventually(lambda: monitor.statistics().in_flight, 1)
    thread.join()
    assert answers == [-1]
    assert all(ended(pid) for pid in pids)


class Deaf(Slow):
    """Does not let itself be canceled."""

    async def read(self, offset: int, length: int) -> bytes:
        """Hang, whatever comes."""
        while True:
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                continue


class InThread(Slow):
    """Waits in a thread, for ever."""

    async def read(self, offset: int, length: int) -> bytes:
        """Hang in a thread."""
        await asyncio.to_thread(time.sleep, 1000)
        return b""


KINDS = ["Silent", "Deaf", "InThread"]


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_while_a_read_without_limit_hangs(kind: str) -> None:
    """timeout=None: the thread is let go, the processes end, whatever the source does."""
    play(leaving_an_endless_read, kind)


async def leaving_in_process(kind: str, canceled: bool) -> None:
    """Scenario."""
    region = aiouffd.Region(SIZE)

    async def main() -> None:
        async with aiouffd.Monitor(region, globals()[kind](SIZE), timeout=None, engine=aiouffd.InProcess()) as monitor:
            thread = asyncio.ensure_future(asyncio.to_thread(poke, region.address))
            await until(lambda: monitor.statistics().in_flight)
            left.append(thread)
            if canceled:
                asyncio.get_running_loop().call_later(0.3, task.cancel)

    left: list[asyncio.Future[int]] = []
    task = asyncio.ensure_future(main())
    await asyncio.wait([task])
    assert await left[0] == -1
    assert poke(region.address + PAGE) == -1  # settled: no hang, no zeros
    sys.stdout.flush()
    os._exit(0)  # asyncio.run would wait for the deaf


@pytest.mark.parametrize("canceled", [False, True])
@pytest.mark.parametrize("kind", ["Silent", "Deaf"])
def test_leaving_on_ones_own_loop(kind: str, canceled: bool, loop: str) -> None:
    """As before, also where leaving is canceled: the region is settled."""
    play(leaving_in_process, kind, canceled, loop=loop)


class Blocks(Slow):
    """Blocks the loop."""

    async def read(self, offset: int, length: int) -> bytes:
        """Block."""
        time.sleep(1000)  # noqa: ASYNC251 - on purpose
        return b""


APPLICATION = """
import sys, threading
sys.path[:0] = {path!r}
import test_misbehaviour, aiouffd
from pattern import peek
region = aiouffd.Region(1 << 20)
monitor = aiouffd.Monitor(region, test_misbehaviour.{kind}(1 << 20), timeout=None).__enter__()
threading.Thread(target=peek, args=(region.address,)).start()
while monitor.statistics().in_flight == 0: pass
print(*monitor.pids, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kind", [*KINDS, "Blocks"])
def test_the_pager_ends_with_its_application(kind: str) -> None:
    """SIGKILL: no source keeps it; one that blocks the loop is found out by the keeper."""
    here = Path(__file__).parent
    code = APPLICATION.format(path=[str(here.parent), str(here)], kind=kind)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
        process.wait()
        assert all(ended(pid) for pid in pids)


async def a_guest_leaves_its_reads(path: str) -> None:
    """Scenario: one client's faults take all the room, and it is killed."""

    def clients(server: Server) -> None:
        code = (
            f"import sys; sys.path[:0] = {sys.path!r}\n"
            "import aiouffd\n"
            "from pattern import Touchers\n"
            f"region = aiouffd.Region({SIZE})\n"
            f"monitor = aiouffd.Monitor(region, engine=aiouffd.ServedBy({path!r})).__enter__()\n"
            "Touchers(region.address, [[page] for page in range(8)])\n"
        )
        region = aiouffd.Region(SIZE)
        with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path)):
            with subprocess.Popen([sys.executable, "-c", code]) as greedy:
                eventually(lambda: server.statistics().in_flight, 4)
                greedy.kill()
            assert peek(region.address + 100 * PAGE) == word(100)

    source = SilentAtTheBeginning(SIZE)
    async with Server(source, path, readahead=0, timeout=None, concurrent_reads=4) as server:
        await asyncio.to_thread(clients, server)


class SilentAtTheBeginning(Slow):
    """Never answers for the first eight pages."""

    async def read(self, offset: int, length: int) -> bytes:
        """Give the bytes, or hang."""
        if offset < 8 * PAGE:
            await asyncio.sleep(1000)
        return content(offset, length)


def test_the_reads_of_a_client_that_is_gone_take_no_room(tmp_path: Path, loop: str) -> None:
    """They are canceled with it: others need the places."""
    play(a_guest_leaves_its_reads, str(tmp_path / "socket"), loop=loop)


class Counting(Slow):
    """Says how many tasks its loop has."""

    async def read(self, offset: int, length: int) -> bytes:
        """Give the bytes, later."""
        tasks = len(asyncio.all_tasks())
        if tasks > 1500:
            raise AssertionError(f"{tasks} tasks")
        return await super().read(offset, length)


def storm() -> None:
    """Scenario: 1,000 threads fault without a pause, a prefetch is asked for at once."""
    size = 64 << 20
    region = aiouffd.Region(size)
    threading.stack_size(128 << 10)
    with aiouffd.Monitor(
        region, Counting(size, 0.01), readahead=0, concurrent_reads=32, bytes_in_flight=1 << 20, retries=0
    ) as monitor:
        worker = monitor.pids[1]
        pages = size // PAGE
        touchers = Touchers(region.address, [range(pages // 2 + n, pages, 1000) for n in range(1000)])
        engine = monitor._engine
        assert isinstance(engine, PagerEngine)
        prefetch = engine.prefetch([(0, 4 << 20)])
        worst = 0
        while not prefetch.done():
            assert touchers.alive
            status = Path(f"/proc/{worker}/status").read_text()
            worst = max(worst, int(status.split("VmRSS:")[1].split()[0]))
            time.sleep(0.01)
        prefetch.result()
        touchers.join()
        assert not touchers.wrong
        assert worst < 200 << 10, worst
        monitor.check()
        eventually(lambda: (monitor.statistics().in_flight, monitor.statistics().bytes_in_flight), (0, 0))


def test_a_thousand_faulting_threads() -> None:
    """Neither tasks nor memory grow beyond what is waited for; the prefetch is done while the storm goes on."""
    play(storm)


def gauges_after_a_death(gate: str) -> None:
    """Scenario."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Gated(SIZE, gate), readahead=0) as monitor:
        thread = threading.Thread(target=peek, args=(region.address,))
        thread.start()
        eventually(lambda: monitor.statistics().in_flight, 1)
        os.kill(monitor.pids[1], signal.SIGKILL)
        Path(gate).touch()
        thread.join()
        eventually(lambda: (monitor.statistics().in_flight, monitor.statistics().bytes_in_flight), (0, 0))


def test_what_a_dead_worker_had_under_way_is_not_counted(tmp_path: Path) -> None:
    """The gauges begin anew."""
    play(gauges_after_a_death, str(tmp_path / "gate"))


def only_minor() -> None:
    """Scenario: all pages are in the file; a worker dies behind each."""
    region = aiouffd.Region(SIZE, shared=True)
    os.pwrite(region.fd, content(0, SIZE), 0)
    with aiouffd.Monitor(region, Pattern(SIZE), readahead=0) as monitor:
        for page in range(8):
            worker = monitor.pids[1]
            assert peek(region.address + page * PAGE) == word(page)
            os.kill(worker, signal.SIGKILL)
            end = time.monotonic() + 60
            while monitor.pids[1] == worker and time.monotonic() < end:
                monitor.check()
                time.sleep(0.001)
        monitor.check()
        assert monitor.statistics().restarts == 8


def only_layout() -> None:
    """Scenario: no page is missing; a worker dies behind each change of the layout."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Pattern(SIZE), readahead=0) as monitor:
        monitor.prefetch_sync(0, SIZE)
        for page in range(8):
            worker = monitor.pids[1]
            region.madvise(4, page * PAGE, PAGE)  # MADV_DONTNEED
            os.kill(worker, signal.SIGKILL)
            end = time.monotonic() + 60
            while monitor.pids[1] == worker and time.monotonic() < end:
                monitor.check()
                time.sleep(0.001)
        assert peek(region.address + 7 * PAGE) == bytes(8)
        monitor.check()


def test_layout_events_are_progress() -> None:
    """Whoever empties memory waits until that is read: eight deaths with one between each two give nothing up."""
    play(only_layout)


def test_minor_faults_are_progress() -> None:
    """Eight deaths with a page mapped between each two of them give nothing up."""
    play(only_minor)
