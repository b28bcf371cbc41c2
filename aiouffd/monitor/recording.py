"""What a Monitor records, or replays."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from aiouffd.engine.ahead.pages import Recording, unkept, version_of
from aiouffd.engine.ahead.trace import Recorder, Trace, fingerprint, stored
from aiouffd.engine.options import Service
from aiouffd.errors import TraceError, UffdError
from aiouffd.lifetime import until_exit
from aiouffd.pager.client.packing import copied

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.engine.serve.bounds import Limits
    from aiouffd.kernel.region import Region
    from aiouffd.monitor.registration import Registration

__all__ = ["Early", "Tracing"]

log: logging.Logger = logging.getLogger("aiouffd")


class Early:
    """A recording that is read while a server is asked for the size of what is to be shown. It stands for its path.

    Args:
        path: of the file.

    Attributes:
        registration: of the region in which pages were placed; None: there is none, or it was taken.
    """

    registration: Registration | None = None

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        self._end: Callable[[], None] = _nothing
        self._found: Trace | TraceError | OSError | None = None

    def expect(self, expect: Callable[[], Callable[[], None]]) -> None:
        """Have those who will replay it be ready; `expect` returns what ends that."""
        try:
            self._end = expect()
        except (UffdError, OSError) as error:  # who enters the Monitor is told, if it goes on
            log.debug("%s: nobody is ready to replay it: %s", self._path, error)

    def take(self) -> Trace:
        """Return the recording; what is wrong with it is raised each time.

        Raises:
            TraceError, OSError: as `Trace.load`.
        """
        if self._found is None:
            try:
                self._found = Trace.load(self._path)
            except (TraceError, OSError) as error:
                self._found = error
        if isinstance(self._found, Exception):
            raise self._found
        return self._found

    def registered(self) -> Registration | None:
        """Return the registration, which is the caller's from now on."""
        registration, self.registration = self.registration, None
        return registration

    def close(self) -> None:
        """Expect it no longer, and undo the registration that nobody has taken."""
        end, self._end = self._end, _nothing
        try:
            if (registration := self.registered()) is not None:
                registration.abandon()
        finally:
            end()

    @until_exit
    def __del__(self) -> None:
        self.close()

    def __fspath__(self) -> str:
        return os.fspath(self._path)

    def __str__(self) -> str:
        return str(self._path)


def _nothing() -> None:
    """End nothing."""


class Tracing:
    """The order of first touches: written to one file, or read from another.

    Args:
        record: the file to write, complete when serving ends.
        replay: the file to read. With neither, a recording that the source has of itself is replayed.
        limits: of the reads of pages whose bytes the file is to carry.

    Raises:
        ValueError: both are given.
    """

    def __init__(
        self, record: str | os.PathLike[str] | Recording | None, replay: str | os.PathLike[str] | None, limits: Limits
    ) -> None:
        if record is not None and replay is not None:
            raise ValueError("either record or replay: what a replay brings is not seen to be touched")
        self._record = None if record is None else Recording.of(record)
        self._replay = replay
        self._limits = limits
        self._copy: Any = None  # of the source, whose bytes are kept with the recording
        self._recorder: Recorder | None = None

    def registered(self) -> Registration | None:
        """Return the registration of a region in which pages were placed before its source was known. Once."""
        return self._replay.registered() if isinstance(self._replay, Early) else None

    def service(self, origin: Any, region: Region) -> Service:
        """Return what serves a region from now on.

        Raises:
            TraceError, OSError: as `Trace.load`; OSError: as `Recorder.create`.
            ValueError: bytes of pages are to be kept of what does not tell its version.
        """
        page, size = region.page_size, len(region)
        source = fingerprint(origin)
        if self._record is not None:
            if self._record.most:
                if not any(version_of(origin)):
                    raise ValueError(unkept(origin))
                self._copy = copied(origin)
            self._recorder = Recorder.create(self._record, page, size, source)
        trace = None
        if self._replay is not None:
            known = self._replay.take() if isinstance(self._replay, Early) else Trace.load(self._replay)
            trace = known.shown(self._replay, page, origin, source)
            # Where fingerprints cannot tell, the size can: of a file and a URL for example. A handler has none.
            if trace.source != source and trace.size not in (size, getattr(origin, "size", trace.size)):
                raise TraceError(str(self._replay), "it was recorded from another source: its size is another")
        elif self._record is None:
            trace = stored(origin, page)
        return Service(origin, self._recorder, trace)

    def end(self, *, complete: bool, raised: type[BaseException] | None = None) -> None:
        """Record no more, and expect no replay. Blocks.

        Args:
            complete: whether to keep what was recorded.
            raised: what the caller is leaving with.

        Raises:
            OSError: as `Recorder.complete`, unless the caller is leaving with an error, which is to be seen.
        """
        if isinstance(self._replay, Early):
            self._replay.close()
        recorder, self._recorder = self._recorder, None
        source, self._copy = self._copy, None
        if recorder is None:
            return
        if not complete:
            recorder.discard()
            return
        try:
            recorder.complete()
        except OSError as error:
            if raised is None:
                raise
            log.error("there is no recording: %s", error)  # noqa: TRY400 - the traceback that matters is the caller's
            return
        self._keep_pages(source)

    def end_at_exit(self) -> None:
        """Keep what was recorded of memory that is served on, since the program ends. Blocks; raises as `end`."""
        recorder, self._recorder = self._recorder, None
        source, self._copy = self._copy, None
        if recorder is not None:
            recorder.complete_now()
            self._keep_pages(source)

    def _keep_pages(self, source: Any) -> None:
        if source is not None:
            assert self._record is not None
            from aiouffd.engine.ahead.keeping import keep_pages  # noqa: PLC0415 - 20 ms: it has a loop

            try:
                keep_pages(self._record, source, self._record.most, self._limits)
            except (UffdError, OSError, RuntimeError) as error:  # the last: no more threads, or no more executors
                log.warning("%s: it has no bytes of its pages: %s", self._record.path, error)
