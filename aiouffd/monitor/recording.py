"""What a Monitor records, or replays."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from aiouffd.engine.ahead.pages import Recording, unkept, version_of
from aiouffd.engine.ahead.trace import Recorder, Trace, fingerprint, stored
from aiouffd.engine.options import Service
from aiouffd.errors import TraceError, UffdError
from aiouffd.pager.client.packing import copied

if TYPE_CHECKING:
    import os

    from aiouffd.engine.serve.bounds import Limits
    from aiouffd.kernel.region import Region

__all__ = ["Tracing"]

log: logging.Logger = logging.getLogger("aiouffd")


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
            trace = Trace.replayed(self._replay, page, origin, source)
            # Where fingerprints cannot tell, the size can: of a file and a URL for example. A handler has none.
            if trace.source != source and trace.size not in (size, getattr(origin, "size", trace.size)):
                raise TraceError(str(self._replay), "it was recorded from another source: its size is another")
        elif self._record is None:
            trace = stored(origin, page)
        return Service(origin, self._recorder, trace)

    def end(self, *, complete: bool) -> None:
        """Record no more. Blocks."""
        recorder, self._recorder = self._recorder, None
        source, self._copy = self._copy, None
        if recorder is None:
            return
        if not complete:
            recorder.close()
            return
        recorder.complete()
        if source is not None:
            assert self._record is not None
            from aiouffd.engine.ahead.keeping import keep_pages  # noqa: PLC0415 - 20 ms: it has a loop

            try:
                keep_pages(self._record, source, self._record.most, self._limits)
            except (UffdError, OSError) as error:
                log.warning("%s: it has no bytes of its pages: %s", self._record.path, error)
