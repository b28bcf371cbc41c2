"""`Monitor` and `open` from the outside: what an application sees."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import mmap
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pattern import PAGE, Pattern, Slow, Touchers, content, left_while_touched, peek, word
from scenario import brought, ended, eventually, next_error, play, until
from web import nginx

import aiouffd
from examples.page_server import serving

# The main job


def four_threads_hold_the_gil(kind: str, size: int) -> None:
    """Scenario."""
    data = b"".join(word(page) * (PAGE // 8) for page in range(size // PAGE)) if kind in ("buffer", "file") else b""
    source: Any
    if kind == "buffer":
        source = aiouffd.BufferSource(data)
    elif kind == "zero":
        source = aiouffd.ZeroSource(size)
    elif kind == "file":
        path = Path(os.environ["AIOUFFD_TEST_DIRECTORY"]) / "input.bin"
        path.write_bytes(data)
        source = aiouffd.FileSource(path)
    else:
        source = aiouffd.ObjectSource(kind)
    del data
    region = aiouffd.Region(size)
    pages = list(range(size // PAGE))
    random.Random(3).shuffle(pages)
    wrong = []

    def touch(part: list[int]) -> None:
        for page in part:
            got = region[page * PAGE : page * PAGE + 8]  # mmap's own slice: with the GIL held
            if got != (bytes(8) if kind == "zero" else word(page)):
                wrong.append((page, got))

    with aiouffd.Monitor(region, source) as monitor:
        threads = [threading.Thread(target=touch, args=(pages[n::4],)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        monitor.check()
    assert not wrong, wrong[:5]


@pytest.mark.parametrize("kind", ["buffer", "file", "zero"])
def test_256_mib_in_random_order_from_four_threads_with_the_gil(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every page right, from each kind of source."""
    monkeypatch.setenv("AIOUFFD_TEST_DIRECTORY", str(tmp_path))
    play(four_threads_hold_the_gil, kind, 256 << 20, measured=False)


