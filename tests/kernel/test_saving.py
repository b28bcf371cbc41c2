"""`monitor.saving`: a program that ends inside a block has saved what it has written, and what it has recorded."""

from __future__ import annotations

import asyncio
import atexit
import errno
import gc
from pathlib import Path
from typing import Any

import pytest
from kinds import poke
from pattern import PAGE, Pattern, content
from scenario import eventually, play

import aiouffd
from aiouffd.engine.ahead.trace import Trace
from aiouffd.kernel import memory

PAGES = 8
SIZE = PAGES * PAGE
ENGINES = {"pager": "Pager", "in_thread": "InThread"}  # imported where they are used: they end in that order, too


def entered(engine: str, source: Any) -> aiouffd.Monitor:
    """Return a Monitor that writes back, and is not left."""
    region = aiouffd.Region(SIZE, shared=engine == "pager")
    return aiouffd.Monitor(region, source, engine=getattr(aiouffd, ENGINES[engine])(), write_back=True).__enter__()


def ends(engine: str, path: str) -> None:
    """Scenario: the program ends, and writes once more when all is saved that was written before."""
    assert getattr(aiouffd, ENGINES[engine])  # is imported, and so ends behind what is registered from now on
    atexit.register(lambda: poke(monitor.region.address + 5 * PAGE, b"later   "))  # called behind that of the Monitor
    monitor = entered(engine, aiouffd.FileSource(path, writable=True))
    monitor.region[3 * PAGE : 3 * PAGE + 8] = b"earlier "


@pytest.mark.parametrize("engine", ENGINES)
def test_a_program_that_ends_loses_nothing(engine: str, tmp_path: Path) -> None:
    """What was written before its end is in the file then; the pager saves what was written in the middle of it."""
    path, model = tmp_path / "file", bytearray(content(0, SIZE))
    path.write_bytes(model)
    play(ends, engine, str(path), fresh=True)
    model[3 * PAGE : 3 * PAGE + 8] = b"earlier "
    assert path.read_bytes()[: 5 * PAGE] == model[: 5 * PAGE]
    if engine == "pager":
        eventually(lambda: path.read_bytes()[5 * PAGE : 5 * PAGE + 8], b"later   ")


def ends_on_its_loop(path: str, closed: bool) -> None:
    """Scenario: the program has run its loop for the last time."""
    source, loop = aiouffd.FileSource(path, writable=True), asyncio.new_event_loop()
    trace = f"{path}.trace"
    recording = aiouffd.Monitor(aiouffd.Region(SIZE), Pattern(SIZE), engine=aiouffd.InProcess(), record=trace)
    monitor = aiouffd.Monitor(aiouffd.Region(SIZE), source, engine=aiouffd.InProcess(), write_back=True)
    atexit.register(lambda: (monitor, recording))  # no collection of garbage comes before
    for each in (monitor, recording):
        loop.run_until_complete(each.__aenter__())
        loop.run_until_complete(asyncio.to_thread(poke, each.region.address + 3 * PAGE, b"earlier "))
    if closed:
        loop.close()


@pytest.mark.parametrize("closed", [False, True])
def test_a_program_that_runs_its_loop_no_more(closed: bool, tmp_path: Path) -> None:
    """It is run once more; where it is closed, the log says what is not saved."""
    path, model = tmp_path / "file", bytearray(content(0, SIZE))
    path.write_bytes(model)
    _, errors = play(ends_on_its_loop, str(path), closed, fresh=True)
    if not closed:
        model[3 * PAGE : 3 * PAGE + 8] = b"earlier "
    assert path.read_bytes() == model
    assert ("was not left when the program ended, and is not saved: Event loop is closed" in errors) is closed
    assert Trace.load(f"{path}.trace").offsets[0] == 3 * PAGE


def forgotten(path: str) -> None:
    """Scenario: nobody keeps a Monitor that is entered, and its region is unmapped."""

    def write() -> int:
        monitor = entered("pager", aiouffd.FileSource(path, writable=True))
        monitor.region[3 * PAGE : 3 * PAGE + 8] = b"earlier "
        return monitor.region.address

    address = write()
    gc.collect()
    eventually(lambda: memory.mapped(address, SIZE), [])


def test_what_was_unmapped_as_a_whole_is_saved(tmp_path: Path) -> None:
    """The file of the memory is as it was, though nobody maps it."""
    path, model = tmp_path / "file", bytearray(content(0, SIZE))
    path.write_bytes(model)
    play(forgotten, str(path), fresh=True)
    model[3 * PAGE : 3 * PAGE + 8] = b"earlier "
    eventually(path.read_bytes, bytes(model))


class Full(Pattern):
    """Takes nothing back."""

    async def write(self, _offset: int, _data: Any) -> None:
        """Refuse it."""
        raise OSError(errno.ENOSPC, "there is no room")


def cannot_be_saved(engine: str) -> None:
    """Scenario: the program ends, and the source takes nothing; Monitors of other engines were entered before."""
    others = [entered(other, Full(SIZE)) for other in ENGINES if other != engine]
    monitor = entered(engine, Full(SIZE))
    atexit.register(lambda: (others, monitor))  # no collection of garbage comes before
    monitor.region[3 * PAGE] = 99


@pytest.mark.parametrize("engine", ENGINES)
def test_what_cannot_be_saved_is_told(engine: str) -> None:
    """In the log."""
    _, errors = play(cannot_be_saved, engine, fresh=True)
    assert "was not left when the program ended, and is not saved: " in errors


def records(engine: str, path: str, pages: bool) -> None:
    """Scenario: the program ends, and records the touches of a region that is still mapped."""
    Path(path).with_name("file").write_bytes(content(0, SIZE))
    what = aiouffd.Recording(path, pages=True) if pages else path
    region = aiouffd.map(
        Path(path).with_name("file"), engine=getattr(aiouffd, ENGINES[engine])(), record=what, readahead=0
    )
    atexit.register(lambda: region)
    for page in (5, 2, 3):
        assert region[page * PAGE : page * PAGE + 8] == content(page * PAGE, 8)


@pytest.mark.parametrize("pages", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_was_recorded_is_a_recording(engine: str, pages: bool, tmp_path: Path) -> None:
    """Also with the bytes of its pages."""
    assert play(records, engine, str(tmp_path / "trace"), pages, fresh=True) == ("", "")
    assert list(Trace.load(tmp_path / "trace").offsets) == [5 * PAGE, 2 * PAGE, 3 * PAGE]
    assert (len((tmp_path / "trace").read_bytes()) > 3 * PAGE) is pages
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "trace"]
