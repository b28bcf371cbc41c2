"""Watches a Monitor, and writes a report of its run when it is left: `Monitor(report=...)`.

Nothing is counted for it that is not counted anyway. A thread reads the counters ten times a second at most, in
microseconds, from memory that the engine counts in; what it keeps does not grow with the run. It looks at the page
tables as well, and lets five hundred times as long pass as that has taken.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import os
import platform
import shlex
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError
from pathlib import Path
from time import monotonic, thread_time
from typing import TYPE_CHECKING, Any, Final

from aiouffd.engine.serve.handler import Handler
from aiouffd.errors import ClosedError, UffdError
from aiouffd.kernel.residency import cells, spans
from aiouffd.report.output import check, write
from aiouffd.report.page import page
from aiouffd.report.run import COLUMNS, NOTHING, Facts, Run, waited_ns
from aiouffd.report.timeline import Film, Timeline

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.engine.options import Options, Service
    from aiouffd.engine.statistics import Statistics
    from aiouffd.kernel.region import Region
    from aiouffd.monitor.engines.protocol import Engine
    from aiouffd.monitor.held import Held

__all__ = ["Reporting"]

log: logging.Logger = logging.getLogger("aiouffd")

_PAUSE: Final = 0.5  # seconds between two looks at the page tables, at first
_PATIENCE: Final = 1.0  # seconds for the thread's last look, and for the engine's last count
_FLUSHED: Final = 0.5  # seconds for the pager to write what its cache has counted
_ERRORS: Final = 20
_TEXT: Final = 1000  # characters of an error or a command line
_RUNS: Final = 1000  # of a process, in the folder

_numbers = itertools.count(1)
_unwritten: weakref.WeakSet[Reporting] = weakref.WeakSet()


class Reporting:
    """The report of a Monitor's run.

    Args:
        path: the file, `.html` or `.json`.

    Raises:
        ValueError: it is neither.
        OSError: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if Path(path).suffix not in (".html", ".json"):
            raise ValueError(f"report= takes the name of an .html or a .json file, not {os.fspath(path)!r}")
        self._path = check(path)
        self._errors: dict[str, None] = {}
        self._thread: threading.Thread | None = None

    @classmethod
    def in_folder(cls, folder: str) -> Reporting | None:
        """Return one with a file of its own in a folder, as AIOUFFD_REPORT asks; None: there are a thousand already."""
        number = next(_numbers)
        if number == _RUNS + 1:
            log.warning("AIOUFFD_REPORT: this process has begun %d reports, and begins no more", _RUNS)
        if number > _RUNS:
            return None
        Path(folder).mkdir(exist_ok=True)
        return cls(Path(folder) / f"{os.getpid()}-{number}.json")

    def noting(self, put: Callable[[BaseException], None]) -> Callable[[BaseException], None]:
        """Return what notes an error, and passes it on."""

        def note(error: BaseException) -> None:
            if len(self._errors) < _ERRORS:
                self._errors[str(error)[:_TEXT]] = None
            put(error)

        return note

    def begin(self, held: Held, engine: Engine, service: Service, choice: str, options: Options) -> None:
        """Watch a region from now on. Keeps neither it nor the engine.

        Args:
            held: the region.
            engine: serves it.
            service: brings the pages.
            choice: says which engine it is.
            options: of the Monitor.
        """
        self._held = weakref.ref(held)
        self._engine, self._statistics = weakref.ref(engine), weakref.WeakMethod(engine.statistics)
        self._facts = _facts(service, choice, held.region, options)
        self._cache = getattr(service.origin, "cache", None)
        self._cached = _counted(self._cache)
        self._pid, self._began = os.getpid(), monotonic()
        self._timeline, self._film = Timeline(len(COLUMNS)), Film(_PAUSE)
        self._seconds = 0.0
        self._seen, self._last = NOTHING, [0] * len(COLUMNS)
        self._resident = self._stretches = 0
        self._ended = ""
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="aiouffd-report", daemon=True)
        with contextlib.suppress(RuntimeError):  # no more threads: there is one look, at the end
            self._thread.start()
        _unwritten.add(self)
        self._look_at(held)

    def _run(self) -> None:
        while not self._closed.wait(self._timeline.width) and self._look():
            pass

    def _look(self, *, last: bool = False) -> bool:
        """Look once; tell whether the region is there still."""
        held, statistics = self._held(), self._statistics()
        if held is None or statistics is None:
            return False
        with self._lock:
            since, self._seconds = self._seconds, monotonic() - self._began
            with contextlib.suppress(UffdError, TimeoutError):  # of a pager that was given up
                self._count(since, statistics())
            if last or self._seconds >= self._film.due:
                self._look_at(held)
        return True

    def _count(self, since: float, seen: Statistics) -> None:
        """Add what is new. While a keeper is replaced, counters read low for a moment: they are waited for."""
        values = [waited_ns(seen) if name == "waited_ns" else getattr(seen, name) for name in COLUMNS]
        news = [max(0, now - before) for now, before in zip(values, self._last, strict=True)]
        self._timeline.add(since, self._seconds, news)
        self._last = [max(pair) for pair in zip(values, self._last, strict=True)]
        if seen.faults >= self._seen.faults:
            self._seen = seen

    def _look_at(self, held: Held) -> None:
        with contextlib.suppress(ClosedError, ValueError):  # ValueError: of a closed mmap
            region, began = held.region, thread_time()
            ranges = list(spans(region))
            shares = cells(len(region), ranges)
            self._film.add(self._seconds, shares, thread_time() - began)
            self._resident, self._stretches = sum(end - start for start, end in ranges), len(ranges)

    def end(self, raised: type[BaseException] | None) -> None:
        """Look for the last time, before the Monitor is left. Blocks, where this thread may."""
        self._ended = "the block was left" if raised is None else f"the block raised {raised.__name__}"
        # The last fault is counted behind the ioctl that has woken its thread: the engine has done so when it answers.
        if (engine := self._engine()) is not None:
            with contextlib.suppress(UffdError, OSError, RuntimeError, CancelledError):  # it is lost, or may not wait
                engine.check_may_wait()
                engine.prefetch([]).result(_PATIENCE)
        self._end()

    def _end(self) -> None:
        if self._thread is None:
            return
        self._closed.set()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(_PATIENCE)
        self._look(last=True)

    def write(self) -> None:
        """Write the report, after the Monitor was left. A second time, does nothing.

        Raises:
            OSError: it cannot be written.
        """
        if self not in _unwritten:
            return
        _unwritten.discard(self)
        run = Run(
            self._facts,
            self._ended,
            self._seconds,
            self._seen,
            self._timeline.width,
            self._timeline.rows,
            self._film.looks,
            self._resident,
            self._stretches,
            cache=self._cache_has_counted(),
            errors=list(self._errors),
        )
        write(self._path, run.to_json() if self._path.suffix == ".json" else page([run]))

    def _cache_has_counted(self) -> dict[str, int]:
        """Return what the cache has counted; the pager writes it some time after it was left."""
        before, now, end = self._cached, _counted(self._cache), monotonic() + _FLUSHED
        while before and self._seen.pages and now in (before, {}) and monotonic() < end:
            time.sleep(0.01)
            now = _counted(self._cache)
        return {name: count - before[name] for name, count in now.items() if name in before and count >= before[name]}

    def at_exit(self) -> None:
        """Write the report of a Monitor that is not left, since the program ends."""
        if self._pid != os.getpid():
            return
        self._ended = "the program ended before the block was left"
        self._end()
        try:
            self.write()
        except OSError:
            log.exception("the report of a Monitor that was not left cannot be written")


@atexit.register
def _at_exit() -> None:
    for reporting in list(_unwritten):
        reporting.at_exit()


def _counted(cache: Any) -> dict[str, int]:
    counted = getattr(cache, "counted", None)
    with contextlib.suppress(OSError):
        return dict(counted()) if counted is not None else {}
    return {}


def _facts(service: Service, engine: str, region: Region, options: Options) -> Facts:
    version = sys.modules["aiouffd"].__version__
    return Facts(
        source=repr(service.origin)[:_TEXT],
        engine=engine,
        program=shlex.join(sys.orig_argv)[:_TEXT],
        host=f"Linux {platform.release()}, Python {platform.python_version()}, aiouffd {version}",
        began=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        size=len(region),
        page_size=region.page_size,
        readahead=options.readahead,
        is_handler=isinstance(service.origin, Handler),
        records=service.recorder is not None,
        brings_ahead=service.trace is not None or options.background > 0,
        caches=hasattr(getattr(service.origin, "cache", None), "counted"),
    )
