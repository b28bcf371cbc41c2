"""The event loops that async tests run on, and what watches that code of the package does not block them."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import io
from typing import TYPE_CHECKING

from blockbuster import BlockBusterFunction, blockbuster_ctx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_IMPORTLIB = "<frozen importlib._bootstrap_external>"
METADATA = ("os.stat", "os.readlink", "os.path.abspath", "os.unlink")
"""These look at names only, on local files and in /proc: they take microseconds, and a thread would take longer."""


def loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Return how each loop is made, by its name; uvloop's only where it is installed."""
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    if importlib.util.find_spec("uvloop") is not None:
        import uvloop

        factories["uvloop"] = uvloop.new_event_loop
    return factories


@contextlib.contextmanager
def no_blocking() -> Iterator[None]:
    """Raise BlockingError where code of the package blocks a running loop: a sleep, a file, a blocking socket."""
    with blockbuster_ctx("aiouffd") as watch:
        # `Path.read_bytes` reads without a buffer since Python 3.14; so does importlib, a module without its source.
        raw = BlockBusterFunction(
            io.FileIO, "read", scanned_modules="aiouffd", can_block_functions=[(_IMPORTLIB, {"get_data"})]
        )
        watch.functions["io.FileIO.read"] = raw.activate()
        # A thread writes a record, and is waited for a moment at most.
        for name in ("threading.Lock.acquire", "threading.Lock.acquire_lock"):
            watch.functions[name].can_block_in("aiouffd/pager/loglines.py", {"call"})
        for name in METADATA:
            watch.functions[name].deactivate()
        yield
