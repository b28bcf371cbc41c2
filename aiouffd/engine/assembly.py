"""Puts an engine together: the server for a source or a handler, and spaces on a dispatcher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from aiouffd.engine.handler import Handler, HandlerServer
from aiouffd.engine.prefetch import Readahead
from aiouffd.engine.source_server import Limits, SourceServer
from aiouffd.kernel.abi import RegisterMode

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.engine.statistics import Counters
    from aiouffd.errors import UffdError

__all__ = ["Options", "make_readahead", "make_server"]


@attrs.frozen
class Options:
    """How a region is served; the same in a pager and in one's own process.

    Attributes:
        readahead: the largest window that a fault brings, in bytes; 0: page by page.
        spin_us: microseconds to look again for faults before sleeping.
        modes: the `RegisterMode` of the memory.
        write_protect: pages come write-protected, so that writes can be told from loads.
        limits: bounds, timeouts and retries.
    """

    readahead: int = 2 << 20
    spin_us: int = 50
    modes: int = RegisterMode.MISSING
    write_protect: bool = False
    limits: Limits = attrs.field(factory=Limits)


def make_server(
    origin: Any,
    counters: Counters,
    options: Options,
    *,
    on_error: Callable[[UffdError], None],
    on_touch: Callable[[int], None] | None = None,
) -> SourceServer | HandlerServer:
    """Return the server for a `Handler` or a `Source`."""
    if isinstance(origin, Handler):
        return HandlerServer(origin, counters, options.limits, on_error=on_error, on_touch=on_touch)
    return SourceServer(origin, counters, options.limits, on_error=on_error, on_touch=on_touch)


def make_readahead(page_size: int, options: Options, *, local: bool) -> Readahead:
    """Return the policy: what is in memory is brought in small neighbourhoods, what is far away in larger ones."""
    return Readahead(page_size, options.readahead, (16 << 10) if local else (64 << 10))
