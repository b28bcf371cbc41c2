"""What a Monitor records, or replays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiouffd.engine.ahead.trace import Recorder, Trace, fingerprint, stored
from aiouffd.engine.options import Service
from aiouffd.errors import TraceError

if TYPE_CHECKING:
    import os

    from aiouffd.kernel.region import Region

__all__ = ["Recording"]


class Recording:
    """The order of first touches: written to one file, or read from another.

    Args:
        record: the file to write, complete when serving ends.
        replay: the file to read. With neither, a recording that the source has of itself is replayed.

    Raises:
        ValueError: both are given.
    """

    def __init__(self, record: str | os.PathLike[str] | None, replay: str | os.PathLike[str] | None) -> None:
        if record is not None and replay is not None:
            raise ValueError("either record or replay: what a replay brings is not seen to be touched")
        self._record = record
        self._replay = replay
        self._recorder: Recorder | None = None

    def service(self, origin: Any, region: Region) -> Service:
        """Return what serves a region from now on.

        Raises:
            TraceError, OSError: as `Trace.load`; OSError: as `Recorder.create`.
        """
        page, size = region.page_size, len(region)
        source = fingerprint(origin)
        if self._record is not None:
            self._recorder = Recorder.create(self._record, page, size, source)
        trace = None
        if self._replay is not None:
            trace = Trace.load(self._replay, page, source=source)
            # Where fingerprints cannot tell, the size can: of a file and a URL for example. A handler has none.
            if trace.source != source and trace.size not in (size, getattr(origin, "size", trace.size)):
                raise TraceError(str(self._replay), "it was recorded from another source: its size is another")
        elif self._record is None:
            trace = stored(origin, page)
        return Service(origin, self._recorder, trace)

    def end(self, *, complete: bool) -> None:
        """Record no more."""
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            (recorder.complete if complete else recorder.close)()
