"""`aiouffd.map`: how long it is served, who ends it, and where else it can be had."""

from __future__ import annotations

import _thread
import atexit
import concurrent.futures
import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import odd_http
import pytest
from pattern import PAGE, Pattern, content
from scenario import ended, eventually, play

import aiouffd
from aiouffd.kernel import memory
from aiouffd.kernel.sigbus import Sentinel
from aiouffd.monitor import map as module

SIZE = 1 << 20
ENGINES = {"pager": aiouffd.Pager, "thread": aiouffd.InThread}


def mapped(engine: str, what: Any = None) -> aiouffd.Region:
    """Return a region of pages that can be told, served page by page."""
    return aiouffd.map(content(0, SIZE) if what is None else what, engine=ENGINES[engine](), readahead=0)


def is_left(monitor: aiouffd.Monitor) -> None:
    """Wait until a Monitor has been left, and its region is gone."""
    gone = (False, False, "a region that is gone")
    eventually(lambda: (monitor.serves_here, monitor in module._served, repr(monitor._held)), gone)


def used_without_a_block(engine: str) -> None:
    """Scenario: a function returns an array on what it has mapped."""

    def load() -> Any:
        return np.frombuffer(mapped(engine), np.uint64)

    gc.disable()
    array = load()
    assert [array[page * PAGE // 8] for page in (0, 9, 200)] == [1, 10, 201]
    monitor: Any = array.base if isinstance(array.base, aiouffd.Region) else array.base.obj
    monitor, pids = monitor.monitor, monitor.monitor.pids
    assert len(pids) == (2 if engine == "pager" else 0)
    threads = set(threading.enumerate())
    del array
    is_left(monitor)
    eventually(lambda: set(threading.enumerate()) <= threads, expected=True)
    assert all(ended(pid) for pid in pids)


@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_served_as_long_as_a_view_lives(engine: str) -> None:
    """And ends with the last one, without a collection of garbage."""
    assert play(used_without_a_block, engine) == ("", "")


def in_a_cycle(engine: str) -> None:
    """Scenario: a region, a view of it and its Monitor are in a cycle, which is garbage; another finalizer reads it."""

    class Model:
        def __init__(self) -> None:
            self.region = mapped(engine)
            self.monitor = self.region.monitor
            self.view = memoryview(self.region)
            self.me = self

        def __del__(self) -> None:
            read.append(self.view[7 * PAGE])

    Sentinel._shut = lambda *_: print("its descriptors were finalized before it was left")  # type: ignore[method-assign]
    read: list[int] = []
    model = Model()
    address = model.region.address
    del model
    assert memory.mapped(address, SIZE)
    gc.collect()
    assert read == [8]
    eventually(lambda: (memory.mapped(address, SIZE), len(module._served)), ([], 0))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_cycle_does_not_keep_it(engine: str) -> None:
    """It is served until the finalizers of all have run."""
    assert play(in_a_cycle, engine) == ("", "")


def cannot_be_reported(engine: str, folder: str) -> None:
    """Scenario: what is written when a region is closed has no place."""
    Path(folder).mkdir()
    region = aiouffd.map(content(0, SIZE), engine=ENGINES[engine](), report=f"{folder}/report.json")
    Path(folder).rmdir()
    monitor, address = region.monitor, region.address
    with pytest.raises(FileNotFoundError):
        region.close()
    assert region.closed
    assert not memory.mapped(address, SIZE)
    assert not monitor.serves_here
    region.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_closed_also_where_that_raises(engine: str, tmp_path: Path) -> None:
    """It is served no longer, and so nobody could close it later."""
    assert play(cannot_be_reported, engine, str(tmp_path / "folder")) == ("", "")


def keeps_a_view_of_itself(engine: str) -> None:
    """Scenario: a program gives a region an attribute, which is a view of it."""
    region: Any = mapped(engine)
    region.view, monitor = memoryview(region), region.monitor
    assert region.view[3 * PAGE] == 4
    del region
    gc.collect()
    is_left(monitor)


@pytest.mark.parametrize("engine", ENGINES)
def test_its_own_attributes_do_not_keep_it(engine: str) -> None:
    """They are its finalizer's to drop, which the thread that closes it keeps alive."""
    assert play(keeps_a_view_of_itself, engine) == ("", "")


def revived(engine: str) -> None:
    """Scenario: a finalizer in the cycle gives a view of the region to others."""

    class Model:
        def __init__(self) -> None:
            self.region = mapped(engine)
            self.view = memoryview(self.region)
            self.me = self

        def __del__(self) -> None:
            views.append(self.view)

    views: list[memoryview] = []
    model = Model()
    monitor = model.region.monitor
    del model
    gc.collect()
    assert [views[0][page * PAGE] for page in (3, 30)] == [4, 31]
    assert monitor.serves_here
    views.clear()
    is_left(monitor)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_view_that_is_revived_is_served(engine: str) -> None:
    """It ends with that view."""
    assert play(revived, engine) == ("", "")


def closed(engine: str) -> None:
    """Scenario: `close` with a view and without; a block; a region that is closed twice."""
    region = mapped(engine)
    monitor, view = region.monitor, memoryview(region)
    with pytest.raises(BufferError, match="views of the region exist"):
        region.close()
    assert view[5 * PAGE] == 6
    view.release()
    region.close()
    region.close()
    assert region.closed
    assert not monitor.serves_here
    with mapped(engine) as region:
        assert region[5 * PAGE] == 6
    assert region.closed
    assert not module._served


@pytest.mark.parametrize("engine", ENGINES)
def test_close_ends_it(engine: str) -> None:
    """Views are a BufferError, and the region is served on."""
    assert play(closed, engine) == ("", "")


def closed_by_many(engine: str) -> None:
    """Scenario: several threads close a region at once."""
    for _ in range(5):
        region = mapped(engine)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            assert [*pool.map(lambda _, region=region: region.close(), range(6))] == [None] * 6
        assert region.closed


@pytest.mark.parametrize("engine", ENGINES)
def test_several_threads_may_close_it(engine: str) -> None:
    """One of them does; none fails, and none waits for ever."""
    assert play(closed_by_many, engine) == ("", "")


class Dropping(Pattern):
    """Gives up the last reference to its own region while it reads."""

    last: list[Any] = []  # noqa: RUF012 - one for all

    def read_nowait(self, offset: int, length: int) -> bytes | None:  # type: ignore[override]
        """Have nothing at hand."""
        return None

    async def read(self, offset: int, length: int) -> bytes:
        """Drop it in the loop's thread."""
        self.last.clear()
        return content(offset, length)


def dropped_where_it_is_served(engine: str) -> None:
    """Scenario: the thread that serves drops the last reference, or the one that hears the pager."""
    source = Dropping(SIZE) if engine == "thread" else None
    region = mapped(engine, source)
    monitor = region.monitor
    last = Dropping.last
    last.append(region)
    del region
    monitor._running().prefetch([(PAGE, PAGE)]).add_done_callback(lambda _: last.clear())
    is_left(monitor)
    assert mapped(engine)[0] == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_the_thread_that_serves_may_drop_it(engine: str) -> None:
    """It does not wait for itself."""
    play(dropped_where_it_is_served, engine)


def forked(how: str, engine: str) -> None:
    """Scenario: a forked child touches a page, then drops or closes the region; the parent's is served on."""
    region = mapped(engine)
    assert region[0] == 1
    child = os.fork()
    if child == 0:
        seen = region[PAGE] if engine == "pager" else 2  # others do not serve children
        if how == "close":
            region.close()
        else:
            del region
        os._exit(seen)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    monitor = region.monitor
    assert region[2 * PAGE] == 3
    del region
    is_left(monitor)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["close", "drop"])
def test_a_forked_child_ends_nothing_of_its_parents(how: str, engine: str) -> None:
    """It has the same contents, where children are served, and closes its own copy only."""
    assert play(forked, how, engine) == ("", "")


def alive_at_the_end(engine: str) -> None:
    """Scenario: the program ends; what runs then touches the region, which lives in a module and in a cycle."""
    cycle: list[Any] = [mapped(engine)]
    cycle.append(cycle)
    sys.modules["kept"] = region = mapped(engine)  # type: ignore[assignment]
    atexit.register(lambda: print(region[3 * PAGE], cycle[0][4 * PAGE]))


@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_served_while_the_interpreter_ends(engine: str) -> None:
    """And keeps it from nothing."""
    assert play(alive_at_the_end, engine, fresh=True) == ("4 5\n", "")


def no_thread() -> None:
    """Scenario: no thread can be started when the last reference goes."""
    region = mapped("thread")
    monitor, start = region.monitor, _thread.start_new_thread

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    _thread.start_new_thread = refuse  # type: ignore[assignment]
    del region
    _thread.start_new_thread = start
    assert monitor.serves_here
    mapped("thread").close()
    is_left(monitor)


def test_where_no_thread_can_be_started_it_is_closed_later() -> None:
    """When the next one is mapped."""
    assert play(no_thread) == ("", "")


def travels(path: str, engine: str) -> None:
    """Scenario: a region is passed to a spawned worker, which has another directory; then its file grows."""
    Path(path).write_bytes(content(0, SIZE))
    os.chdir(Path(path).parent)
    region = aiouffd.map(Path(path).name, engine=ENGINES[engine](), readahead=0, record="trace")
    region[:8] = b"\xff" * 8
    os.chdir("/")
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(seen, region).result() == ("served", [1, 2, 255], repr(ENGINES[engine]()))
    again = pickle.loads(pickle.dumps(region))
    assert again[9 * PAGE] == 10
    assert again.address != region.address
    with Path(path).open("ab") as file:
        file.write(bytes(PAGE))
    with pytest.raises(aiouffd.SourceError, match=f"it has {SIZE + PAGE} bytes; it had {SIZE} where"):
        pickle.loads(pickle.dumps(region))


def seen(region: aiouffd.Region) -> tuple[str, list[int], str]:
    """Say what a worker sees of a region that it was passed."""
    engine = repr(region.monitor._choice)
    return "served" if region.monitor else "", [region[page * PAGE] for page in (0, 1, 254)], engine


@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_pickled_as_what_it_shows(engine: str, tmp_path: Path) -> None:
    """By an absolute path, with its engine and options; not with what was written to it; a recording stays one's."""
    play(travels, str(tmp_path / "data"), engine)


_WORKER = """
import mmap, pickle, sys
try:
    region = pickle.loads(sys.stdin.buffer.read())
    at = mmap.PAGESIZE  # the first page has come with the size
    print(region.monitor.read(at, 8) == bytes(n * 7 % 251 for n in range(at, at + 8)), len(region))
except Exception as error:
    print(type(error).__name__, error)
"""


def test_credentials_and_the_version_of_a_url_travel() -> None:
    """A worker asks with the same headers; it gets no bytes of another version."""
    headers = {"authorization": "Bearer of-news"}

    def elsewhere() -> str:
        worker = [sys.executable, "-c", _WORKER]
        return subprocess.run(worker, input=pickled, capture_output=True, check=True).stdout.decode()

    with odd_http.serving() as server:
        options: aiouffd.StorageOptions = {"client_options": {"default_headers": headers, "allow_http": True}}
        with aiouffd.open(server.url, storage_options=options) as region:
            pickled = pickle.dumps(region)
        server.requests.clear()
        assert elsewhere() == f"True {len(odd_http.DATA)}\n"
        assert server.requests
        assert all(sent["authorization"] == "Bearer of-news" for _, sent in server.requests)
        server.change()
        assert "has changed" in elsewhere()


def test_what_cannot_be_pickled() -> None:
    """A TypeError says why: a region whose source it does not know."""
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="can be pickled, as what they show"):
            pickle.dumps(aiouffd.Region(PAGE), protocol)


