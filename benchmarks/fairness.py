"""What a quiet client of a server waits for a page, alone and beside two that take all that they can."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import aiouffd
from benchmarks import far, served
from benchmarks.contestants import PAGE, child, content
from benchmarks.native import touch
from benchmarks.row import MIB, Bar, Row, shuffled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["fairness_rows", "quiet"]

_PAUSE = 0.002  # seconds between two touches of the quiet client
_AWAY = 0.002  # seconds to the web server
_TOUCHERS = 8  # of a storm
_COUNTED = 8 * MIB  # of its memory at once: after each, 8 threads begin anew, during which it asks for nothing
_AUTOGROUP = Path("/proc/sys/kernel/sched_autogroup_enabled")
_READY, _GO, _DONE = 1, 2, 3  # of the quiet client
_PATIENCE = 120.0  # seconds until it has touched all


def quiet(size: int, touches: int, storms: int, *, remote: bool, spins: bool = False, apart: bool = True) -> float:
    """Touch pages now and then, beside so many clients that do so all the time and are filled; return the p99 in us.

    Each of these is a process of its own. When a storm has all of its memory, it drops that and begins anew: it is a
    storm to the end.

    Args:
        size: bytes of each client's memory.
        touches: of the quiet one.
        storms: how many others there are.
        remote: the source is behind HTTP; else it is a file.
        spins: a process spins on each processor meanwhile, which nobody serves.
        apart: each process is in a session of its own, as services and virtual machines of a host are, or in a cgroup
            of its own, which is the same to the scheduler. Else all but the pager are in the session of this process.

    Raises:
        AssertionError: a client has ended, or a storm got nothing.
    """
    pages = shuffled(size)[: touches + 1]
    with contextlib.ExitStack() as stack:
        sockets = stack.enter_context(_sessions(size, storms + 1, remote=remote, apart=apart))
        come = memoryview(mmap.mmap(-1, PAGE)).cast("Q")  # pages of each storm, which counts them itself
        state = memoryview(mmap.mmap(-1, PAGE)).cast("Q")
        waits = np.frombuffer(mmap.mmap(-1, touches * 4), np.uint32)

        def begin(client: Callable[[], None]) -> None:
            def run() -> None:
                if apart:
                    os.setsid()
                client()

            stack.enter_context(child(run))

        begin(partial(_touch, sockets[0], size, pages, waits, state))
        served.criu_rig.until(lambda: state[0] == _READY, "quiet client")
        for number, path in enumerate(sockets[1:]):
            begin(partial(_storm, path, size, come[number : number + 1]))
        for processor in os.sched_getaffinity(0) if spins else ():
            begin(partial(_spin, processor))
        served.criu_rig.until(lambda: all(come[:storms]), "storms")
        before = list(come[:storms])
        state[0] = _GO
        served.criu_rig.until(lambda: state[0] == _DONE, "end of the quiet client", _PATIENCE)
        assert all(now > then for now, then in zip(come[:storms], before, strict=True)), "a storm has got nothing"
    return float(np.quantile(waits, 0.99)) / 1e3


def _touch(path: Path, size: int, pages: np.ndarray, waits: np.ndarray, state: memoryview) -> None:
    """Touch all pages but the last, which shows that it is served, now and then."""
    region = aiouffd.Region(size)
    with served.handed_over(path, region.address, size):
        touch(region.address, pages[-1:])
        state[0] = _READY
        while state[0] != _GO:
            time.sleep(_PAUSE)
        for at in range(len(waits)):
            time.sleep(_PAUSE)
            touch(region.address, pages[at : at + 1], latencies=waits[at : at + 1])
        state[0] = _DONE
        signal.pause()


def _storm(path: Path, size: int, come: memoryview) -> None:
    while True:
        region = aiouffd.Region(size)
        with served.handed_over(path, region.address, size):
            for pages in np.array_split(shuffled(size), max(size // _COUNTED, 1)):
                touch(region.address, pages, _TOUCHERS)
                come[0] += len(pages)
        region.close()


def _spin(processor: int) -> None:
    os.sched_setaffinity(0, {processor})
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # it would keep everything else away
    while True:
        pass


@contextlib.contextmanager
def _sessions(size: int, count: int, *, remote: bool, apart: bool) -> Iterator[list[Path]]:
    """Yield the sockets of so many sessions of one server, with one source; all but the first fill their clients."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        place = Path(directory)
        if remote:
            source = f"http://127.0.0.1:{stack.enter_context(far.served(content(size).fd, size, _AWAY))}/file"
        else:
            source = str(place / "memory.bin")
            Path(source).write_bytes(content(size).map or b"")
        client = stack.enter_context(served.serving(place, "--recent", "0", apart=apart))
        sockets = [place / str(number) for number in range(count)]
        for number, path in enumerate(sockets):
            new = {"name": path.name, "socket": str(path), "source": source, "readahead": 64 << 10 if number else 0}
            client.ask("POST", "/v1/sessions", {**new, "background": "max" if number else 0})
        yield sockets


def _no_groups() -> str | None:
    """Return a remark where a session is no group to the scheduler."""
    if _AUTOGROUP.exists() and _AUTOGROUP.read_text().strip() == "1":
        return None
    return "sched_autogroup_enabled is not 1: the scheduler does not know which processes belong together"


def fairness_rows(*, quick: bool) -> Iterator[Row]:
    """One quiet client, beside two storms of faults that are filled besides.

    It stands beside itself alone, and alone on processors that are as busy: what it waits for a processor then, no
    order of service can take from it. Where all are in one session, the scheduler shares the processors among threads,
    of which the storms have eight each: that has no bar.
    """
    size, touches = (64 if quick else 512) * MIB, 50 if quick else 500
    contestants = {"aiouffd": (2, False), "alone": (0, False), "alone, busy processors": (0, True)}
    for name, title, remote in (("fair", "of a file", False), ("fair-http", "by HTTP, 2 ms away", True)):
        for suffix, where, apart in (("", "each in a session", True), ("-together", "all in one session", False)):
            yield Row(
                name + suffix,
                f"a fault of a quiet client beside two storms, 99th percentile, {title}, {where}",
                "us",
                {
                    who: partial(quiet, size, touches, storms, remote=remote, spins=spins, apart=apart)
                    for who, (storms, spins) in contestants.items()
                },
                (Bar("alone", 2.0),) if apart else (),
                remark=_no_groups if apart else lambda: None,
                setup="aiouffd serve --control",
            )
