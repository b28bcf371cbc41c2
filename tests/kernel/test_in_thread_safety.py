"""`InThread`: what a signal handler could break, and what could hang. Each in a process of its own."""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import fcntl
import gc
import logging
import mmap
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import touchers
from pattern import PAGE, Slow, content, peek, word
from scenario import eventually, play

import aiouffd
from aiouffd.kernel.abi import Feature
from aiouffd.kernel.userfaultfd import kernel_features
from aiouffd.monitor import registration

SIZE = 4 << 20
PAGES = SIZE // PAGE


class Broken:
    """Has no page, and says so for good."""

    size = SIZE

    async def read(self, offset: int, length: int) -> bytes:
        """Fail, when all who touch have come: one that comes while faulthandler writes spoils its report."""
        await asyncio.sleep(0.2)
        raise aiouffd.SourceError("Broken", offset, length, "no such page")


class Never:
    """Does not answer."""

    size = SIZE

    def __init__(self) -> None:
        self.asked = 0

    async def read(self, offset: int, length: int) -> bytes:
        """Wait for ever."""
        self.asked += 1
        await asyncio.Event().wait()
        return b""


def near() -> aiouffd.BufferSource:
    """Return a source that is at hand."""
    return aiouffd.BufferSource(content(0, SIZE))


def served(source: Any, on_exit: Any = "sigbus", retries: int = 4, **options: Any) -> aiouffd.Monitor:
    """Return a Monitor of a new region, page by page."""
    engine = aiouffd.InThread(**options)
    return aiouffd.Monitor(aiouffd.Region(SIZE), source, engine=engine, readahead=0, on_exit=on_exit, retries=retries)


def real_sigbus() -> mmap.mmap:
    """Return memory whose second page is behind the end of its file."""
    with tempfile.TemporaryFile() as file:
        file.truncate(2 * PAGE)
        memory = mmap.mmap(file.fileno(), 2 * PAGE)
        file.truncate(PAGE)
    return memory


# What the interrupted thread has


def errno_scenario() -> None:
    """Scenario."""
    for source in (near(), Slow(SIZE, 0.25)):
        with served(source) as monitor:
            for page in range(4):
                assert touchers.free().errno_after(monitor.region.address + page * PAGE) == 1234


def test_errno_is_kept() -> None:
    """Through a futex that times out, among others."""
    play(errno_scenario)


def pending_exception() -> None:
    """Scenario."""
    for source in (near(), Slow(SIZE)):
        with served(source) as monitor:
            for page in range(0, 100, 10):
                with pytest.raises(KeyError, match="pending"):
                    touchers.held().raise_and_touch(
                        ctypes.pythonapi.PyErr_SetString, KeyError, monitor.region.address + page * PAGE, 10
                    )
            try:
                raise ZeroDivisionError  # noqa: TRY301 - it is to be handled while pages come
            except ZeroDivisionError:
                assert monitor.region[200 * PAGE : 200 * PAGE + 8] == word(200)
                assert isinstance(
                    sys.exception() if sys.version_info >= (3, 11) else sys.exc_info()[1], ZeroDivisionError
                )


def test_an_exception_that_is_pending() -> None:
    """In C, and in Python: it is there after the page has come, with the GIL held or freed meanwhile."""
    play(pending_exception)


def recursion() -> None:
    """Scenario."""
    for source in (near(), Slow(SIZE)):
        with served(source) as monitor:
            region = monitor.region
            touched = []

            def deeper(level: int) -> None:
                touched.append(region[level * PAGE])  # noqa: B023
                deeper(level + 1)

            for limit in (60, 61, 62, 63, 100):
                sys.setrecursionlimit(limit)
                with pytest.raises(RecursionError):
                    deeper(len(touched))
                sys.setrecursionlimit(1000)
            assert touched == [(page + 1) & 0xFF for page in range(len(touched))] or len(touched) > 100


def test_the_recursion_limit() -> None:
    """A page that is touched at the last level comes as any other."""
    play(recursion)


def garbage() -> None:
    """Scenario: collections at every turn, whose finalizers touch as well."""
    gc.set_threshold(1)
    for source in (near(), Slow(SIZE)):
        with served(source) as monitor:
            region = monitor.region
            wrong = []

            class Cycle:
                def __init__(self, page: int) -> None:
                    self.me, self.page = self, page

                def __del__(self) -> None:
                    # Any thread may collect it, also that of the loop: which can have only what is at hand.
                    there = isinstance(monitor.origin, aiouffd.BufferSource)
                    if there and region[self.page * PAGE : self.page * PAGE + 8] != word(self.page):  # noqa: B023
                        wrong.append(self.page)  # noqa: B023

            def work(first: int) -> None:
                for page in range(first, 400, 4):
                    Cycle(PAGES - 1 - page)
                    if region[page * PAGE : page * PAGE + 8] != word(page):  # noqa: B023
                        wrong.append(page)  # noqa: B023

            threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            gc.collect()
            assert not wrong


