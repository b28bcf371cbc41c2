"""`monitor.reporting`: what is written of a run, when, and that it watches without keeping anything."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
from pattern import PAGE, Pattern, Slow, peek
from scenario import eventually, next_error, play, replaced

import aiouffd
from aiouffd.engine.options import Options, Service
from aiouffd.monitor import reporting
from aiouffd.monitor.held import Held
from aiouffd.monitor.reporting import Reporting
from aiouffd.report.run import COLUMNS, NOTHING, Run

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.engine.statistics import Statistics

SIZE = 128 * PAGE


class Engine:
    """Has counted what the test says."""

    def __init__(self, *seen: Statistics | Exception) -> None:
        self.seen = list(seen)

    def statistics(self) -> Statistics:
        """Return the next, the last one again and again."""
        found = self.seen.pop(0) if len(self.seen) > 1 else self.seen[0]
        if isinstance(found, Exception):
            raise found
        return found

    def check_may_wait(self) -> None:
        """Allow it."""

    def prefetch(self, ranges: list[Any]) -> Future[None]:
        """Count what was not counted yet, behind what is under way."""
        assert ranges == []
        done: Future[None] = Future()
        done.set_exception(aiouffd.ClosedError("given up"))
        return done


def begun(path: Path, held: Held, engine: Engine, origin: Any = None) -> Reporting:
    """Return one that watches, and whose thread does not look before the end."""
    report = Reporting(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda _: None)
        report.begin(held, engine, Service(origin or Pattern(SIZE)), "Fake()", Options())  # type: ignore[arg-type]
    return report


def run_of(path: Path) -> Run:
    """Return the run that was written."""
    return Run.from_json(path.read_bytes())


def test_each_look_adds_what_is_new(tmp_path: Path) -> None:
    """Also while the counters read low, or cannot be read; errors are kept once, and not too many."""
    held, path = Held(aiouffd.Region(SIZE)), tmp_path / "run.json"
    counts = [attrs.evolve(NOTHING, faults=faults, pages_fault=faults) for faults in (5, 2, 7, 9)]
    engine = Engine(*counts[:3], aiouffd.ClosedError("given up"), counts[3])
    told: list[BaseException] = []
    report = begun(path, held, engine)
    for number in range(50):
        report.noting(told.append)(ValueError(f"{number // 2}: {'x' * 2000}"))
    held.region[2 * PAGE] = 1
    for _ in range(4):
        assert report._look()
    report.end(None)
    report.write()
    run = run_of(path)
    assert run.statistics.faults == sum(run.column("faults")) == sum(run.column("pages_fault")) == 9
    assert (run.resident, run.stretches, run.film[-1][1]) == (PAGE, 1, [0, 0, 100] + [0] * 125)
    assert (len(run.errors), {len(error) for error in run.errors}, len(told)) == (20, {1000}, 50)
    path.unlink()
    report.write()
    assert not path.exists()


def test_the_last_fault_is_counted(tmp_path: Path) -> None:
    """It is when its thread has gone on already: the engine is asked for an answer before the last look."""

    class Late(Engine):
        def prefetch(self, ranges: list[Any]) -> Future[None]:
            assert ranges == []
            self.seen = [attrs.evolve(NOTHING, faults=1, latency=(0, 1, *[0] * 46))]
            done: Future[None] = Future()
            done.set_result(None)
            return done

    held, path = Held(aiouffd.Region(SIZE)), tmp_path / "run.json"
    engine = Late(NOTHING)
    report = begun(path, held, engine)
    report.end(None)
    report.write()
    assert run_of(path).statistics.latency_ns(0.5) == 2
    assert run_of(path).column("faults")[-1] == 1


def test_it_keeps_neither_region_nor_engine(tmp_path: Path) -> None:
    """Its thread ends with them."""
    held, engine = Held(aiouffd.Region(SIZE)), Engine(NOTHING)
    report = Reporting(tmp_path / "run.html")
    report.begin(held, engine, Service(Pattern(SIZE)), "Fake()", Options())  # type: ignore[arg-type]
    assert report._thread is not None
    del held, engine
    report._thread.join(60)
    assert not report._thread.is_alive()
    report.end(KeyError)
    report.write()
    assert "the block raised KeyError" in (tmp_path / "run.html").read_text()


class Cache:
    """Counts, as a pager writes it: some time after it was left."""

    def __init__(self) -> None:
        self.asked = 0

    def counted(self) -> dict[str, int]:
        """Return the counters."""
        self.asked += 1
        if self.asked == 3:
            raise OSError(errno.EIO, "not now")
        return {"hits": 1000 + (30 if self.asked > 5 else 0), "misses": 5}


def test_what_the_cache_has_counted_is_waited_for(tmp_path: Path) -> None:
    """As a difference; where nothing came, nothing is waited for."""
    held, origin, engine = Held(aiouffd.Region(SIZE)), Pattern(SIZE), Engine(attrs.evolve(NOTHING, pages_fault=1))
    origin.cache = Cache()  # type: ignore[attr-defined]
    report = begun(tmp_path / "run.json", held, engine, origin)
    report.end(None)
    report.write()
    run = run_of(tmp_path / "run.json")
    assert run.cache == {"hits": 30, "misses": 0}
    assert run.facts.caches


def test_a_path_that_will_not_do_is_told_when_the_monitor_is_made(tmp_path: Path) -> None:
    """By its name, by its folder, or since a server counts for all its clients."""
    region = aiouffd.Region(SIZE)
    for report, error, text in (
        *((tmp_path / "run.txt", ValueError, "the name of an .html or a .json file, not '/"),),
        *((tmp_path / "no" / "run.html", FileNotFoundError, "no/run.html"),),
    ):
        with pytest.raises(error, match=text):
            aiouffd.Monitor(region, report=report)
    with pytest.raises(ValueError, match=r"ServedBy\(\) takes no report \(its statistics are those of all its clients"):
        aiouffd.Monitor(region, engine=aiouffd.ServedBy("/x"), report="x.html")  # type: ignore[call-overload]


def test_a_folder_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made. Each Monitor has a file there, but those that report elsewhere; a process has a thousand at most."""
    monkeypatch.setenv("AIOUFFD_REPORT", str(tmp_path / "runs"))
    region = aiouffd.Region(SIZE)
    monitors = [aiouffd.Monitor(region), aiouffd.Monitor(region), aiouffd.Monitor(region, report=tmp_path / "x.json")]
    paths = [monitor._reporting._path for monitor in monitors if monitor._reporting is not None]
    assert len(set(paths)) == 3
    assert [path.name.startswith(f"{os.getpid()}-") for path in paths] == [True, True, False]
    assert aiouffd.Monitor(region, engine=aiouffd.ServedBy("/x"))._reporting is None
    monkeypatch.setattr(reporting, "_RUNS", 0)
    assert aiouffd.Monitor(region)._reporting is None
    monkeypatch.setenv("AIOUFFD_REPORT", str(tmp_path / "runs" / "no" / "where"))
    monkeypatch.setattr(reporting, "_RUNS", 1 << 30)
    with pytest.raises(FileNotFoundError):
        aiouffd.Monitor(region)


