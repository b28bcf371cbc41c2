"""The options of a Monitor together: each pair of their values is right, or refused when the Monitor is made."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pattern import PAGE, Pattern, content, peek
from scenario import play

import aiouffd
from aiouffd.server.server import Server

PAGES = 32
SIZE = PAGES * PAGE
ENGINES: dict[str, Any] = {"pager": aiouffd.Pager, "in_thread": aiouffd.InThread, "in_process": aiouffd.InProcess}


class Far(Pattern):
    """Its bytes must be waited for."""

    read_nowait = None  # type: ignore[assignment]


class Handles(aiouffd.Handler):
    """Fills pages with what the pattern has."""

    async def pagefault(self, fault: aiouffd.Fault, batch: aiouffd.Batch) -> None:
        """Fill it."""
        batch.copy(fault.page, content(fault.offset, fault.page.length))


SOURCES: dict[str, Any] = {
    "file": lambda path: aiouffd.FileSource(path / "file"),
    "far": lambda _: Far(SIZE),
    "handler": lambda _: Handles(),
}
# In this order a few combinations cover all pairs.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "fork": ("dontfork", "serve"),
    "trace": ("", "record", "replay"),
    "on_exit": ("sigbus", "populate", "zeros"),
    "user_mode_only": (False, True),
    "readahead": (0, 2 << 20),
    "source": tuple(SOURCES),
    "cut": (0, 100),
    "background": (False, True),
    "shared": (False, True),
    "track_writes": (False, True),
}
OF_A_SERVER = ("trace", "readahead", "source", "background")


def covering(values: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Return combinations in which each pair of values is at least once; each takes what brings most new pairs."""
    left = {
        frozenset(((one, a), (other, b)))
        for one, other in itertools.combinations(values, 2)
        for a, b in itertools.product(values[one], values[other])
    }
    rows = []
    while left:
        row = set(min(left, key=lambda pair: repr(sorted(pair, key=repr))))
        for name in [name for name in values if name not in dict(row)]:
            row.add(max(((name, value) for value in values[name]), key=partial(_new, frozenset(row), left)))
        left -= set(map(frozenset, itertools.combinations(row, 2)))
        rows.append(dict(row))
    return rows


def _new(row: frozenset[Any], left: set[frozenset[Any]], choice: tuple[str, Any]) -> int:
    return sum(frozenset((chosen, choice)) in left for chosen in row)


def poke(address: int) -> None:
    """Write a byte, without the GIL."""
    ctypes.CDLL(None).memset(ctypes.c_void_p(address), 1, 1)


async def tried(engine: Any, source: Any, chosen: dict[str, Any], path: Path) -> str:
    """Serve a region so; return "" if all is right, and why it was refused otherwise."""
    trace = chosen.pop("trace", "")
    if trace:
        chosen[trace] = path / trace
    report = path / "run.json"
    if chosen["cut"] and source is not None:  # else a server has the source, and counts for all its clients
        chosen["report"] = report
    region = aiouffd.Region(SIZE - chosen.pop("cut"), shared=chosen.pop("shared"))
    try:
        monitor = aiouffd.Monitor(region, source, engine=engine, **chosen)
    except ValueError as error:
        return str(error)
    async with monitor:
        for page in (3, 17, 4, PAGES - 1):
            assert await asyncio.to_thread(peek, region.address + page * PAGE, 64) == content(page * PAGE, 64)
        await monitor.prefetch(0, 8 * PAGE)
        if chosen["track_writes"]:
            assert monitor.collect() == []
            await asyncio.to_thread(poke, region.address + 5 * PAGE)
            assert monitor.collect() == [aiouffd.Range(5 * PAGE, PAGE)]
        if chosen["fork"] == "serve":
            child = os.fork()
            if child == 0:
                os._exit(region[20 * PAGE : 20 * PAGE + 64] != content(20 * PAGE, 64))
            assert os.waitstatus_to_exitcode((await asyncio.to_thread(os.waitpid, child, 0))[1]) == 0
        monitor.check()
    assert report.exists() == ("report" in chosen)
    report.unlink(missing_ok=True)
    if chosen["on_exit"] == "populate":
        end = len(region)
        assert region[6 * PAGE : end] == content(6 * PAGE, end - 6 * PAGE)
    return ""


async def all_pairs(kind: str, directory: str) -> None:
    """Scenario: what is refused is printed."""
    path = Path(directory)
    (path / "file").write_bytes(content(0, SIZE))
    with aiouffd.Monitor(
        aiouffd.Region(SIZE), Pattern(SIZE), record=path / "replay", engine=aiouffd.InThread()
    ) as made:
        _ = made.region[9 * PAGE], made.region[2 * PAGE]
    if kind != "served":
        for chosen in covering(OPTIONS):
            source = SOURCES[chosen.pop("source")](path)
            print(repr(await tried(ENGINES[kind](), source, chosen, path)))
        return
    async with Server(aiouffd.FileSource(path / "file"), path / "socket"):
        for chosen in covering({name: OPTIONS[name] for name in OPTIONS if name not in OF_A_SERVER}):
            print(repr(await tried(aiouffd.ServedBy(str(path / "socket")), None, chosen, path)))


@pytest.mark.parametrize("kind", [*ENGINES, "served"])
def test_each_pair(kind: str, tmp_path: Path) -> None:
    """Right bytes to threads and forked children, the writes that were made and no others, and all on leaving."""
    output, _ = play(all_pairs, kind, str(tmp_path))
    refused = [line for line in output.splitlines() if line != "''"]
    assert all("fork" in line for line in refused)
    assert bool(refused) == kind.startswith("in_")