@pytest.mark.unmeasured
def test_64_mib_in_random_order_over_http(tmp_path: Path) -> None:
    """The same, from a web server."""
    size = 64 << 20
    files, work = tmp_path / "files", tmp_path / "work"
    files.mkdir()
    work.mkdir()
    with (files / "input.bin").open("wb") as file:
        for page in range(size // PAGE):
            file.write(word(page) * (PAGE // 8))
    with nginx(files, work) as url:
        play(four_threads_hold_the_gil, f"{url}/strong/input.bin", size, measured=False)


async def own_loop_thread_touches() -> None:
    """Scenario."""
    region = aiouffd.Region(1 << 20)
    async with aiouffd.Monitor(region, Slow(1 << 20)) as monitor:
        assert region[5 * PAGE] == 6  # in the loop's own thread, GIL held
        assert np.frombuffer(region, np.uint64)[::512].sum() == sum(range(1, 257))
        assert monitor.statistics().faults >= 1


def test_a_touch_from_the_loops_own_thread(loop: str) -> None:
    """`region[n]` in a coroutine, holding the GIL, gets its byte."""
    play(own_loop_thread_touches, loop=loop)


async def plain_and_async() -> None:
    """Scenario."""
    data = random.Random(1).randbytes(100_003)

    async with aiouffd.open(data) as region:
        assert len(region) == len(data)
        assert region[:] == data
        assert region.monitor is not None
    with aiouffd.open(data) as region:
        assert region[-1] == data[-1]
        assert peek(region.address + 98304, 4096) == data[98304:] + bytes(4096 - len(data[98304:]))


def test_open_works_with_and_without_a_loop(loop: str) -> None:
    """Any length; the tail of the last page is zeros."""
    play(plain_and_async, loop=loop)


async def prefetch_and_statistics() -> None:
    """Scenario."""
    size = 8 << 20
    region = aiouffd.Region(size)
    async with aiouffd.Monitor(region, Slow(size)) as monitor:
        await asyncio.gather(monitor.prefetch(0, size // 2), monitor.prefetch(size // 4, size // 4))
        seen = monitor.statistics()
        assert (seen.faults, seen.pages_prefetch, seen.bytes_fetched) == (0, 1024, 4 << 20)
        assert region[: size // 2] == content(0, size // 2)
        assert monitor.statistics().faults == 0
        assert region[size // 2] != 0
        # The source's millisecond, as a power of two.
        eventually(lambda: monitor.statistics().latency_ns(0.5) > 500_000, expected=True)
        for start, length in ((-1, 1), (0, size + 1), (size, 1)):
            with pytest.raises(ValueError, match="not within the region"):
                await monitor.prefetch(start, length)
    with pytest.raises(aiouffd.ClosedError):
        monitor.statistics()


def test_prefetch_brings_all_and_faults_nothing(loop: str) -> None:
    """What was prefetched is there without a fault, brought once; the statistics say so."""
    play(prefetch_and_statistics, loop=loop)


def larger_than_memory() -> None:
    """Scenario."""
    region = aiouffd.Region(1 << 40)
    with aiouffd.Monitor(region) as monitor:
        assert region[123 << 30] == 0
        assert region[(1 << 40) - 1] == 0
        region[5 << 30] = 7
        assert region[5 << 30] == 7
        assert monitor.statistics().pages_zero >= 3


def test_a_region_larger_than_memory() -> None:
    """A terabyte of zeros is no more work than a page of them; with no source, that is what it is."""
    play(larger_than_memory)


def zeros_among_data(kind: str) -> None:
    """Scenario: every second quarter of a MiB is zeros."""
    size, part = 64 << 20, 256 << 10
    data = b"".join(bytes(part) if at // part % 2 else content(at, part) for at in range(0, size, part))
    source: Any = aiouffd.BufferSource(data)
    if kind == "file":
        path = Path(os.environ["AIOUFFD_TEST_DIRECTORY"]) / "input.bin"
        path.write_bytes(data)
        source = aiouffd.FileSource(path)
    elif kind == "far":
        source = Slow(size)

        async def read(offset: int, length: int) -> bytes:
            return data[offset : offset + length]

        source.read = read
    region = aiouffd.Region(size)
    with aiouffd.Monitor(region, source) as monitor:
        assert region[:] == data
        pages = np.frombuffer(region, np.uint8)[::4096]
        pages[64] = 1  # zeros can be written to
        assert pages[64] == 1
        assert region[part + 1 : 2 * part] == bytes(part - 1)
        seen = monitor.statistics()
        assert seen.pages_zero * 4096 >= size * 0.3, seen
        resident = sum(
            int(line.split()[1])
            for line in Path("/proc/self/smaps").read_text().split(f"{region.address:x}-")[1].splitlines()[:20]
            if line.startswith("Rss:")
        )
        assert resident <= (size >> 10) * 0.7, resident


@pytest.mark.parametrize("kind", ["buffer", "file", "far"])
def test_zeros_of_a_source_cost_no_memory(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of zeros are mapped from the kernel's zero page, can be written to, and all bytes are right."""
    monkeypatch.setenv("AIOUFFD_TEST_DIRECTORY", str(tmp_path))
    play(zeros_among_data, kind)


# Leaving


def after_leaving(on_exit: str, address_of_missing: int) -> None:
    """Scenario: look at a page that was present and at one that was missing, when the block has been left."""
    size = 4 << 20
    region = aiouffd.Region(size)
    array = np.frombuffer(region, np.uint64)
    with aiouffd.Monitor(region, Pattern(size), readahead=0, on_exit=on_exit):  # type: ignore[call-overload]
        assert array[0] == 1
    assert array[0] == 1  # a view outlives it; what is present stays
    with pytest.raises(BufferError):
        region.close()
    print(int(array[address_of_missing // 8]))


@pytest.mark.parametrize(("on_exit", "found"), [("populate", 513), ("zeros", 0)])
def test_what_is_missing_at_the_end_is_settled(on_exit: str, found: int) -> None:
    """Populated from the source, or zeros, as asked."""
    output, _ = play(after_leaving, on_exit, 2 << 20)
    assert int(output) == found


def test_a_missing_page_is_sigbus_after_the_end() -> None:
    """By default a touch of what never came ends the process, with a traceback where faulthandler is on."""
    _, errors = play(after_leaving, "sigbus", 2 << 20, status=-signal.SIGBUS)
    assert "Bus error" in errors
    assert "after_leaving" in errors


def leave_while_waiting() -> None:
    """Scenario."""
    size = 4 << 20
    region = aiouffd.Region(size)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    answers: list[tuple[int, int]] = []

    def touch(page: int) -> None:
        _, write = os.pipe()  # one each: write(2) holds the pipe's lock while it waits for the page
        result = libc.write(write, region.address + page * PAGE, 1)
        answers.append((result, ctypes.get_errno()))

    with aiouffd.Monitor(region, Slow(size, 1000.0), readahead=0) as monitor:
        threads = [threading.Thread(target=touch, args=(page,)) for page in range(8)]
        for thread in threads:
            thread.start()
        while monitor.statistics().in_flight < 8:
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert answers == [(-1, 14)] * 8  # EFAULT


def test_leaving_lets_waiting_threads_go() -> None:
    """Threads that wait for a slow source are let go with an error, not with zeros, and nothing hangs."""
    play(leave_while_waiting)


def leave_while_touched(on_exit: str) -> None:
    """Scenario: a thread goes on touching, with the GIL held at each page, while the block is left."""
    size = 64 << 20
    region = aiouffd.Region(size)
    left_while_touched(region, aiouffd.Monitor(region, Pattern(size), readahead=0, on_exit=on_exit))  # type: ignore[call-overload]


@pytest.mark.parametrize(("on_exit", "status"), [("sigbus", -signal.SIGBUS), ("zeros", 0)])
def test_leaving_while_a_thread_touches_with_the_gil_does_not_hang(on_exit: str, status: int) -> None:
    """It gets what `on_exit` says, and not a pager that answers no more: that would stop whoever leaves, too."""
    _, errors = play(leave_while_touched, on_exit, status=status)
    assert ("in touch" in errors) == (status != 0)


def populate_fails() -> None:
    """Scenario: what could not be brought at the end."""
    region = aiouffd.Region(4 << 20)
    with (
        pytest.raises(aiouffd.SourceError),
        aiouffd.Monitor(region, Failing(4 << 20), on_exit="populate", retries=0),
    ):
        pass
    print(region[0])


def test_what_could_not_be_populated_is_sigbus() -> None:
    """And not zeros."""
    play(populate_fails, status=-signal.SIGBUS)


def nothing_is_left() -> None:
    """Scenario."""

    def count() -> tuple[int, int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text().count("\n")
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), maps

    def use(number: int) -> None:
        region = aiouffd.Region(1 << 20)
        on_exit = ("sigbus", "populate", "zeros")[number % 3]
        with aiouffd.Monitor(region, Pattern(1 << 20), on_exit=on_exit) as monitor:  # type: ignore[call-overload]
            pids.extend(monitor.pids)
            assert region[number * PAGE] == number + 1

    pids: list[int] = []
    for number in range(3):
        use(number)
    before = count()
    for number in range(3, 15):
        use(number)
    after = count()
    assert after[:2] == before[:2]
    assert after[2] <= before[2] + 4  # malloc's own
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.unmeasured
def test_nothing_leaks() -> None:
    """Descriptors, threads, mappings and processes are as before."""
    play(nothing_is_left)


# What bad input gets


def refusals() -> None:
    """Scenario."""
    region = aiouffd.Region(1 << 20)
    with aiouffd.Monitor(region, Pattern(1 << 20)):
        with pytest.raises(aiouffd.BusyError), aiouffd.Monitor(region, Pattern(1 << 20)):
            pass
        with pytest.raises(aiouffd.BusyError):
            region.close()
        assert region[PAGE] == 2
    with pytest.raises(TypeError, match=r"aiouffd\.Region"):
        aiouffd.Monitor(mmap.mmap(-1, PAGE))  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="on_exit"):
        aiouffd.Monitor(region, on_exit="explode")  # type: ignore[call-overload]
    with aiouffd.Monitor(aiouffd.Region(PAGE), Pattern(PAGE)) as monitor:
        with pytest.raises(aiouffd.BusyError, match="this Monitor a second time"):
            monitor.__enter__()
        assert monitor.region[0] == 1
    opened = aiouffd.open(Pattern(PAGE))
    for _ in range(2):  # one block behind the other is no second time
        with opened as found:
            with pytest.raises(aiouffd.BusyError, match=r"what aiouffd\.open has returned a second time"), opened:
                pass
            assert found[0] == 1
    with (
        pytest.raises(TypeError, match="async with"),
        aiouffd.Monitor(aiouffd.Region(PAGE), engine=aiouffd.InProcess()),
    ):
        pass
    lock = threading.Lock()

    class Stubborn:
        size = PAGE

        def __init__(self) -> None:
            self.lock = lock

        async def read(self, offset: int, length: int) -> bytes:
            return bytes(length)

    again = aiouffd.Region(PAGE)
    with pytest.raises(aiouffd.PagerStartError, match="InProcess"), aiouffd.Monitor(again, Stubborn()):
        pass
    with aiouffd.Monitor(again, Pattern(PAGE)):  # nothing was left behind
        assert again[0] == 1
    closed = aiouffd.Region(PAGE)
    closed.close()
    with pytest.raises(aiouffd.ClosedError), aiouffd.Monitor(closed, Pattern(PAGE)):
        pass


def test_wrong_use_is_a_typed_error() -> None:
    """Registered twice, closed while served, no region, what cannot travel: each says so, and nothing is left over."""
    play(refusals)


def bad_sources() -> None:
    """Scenario."""
    for url, words in (
        ("/no/such/file", "No such file"),
        ("/tmp", "directory"),
        ("http://127.0.0.1:1/x", "refuses connections"),
        ("nonsense://x/y", "scheme"),
    ):
        with pytest.raises(aiouffd.SourceError, match=words), aiouffd.open(url):
            pass
    with pytest.raises(aiouffd.SourceError, match="empty"), aiouffd.open(b""):
        pass


def test_sources_that_cannot_be_opened() -> None:
    """A missing file, a directory, a host that is down, an unknown scheme, nothing at all."""
    play(bad_sources)


def test_servers_that_cannot_be_used(tmp_path: Path) -> None:
    """A 404 and a server without Range are told apart, before anything is mapped."""
    (tmp_path / "x.bin").write_bytes(bytes(10000))
    with serving(tmp_path) as url, pytest.raises(aiouffd.SourceError, match="404"), aiouffd.open(f"{url}/nothing"):
        pass
    with (
        serving(tmp_path, "--no-range") as url,
        pytest.raises(aiouffd.SourceError, match="without Range"),
        aiouffd.open(f"{url}/x.bin"),
    ):
        pass


def server_restarts(directory: str) -> None:
    """Scenario."""
    with contextlib.ExitStack() as later:

        def start(port: str) -> None:
            later.enter_context(serving(Path(directory), "--port", port))

        with contextlib.ExitStack() as first:
            url = first.enter_context(serving(Path(directory)))
            region = later.enter_context(aiouffd.open(f"{url}/x.bin", readahead=0))
            assert region[0] == 1
        timer = threading.Timer(1.5, start, [url.rpartition(":")[2]])
        timer.start()
        assert peek(region.address + 5 * PAGE) == word(5)  # waits for the server; the timer needs the GIL
        timer.join()
        region.monitor.check()


def test_a_server_that_is_restarted(tmp_path: Path) -> None:
    """Whoever touches waits until it is back; nothing is poisoned."""
    (tmp_path / "x.bin").write_bytes(content(0, 1 << 20))
    play(server_restarts, str(tmp_path))


class Awkward(aiouffd.Handler):
    """Each page misbehaves in its own way."""

    async def pagefault(self, fault: aiouffd.Fault, batch: aiouffd.Batch) -> None:
        """Do what the page's number says."""
        page = fault.offset // PAGE
        if page == 0:
            raise RuntimeError("out of luck")
        if page == 1:
            return
        if page == 2:
            batch.copy(aiouffd.Range(fault.page.start + PAGE, PAGE), word(3) * 512)
        elif page == 4:
            batch.copy(fault.page, b"short")
        elif page == 5:
            await asyncio.sleep(60)
        else:
            batch.copy(fault.page, word(page) * 512)


def awkward_handlers() -> None:
    """Scenario."""
    libc = ctypes.CDLL(None)
    libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    _, write = os.pipe()
    region = aiouffd.Region(1 << 20)
    with aiouffd.Monitor(region, Awkward(), timeout=0.5) as monitor:
        results = [libc.write(write, region.address + page * PAGE, 1) for page in range(8)]
        assert results == [-1, -1, -1, 1, -1, -1, 1, 1]
        assert region[6 * PAGE : 8 * PAGE] == content(6 * PAGE, 2 * PAGE)
        reasons = []
        for _ in range(5):
            with pytest.raises(aiouffd.HandlerError) as caught:
                next_error(monitor)
            reasons.append(caught.value.reason)
            assert "Awkward" in caught.value.handler
            assert "offset" in caught.value.fault
        monitor.check()
        assert monitor.statistics().handler_errors == 5
    for reason, expected in zip(
        reasons, ("out of luck", "without resolving", "without resolving", "5 bytes for a range", "0.5 s"), strict=True
    ):
        assert expected in reason


def test_handlers_that_misbehave() -> None:
    """It raises, never resolves, resolves another page, gives short data, takes too long: only its page is poisoned."""
    _, errors = play(awkward_handlers)
    assert "out of luck" in errors


class Failing:
    """Fails where it is told to."""

    def __init__(self, size: int) -> None:
        self.size = size

    async def read(self, offset: int, length: int) -> bytes:
        """Fail for the page at 1 MiB, give too little for the one at 2 MiB, else give the bytes."""
        if offset <= 1 << 20 < offset + length:
            raise OSError(5, "bad sector")
        if offset <= 2 << 20 < offset + length:
            return content(offset, length - 1)
        return content(offset, length)


async def failing_sources() -> None:
    """Scenario."""
    libc = ctypes.CDLL(None)
    libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    _, write = os.pipe()

    size = 4 << 20
    region = aiouffd.Region(size)
    async with aiouffd.Monitor(region, Failing(size), retries=2) as monitor:
        with pytest.raises(aiouffd.SourceError, match="bad sector"):
            await monitor.prefetch(0, size // 2)
        assert libc.write(write, region.address + (1 << 20), 1) == -1
        with pytest.raises(aiouffd.SourceError) as caught:
            await asyncio.wait_for(monitor.wait_error(), 60)
        assert (caught.value.offset, caught.value.length) == (1 << 20, PAGE)
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == 5
        assert libc.write(write, region.address + (2 << 20), 1) == -1
        with pytest.raises(aiouffd.ShortReadError):
            await asyncio.wait_for(monitor.wait_error(), 60)
        for page in (0, 255, 257, 511, 513, 1023):  # the neighbours are none the worse
            assert region[page * PAGE : page * PAGE + 8] == word(page)
        assert monitor.statistics().source_retries >= 2
        waiting = asyncio.ensure_future(monitor.wait_error())
        await asyncio.sleep(0)
    with pytest.raises(aiouffd.ClosedError):
        await asyncio.wait_for(waiting, 60)


def test_a_source_that_fails_for_good(loop: str) -> None:
    """The page is poisoned, wait_error tells which bytes and why; a failed prefetch raises and poisons nothing."""
    _, errors = play(failing_sources, loop=loop)
    assert "bad sector" in errors


class Flaky(Slow):
    """Fails three reads of ten."""

    def __init__(self, size: int) -> None:
        super().__init__(size, 0.0)
        self.rng = random.Random(5)

    async def read(self, offset: int, length: int) -> bytes:
        """Give the bytes, mostly."""
        if self.rng.random() < 0.3:
            raise ConnectionResetError("reset by peer")
        return content(offset, length)


def flaky_source() -> None:
    """Scenario."""
    size = 8 << 20
    region = aiouffd.Region(size)
    with aiouffd.Monitor(region, Flaky(size), readahead=0, retries=12) as monitor:
        touchers = Touchers(region.address, [range(n, 2048, 64) for n in range(64)])
        touchers.join()
        assert not touchers.wrong
        assert monitor.statistics().source_retries > 500
        monitor.check()


def test_a_source_that_fails_now_and_then() -> None:
    """30 % of the reads fail: every byte is right, and nobody is told."""
    play(flaky_source)


# Its own loop


async def in_process() -> None:
    """Scenario."""
    size = 4 << 20
    region = aiouffd.Region(size)
    marks = []

    class Here(aiouffd.Handler):
        async def pagefault(self, fault: aiouffd.Fault, batch: aiouffd.Batch) -> None:
            await asyncio.sleep(0.001)
            marks.append(fault.offset)  # a closure of this process
            batch.copy(fault.page, content(fault.offset, PAGE))

    async with aiouffd.Monitor(region, Here(), engine=aiouffd.InProcess()) as monitor:
        assert monitor.pids == ()
        assert await asyncio.to_thread(peek, region.address + 9 * PAGE) == word(9)
        assert marks == [9 * PAGE]
        region.madvise(mmap.MADV_DONTNEED, 9 * PAGE, PAGE)
        assert await asyncio.to_thread(peek, region.address + 9 * PAGE) == bytes(8)
        await monitor.prefetch(0, 16 * PAGE)
        assert region[15 * PAGE] == 16
        assert monitor.statistics().faults == 2
    async with aiouffd.Monitor(aiouffd.Region(size), Pattern(size), engine=aiouffd.InProcess()) as monitor:
        address = monitor.region.address
        touchers = [asyncio.to_thread(peek, address + page * PAGE) for page in range(100, 164)]
        assert await asyncio.gather(*touchers) == [word(page) for page in range(100, 164)]


def test_in_process_serves_what_others_touch(loop: str) -> None:
    """The engine on the caller's loop; the region's own madvise tells it what the kernel does not."""
    play(in_process, loop=loop)


def handler_of_main() -> None:
    """Scenario: a script whose handler lives in `__main__`."""
    code = """
import aiouffd
class Mine(aiouffd.Handler):
    async def pagefault(self, fault, batch):
        batch.copy(fault.page, bytes([fault.offset // 4096]) * 4096)
region = aiouffd.Region(1 << 20)
with aiouffd.Monitor(region, Mine()):
    print(region[7 * 4096])
"""
    print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def test_a_handler_that_lives_in_main() -> None:
    """It travels by value: no `__main__` guard, no module."""
    output, _ = play(handler_of_main)
    assert output.split() == ["7"]


def events_reach_the_handler() -> None:
    """Scenario."""
    seen = Path(os.environ["AIOUFFD_TEST_DIRECTORY"]) / "events"

    class Telling(aiouffd.Handler):
        async def tell(self, text: str) -> None:
            with seen.open("a") as file:
                file.write(text + "\n")

        async def pagefault(self, fault: aiouffd.Fault, batch: aiouffd.Batch) -> None:
            batch.copy(fault.page, content(fault.offset, PAGE))

        async def fork(self, event: aiouffd.Fork) -> None:
            await self.tell("fork")

        async def remap(self, event: aiouffd.Remap) -> None:
            await self.tell(f"remap {event.length}")

        async def remove(self, event: aiouffd.Remove) -> None:
            await self.tell(f"remove {event.end - event.start}")

        async def unmap(self, event: aiouffd.Unmap) -> None:
            await self.tell("unmap")

    size = 1 << 20
    region = aiouffd.Region(size)
    with aiouffd.Monitor(region, Telling(), fork="serve") as monitor:
        assert region[PAGE] == 2
        region.madvise(mmap.MADV_DONTNEED, 0, 2 * PAGE)
        child = os.fork()
        if child == 0:
            os._exit(0 if region[: 4 * PAGE] == bytes(2 * PAGE) + content(2 * PAGE, 2 * PAGE) else 1)
        assert os.waitpid(child, 0)[1] == 0
        region.resize(2 << 20)
        assert region[8 * PAGE] == 9
        assert region[size] == 0
        statistics = monitor.statistics()
        assert (statistics.forks, statistics.removes) == (1, 1)
        eventually(lambda: seen.exists() and "fork" in seen.read_text(), expected=True)
    assert seen.read_text().split("\n")[:2] == [f"remove {2 * PAGE}", "fork"]


def test_layout_events_reach_a_handler_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """remove, fork, remap, unmap: the engine has applied them, an overridden coroutine is told."""
    monkeypatch.setenv("AIOUFFD_TEST_DIRECTORY", str(tmp_path))
    play(events_reach_the_handler)


def child_without_serving() -> None:
    """Scenario."""
    region = aiouffd.Region(1 << 20)
    with aiouffd.Monitor(region, Pattern(1 << 20), fork="dontfork"):
        assert region[0] == 1
        child = os.fork()
        if child == 0:
            _ = region[0]
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGSEGV
        subprocess.run(["true"], check=True, preexec_fn=os.getpid)  # a real fork: it is not held up


def test_a_forked_child_that_is_not_served_fails_loudly() -> None:
    """It has not got the region: SIGSEGV, never silent zeros; fork itself is not held up."""
    play(child_without_serving)


def a_failing_disk(path: str) -> None:
    """Scenario: the file is cut while it is served."""
    libc = ctypes.CDLL(None)
    libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    _, write = os.pipe()
    size = 4 << 20
    Path(path).write_bytes(content(0, size))
    with aiouffd.open(path, readahead=0) as region:
        assert region[PAGE] == 2
        os.truncate(path, 1 << 20)
        for offset in (2 << 20, (1 << 20) - PAGE):
            time.sleep(0.01)  # the source looks at the file at most once in a millisecond
            assert libc.write(write, region.address + offset, 1) == -1
            with pytest.raises(aiouffd.ShortReadError):
                next_error(region.monitor)
        assert region[PAGE] == 2


def test_a_file_that_is_cut_is_an_error_and_not_zeros(tmp_path: Path) -> None:
    """All pages that are still missing are poisoned: a file that was cut may have been written anew, too."""
    play(a_failing_disk, str(tmp_path / "x.bin"))


class Blocking(aiouffd.Handler):
    """Blocks its loop, for the page at 4096; in a way that nothing but a signal ends, for the one at 8192."""

    async def pagefault(self, fault: aiouffd.Fault, batch: aiouffd.Batch) -> None:
        """Sleep without await."""
        if fault.offset == PAGE:
            time.sleep(5)  # noqa: ASYNC251 - blocks the loop on purpose
        if fault.offset == 3 * PAGE:
            time.sleep(1000)  # noqa: ASYNC251 - as above
        if fault.offset == 2 * PAGE:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            while True:  # with the GIL held
                ctypes.PyDLL(None).sleep(1000)
        batch.copy(fault.page, content(fault.offset, PAGE))


def blocking_handler() -> None:
    """Scenario."""
    region = aiouffd.Region(1 << 20)
    with aiouffd.Monitor(region, Blocking()):
        assert region[PAGE] == 2
        assert region[4 * PAGE] == 5


def test_a_handler_that_blocks_its_loop_is_found() -> None:
    """Standard error says that the loop does not turn, and shows the line; the fault is served all the same."""
    _, errors = play(blocking_handler)
    assert "has not turned" in errors
    assert "pagefault" in errors
    assert re.search(r"Blocking .*blocks the event loop; it was given .* of 0x1000", errors)


def interrupted_handler() -> None:
    """Scenario."""
    libc = ctypes.CDLL(None)
    libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    _, write = os.pipe()
    region = aiouffd.Region(1 << 20)
    with aiouffd.Monitor(region, Blocking()) as monitor:
        assert libc.write(write, region.address + 3 * PAGE, 1) == -1
        with pytest.raises(aiouffd.HandlerError, match="has blocked the event loop"):
            next_error(monitor)
        assert region[4 * PAGE] == 5
        assert monitor.statistics().restarts == 0


@pytest.mark.nightly
def test_a_handler_that_blocks_for_ever_is_interrupted() -> None:
    """Its page is poisoned, the error says why, and the worker lives."""
    play(interrupted_handler)


@pytest.mark.nightly
def test_a_loop_that_never_turns_again_is_replaced() -> None:
    """Killed and replaced until five have died over the same fault: then its toucher gets SIGBUS."""
    _, errors = play(hopeless_handler, status=-signal.SIGBUS, deadline=200)
    assert "is killed" in errors
    assert "given up" in errors or "died with no fault resolved" in errors


def hopeless_handler() -> None:
    """Scenario."""
    region = aiouffd.Region(1 << 20)
    with aiouffd.Monitor(region, Blocking()):
        _ = region[2 * PAGE]


class Hanging(Slow):
    """Never answers for the page at 4096."""

    async def read(self, offset: int, length: int) -> bytes:
        """Give the bytes, or hang."""
        if offset == PAGE:
            await asyncio.sleep(1000)
        return content(offset, length)


def hanging_source() -> None:
    """Scenario."""
    libc = ctypes.CDLL(None)
    libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    _, write = os.pipe()
    region = aiouffd.Region(1 << 20)
    with aiouffd.Monitor(region, Hanging(1 << 20), readahead=0, timeout=0.2, retries=1) as monitor:
        assert libc.write(write, region.address + PAGE, 1) == -1
        with pytest.raises(aiouffd.SourceTimeoutError) as caught:
            next_error(monitor)
        assert "0.2 s" in str(caught.value)
        assert region[2 * PAGE] == 3


def test_a_source_that_hangs() -> None:
    """After its timeout and its retries the page is poisoned: SourceTimeoutError; the others are served."""
    play(hanging_source)


class Bounded:
    """Complains when it is asked for more at once than allowed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.reads = self.bytes = 0

    async def read(self, offset: int, length: int) -> bytes:
        """Count what is under way."""
        self.reads += 1
        self.bytes += length
        try:
            if self.reads > 4 or self.bytes > 1 << 20:
                raise AssertionError(f"{self.reads} reads, {self.bytes} bytes at once")
            await asyncio.sleep(0.002)
            return content(offset, length)
        finally:
            self.reads -= 1
            self.bytes -= length


async def backpressure() -> None:
    """Scenario."""
    size = 16 << 20

    region = aiouffd.Region(size)
    async with aiouffd.Monitor(
        region,
        Bounded(size),
        concurrent_reads=4,
        bytes_in_flight=1 << 20,
        readahead=64 << 10,
        retries=0,
    ) as monitor:
        prefetch = asyncio.ensure_future(monitor.prefetch(0, 4 << 20))
        touchers = Touchers(region.address, [range(1024 + n, 4096, 64) for n in range(64)])
        await prefetch  # a storm of faults does not starve it
        await asyncio.to_thread(touchers.join)
        assert not touchers.wrong
        monitor.check()
        assert monitor.statistics().source_errors == 0


def test_bounds_hold_in_a_storm(loop: str) -> None:
    """64 touchers and a prefetch: never more reads or bytes under way than allowed, and all of it arrives."""
    play(backpressure, loop=loop)


def too_late() -> None:
    """Scenario."""
    region = aiouffd.Region(PAGE)
    with aiouffd.Monitor(region, Slow(PAGE, 0.3)) as monitor:
        with pytest.raises(TimeoutError, match=r"\[0, 4096\) is not all there after 0.01 s; it goes on coming"):
            monitor.prefetch_sync(0, PAGE, 0.01)
        brought(monitor, PAGE)
        assert monitor.statistics().pages_prefetch == 1
        assert region[:8] == content(0, 8)
        assert monitor.statistics().faults == 0


def test_a_prefetch_that_is_late() -> None:
    """An error that says so; the pages come all the same."""
    play(too_late)


async def leave_in_the_middle() -> None:
    """Scenario."""
    size = 64 << 20
    region = aiouffd.Region(size)
    async with aiouffd.Monitor(region, Slow(size, 1000.0)) as monitor:
        prefetch = asyncio.ensure_future(monitor.prefetch(0, size))
        waiting = asyncio.ensure_future(monitor.wait_error())
        pids = monitor.pids
        await until(lambda: monitor.statistics().in_flight)
    with pytest.raises(aiouffd.ClosedError):
        await prefetch
    with pytest.raises(aiouffd.ClosedError):
        await waiting
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_leaving_in_the_middle_of_a_prefetch(loop: str) -> None:
    """ClosedError for whoever waits; no process is left."""
    play(leave_in_the_middle, loop=loop)


def child_leaves_the_block() -> None:
    """Scenario."""
    region = aiouffd.Region(1 << 20)
    child = 0
    try:
        with aiouffd.Monitor(region, Pattern(1 << 20), fork="serve") as monitor:
            child = os.fork()
            if child == 0:
                with pytest.raises(aiouffd.ClosedError, match="forked child"):
                    monitor.statistics()
                sys.exit(region[PAGE] - 2)  # goes through the parent's `with`
            assert os.waitpid(child, 0)[1] == 0
            assert region[2 * PAGE] == 3
            assert monitor.statistics().forks == 1
    except SystemExit as end:
        os._exit(int(str(end.code)))


def test_a_forked_child_that_leaves_the_block_ends_nothing() -> None:
    """The Monitor is its parent's: served on, and the child is told so when it asks."""
    play(child_leaves_the_block)


def leave_while_blocked(on_exit: Any) -> None:
    """Scenario: what blocks is interrupted by no signal."""
    region = aiouffd.Region(1 << 20)
    monitor = aiouffd.Monitor(region, Blocking(), on_exit=on_exit)
    with monitor:
        pids = monitor.pids
        asked = monitor._running().prefetch([(2 * PAGE, PAGE)])
        eventually(lambda: monitor.statistics().in_flight, 1)
    assert asked.done()
    assert all(ended(pid) for pid in pids)


@pytest.mark.parametrize("on_exit", ["zeros", "sigbus"])
def test_leaving_while_a_handler_blocks_the_loop(on_exit: str) -> None:
    """The worker is killed: its owner says why. No process is left behind, and no traceback is printed."""
    _, errors = play(leave_while_blocked, on_exit)
    assert "does not answer, and is killed" in errors
    assert "Traceback" not in errors