def test_garbage_collection() -> None:
    """Before, after and (by other threads) while a page is waited for."""
    play(garbage)


def signals() -> None:
    """Scenario."""
    fired = []
    signal.signal(signal.SIGALRM, lambda *_: fired.append(1))
    with served(Slow(SIZE, 0.2)) as monitor:
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        assert monitor.region[PAGE] == 2
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert fired
        assert touchers.free().pestered_touch(monitor.region.address + 2 * PAGE) > 10


def test_other_signals_while_a_page_is_waited_for() -> None:
    """They are not blocked: their C handlers run at once, Python's with the next bytecode; and the page comes."""
    play(signals)


# SIGBUS that is not ours


def a_real_sigbus(enabled: bool) -> None:
    """Scenario."""
    if not enabled:
        faulthandler.disable()
        touchers.free().take_sigbus(1)  # somebody who calls whoever was there before him: nobody
    memory = real_sigbus()
    with served(near()) as monitor:
        assert monitor.region[PAGE] == 2
        assert faulthandler.is_enabled() == enabled
        print("so far", flush=True)
        memory[PAGE]  # the line


@pytest.mark.parametrize(("enabled", "status"), [(True, -signal.SIGBUS), (False, -signal.SIGSEGV)])
def test_a_real_sigbus_is_what_it_was(enabled: bool, status: int) -> None:
    """Faulthandler's traceback, if it is enabled; else what whoever has SIGBUS makes of it: here, a call of nobody."""
    output, errors = play(a_real_sigbus, enabled, status=status)
    assert "so far" in output
    assert ("Fatal Python error: Bus error" in errors) == enabled
    assert ("in a_real_sigbus" in errors) == enabled
    assert errors.count("Fatal Python error") <= 1


def probing() -> None:
    """Scenario: a program that lives with SIGBUS, before and after."""
    memory = real_sigbus()
    place = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    library = touchers.free()
    library.take_sigbus(2)
    with served(near()) as monitor:
        for n in range(50):
            assert library.probe(place) == 0
            assert library.probe(place + PAGE) == -1
            assert library.probe(monitor.region.address + n * PAGE) == n + 1
    assert library.times_called() == 50
    assert library.probe(place + PAGE) == -1
    assert library.times_called() == 51


def test_a_handler_that_jumps() -> None:
    """Whoever handles SIGBUS for memory of his own goes on doing so, by longjmp, too."""
    play(probing)


def sent_by_kill(how: str) -> None:
    """Scenario."""
    faulthandler.disable()
    got: list[int] = []
    if how == "python":
        signal.signal(signal.SIGBUS, lambda *_: got.append(1))
    elif how == "ignored":
        signal.signal(signal.SIGBUS, signal.SIG_IGN)
    with served(near()) as monitor:
        os.kill(os.getpid(), signal.SIGBUS)
        assert monitor.region[PAGE] == 2
        assert len(got) == (how == "python")
    os.kill(os.getpid(), signal.SIGBUS)
    assert len(got) == 2 * (how == "python")


@pytest.mark.parametrize(("how", "status"), [("python", 0), ("ignored", 0), ("default", -signal.SIGBUS)])
def test_sigbus_that_somebody_sends(how: str, status: int) -> None:
    """It is no fault: it is handled as it was."""
    play(sent_by_kill, how, status=status)


def given_back() -> None:
    """Scenario."""
    library = touchers.free()
    before = library.sigbus()
    with served(near()):
        with served(near()) as monitor:
            assert monitor.region[0] == 1
            ours = library.sigbus()
            assert ours != before
        assert library.sigbus() == ours
    assert library.sigbus() == ours  # to explain a touch of what is missing
    monitor.region.close()
    assert library.sigbus() == before
    with served(near(), stuck_warning=1e6, stuck_limit=None) as monitor:
        assert library.sigbus() == ours
        library.take_sigbus(3)
        theirs = library.sigbus()
    monitor.region.close()
    assert library.sigbus() in (theirs, before)
    assert library.sigbus() == theirs or library.times_called() == 0


