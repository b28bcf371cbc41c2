"""The rows: what is measured, beside whom, and the bar it is held against."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import tempfile
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import aiouffd
from benchmarks import clock, far, fuse, guest, in_thread, monitors, page_cache, trouble
from benchmarks.bounded import bounded_rows
from benchmarks.caches import cache_rows
from benchmarks.clones import clones_rows
from benchmarks.contestants import PAGE, Arena, bare, buffer, c_poll, c_spin, many, monitored, warm
from benchmarks.fairness import fairness_rows
from benchmarks.live import live_rows
from benchmarks.native import touch
from benchmarks.row import MIB, Bar, Row, Serve, processor, shuffled, touching
from benchmarks.rows_served import (
    clients_row,
    fetched_row,
    program_rows,
    restore_rows,
    serve_rows,
    sessions_row,
    upgrade_row,
)
from benchmarks.snapshots import snapshot_rows
from benchmarks.tensors import tensor_rows

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Iterator


def page_by_page(size: int) -> contextlib.AbstractContextManager[Arena]:
    """Ours, default pager, no readahead."""
    return monitored(size, readahead=0)


def random_rows(*, quick: bool) -> Iterator[Row]:
    """Single pages in random order, out of memory."""
    size = (8 if quick else 64) * MIB
    handlers: dict[str, Serve] = {"C poll": c_poll, "C spin": c_spin, "bare Python": bare, "aiouffd": page_by_page}
    yield Row(
        "random-1",
        "random 4 KiB touches, 1 toucher",
        "us/page",
        {name: touching(serve, size, 1) for name, serve in handlers.items()},
        (Bar("C poll", 0.45), Bar("C spin", 1.20)),
        setup="readahead=0",
    )
    defaults: dict[str, Serve] = {
        "C poll": c_poll,
        "C spin": c_spin,
        "readahead=0": page_by_page,
        "aiouffd": monitored,
    }
    for threads, bars in (
        (1, (Bar("readahead=0", 1.10), Bar("C spin", 1.20), Bar("C poll", 0.5))),
        (16, (Bar("C poll", 1.25),)),
    ):
        yield Row(
            f"default-{threads}",
            f"random 4 KiB touches at the default readahead, {threads} toucher{'s' if threads > 1 else ''}",
            "us/page",
            {name: touching(serve, size, threads) for name, serve in defaults.items()},
            bars,
        )
        yield Row(
            f"default-cpu-{threads}",
            f"processor time of the handler at the default readahead, {threads} toucher{'s' if threads > 1 else ''}",
            "us/page",
            {name: processor(serve, size, threads) for name, serve in defaults.items() if name != "C spin"},
            (Bar("C poll", 1.3 if threads == 1 else 1.2),),
        )
    yield Row(
        "random-16",
        "random 4 KiB touches, 16 touchers",
        "us/page",
        {name: touching(serve, size, 16) for name, serve in handlers.items()},
        (Bar("C poll", 1.15),),
        setup="readahead=0",
    )
    yield Row(
        "cpu-16",
        "processor time of the handler, 16 touchers",
        "us/fault",
        {name: processor(serve, size, 16) for name, serve in handlers.items() if name in ("C poll", "aiouffd")},
        (Bar("C poll", 1.40),),
        setup="readahead=0",
    )


def lone_rows(*, quick: bool) -> Iterator[Row]:
    """A fault that comes long after the last one: nobody looks for it, and the processors sleep."""
    size, touches = 64 * MIB, 50 if quick else 500

    def quantile(serve: Serve, share: float) -> Callable[[], float]:
        def once() -> float:
            pages, waits = shuffled(size)[:touches], np.zeros(touches, np.uint32)
            warm(size)
            with serve(size) as arena:
                for at in range(touches):
                    time.sleep(0.0015)
                    touch(arena.address, pages[at : at + 1], latencies=waits[at : at + 1])
            return float(np.quantile(waits, share)) / 1e3

        return once

    for name, title, share in (("lone", "median", 0.5), ("lone-99", "99th percentile", 0.99)):
        yield Row(
            name,
            f"a fault 1.5 ms after the last one, {title}",
            "us",
            {"C poll": quantile(c_poll, share), "aiouffd": quantile(monitored, share)},
            (Bar("C poll", 1.7),),
        )


def file_rows(*, quick: bool) -> Iterator[Row]:
    """A file in the page cache, in order, with defaults."""
    size = (64 if quick else 1024) * MIB
    why = fuse.unavailable()
    peer = "COPY in 2 MiB calls"
    with page_cache.file_of(size) as path:
        contestants: dict[str, Callable[[], float]] = {
            "aiouffd": partial(page_cache.touched, path),
            peer: partial(page_cache.copied, size),
            "pyfuse3 + mmap": partial(page_cache.shown_by_fuse, path),
            "mmap of the file": partial(page_cache.mapped, path),
        }
        if why is not None:
            del contestants["pyfuse3 + mmap"]
        yield Row(
            "sequential",
            f"sequential touch of {size // MIB} MiB, file source, page cache warm",
            "us/page",
            contestants,
            (Bar(peer, 1.30),),
            left_out={} if why is None else {"pyfuse3 + mmap": why},
        )
        for name, engine in (("prefetch", aiouffd.Pager), ("thread-prefetch", aiouffd.InThread)):
            yield Row(
                name,
                f"prefetch of {size // MIB} MiB, file source, page cache warm",
                "us/page",
                {
                    "aiouffd": partial(page_cache.prefetched, path, engine),
                    peer: partial(page_cache.copied, size),
                    "the same out of a mapping of the file": partial(page_cache.copied, size, path),
                },
                (Bar(peer, 1.15),),
                setup="defaults" if engine is aiouffd.Pager else "engine=InThread()",
            )


class Far:
    """A source that takes its time, as exactly as the kernel's timers are: the loop's own are whole milliseconds.

    With asyncio.sleep a read of 5 ms takes 5.8 on average when 64 are under way, which is not what is to be measured.
    """

    def __init__(self, size: int, latency: float) -> None:
        self.size = size
        self.latency = latency
        self._bytes = buffer(size)
        self._due: deque[tuple[float, asyncio.Future[None]]] = deque()
        self._timer = -1

    async def read(self, offset: int, length: int) -> memoryview:
        """Return the bytes, when it is time."""
        loop = asyncio.get_running_loop()
        if self._timer < 0:
            self._timer = clock.create()
            loop.add_reader(self._timer, self._tick)
        answer: asyncio.Future[None] = loop.create_future()
        self._due.append((time.monotonic() + self.latency, answer))
        if len(self._due) == 1:
            clock.ring(self._timer, self.latency)
        await answer
        return self._bytes.read_nowait(offset, length)

    async def aclose(self) -> None:
        """Be ready for another loop."""
        if self._timer >= 0:
            asyncio.get_running_loop().remove_reader(self._timer)
            os.close(self._timer)
            self._timer = -1
        self._due.clear()

    def _tick(self) -> None:
        os.read(self._timer, 8)
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            _, answer = self._due.popleft()
            if not answer.done():
                answer.set_result(None)
        if self._due:
            clock.ring(self._timer, max(self._due[0][0] - now, 1e-6))


def latency_row(*, quick: bool) -> Iterator[Row]:
    """Many touchers, a source with latency: are faults served in parallel?"""
    size = (8 if quick else 32) * MIB
    pages = shuffled(size)

    def ours() -> float:
        with monitored(size, Far(size, 0.005), readahead=0) as arena:
            return touch(arena.address, pages, 64) / len(pages) * 1e6

    yield Row(
        "latency-64",
        "64 touchers, random pages, a source with 5 ms latency",
        "us/page",
        {"aiouffd": ours, "ideal": lambda: 0.005 / 64 * 1e6},
        (Bar("ideal", 1.30),),
        setup="readahead=0",
    )


def far_rows(*, quick: bool) -> Iterator[Row]:
    """An object behind HTTP, and a source that takes its time."""
    size = (32 if quick else 1024) * MIB
    way = f"{size // MIB} MiB over loopback HTTP"
    peer = "a plain thread"

    def part(once: Callable[[int], far.Spent], index: int) -> Callable[[], float]:
        return lambda: once(size)[index] * 1e3

    for name, what, ours, limit in (
        ("far-prefetch", "prefetch of", far.prefetched, 1.2),
        ("far-order", "in order,", far.in_order, 1.4),
    ):
        for index, (suffix, title, bar) in enumerate((("", "", limit), ("-cpu", "processor time: ", 1.4))):
            contestants = {"aiouffd": part(ours, index), peer: part(far.plain_thread, index)}
            yield Row(name + suffix, f"{title}{what} {way}", "ms", contestants, (Bar(peer, bar),))
    pages = shuffled(64 * MIB)[: 1000 if quick else 10_000]

    def each(once: Callable[[int, np.ndarray], float]) -> Callable[[], float]:
        return lambda: once(64 * MIB, pages) / len(pages) * 1e6

    yield Row(
        "far-random",
        "random 4 KiB over loopback HTTP, 64 touchers",
        "us/page",
        {"aiouffd": each(far.random_pages), "obstore alone": each(far.obstore_alone)},
        (Bar("obstore alone", 1 / 0.9),),
        setup="readahead=0",
    )

    def filled(*, background: bool) -> Callable[[], float]:
        return lambda: far.filled(size, lambda: Far(size, 0.005), background=background) * 1e3

    yield Row(
        "far-background",
        f"background fill of {size // MIB} MiB, a source with 5 ms latency",
        "ms",
        {"aiouffd": filled(background=True), "a prefetch": filled(background=False)},
        (Bar("a prefetch", 1 / 0.95),),
    )
    yield Row(
        "far-touched",
        f"{size // MIB} MiB by HTTP, 2 ms away, touched at random by 8 threads while it is filled",
        "ms",
        {
            "aiouffd": lambda: far.at_random(size, background=True) * 1e3,
            "a prefetch first": lambda: far.at_random(size, background=False) * 1e3,
        },
        setup="background=True",
    )


def in_thread_rows(*, quick: bool) -> Iterator[Row]:
    """Faults resolved in the faulting thread."""
    size = (8 if quick else 64) * MIB
    why = in_thread.unavailable()
    left_out = {} if why is None else {"aiouffd": why}
    for name, title, threads, make, bars in (
        ("thread-python-1", "1 Python toucher", 1, in_thread.python_touchers, (Bar("C spin", 0.5),)),
        ("thread-python-4", "4 Python touchers", 4, in_thread.python_touchers, (Bar("C spin", 1.0),)),
        ("thread-native-1", "1 native toucher", 1, in_thread.native_touchers, ()),
        ("thread-native-16", "16 native touchers", 16, in_thread.native_touchers, ()),
    ):
        yield Row(
            name,
            f"`in_thread`: random 4 KiB touches, {title}",
            "us/page",
            {contestant: make(contestant, size, threads) for contestant in in_thread.CONTESTANTS},
            bars,
            left_out=left_out,
            setup="engine=InThread(), readahead=0",
        )
    yield Row(
        "thread-enter",
        "`in_thread`: to enter and leave a Monitor",
        "ms",
        {
            "aiouffd": in_thread.entering(aiouffd.InThread()),
            "2 ms": lambda: 2.0,
            "the pager": in_thread.entering(aiouffd.Pager()),
        },
        (Bar("2 ms", 1.0),),
        left_out=left_out,
        setup="engine=InThread()",
    )
    yield Row(
        "thread-latency",
        "`in_thread`: 32 Python touchers, 20 random pages each, a source with 2 ms latency",
        "ms",
        {"aiouffd": in_thread.far(Far(size, 0.002), size, 32, 20), "ideal": lambda: 20 * 2.0},
        (Bar("ideal", 2.0),),
        left_out=left_out,
        setup="engine=InThread(), readahead=0",
    )


def guest_row(*, quick: bool) -> Iterator[Row]:
    """A guest of KVM that goes through its memory once."""
    size = (8 if quick else 64) * MIB
    why = guest.unavailable()
    yield Row(
        "kvm",
        f"KVM guest that sums a byte of each page of {size // MIB} MiB",
        "us/page",
        {
            "aiouffd": guest.summing(monitored, size),
            "present memory": guest.summing(guest.present, size),
            "C poll": guest.summing(c_poll, size),
        },
        (Bar("present memory", 1 / 0.7), Bar("C poll", 0.5)),
        left_out={} if why is None else {"aiouffd": why},
        remark=lambda: guest.interpreted(size),
    )


def descriptors_row(*, quick: bool) -> Iterator[Row]:
    """A thousand descriptors on one loop, touches random over all."""
    size = (8 if quick else 64) * MIB

    def idle() -> float:
        with many(size, 1000) as arena:
            touch(arena.address, shuffled(size)[:1000])
            time.sleep(0.2)
            before = arena.cpu()
            time.sleep(2)
            return (arena.cpu() - before) / 2 * 100

    yield Row(
        "descriptors",
        "1,000 descriptors on one loop, 1 toucher, random over all",
        "us/page",
        {
            "aiouffd": touching(lambda n: many(n, 1000), size, 1),
            "one descriptor": touching(lambda n: many(n, 1), size, 1),
        },
        (Bar("one descriptor", 1.10),),
        setup="one Dispatcher, readahead=0",
    )
    yield Row(
        "idle",
        "processor time of an idle loop with 1,000 descriptors",
        "%",
        {"aiouffd": idle, "1 %": lambda: 1.0},
        (Bar("1 %", 1.0),),
        repeats=3,
        setup="one Dispatcher, readahead=0",
    )


def memory_row(*, quick: bool) -> Iterator[Row]:
    """Does the pager's memory grow with the region?"""
    touches = 2_000 if quick else 20_000

    def resident(size: int) -> Callable[[], float]:
        def once() -> float:
            with monitored(size, aiouffd.ZeroSource(size)) as arena:
                rng = np.random.default_rng(3)
                for page in rng.integers(0, size // PAGE, touches):
                    ctypes.string_at(arena.address + int(page) * PAGE, 1)
                status = Path(f"/proc/{arena.pid}/status").read_text()
            return int(status.split("VmRSS:")[1].split()[0]) / 1024

        return once

    def allowed() -> float:
        return resident(1 << 30)() + 10

    yield Row(
        "memory",
        f"pager's memory, 1 TiB region, {touches} random touches, against 1 GiB plus 10 MiB",
        "MiB",
        {"aiouffd": resident(1 << 40), "1 GiB + 10 MiB": allowed},
        (Bar("1 GiB + 10 MiB", 1.0),),
        repeats=3,
    )


def start_rows(*, quick: bool) -> Iterator[Row]:  # noqa: ARG001 - as all makers of rows
    """A process and its first Monitor, from the start of Python on."""
    peer = "Python with asyncio, uvloop and attrs"
    yield Row(
        "first",
        "a process that enters its first Monitor, touches a page and ends",
        "ms",
        {peer: partial(monitors.starting, "peer"), "aiouffd": partial(monitors.starting, "first")},
        (Bar(peer, 2.0),),
    )
    yield Row(
        "import",
        "processor time of `import aiouffd`",
        "ms",
        {
            "asyncio, uvloop and attrs": partial(monitors.importing, "peer"),
            "80 ms": lambda: 80.0,
            "aiouffd": partial(monitors.importing, "import"),
        },
        (Bar("80 ms", 1.0),),
    )


def pieces_row(*, quick: bool) -> Iterator[Row]:
    """What is brought ahead finds its addresses among many mappings."""
    yield Row(
        "pieces",
        f"to prefetch a page of memory in {monitors.MAPPINGS:,} pieces",
        "us",
        {"one piece": partial(monitors.bringing, 0), "aiouffd": partial(monitors.bringing, monitors.MAPPINGS)},
        (Bar("one piece", 1.5),),
        repeats=2 if quick else None,
    )


def monitors_rows(*, quick: bool) -> Iterator[Row]:
    """What the last of many Monitors of a process costs."""
    title = f"number {monitors.COUNT} of the Monitors of a process"
    repeats = 3 if quick else 15
    for name, what, unit, once, most in (
        ("monitors-enter", f"to enter {title}", "ms", monitors.entering, 5.0),
        ("monitors-leave", f"to leave {title}", "ms", monitors.leaving, 2.0),
        ("monitors-memory", f"memory of all pagers of {monitors.COUNT} Monitors (PSS)", "MiB", monitors.memory, 40.0),
    ):
        bar = f"{most:g} {unit}"
        yield Row(name, what, unit, {"aiouffd": once, bar: partial(float, most)}, (Bar(bar, 1.0),), repeats=repeats)


def recovery_row(*, quick: bool) -> Iterator[Row]:
    """How long a toucher waits when the worker is killed."""
    kills = 20 if quick else 100

    def quantile(share: float) -> Callable[[], float]:
        def once() -> float:
            size = 64 * MIB
            waits = []
            with monitored(size, readahead=0) as arena:
                monitor = arena.monitor
                assert monitor is not None
                for number in range(kills):
                    worker = monitor.pids[1]
                    os.kill(worker, signal.SIGKILL)
                    waits.append(touch(arena.address, np.array([number * 16], np.uint32)))
                    while monitor.pids[1] == worker:
                        time.sleep(0.001)
            return float(np.quantile(waits, share)) * 1e3

        return once

    yield Row(
        "recovery",
        "wait for a page when the worker is killed with -9",
        "ms",
        {"aiouffd": quantile(0.5), "p99": quantile(0.99)},
        repeats=3,
        setup="readahead=0",
    )


def replay_row(*, quick: bool) -> Iterator[Row]:
    """A recorded working set on a source with latency, touched again in the same order."""
    size = (32 if quick else 512) * MIB
    pages = shuffled(size)[: 1000 if quick else 20_000]
    directory = tempfile.TemporaryDirectory()
    trace = Path(directory.name) / "trace"
    with monitored(size, readahead=0, record=trace) as arena:
        touch(arena.address, pages, 1)

    def once(**options: Path) -> float:
        with monitored(size, Far(size, 0.001), readahead=0, **options) as arena:
            return touch(arena.address, pages, 1) * 1e3

    yield Row(
        "replay",
        f"{len(pages)} random pages, a source with 1 ms latency, replayed from a recording",
        "ms",
        {"aiouffd": lambda: once(replay=trace), "without": once},
        (Bar("without", 0.1),),
        repeats=3,
        setup="readahead=0, replay=",
    )
    directory.cleanup()


def trouble_rows(*, quick: bool) -> Iterator[Row]:
    """What others do must not cost."""
    size, pages = (8 if quick else 64) * MIB, 100 if quick else 1000
    yield Row(
        "failing",
        f"a page of a source with 1 ms latency behind {trouble.FAILING} reads that fail",
        "us/page",
        {
            "aiouffd": lambda: trouble.healthy_pages(size, pages, failing=True),
            "alone": lambda: trouble.healthy_pages(size, pages, failing=False),
        },
        (Bar("alone", 2.0),),
        setup=f"readahead=0, concurrent_reads={trouble.FAILING}",
    )
    yield Row(
        "offers",
        "pages offered to the kernel a page, while the process changes its layout",
        "pages",
        {"aiouffd": lambda: trouble.offers(Far(size, 0.005), size), "1": lambda: 1.0},
        (Bar("1", 1.05),),
        repeats=3,
    )


def rows(*, quick: bool) -> Iterator[Row]:
    """Return all rows; a row's files live as long as it is being worked on."""
    for make in (
        random_rows,
        lone_rows,
        file_rows,
        guest_row,
        latency_row,
        far_rows,
        snapshot_rows,
        bounded_rows,
        live_rows,
        tensor_rows,
        cache_rows,
        in_thread_rows,
        replay_row,
        clients_row,
        sessions_row,
        upgrade_row,
        clones_rows,
        fairness_rows,
        serve_rows,
        restore_rows,
        program_rows,
        fetched_row,
        trouble_rows,
        descriptors_row,
        memory_row,
        start_rows,
        pieces_row,
        monitors_rows,
        recovery_row,
    ):
        yield from make(quick=quick)
