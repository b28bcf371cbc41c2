"""The event loop of an engine that has a thread or a process of its own."""

from __future__ import annotations

import asyncio
import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Coroutine

__all__ = ["kind", "new_event_loop", "run"]

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
            room.append(os.dup(room[0]) if room else os.eventfd(0))
    finally:
        for fd in room:
            os.close(fd)
    loop: asyncio.AbstractEventLoop = (_uvloop or asyncio).new_event_loop()
    return loop


def run(loop: asyncio.AbstractEventLoop, main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine and close the loop, as `asyncio.Runner` does, but start the loop once: each start takes 20 us."""
    try:
        loop.run_until_complete(_run_to_the_end(loop, main))
    except BaseException:  # another task's, perhaps, which has stopped the loop
        with asyncio.Runner(loop_factory=lambda: loop):
            raise
    loop.close()


async def _run_to_the_end(loop: asyncio.AbstractEventLoop, main: Coroutine[Any, Any, None]) -> None:
    try:
        await main
    finally:
        for _ in range(2):  # what other threads have asked for begins: a task that has not begun cannot say why it ends
            await asyncio.sleep(0)
        while others := asyncio.all_tasks(loop) - {asyncio.current_task(loop)}:
            for task in others:
                task.cancel()
            await asyncio.wait(others)
        await loop.shutdown_asyncgens()
        await loop.shutdown_default_executor()
