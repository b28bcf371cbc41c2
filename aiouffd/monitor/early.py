"""A replay that begins while a server is asked for the size of what is shown: its recording says the size, too.

The region is made and registered meanwhile, and the first pages whose bytes the recording carries are placed in it. It
belongs to nobody before the answer has come. Where that is not what the recording is of, it is thrown away, with all
that was placed.
"""

from __future__ import annotations

import logging
import threading
from array import array
from functools import partial
from typing import TYPE_CHECKING, Any

from aiouffd.engine.two_threads import two_threads
from aiouffd.errors import TraceError
from aiouffd.monitor.recording import Early

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from aiouffd.engine.ahead.pages import RecordedPages
    from aiouffd.monitor.monitor import Monitor
    from aiouffd.monitor.registration import Registration
    from aiouffd.sources.base import Source

__all__ = ["Beginning"]

log: logging.Logger = logging.getLogger("aiouffd")


class Beginning:
    """What another thread does between the request for the size and its answer.

    Args:
        path: of the recording.
        expect: as for `Early.expect`; None: it is replayed in this process.
        make: returns a Monitor of a region of so many bytes, which replays a recording; it is not entered.
        places: whether pages may be placed: nobody counts or notes them.

    Attributes:
        early: the recording.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        expect: Callable[[], Callable[[], None]] | None,
        make: Callable[[int, Any], Monitor],
        *,
        places: bool,
    ) -> None:
        self.early: Early = Early(path)
        self._expect, self._make, self._places = expect, make, places
        self._monitor: Monitor | None = None
        self._answered = threading.Event()
        self._thread: threading.Thread | None = None

    def monitor_of(self, source: Source) -> Monitor | None:
        """Ask for the size of a source; return a Monitor, not entered, where what was begun is good for it.

        Raises:
            SourceError: as its `size`.
        """
        try:
            source.ask_size(self._start)  # type: ignore[attr-defined]
        except BaseException:
            self._end()
            self.early.close()
            raise
        self._end()
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            trace = self.early.take()
            assert trace.pages is not None
            if trace.size == source.size and not trace.pages.refusal(source):
                return monitor
            self._forget(monitor, trace.pages)
        return None

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name="aiouffd-early", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads: nothing is begun before the answer is there
            return
        self._thread = thread

    def _end(self) -> None:
        """Have nothing more begun, and wait for what is."""
        self._answered.set()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        early = self.early
        if self._expect is not None:
            early.expect(self._expect)
        try:
            trace = early.take()
        except (TraceError, OSError):  # who enters the Monitor is told
            return
        pages = trace.pages
        if pages is None or not self._places or self._answered.is_set():
            return
        try:
            monitor = self._make(trace.size, early)
            early.registration = monitor.register()
            self._monitor = monitor
            self._place(pages, early.registration)
        except Exception as error:  # noqa: BLE001 - it comes again, where the size is known
            log.debug("%s: its pages are not placed early: %s", early, error)

    def _place(self, pages: RecordedPages, registration: Registration) -> None:
        """Place units, until the answer is there, or one cannot be placed: then the replay goes on with that."""
        begin, uffd = registration.region.address, registration.uffd
        room = pages.room()
        for number in range(len(pages)):
            if self._answered.is_set() or (unit := pages.load(number, room)) is None:
                return
            words = array("Q", [word for at, length, data in unit.parts for word in (begin + at, data, length)])
            half = len(words) // 6 * 3
            finish = two_threads.beside(partial(uffd.try_copies, words[half:], 0))
            if (uffd.try_copies(words[:half], 0) + finish()) * 3 < len(words):
                return
            pages.placed = number + 1

    def _forget(self, monitor: Monitor, pages: RecordedPages) -> None:
        """Throw the region away, of which nobody knows."""
        pages.placed = 0
        if (registration := self.early.registered()) is not None:
            registration.abandon()
        monitor.region.close()
