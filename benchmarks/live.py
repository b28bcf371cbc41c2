"""Snapshots of memory in use: what those who write to it feel, beside C, and beside nobody."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import socket
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import aiouffd
from aiouffd.engine.mappings import Mapping
from aiouffd.handoff import firecracker
from aiouffd.kernel.abi import Feature, RegisterMode
from aiouffd.kernel.memory import address_of
from benchmarks.native import library, write
from benchmarks.row import MIB, Bar, Row, shuffled
from benchmarks.served import criu_rig, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["live_rows"]

_PACE_NS = 50_000  # 20,000 pages a second
_MODE_WP = 1


def fill(region: mmap.mmap) -> None:
    """Have all pages of a region there, of bytes that hardly compress."""
    block = np.random.default_rng(1).integers(0, 256, MIB, np.uint8).tobytes()
    for at in range(0, len(region), MIB):
        region[at : at + MIB] = (at >> 20).to_bytes(8, "little") + block[8:]


@contextlib.contextmanager
def memory(size: int) -> Iterator[tuple[aiouffd.Monitor, Path]]:
    """Give a Monitor of memory that is all there, in a pager of its own, and a folder."""
    with (
        tempfile.TemporaryDirectory(prefix="aiouffd-live-", dir="/var/tmp") as folder,
        aiouffd.Monitor(aiouffd.Region(size), engine=aiouffd.Pager(), on_exit="zeros") as monitor,
    ):
        fill(monitor.region)
        yield monitor, Path(folder)


@contextlib.contextmanager
def served(size: int) -> Iterator[tuple[int, Callable[[str, str | None], float]]]:
    """Give the address of a server's client, whose memory is a file that is all there; and what captures it.

    That takes a name and that of a base, and returns the milliseconds for which writes were held back.
    """
    features = Feature.EVENT_REMOVE | Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM
    with (
        tempfile.TemporaryDirectory(prefix="aiouffd-live-", dir="/var/tmp") as folder,
        serving(Path(folder)) as control,
        aiouffd.Userfaultfd(features) as uffd,
        socket.socket(socket.AF_UNIX) as connection,
    ):
        region, source, path = aiouffd.Region(size, shared=True), Path(folder, "source"), str(Path(folder, "vm"))
        fill(region)
        with source.open("wb") as file:
            file.truncate(size)
        uffd.register(region.address, size, RegisterMode.MISSING | RegisterMode.WP)
        control.ask("POST", "/v1/sessions", {"name": "vm", "socket": path, "source": str(source)})
        connection.connect(path)
        message = firecracker.encode([Mapping(region.address, region.address + size, 0)], mmap.PAGESIZE)
        socket.send_fds(connection, [message], [uffd.fileno(), region.fd])
        criu_rig.until(lambda: control.ask("GET", "/v1/sessions/vm")["clients"], "client")

        def capture(name: str, base: str | None) -> float:
            new = {"whole": True} if base is None else {"base": f"{folder}/{base}"}
            taken = control.ask("POST", "/v1/sessions/vm/snapshot", {"destination": f"{folder}/{name}", **new})
            return float(taken["pause_ns"] / 1e6)

        yield region.address, capture


@contextlib.contextmanager
def writing(address: int, pages: np.ndarray, interval_ns: int) -> Iterator[list[float]]:
    """Have a thread write to pages, from the block's beginning; how many seconds it took is there at its end."""
    took: list[float] = []
    thread = threading.Thread(target=lambda: took.append(write(address, pages, interval_ns)))
    thread.start()
    yield took
    thread.join()


def pause(size: int) -> float:
    """Return the milliseconds for which writes are held back; one page in a hundred was written since the base."""
    with memory(size) as (monitor, folder):

        def capture(name: str, base: str | None) -> float:
            return monitor.snapshot_sync(folder / name, base=None if base is None else folder / base).pause_ns / 1e6

        return _pause(size, monitor.region.address, capture)


def pause_served(size: int) -> float:
    """Return the same of a server's client, whose memory is a file."""
    with served(size) as (address, capture):
        return _pause(size, address, capture)


def _pause(size: int, address: int, capture: Callable[[str, str | None], float]) -> float:
    capture("base.snap", None)
    write(address, shuffled(size, seed=2, share=0.01))
    with writing(address, shuffled(size, seed=3, share=0.02), _PACE_NS):
        return capture("next.snap", "base.snap")


