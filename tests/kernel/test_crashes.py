"""`monitor.crashes`: a touch that ends the process says which Monitor, and what to do."""

from __future__ import annotations

import asyncio
import faulthandler
import mmap
import multiprocessing
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from pattern import PAGE, Pattern, content, word
from scenario import play

import aiouffd

SIZE = 1 << 20


def engine_of(name: str) -> Any:
    """Return an engine by its name."""
    return {"pager": aiouffd.Pager, "in_thread": aiouffd.InThread, "in_process": aiouffd.InProcess}[name]()


def touched_later(name: str, how: str) -> None:
    """Scenario: a page that is missing is touched after the block."""
    faulthandler.disable()  # a user's program has not enabled it
    region = aiouffd.Region(SIZE)
    source = Pattern(SIZE)

    def leave() -> None:
        with aiouffd.Monitor(region, source, engine=engine_of(name), readahead=0):
            assert region[3 * PAGE] == 4

    async def leave_on_a_loop() -> None:
        async with aiouffd.Monitor(region, source, engine=engine_of(name), readahead=0) as monitor:
            await monitor.prefetch(3 * PAGE, PAGE)

    if how == "async":
        asyncio.run(leave_on_a_loop())
    else:
        leave()
    assert region[3 * PAGE] == 4
    print("left", flush=True)
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    region[5 * PAGE + 1]


@pytest.mark.parametrize(
    ("name", "how"),
    [("pager", "plain"), ("pager", "async"), ("in_thread", "plain"), ("in_thread", "async"), ("in_process", "async")],
)
def test_a_touch_after_the_block(name: str, how: str) -> None:
    """The process ends; standard error has the Monitor, the line where it was left, and the line that touched."""
    output, errors = play(touched_later, name, how, status=-signal.SIGBUS)
    assert output == "left\n"
    where = rf"was left at {re.escape(__file__)}:\d+, in leave"
    assert len(re.findall(rf"byte {5 * PAGE + 1} of a region\. The Monitor of <Region .* {where}", errors)) == 1
    assert 'on_exit="populate"' in errors
    assert "in touched_later" in errors
    if name == "pager":  # frames of threads that run on are not looked at: that could end by SIGSEGV
        assert "\nThread 0x" not in errors, errors


def opened_and_left(path: str) -> None:
    """Scenario: a view outlives the block of `open`."""
    Path(path).write_bytes(content(0, SIZE))

    def load() -> memoryview:
        with aiouffd.open(path, readahead=0) as region:
            return memoryview(region)

    load()[9 * PAGE]


def test_a_view_that_outlives_open(tmp_path: Path) -> None:
    """The line where it was left is the caller's, and not one of this package."""
    _, errors = play(opened_and_left, str(tmp_path / "data"), status=-signal.SIGBUS)
    assert re.search(rf"was left at {re.escape(__file__)}:\d+, in load;", errors)
    assert "FileSource" in errors
    assert "use `aiouffd.map`, which has no block" in errors


def nothing_said(how: str) -> None:
    """Scenario: what is missing is zeros, or nothing is; later, other memory is at the same place."""
    region = aiouffd.Region(SIZE)
    options: Any = {"on_exit": how}
    with aiouffd.Monitor(region, Pattern(SIZE), readahead=0, **options):
        assert region[0] == 1
    assert region[PAGE] == (0 if how == "zeros" else 2)
    child = os.fork()
    if child == 0:
        os._exit(region[2 * PAGE] != (0 if how == "zeros" else 3))
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("how", ["zeros", "populate"])
def test_nothing_is_said_where_nothing_is_wrong(how: str) -> None:
    """Nor are forked children kept away any more."""
    assert play(nothing_said, how) == ("", "")


def moved_and_left() -> None:
    """Scenario: the region has moved while it was served."""
    region = aiouffd.Region(SIZE)
    blocker = mmap.mmap(-1, SIZE)
    before = region.address
    with aiouffd.Monitor(region, Pattern(SIZE), readahead=0):
        region.resize(64 * SIZE)
    assert region.address != before, "it has not moved: the test shows nothing"
    assert blocker[0] == 0
    region[7 * PAGE]


def test_a_region_that_has_moved() -> None:
    """Its note has moved with it."""
    _, errors = play(moved_and_left, status=-signal.SIGBUS)
    assert f"byte {7 * PAGE} of a region" in errors


def forked(name: str, where: str) -> None:
    """Scenario: a child touches a region that is served, or was, for its parent."""
    region = aiouffd.Region(SIZE)
    options: Any = {"fork": "dontfork", "readahead": 0}
    with aiouffd.Monitor(region, Pattern(SIZE), engine=engine_of(name), **options):
        if where == "inside":
            child = os.fork()
            if child == 0:
                _ = region[5 * PAGE]
                os._exit(0)
    if where == "after":
        child = os.fork()
        if child == 0:
            _ = region[5 * PAGE]
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV


@pytest.mark.parametrize(("where", "words"), [("inside", "Use the default engine"), ("after", "was left at")])
@pytest.mark.parametrize("name", ["pager", "in_thread"])
def test_a_touch_in_a_forked_child(name: str, where: str, words: str) -> None:
    """It is SIGSEGV; standard error has the Monitor, the way out, and the line that touched."""
    _, errors = play(forked, name, where)
    assert errors.count(f"byte {5 * PAGE} of a region. The Monitor of ") == 1
    assert words in errors
    assert "in forked" in errors


def served_child() -> None:
    """Scenario: the child is served, and one that is forked after the block does not get what was missing."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Pattern(SIZE), fork="serve", readahead=0):
        child = os.fork()
        if child == 0:
            os._exit(region[5 * PAGE : 5 * PAGE + 8] != word(5))
        assert os.waitpid(child, 0)[1] == 0
    child = os.fork()
    if child == 0:
        _ = region[6 * PAGE]
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV


def test_a_child_that_is_served() -> None:
    """Nothing is said of it; of one that is forked later it is, and it reads no zeros."""
    _, errors = play(served_child)
    assert errors.count("was left at") == 1


def item(number: int) -> int:
    """Return a byte of the region that the pool's parent serves."""
    region: aiouffd.Region = globals()["region"]
    return region[number * PAGE]


def pool(fork: str) -> None:
    """Scenario: a pool of forked workers, made inside the block."""
    globals()["region"] = region = aiouffd.Region(SIZE)
    options: Any = {"fork": fork} if fork else {}
    monitor = aiouffd.Monitor(region, Pattern(SIZE), **options)
    with monitor, multiprocessing.get_context("fork").Pool(2) as workers:
        result = workers.map_async(item, range(4))
        if fork != "dontfork":
            assert result.get(20) == [1, 2, 3, 4]
        else:
            with pytest.raises(multiprocessing.TimeoutError):
                result.get(5)


@pytest.mark.parametrize("fork", ["", "serve", "dontfork"])
def test_a_pool_of_forked_workers(fork: str) -> None:
    """Served, as by default, it has the bytes. Else each worker says what to do, and the pool waits for ever."""
    _, errors = play(pool, fork)
    assert ("Use the default engine" in errors) == (fork == "dontfork")