@pytest.mark.parametrize("options", [{"on_exit": "zeros"}, {"chunks": 4}])
def test_options_that_it_has_not(options: dict[str, Any]) -> None:
    """They are refused before the network is asked."""
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(options))}'"):
        aiouffd.map("http://127.0.0.1:1/nothing", **options)


def test_an_engine_that_needs_a_loop() -> None:
    """There is none; a program that has one is told what it can use."""
    with pytest.raises(TypeError, match="async with"):
        aiouffd.map(b"bytes", engine=aiouffd.InProcess())  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [None, 4 * PAGE])
@pytest.mark.parametrize("engine", [aiouffd.InThread, "InThread"])
def test_what_is_no_engine(engine: Any, limit: int | None) -> None:
    """It is told what is one."""
    with pytest.raises(TypeError, match=r"an instance, InThread\(\) for example"):
        aiouffd.map(bytes(8 * PAGE), engine=engine, max_resident=limit)


def test_what_is_empty_or_not_there(tmp_path: Path) -> None:
    """As with `open`, and nothing is served."""
    with pytest.raises(aiouffd.SourceError, match="it is empty"):
        aiouffd.map(b"")
    with pytest.raises(aiouffd.SourceError, match="nothing"):
        aiouffd.map(tmp_path / "nothing")
    assert not module._served
