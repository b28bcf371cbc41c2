"""`monitor.early`: pages are placed while a server is asked for the size, and nobody sees them if they are wrong."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from odd_http import DATA, Odd, serving
from pattern import PAGE
from scenario import brought, eventually, play

import aiouffd
from aiouffd.engine.ahead.pages import RecordedPages
from aiouffd.engine.ahead.trace import Trace
from aiouffd.monitor.early import Beginning
from aiouffd.monitor.map import _is_asked
from aiouffd.pager.client import shared
from aiouffd.sources.base import ZeroSource
from aiouffd.store import create_sync, open_snapshot, snapshot_source
from aiouffd.store.cached_source import CachedSource
from examples.page_server import serving as files_served

if TYPE_CHECKING:
    from collections.abc import Iterator

WHOLE = DATA * 10
PAGES = [*range(480, 201, -1), 0]
"""Of these a unit has 256."""
ENGINES: dict[str, Any] = {"shared": None, "pager": aiouffd.Pager(), "here": aiouffd.InThread()}


@contextmanager
def object_served() -> Iterator[Odd]:
    """Serve an object of a few units."""
    with serving() as odd:
        odd.data = WHOLE
        yield odd


@contextmanager
def answering_late(units: int = 100) -> Iterator[threading.Event]:
    """Have a server's first answer, or the snapshot, come when so many units are placed, or as many as there are.

    Yields what is set when the server has been asked.
    """
    load, work, end, answer = RecordedPages.load, Beginning._work, Beginning._end, Odd.finish_request
    placed, answered, asked, is_first = threading.Event(), threading.Event(), threading.Event(), threading.Lock()

    def loading(pages: RecordedPages, number: int, *room: Any) -> Any:
        if room and number == units:
            placed.set()
            assert answered.wait(30)
            return None
        return load(pages, number, *room)

    def working(beginning: Beginning) -> None:
        try:
            work(beginning)
        finally:
            placed.set()

    def ending(beginning: Beginning) -> None:
        answered.set()
        end(beginning)

    def late(answer: Any, *arguments: Any, **options: Any) -> Any:
        asked.set()
        assert not is_first.acquire(blocking=False) or placed.wait(30)
        return answer(*arguments, **options)

    with (
        mock.patch.object(RecordedPages, "load", loading),
        mock.patch.object(Beginning, "_work", working),
        mock.patch.object(Beginning, "_end", ending),
        mock.patch.object(Odd, "finish_request", lambda *given: late(answer, *given)),
        mock.patch.object(snapshot_source, "open_snapshot", partial(late, open_snapshot)),
    ):
        yield asked
    assert placed.is_set()


def recorded(what: str | Path, path: Path, size: int = 0) -> Path:
    """Record the pages, with their bytes; `size`: of a region that shows the beginning of a URL, and no more."""
    how: Any = {"record": aiouffd.Recording(path, pages=True), "readahead": 0, "engine": ENGINES["here"]}
    source = aiouffd.ObjectSource(str(what)) if size else None
    with aiouffd.Monitor(aiouffd.Region(size), source, **how) if source else aiouffd.open(what, **how) as served:
        region = served.region if isinstance(served, aiouffd.Monitor) else served
        for page in PAGES:
            _ = region[page * PAGE]
    pages = Trace.load(path).pages
    assert pages is not None
    assert len(pages) == 2
    return path


def shows(region: aiouffd.Region, data: bytes) -> None:
    """Compare all pages that were recorded, and another; the server is in this process, and needs the GIL."""
    for page in [*PAGES, 1]:
        assert region.monitor.read(page * PAGE, PAGE) == data[page * PAGE :][:PAGE], page


def replayed(monitor: aiouffd.Monitor) -> int:
    """Return how many pages came by the replay."""
    return monitor.statistics().pages_replay


def left(folder: str) -> list[object]:
    """Return what stays open, registered or held."""
    gc.collect()
    names = []
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            names.append(str(fd.readlink()))
    found: list[object] = [name for name in names if name.startswith(folder) or "userfaultfd" in name]
    found += [thread for thread in threading.enumerate() if thread.name == "aiouffd-early"]
    return found + [client for pagers in list(shared._all) for client in pagers.used]


def placed_before_the_answer(folder: str, engine: str) -> None:
    """Scenario: both units, or the first; then with `map`, whose worker dies while it begins to replay."""
    with object_served() as odd:
        path, choice = recorded(odd.url, Path(folder) / "trace"), ENGINES[engine]
        for units in (2, 1):
            with answering_late(units), aiouffd.open(odd.url, replay=path, readahead=0, engine=choice) as region:
                monitor = region.monitor
                eventually(partial(replayed, monitor), len(PAGES))
                shows(region, WHOLE)
                found = monitor.statistics()
                assert (found.faults, found.pages_replay, found.source_reads) == (0, len(PAGES), 1)
                assert found.bytes_shared + found.bytes_fetched == (len(PAGES) + 1) * PAGE
                assert (found.copies == 1) == (units == 2)  # for the page that was not recorded
        with answering_late():
            region = aiouffd.map(odd.url, replay=path, readahead=0, engine=choice)
        if region.monitor.pids:
            os.kill(region.monitor.pids[1], signal.SIGKILL)
        shows(region, WHOLE)
        eventually(partial(replayed, region.monitor), len(PAGES))
        region.close()
    del region, monitor
    eventually(partial(left, folder), [])


@pytest.mark.parametrize("engine", ["shared", "pager", "here"])
def test_pages_are_placed_before_the_server_has_answered(engine: str, tmp_path: Path) -> None:
    """They cause no fault, and are counted once; the engine goes on behind them."""
    play(placed_before_the_answer, str(tmp_path), engine)


def placed_of_a_snapshot(folder: str) -> None:
    """Scenario: behind a URL, and through a cache; an object through a cache."""
    create_sync(WHOLE, Path(folder) / "store" / "x.snap")
    cache = aiouffd.ChunkCache(Path(folder) / "cache", 64 << 20)
    with files_served(Path(folder) / "store") as url, object_served() as odd:
        for what in (odd.url, f"{url}/x.snap"):
            path = recorded(what, Path(folder) / "trace")
            for each in (None, cache):
                with answering_late(), aiouffd.open(what, replay=path, readahead=0, cache=each) as region:
                    eventually(partial(replayed, region.monitor), len(PAGES))
                    shows(region, WHOLE)
                    assert region.monitor.statistics().bytes_shared == len(PAGES) * PAGE
        copy = Path(folder) / "store" / "x.snap"
        with mock.patch.object(Beginning, "_work") as work, aiouffd.open(copy, replay=path):
            pass
        assert not work.called  # it is opened in less time
    del region
    eventually(partial(left, folder), [])


def test_pages_of_a_snapshot_are_placed_before_it_is_opened(tmp_path: Path) -> None:
    """A store behind a URL is asked for its manifest, and then for its index."""
    play(placed_of_a_snapshot, str(tmp_path))


def test_only_a_server_is_asked(tmp_path: Path) -> None:
    """A source of another kind that is cached tells its size by itself."""
    cache = aiouffd.ChunkCache(tmp_path, 64 << 20)
    asked: list[Any] = [aiouffd.ObjectSource("http://x/y"), aiouffd.SnapshotSource("http://x/y.snap"), ZeroSource(1)]
    assert [_is_asked(source) for source in asked] == [True, True, False]
    assert [_is_asked(CachedSource(source, cache)) for source in asked] == [True, True, False]


def thrown_away(folder: str) -> None:
    """Scenario: the answer is of something else of this size, of more, an error, another version, or another size."""
    image = Path(folder) / "image"
    image.write_bytes(bytes(len(WHOLE)))
    with object_served() as odd:
        path, of_file = recorded(odd.url, Path(folder) / "trace"), recorded(image, Path(folder) / "file")
        with answering_late(), aiouffd.open(odd.url, replay=of_file, readahead=0) as region:
            shows(region, WHOLE)
            assert region.monitor.statistics().bytes_shared == 0
        of_beginning = recorded(odd.url, Path(folder) / "beginning", size=(max(PAGES) + 1) * PAGE)
        with answering_late(), aiouffd.open(odd.url, replay=of_beginning, readahead=0) as region:
            brought(region.monitor, len(PAGES) * PAGE)
            shows(region, WHOLE)
        odd.habit = "404"
        with pytest.raises(aiouffd.SourceError), answering_late(), aiouffd.open(odd.url, retries=0, replay=path):
            pass
        odd.habit = ""
        odd.change()
        for _ in range(2):
            with (
                pytest.raises(aiouffd.TraceError, match="another"),
                answering_late(),
                aiouffd.open(odd.url, replay=path),
            ):
                pass
            odd.data = odd.data[:-PAGE]
    del region
    eventually(partial(left, folder), [])


def test_what_was_placed_of_something_else_is_thrown_away(tmp_path: Path) -> None:
    """Before anybody can see it."""
    play(thrown_away, str(tmp_path))


async def canceled(folder: str) -> None:
    """Scenario: by `async with`, while the server does not answer; then it is opened again."""
    with object_served() as odd:
        path = await asyncio.to_thread(recorded, odd.url, Path(folder) / "trace")

        async def opens() -> None:
            async with aiouffd.open(odd.url, replay=path, readahead=0) as region:
                await asyncio.to_thread(shows, region, WHOLE)

        with answering_late() as asked:
            task = asyncio.create_task(opens())
            assert await asyncio.to_thread(asked.wait, 30)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            del task
            await asyncio.to_thread(eventually, lambda: left(folder), [])
        await opens()
    await asyncio.to_thread(eventually, lambda: left(folder), [])


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_replay_that_is_canceled_before_the_answer(tmp_path: Path, loop: str) -> None:
    """Nothing stays registered."""
    play(canceled, str(tmp_path), loop=loop)


def not_early(folder: str) -> None:
    """Scenario: pages are noted, or tracked; the region cannot be registered at first; what is carried is damaged."""
    with object_served() as odd:
        path = recorded(odd.url, Path(folder) / "trace")
        options: Any
        for options in ({"max_resident": 400 * PAGE}, {"track_writes": True}):
            with (
                mock.patch.object(Beginning, "_place") as place,
                aiouffd.open(odd.url, replay=path, readahead=0, **options) as region,
            ):
                shows(region, WHOLE)
            assert not place.called
        register, tries = aiouffd.Monitor.register, [OSError("no"), None]

        def registering(monitor: aiouffd.Monitor) -> Any:
            if (error := tries.pop(0)) is not None:
                raise error
            return register(monitor)

        with (
            mock.patch.object(aiouffd.Monitor, "register", registering),
            answering_late(),
            aiouffd.open(odd.url, replay=path, readahead=0) as region,
        ):
            shows(region, WHOLE)
        assert tries == []
        data = bytearray(path.read_bytes())
        data[-len(PAGES) * PAGE] ^= 1  # of the first unit
        path.write_bytes(data)
        with answering_late(), aiouffd.open(odd.url, replay=path, readahead=0) as region:
            shows(region, WHOLE)
            assert region.monitor.statistics().bytes_shared == (len(PAGES) - 256) * PAGE
    del region
    eventually(partial(left, folder), [])


def test_what_is_not_placed_early(tmp_path: Path) -> None:
    """It is right all the same."""
    play(not_early, str(tmp_path))