ENGINES: dict[str, Callable[[], Any]] = {
    "pager": aiouffd.Pager,
    "thread": aiouffd.InThread,
    "process": aiouffd.InProcess,
}


async def known(engine: str, path: str) -> None:
    """Scenario: ten pages are touched, six are prefetched, and the block raises."""
    region = aiouffd.Region(SIZE)
    options: Any = {"engine": ENGINES[engine](), "readahead": 0, "report": path}
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the block raises it
        async with aiouffd.Monitor(region, Pattern(SIZE), **options) as monitor:
            for page in range(10):
                await asyncio.to_thread(peek, region.address + 2 * page * PAGE)
            await monitor.prefetch(64 * PAGE, 6 * PAGE)
            await asyncio.to_thread(eventually, lambda: sum(monitor.statistics().latency), 10)
            _ = 1 / 0
    run = run_of(Path(path))
    assert (run.statistics.faults, run.statistics.pages_fault, run.statistics.pages_prefetch) == (10, 10, 6)
    assert (run.resident, run.stretches, run.facts.size, run.facts.readahead) == (16 * PAGE, 11, SIZE, 0)
    assert run.ended == "the block raised ZeroDivisionError"
    assert [page for page, share in enumerate(run.film[-1][1]) if share] == [*range(0, 20, 2), *range(64, 70)]
    sums = {name: sum(run.column(name)) for name in COLUMNS}
    assert (sums["faults"], sums["pages_prefetch"], sums["restarts"], sums["waited_ns"] > 0) == (10, 6, 0, True)
    assert run.facts.engine.startswith(type(ENGINES[engine]()).__name__)
    assert json.loads(Path(path).read_text())["facts"]["source"] == repr(monitor.origin)