async def first_writes(size: int) -> float:
    """Return the microseconds of a first write to a page that is protected and not read yet."""
    with memory(size) as (monitor, folder):
        task = asyncio.create_task(monitor.snapshot(folder / "plain", rate=size / 600))
        await asyncio.sleep(1)
        pages = shuffled(size, share=0.05)
        spent = await asyncio.to_thread(write, monitor.region.address, pages)
        assert not task.done()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    return spent / len(pages) * 1e6


def kept_by_c(size: int) -> float:
    """Return the same beside a thread in C that spins, copies each page, and lifts its protection."""
    region, kept, pages = aiouffd.Region(size), mmap.mmap(-1, size), shuffled(size, share=0.05)
    fill(region)
    fill(kept)  # memory that is warm
    uffd = aiouffd.Userfaultfd(Feature.PAGEFAULT_FLAG_WP)
    with uffd:
        uffd.register(region.address, size, RegisterMode.WP)
        uffd.try_writeprotect(region.address, size, _MODE_WP)
        spinner = threading.Thread(target=library().keep_pages, args=(uffd.fileno(), address_of(kept), region.address))
        spinner.start()
        spent = write(region.address, pages)
    spinner.join()
    return spent / len(pages) * 1e6


def paced(size: int, *, snapshot: bool) -> float:
    """Return the microseconds a page of a writer who would write 20,000 new pages a second."""
    with memory(size) as (monitor, folder):
        pages = shuffled(size, share=0.1)
        with writing(monitor.region.address, pages, _PACE_NS) as took:
            if snapshot:
                monitor.snapshot_sync(folder / "x.snap")
        return took[0] / len(pages) * 1e6


def peak(size: int) -> float:
    """Return the MiB that a snapshot takes at most, all of whose memory is overwritten meanwhile."""
    with memory(size) as (monitor, folder):
        worker = Path(f"/proc/{monitor.pids[1]}")
        (worker / "clear_refs").write_text("5")  # the most that it had is what it has
        before = _most(worker)
        with writing(monitor.region.address, shuffled(size), 0):
            monitor.snapshot_sync(folder / "x.snap")
        return (_most(worker) - before) / 1024


def _most(process: Path) -> int:
    return int(
        next(line for line in (process / "status").read_text().splitlines() if line.startswith("VmHWM")).split()[1]
    )


def live_rows(*, quick: bool) -> Iterator[Row]:
    """Return the rows of snapshots of memory in use."""
    size = (32 if quick else 1024) * MIB
    yield Row(
        "live-pause",
        f"writes are held back for a snapshot of {size // MIB} MiB, 1 % of it written since, page by page at random",
        "ms",
        {"aiouffd": lambda: pause(size), "10 ms": lambda: 10.0},
        (Bar("10 ms", 1.0),),
        repeats=3,
    )
    yield Row(
        "live-pause-served",
        f"the same of a client of {size // MIB} MiB, whose memory is a file",
        "ms",
        {"aiouffd": lambda: pause_served(size), "10 ms": lambda: 10.0},
        (Bar("10 ms", 1.0),),
        repeats=3,
        setup="aiouffd serve --control",
    )
    yield Row(
        "live-first-write",
        "the first write to a page that a snapshot has still to read",
        "us",
        {"aiouffd": lambda: asyncio.run(first_writes(size // 4)), "C spin": lambda: kept_by_c(size // 4)},
        (Bar("C spin", 1.3),),
        left_out={} if (os.cpu_count() or 1) > 1 else {"C spin": "a spinning thread needs a processor of its own"},
    )
    yield Row(
        "live-paced",
        f"a writer of 20,000 new pages a second, during a snapshot of {size // MIB} MiB",
        "us/page",
        {"aiouffd": lambda: paced(size, snapshot=True), "without": lambda: paced(size, snapshot=False)},
        (Bar("without", 1.25),),
        repeats=3,
    )
    yield Row(
        "live-peak",
        f"memory for a snapshot of {size // MIB} MiB, all of which is overwritten meanwhile",
        "MiB",
        {"aiouffd": lambda: peak(size), "256 MiB": lambda: 256.0},
        (Bar("256 MiB", 1.0),),
        repeats=3,
    )
