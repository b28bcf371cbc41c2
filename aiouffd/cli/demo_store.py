"""`aiouffd demo --store`: a snapshot in two layers behind HTTP, which is opened cold, and again from a cache."""

from __future__ import annotations

import time
import urllib.request
from typing import TYPE_CHECKING

import attrs
import rich.console
import rich.progress
import rich.table

import aiouffd
from aiouffd.cli import demo_parts
from aiouffd.cli.demo_server import SENT
from aiouffd.store import create_sync

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rich.progress import Progress

    from aiouffd.engine.statistics import Statistics

__all__ = ["run"]

_WORDS = 512
_CHANGED = 100  # one chunk of so many differs in the second layer
_CHUNK = 64 << 10


@attrs.frozen
class _Visit:
    """What it took to open the snapshot, and to touch parts of it.

    Attributes:
        ready: seconds until it could be used.
        seconds: for the touches.
        sent: bytes that the server sent.
        seen: by the Monitor.
    """

    ready: float
    seconds: float
    sent: int
    seen: Statistics


def _stored(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _write(path: Path, store: Path, progress: Progress) -> tuple[int, int]:
    """Write the file as a snapshot, change it, and write it as a layer upon that; return the bytes of both layers."""
    size = path.stat().st_size

    def shown(doing: str) -> Callable[[int, int], None]:
        task = progress.add_task(doing, total=size)
        return lambda done, _: progress.update(task, completed=done)

    create_sync(path, store / "first.snap", progress=shown("writing the first layer"))
    first = _stored(store)
    with path.open("r+b") as file:
        for at in range(0, size, _CHANGED * _CHUNK):
            file.seek(at)
            file.write(b"changed"[: size - at])
    create_sync(path, store / "second.snap", base=store / "first.snap", progress=shown("writing what has changed"))
    return first, _stored(store) - first


def run(*, size: int, threads: int, touches: int, latency: float) -> int:
    """Run the demo; return the exit status."""
    console = rich.console.Console()
    with demo_parts.workplace() as directory:
        path, store = directory / "input.bin", directory / "snapshots"
        cache = aiouffd.ChunkCache(directory / "cache", 2 * size + (64 << 20))
        with rich.progress.Progress(*demo_parts.columns(), console=console) as progress:
            demo_parts.make_input(path, size, progress, _WORDS)
            layers = _write(path, store, progress)
            check = demo_parts.Check(path)
            visits = []
            with demo_parts.served(store, latency) as url:
                for _ in range(2):
                    before, opened = _sent(url), time.perf_counter()
                    with aiouffd.open(f"{url}/second.snap", cache=cache) as region:
                        ready = time.perf_counter() - opened
                        used = demo_parts.use(region, check, threads=threads, touches=touches, progress=progress)
                    visits.append(_Visit(ready, used[0], _sent(url) - before, used[1]))
            check.close()
        _report(console, size, layers, *visits)
        console.print(f"  touched      {check.touched.total:>13,} bytes, each time", highlight=False)
        return check.report(console)


def _sent(url: str) -> int:
    with urllib.request.urlopen(f"{url}/{SENT}") as answer:  # noqa: S310 - of the demo's own server
        return int(answer.read())


def _report(console: rich.console.Console, size: int, layers: tuple[int, int], cold: _Visit, warm: _Visit) -> None:
    """Print the figures."""
    console.print()
    for name, count in (("image", size), ("first layer", layers[0]), ("second layer", layers[1])):
        console.print(f"  {name:<12} {count:>13,} bytes ({count / size:.1%})", highlight=False)
    console.print()
    table = rich.table.Table("", "cold", "from the cache", "ratio", box=None, padding=(0, 2))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, unit, values in (
        ("usable after", "ms", [visit.ready * 1000 for visit in (cold, warm)]),
        ("touched in", "ms", [visit.seconds * 1000 for visit in (cold, warm)]),
        ("fetched", "bytes", [visit.sent for visit in (cold, warm)]),
        ("page faults", "", [visit.seen.faults for visit in (cold, warm)]),
    ):
        ratio = f"{values[1] / values[0]:.2f}" if values[0] else ""
        table.add_row(name, *(f"{value:,.0f} {unit}".rstrip() for value in values), ratio)
    console.print(table, highlight=False)
    console.print()
