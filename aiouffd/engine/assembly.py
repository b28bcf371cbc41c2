"""Puts an engine together: the backend for a source or a handler, and the readahead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiouffd.engine.readahead import Readahead
from aiouffd.engine.serve.handler import Handler
from aiouffd.engine.serve.handler_backend import HandlerBackend
from aiouffd.engine.serve.source import SourceBackend
from aiouffd.engine.write_back import WriteBack
from aiouffd.ranges import align_down

if TYPE_CHECKING:
    from aiouffd.engine.ahead.trace import Recorder
    from aiouffd.engine.bound import Bound
    from aiouffd.engine.one_copy import OneCopy
    from aiouffd.engine.options import Options, Service
    from aiouffd.engine.serve.common import Common
    from aiouffd.engine.serve.precedence import Precedence
    from aiouffd.engine.statistics import Counters

__all__ = ["make_backend", "make_readahead"]


def make_backend(
    service: Service,
    counters: Counters,
    options: Options,
    bound: Bound | None = None,
    common: Common | None = None,
    precedence: Precedence | None = None,
    one_copy: OneCopy | None = None,
) -> SourceBackend | HandlerBackend:
    """Return what brings the pages for a service.

    Args:
        service: a source or a handler.
        counters: where to count.
        options: how.
        bound: drops the pages of a source again; None: they stay.
        common: has the source, where others read it, too.
        precedence: of other backends of this loop; None: there are none.
        one_copy: the file that all that is served of a source maps privately; None: it maps none in common.
    """
    origin = service.origin
    if isinstance(origin, Handler):
        return HandlerBackend(origin, counters, options.limits)
    if bound is not None and options.write_back and hasattr(origin, "write"):  # else it could not be opened again
        bound.write_back = WriteBack(origin, bound, counters)
        bound.end = min(bound.end, align_down(origin.size, bound.page))
    return SourceBackend(
        *(origin, counters, options.limits), bound=bound, one_copy=one_copy, common=common, precedence=precedence
    )


def make_readahead(page_size: int, options: Options, *, local: bool, recorder: Recorder | None = None) -> Readahead:
    """Return the readahead of a space: bytes in memory come in small neighbourhoods, remote ones in larger ones."""
    noting = (None, None) if recorder is None else (recorder.note, recorder.note_pages)
    limit = options.readahead if options.max_resident is None else min(options.readahead, options.max_resident // 16)
    return Readahead(page_size, limit, (16 << 10) if local else (64 << 10), *noting)
