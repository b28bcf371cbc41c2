"""The rows: what is measured, beside whom, and the bar it is held against."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import attrs
import numpy as np

import aiouffd
from aiouffd.kernel.memory import address_of
from benchmarks import clock, far, fuse, guest, in_thread, monitors, programs, served
from benchmarks.contestants import PAGE, Arena, bare, buffer, c_poll, c_spin, content, many, monitored, warm
from benchmarks.native import touch

MIB = 1 << 20


@attrs.frozen
class Bar:
    """A bound on the ratio of ours to a peer."""

    peer: str
    limit: float
    at_least: bool = False

    def holds(self, ratio: float) -> bool:
        """Tell whether a ratio is within the bound."""
        return ratio >= self.limit if self.at_least else ratio <= self.limit


@attrs.frozen
class Row:
    """One line of the table.

    Attributes:
        name: for `--rows`.
        title: what is measured.
        unit: of each figure; smaller is better.
        contestants: name -> a function that runs once and returns a figure. "aiouffd" is ours.
        bars: what ours is held against.
        repeats: rounds, where they are not as many as usual.
        left_out: contestants that cannot run on this machine -> why; under "aiouffd" the row cannot.
        remark: asks for what a reader must know of this machine's figures, or None.
        setup: how ours is configured.
    """

    name: str
    title: str
    unit: str
    contestants: dict[str, Callable[[], float]]
    bars: tuple[Bar, ...] = ()
    repeats: int | None = None
    left_out: dict[str, str] = attrs.field(factory=dict)
    remark: Callable[[], str | None] = lambda: None
    setup: str = "defaults"


def shuffled(size: int, seed: int = 1) -> np.ndarray:
    """Return the numbers of all pages in random order."""
    return np.random.default_rng(seed).permutation(size // PAGE).astype(np.uint32)


Serve = Callable[[int], contextlib.AbstractContextManager[Arena]]


def touching(serve: Serve, size: int, threads: int) -> Callable[[], float]:
    """Return a contestant: microseconds a page, all pages touched in random order."""

    def once() -> float:
        pages = shuffled(size)
        warm(size)
        with serve(size) as arena:
            return touch(arena.address, pages, threads) / len(pages) * 1e6

    return once


def processor(serve: Serve, size: int, threads: int) -> Callable[[], float]:
    """Return a contestant: microseconds of processor time of the handler a fault."""

    def once() -> float:
        pages = shuffled(size)
        warm(size)
        with serve(size) as arena:
            before = arena.cpu()
            touch(arena.address, pages, threads)
            return (arena.cpu() - before) / len(pages) * 1e6

    return once


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


def sequential_row(*, quick: bool) -> Iterator[Row]:
    """A file in the page cache, in order, with defaults."""
    size = (64 if quick else 1024) * MIB
    pages = np.arange(size // PAGE, dtype=np.uint32)
    directory = tempfile.TemporaryDirectory(prefix="aiouffd-benchmark-")
    path = Path(directory.name) / "file"

    def ours() -> float:
        if not path.exists():
            path.write_bytes(content(size).map or b"")
            os.sync()  # or its write-back would be measured
        warm(size)
        with monitored(size, aiouffd.FileSource(path)) as arena:
            return touch(arena.address, pages) / len(pages) * 1e6

    def copy() -> float:
        source = address_of(content(size).map)
        warm(size)
        region = aiouffd.Region(size)
        with aiouffd.Userfaultfd() as uffd:
            uffd.register(region.address, size, aiouffd.RegisterMode.MISSING)
            before = time.perf_counter()
            for at in range(0, size, 2 * MIB):
                done = uffd.try_copy(region.address + at, source + at, 2 * MIB, 0)
                if done != 2 * MIB:
                    raise AssertionError(done)
            seconds = time.perf_counter() - before
            touch(region.address, pages)
        return seconds / len(pages) * 1e6

    def mapped(file: Path) -> float:
        array = np.memmap(file, np.uint8, "r")
        return touch(array.ctypes.data, pages) / len(pages) * 1e6

    def through_fuse() -> float:
        warm(size)
        with fuse.mounted(path) as shown:
            return mapped(shown)

    contestants = {
        "aiouffd": ours,
        "COPY in 2 MiB calls": copy,
        "pyfuse3 + mmap": through_fuse,
        "mmap of the file": lambda: mapped(path),
    }
    why = fuse.unavailable()
    if why is not None:
        del contestants["pyfuse3 + mmap"]
    yield Row(
        "sequential",
        f"sequential touch of {size // MIB} MiB, file source, page cache warm",
        "us/page",
        contestants,
        (Bar("COPY in 2 MiB calls", 1.30),),
        left_out={} if why is None else {"pyfuse3 + mmap": why},
    )
    directory.cleanup()


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
        (Bar("one descriptor", 1.20),),
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


def clients_row(*, quick: bool) -> Iterator[Row]:
    """Two hundred clients of one server, touches random over all."""
    size = (8 if quick else 64) * MIB
    yield Row(
        "serve-200",
        "200 clients of `aiouffd serve`, 1 toucher, random over all",
        "us/page",
        {
            "aiouffd": touching(lambda size: served.clients(size, 200), size, 1),
            "one client": touching(lambda size: served.clients(size, 1), size, 1),
        },
        setup="aiouffd serve --readahead 0",
    )


def restore_rows(*, quick: bool) -> Iterator[Row]:
    """A process that CRIU restores lazily, until it has read all its memory."""
    size = (8 if quick else 64) * MIB
    for name, when, again in (("criu", "", False), ("criu-again", ", within a second of another", True)):
        why = served.restore_unavailable(again=again)
        yield Row(
            name,
            f"lazy restore and full scan of {size // MIB} MiB{when}",
            "ms",
            {
                "aiouffd": served.restoring(served.our_daemon, size, again=again),
                "criu lazy-pages": served.restoring(served.own_daemon, size, again=again),
            },
            (Bar("criu lazy-pages", 1.0),),
            left_out={} if why is None else {"aiouffd": why},
            setup="aiouffd lazy-pages",
        )


def program_rows(*, quick: bool) -> Iterator[Row]:  # noqa: ARG001 - as all makers of rows
    """Programs as users restore them."""
    peer = "criu lazy-pages"
    for name in programs.PROGRAMS:
        why = programs.unavailable(name)
        ours, theirs = (programs.figures(name, daemon) for daemon in (served.our_daemon, served.own_daemon))
        for index, until in enumerate(("the first answer", "the daemon has ended")):
            yield Row(
                f"{name}-{'end' if index else 'answer'}",
                f"lazy restore of {name}, until {until}",
                "ms",
                {"aiouffd": ours[index], peer: theirs[index]},
                (Bar(peer, 1.0),),
                left_out={} if why is None else {"aiouffd": why},
                setup="aiouffd lazy-pages",
            )


def rows(*, quick: bool) -> Iterator[Row]:
    """Return all rows; a row's files live as long as it is being worked on."""
    for make in (
        random_rows,
        sequential_row,
        guest_row,
        latency_row,
        far_rows,
        in_thread_rows,
        replay_row,
        clients_row,
        restore_rows,
        program_rows,
        descriptors_row,
        memory_row,
        start_rows,
        pieces_row,
        monitors_rows,
        recovery_row,
    ):
        yield from make(quick=quick)
