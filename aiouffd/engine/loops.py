"""The event loop of an engine that has a thread or a process of its own."""

from __future__ import annotations

import asyncio
import importlib
import os
from typing import Any

__all__ = ["kind", "new_event_loop"]

_DESCRIPTORS = 9  # of a loop of uvloop that runs
_uvloop: Any
try:
    _uvloop = importlib.import_module("uvloop")
except ImportError:  # there is no wheel for free-threaded Pythons
    _uvloop = None


def kind() -> str:
    """Return which library runs the loops: "uvloop" or "asyncio"."""
    return "asyncio" if _uvloop is None else "uvloop"


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return a new event loop, of uvloop where that is installed: a loop factory for `asyncio.Runner`.

    Raises:
        OSError: there is no room for its descriptors. libuv would end the process.
    """
    room: list[int] = []
    try:
        while _uvloop is not None and len(room) < _DESCRIPTORS:
            room.append(os.eventfd(0))
    finally:
        for fd in room:
            os.close(fd)
    loop: asyncio.AbstractEventLoop = (_uvloop or asyncio).new_event_loop()
    return loop