@pytest.mark.kernel
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_whose_faults_are_known(engine: str, tmp_path: Path, loop: str) -> None:
    """Whatever the engine."""
    play(known, engine, str(tmp_path / "run.json"), loop=loop)


def killed(path: str) -> None:
    """Scenario: the worker is killed twice while pages are touched."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Pattern(SIZE), readahead=0, report=path) as monitor:
        for page in (4, 6, 8):
            assert region[page * PAGE] == page + 1
            if page < 8:
                worker = monitor.pids[1]
                os.kill(worker, signal.SIGKILL)
                replaced(monitor, worker)
        eventually(lambda: monitor.statistics().pages_fault, 3)
    run = run_of(Path(path))
    assert run.statistics.restarts == sum(run.column("restarts")) == 2
    assert run.statistics.pages_fault == sum(run.column("pages_fault")) == 3
    assert run.resident == 3 * PAGE


@pytest.mark.kernel
def test_a_worker_that_is_killed_takes_no_count_with_it(tmp_path: Path) -> None:
    """It is counted as well."""
    play(killed, str(tmp_path / "run.json"))


class Lacking(Slow):
    """Has no page."""

    async def read(self, offset: int, length: int) -> bytes:
        """Fail."""
        raise aiouffd.SourceError("Lacking", offset, length, "not today")


def fails(path: str) -> None:
    """Scenario: a page cannot be had; its thread waits until the block is left."""
    options: Any = {"readahead": 0, "retries": 0, "on_error": "retry", "on_exit": "zeros", "report": path}
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Lacking(SIZE), **options) as monitor:
        toucher = threading.Thread(target=peek, args=(region.address + PAGE,), daemon=True)
        toucher.start()
        with pytest.raises(aiouffd.SourceError):
            next_error(monitor)
    run = run_of(Path(path))
    toucher.join()
    assert [error.endswith("not today") for error in run.errors] == [True], run.errors
    assert run.statistics.source_errors >= 1
    assert run.outages() != []


@pytest.mark.kernel
def test_errors_are_in_it(tmp_path: Path) -> None:
    """Their text, and when it was."""
    play(fails, str(tmp_path / "run.json"))


def is_left_to_the_end(path: str) -> None:
    """Scenario: a mapped region lives until the program ends; a forked child ends before."""
    region = aiouffd.map(Slow(SIZE), report=path)
    assert region[5 * PAGE] == 6
    globals()["kept"] = region
    if not (child := os.fork()):
        reporting._at_exit()  # and not all of an exit: faulthandler waits for a thread that was not forked
        os._exit(0)
    os.waitpid(child, 0)
    assert not Path(path).exists()


@pytest.mark.kernel
def test_a_monitor_that_is_never_left(tmp_path: Path) -> None:
    """Its report is written when the program ends, by the process that has entered it."""
    play(is_left_to_the_end, str(tmp_path / "run.json"), fresh=True)
    run = run_of(tmp_path / "run.json")
    assert run.ended == "the program ended before the block was left"
    assert run.statistics.faults == 1
    assert run.resident > 0