def test_sigbus_is_given_back() -> None:
    """When the last one has left and its region is closed, if it is still ours."""
    play(given_back)


class Telling(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to standard error, and counts."""

    times = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write first."""
        super().emit(record)
        self.times += 1


def taken(how: int) -> None:
    """Scenario: another library takes SIGBUS while a Monitor has it."""
    library = touchers.free()
    told = Telling()
    logging.getLogger("aiouffd").addHandler(told)
    with served(near()) as monitor, served(Slow(SIZE)) as other:
        assert monitor.region[0] == 1
        ours = library.sigbus()
        if how < 5:
            library.take_sigbus(how)
        else:
            faulthandler.disable()
            faulthandler.enable()
        eventually(lambda: library.sigbus() == ours and told.times > 0, True)
        assert monitor.region[PAGE] == 2
        assert other.region[PAGE] == 2
        assert library.times_called() == 0
        real_sigbus()[PAGE]


@pytest.mark.parametrize(
    "how",
    [0, 1, 3, 4, 5],
    ids=["restores and returns", "calls ours", "returns", "default", "faulthandler, which is enabled anew"],
)
def test_another_library_takes_sigbus(how: int) -> None:
    """It is told, and is put below us; a real SIGBUS goes to it, then to whom it was before, and ends there."""
    _, errors = play(taken, how, status=-signal.SIGBUS)
    assert "SIGBUS was taken from a Monitor" in errors
    assert ("touchers-" in errors) == (how < 4)
    assert errors.count("restoring") == (how == 0)
    assert errors.count("Fatal Python error: Bus error") == (how != 4)
    assert ("in taken" in errors) == (how != 4)


# Pages that cannot be had


def broken(how: str) -> None:
    """Scenario."""
    if how == "python":
        signal.signal(signal.SIGBUS, lambda *_: None)
    with served(Broken()) as monitor:
        print("so far", flush=True)
        if how == "native":
            touchers.free().sum_in_threads(monitor.region.address, 4, 4)
        elif how == "thread":
            thread = threading.Thread(target=lambda: monitor.region[PAGE])
            thread.start()
            thread.join()
        else:
            monitor.region[PAGE]


@pytest.mark.parametrize("how", ["main", "thread", "native", "python"])
def test_a_page_that_cannot_be_had(how: str) -> None:
    """The process ends with the line that touched it; also where a handler of Python's would return for ever."""
    output, errors = play(broken, how, status=-signal.SIGBUS)
    assert "so far" in output
    assert "no such page\n" in errors.partition("Fatal Python error")[0]  # why, before what ends the process
    if how != "python":
        assert errors.count("Fatal Python error: Bus error") == 1
        assert "in broken" in errors or "in <lambda>" in errors


async def broken_and_told() -> None:
    """Scenario: a program that survives SIGBUS learns why it came."""
    library = touchers.free()
    library.take_sigbus(2)
    region = aiouffd.Region(SIZE)
    async with aiouffd.Monitor(region, Broken(), engine=aiouffd.InThread()) as monitor:
        waiting = asyncio.ensure_future(monitor.wait_error())
        assert await asyncio.to_thread(library.probe, region.address + PAGE) == -1
        with pytest.raises(aiouffd.SourceError, match="no such page"):
            await waiting
        assert monitor.statistics().pages_poisoned == 1
        for _ in range(10):
            assert library.probe(region.address + PAGE) == -1  # again and again


def test_why_a_page_cannot_be_had(loop: str) -> None:
    """`wait_error()` raises it."""
    play(broken_and_told, loop=loop)


class Recovering:
    """Fails for the pages below 80 until it has been told not to."""

    size = SIZE

    def __init__(self) -> None:
        self.broken = True

    async def read(self, offset: int, length: int) -> bytes:
        """Fail, or return the pattern."""
        if self.broken and offset < 80 * PAGE:
            raise aiouffd.SourceError("Recovering", offset, length, "no such page")
        return content(offset, length)


def without_poison() -> None:
    """Take UFFDIO_POISON away, as before Linux 6.6."""
    lacking = kernel_features() & ~Feature.POISON
    vars(registration)["kernel_features"] = lambda: lacking


def broken_without_poison(how: str) -> None:
    """Scenario: the same where the kernel cannot be told that a page cannot be had."""
    without_poison()
    broken(how)


@pytest.mark.parametrize("how", ["main", "thread", "native", "python"])
def test_a_page_that_cannot_be_had_without_poison(how: str) -> None:
    """The handler remembers it: the process ends, with the line that touched, and does not hang."""
    _, errors = play(broken_without_poison, how, status=-signal.SIGBUS)
    assert "cannot be had: `Monitor.check()` raises why" in errors
    if how != "python":
        assert errors.count("Fatal Python error: Bus error") == 1
        assert "in broken" in errors or "in <lambda>" in errors


def lived_without_poison() -> None:
    """Scenario: a program that survives SIGBUS, and a source that recovers."""
    without_poison()
    source = Recovering()
    library = touchers.free()
    library.take_sigbus(2)
    with served(source, retries=0) as monitor:
        region = monitor.region
        for page in range(60):
            assert library.probe(region.address + page * PAGE) == -1
            with pytest.raises(aiouffd.SourceError, match="no such page"):
                monitor.check()
            assert library.probe(region.address + page * PAGE) == -1
        assert library.probe(region.address + 80 * PAGE) == 81
        source.broken = False
        assert library.probe(region.address + 59 * PAGE) == -1  # it stays so until it is prefetched,
        monitor.prefetch_sync(59 * PAGE, PAGE)
        assert library.probe(region.address + 59 * PAGE) == 60
        region.madvise(mmap.MADV_DONTNEED, 0, PAGE)  # or the layout changes
        assert library.probe(region.address) == 0
        assert library.probe(region.address + 58 * PAGE) == 59
        source.broken = True
        for page in range(60, 80):
            assert library.probe(region.address + page * PAGE) == -1
        assert library.probe(region.address + 81 * PAGE) == 82
        for page in range(50):
            assert library.probe(region.address + page * PAGE) == (0 if page == 0 else -1)
        assert library.probe(region.address + 82 * PAGE) == -1  # more than 64: any page


def test_living_without_poison() -> None:
    """A page that cannot be had is SIGBUS, until it is there; its neighbors are served, up to 64 such pages."""
    play(lived_without_poison)


class Selfish(aiouffd.Handler):
    """Touches the region that it serves."""

    async def pagefault(self, fault: aiouffd.Fault, batch: aiouffd.Batch) -> None:
        """Touch the next page."""
        _ = self.region[fault.offset + PAGE]

    def __init__(self, region: aiouffd.Region) -> None:
        self.region = region


def selfish() -> None:
    """Scenario."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Selfish(region), engine=aiouffd.InThread(stuck_limit=None)):
        region[0]


def test_a_handler_that_touches_its_own_region() -> None:
    """It is told at once, with both lines."""
    _, errors = play(selfish, status=-signal.SIGBUS)
    assert "it runs the event loop of this region" in errors
    assert "in pagefault" in errors
    assert "in selfish" in errors


# Waiting


def deadlock(at_hand: bool) -> None:
    """Scenario: native code keeps the GIL while its threads touch."""
    options: Any = {"stuck_warning": 0.3, "stuck_limit": 1.0}
    with served(near() if at_hand else Slow(SIZE), **options) as monitor:
        total = touchers.held().sum_in_threads(monitor.region.address, 64, 8)
        assert total == sum(range(1, 65))


def test_native_code_that_keeps_the_gil_while_its_threads_wait() -> None:
    """What is at hand is there all the same; else it is told, and ended with the line that keeps the GIL."""
    play(deadlock, True)
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        play(deadlock, False)  # nothing is kept
        return
    _, errors = play(deadlock, False, status=-signal.SIGBUS)
    assert re.search(r"thread \d+ has been waiting for the page at 0x[0-9a-f]+000 for 0\.[34] s", errors)
    assert "native code keeps the GIL" in errors
    assert "ended in 1 s" in errors
    assert "in deadlock" in errors
    assert errors.count("Fatal Python error") == 1


class Blocking(aiouffd.Handler):
    """Blocks its loop for a second."""

    async def pagefault(self, fault: aiouffd.Fault, batch: aiouffd.Batch) -> None:
        """Do what a handler must not do."""
        time.sleep(1.0)  # noqa: ASYNC251
        batch.copy(fault.page, content(fault.offset, PAGE))


def late(limit: float) -> None:
    """Scenario."""
    with served(Blocking(), stuck_warning=0.2, stuck_limit=limit) as monitor:
        assert monitor.region[PAGE] == 2
        print("came", flush=True)


def test_a_loop_that_is_late() -> None:
    """It is warned of, and ended only behind the limit."""
    output, errors = play(late, 30.0)
    assert "came" in output
    assert errors.count("has been waiting") == 1
    output, errors = play(late, 0.5, status=-signal.SIGBUS)
    assert "came" not in output
    assert "in pagefault" in errors


def patient() -> None:
    """Scenario: a page that is long in coming while the loop runs."""
    with served(Slow(SIZE, 1.5), stuck_warning=0.2, stuck_limit=0.5) as monitor:
        assert monitor.region[PAGE] == 2


def test_a_page_that_is_long_in_coming() -> None:
    """As long as the loop runs, its own timeouts count."""
    _, errors = play(patient)
    assert not errors


def stopped() -> None:
    """Scenario: all of the process stands still."""
    with served(Slow(SIZE, 1.0), stuck_warning=0.5, stuck_limit=0.7) as monitor:
        stopper = subprocess.Popen(
            ["sh", "-c", f"sleep 0.3; kill -STOP {os.getpid()}; sleep 2; kill -CONT {os.getpid()}"]
        )
        assert monitor.region[PAGE] == 2
        stopper.wait()


def test_a_process_that_was_stopped() -> None:
    """The time in which nothing could run does not count."""
    _, errors = play(stopped)
    assert not errors


def crowd() -> None:
    """Scenario: more threads wait than the pipe holds."""
    with served(Slow(SIZE, 0.001)) as monitor:
        engine: Any = monitor._engine
        fcntl.fcntl(engine._writing, fcntl.F_SETPIPE_SZ, 4096)  # 128 messages
        engine._loop.call_soon_threadsafe(time.sleep, 0.5)
        library, totals = touchers.free(), [0] * 4

        def work(n: int) -> None:
            totals[n] = library.sum_in_threads(monitor.region.address + n * 64 * PAGE, 64, 64)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(totals) == sum((page + 1) & 0xFF for page in range(256))


def test_more_threads_than_the_pipe_holds() -> None:
    """They try again until it has room."""
    play(crowd)


# Leaving


def leaving(how: str) -> None:
    """Scenario: threads wait, and nobody will bring their pages."""
    source = Never()
    got: list[bytes] = []
    with served(source, on_exit=how) as monitor:
        region = monitor.region
        number = 4 if how == "zeros" else 1  # two that crash at once spoil each other's traceback
        threads = [
            threading.Thread(target=lambda n=n: got.append(region[n * PAGE : n * PAGE + 8])) for n in range(number)
        ]
        if how == "zeros":
            threads += [
                threading.Thread(target=lambda n=n: got.append(peek(region.address + n * PAGE))) for n in range(number)
            ]
        for thread in threads:
            thread.start()
        eventually(lambda: source.asked, number)
        print("leaving", flush=True)
    for thread in threads:
        thread.join()
    assert got == [bytes(8)] * 8


def test_leaving_while_threads_wait() -> None:
    """They go on as `on_exit` says: with zeros, or with SIGBUS."""
    play(leaving, "zeros")
    output, errors = play(leaving, "sigbus", status=-signal.SIGBUS)
    assert "leaving" in output
    assert "in <lambda>" in errors


def collecting() -> None:
    """Scenario: garbage is collected at every turn, also while a Monitor is left and its layout changes."""
    seen: list[bool] = []

    class Watched(aiouffd.Region):
        def keep(self, thing: object) -> None:
            seen.append(gc.isenabled())
            super().keep(thing)

    region = Watched(SIZE)
    with aiouffd.Monitor(region, near(), engine=aiouffd.InThread(), readahead=0) as monitor:
        layout: Any = monitor._engine.layout  # type: ignore[union-attr]
        layout.change(lambda _: seen.append(gc.isenabled()))
    assert seen == [False] * len(seen)
    assert len(seen) >= 2
    assert gc.isenabled()


def test_no_garbage_is_collected_where_a_finalizer_would_wait_for_itself() -> None:
    """In the thread that changes the layout or settles the memory, whose missing pages wait until it is done."""
    play(collecting)


def in_and_out() -> None:
    """Scenario: regions come and go under the hands of those who touch."""
    stop = threading.Event()
    source = near()
    with served(source) as steady:

        def touch() -> None:
            page = 0
            while not stop.is_set():
                page = (page + 1) % PAGES
                if page == 0:
                    steady.region.madvise(mmap.MADV_DONTNEED)
                assert steady.region[page * PAGE : page * PAGE + 8] in (word(page), bytes(8))

        threads = [threading.Thread(target=touch) for _ in range(2)]
        for thread in threads:
            thread.start()
        for number in range(100):
            with served(Slow(SIZE) if number % 2 else source, on_exit="zeros") as monitor:
                readers = [
                    threading.Thread(target=touchers.free().sum, args=(monitor.region.address + n * 64 * PAGE, 64))
                    for n in range(4)
                ]
                for reader in readers:
                    reader.start()
                assert monitor.region[PAGE] == 2
            for reader in readers:
                reader.join()
        stop.set()
        for thread in threads:
            thread.join()


def test_regions_that_come_and_go() -> None:
    """While others are being touched, and while they are touched themselves."""
    play(in_and_out)


def after_leaving() -> None:
    """Scenario."""
    with served(near()) as monitor:
        assert monitor.region[0] == 1
    assert monitor.region[0] == 1
    print("so far", flush=True)
    monitor.region[PAGE]


def test_a_missing_page_after_leaving() -> None:
    """It is SIGBUS, with the line."""
    output, errors = play(after_leaving, status=-signal.SIGBUS)
    assert "so far" in output
    assert "in after_leaving" in errors


def forked() -> None:
    """Scenario."""
    source, before = Never(), touchers.free().sigbus()
    with served(near()) as monitor, served(source, on_exit="zeros") as slow:
        assert touchers.free().sigbus() != before
        threads = [threading.Thread(target=peek, args=(slow.region.address + n * PAGE,)) for n in range(4)]
        for thread in threads:
            thread.start()
        eventually(lambda: source.asked, 4)
        assert monitor.region[0] == 1
        pid = os.fork()
        if pid == 0:
            status = 1
            if touchers.free().sigbus() == before:
                with served(near()) as own:  # the table is empty, and can be used
                    status = 0 if own.region[5 * PAGE] == 6 else 2
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        pid = os.fork()
        if pid == 0:
            faulthandler.disable()
            _ = monitor.region[PAGE]
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGSEGV
        pid = os.fork()
        if pid == 0:
            with pytest.raises(aiouffd.ClosedError):
                monitor.statistics()
            monitor.__exit__(None, None, None)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert monitor.region[PAGE] == 2
    for thread in threads:
        thread.join()


def test_a_forked_child() -> None:
    """It does not have the region, has SIGBUS as it was, and may serve regions of its own; its parent is served on."""
    play(forked)


# The end


def ending(how: str) -> None:
    """Scenario: the program ends inside the block."""
    source = Never()
    monitor = served(near() if how == "late, at hand" else source).__enter__()
    if how == "waiting":
        for n in range(4):
            threading.Thread(target=lambda n=n: monitor.region[n * PAGE], daemon=True).start()
            threading.Thread(target=peek, args=(monitor.region.address + n * PAGE,), daemon=True).start()
        eventually(lambda: source.asked, 4)
    elif how.startswith("late"):
        weakref.finalize(monitor, print, "finalized", monitor.region[PAGE] if how == "late, at hand" else "")

        class Last:
            def __init__(self, region: aiouffd.Region) -> None:
                self.region = region

            def __del__(self, word: bytes = word(5), write: Any = os.write) -> None:
                write(1, b"right" if self.region[5 * 4096 : 5 * 4096 + 8] == word else b"wrong")

        sys.last = Last(monitor.region)  # type: ignore[attr-defined]
    sys.monitor = monitor  # type: ignore[attr-defined]
    print("ends", flush=True)


@pytest.mark.parametrize("how", ["idle", "waiting", "late, at hand", "late, far"])
def test_a_program_that_ends_without_leaving(how: str) -> None:
    """It ends, whoever waits. What is at hand is there to the last; what is not is told, and SIGBUS."""
    output, errors = play(ending, how, status=-signal.SIGBUS if how == "late, far" else 0)
    assert "ends" in output
    assert ("right" in output) == (how == "late, at hand")
    assert ("while the interpreter ends" in errors) == (how == "late, far")


# Python's own modes


@pytest.mark.parametrize("options", [["-X", "dev"], ["-X", "faulthandler"], ["-X", "dev", "-W", "error"]])
def test_modes_of_python(options: list[str]) -> None:
    """With its debug hooks, and with faulthandler from the beginning."""
    script = """
import asyncio, sys, warnings
warnings.filterwarnings("ignore", "emptied pages")
sys.path[:0] = sys.argv[1:]
import test_in_thread as tests
tests.every_source("buffer", 0, "")
tests.every_source("read_nowait", 2 << 20, "")
asyncio.run(tests.handlers())
tests.far_away()
"""
    here = Path(__file__).parent
    command = [sys.executable, *options, "-c", script, str(here), str(here.parent)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
