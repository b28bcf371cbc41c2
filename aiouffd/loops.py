"""The event loop of an engine that has a thread or a process of its own."""

from __future__ import annotations

import asyncio
import importlib
import os
import resource
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Coroutine

__all__ = ["kind", "new_event_loop", "require_room", "run"]

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
    if _uvloop is not None:
        require_room(_DESCRIPTORS)
    loop: asyncio.AbstractEventLoop = (_uvloop or asyncio).new_event_loop()
    return loop


def require_room(count: int) -> None:
    """Raise OSError where there is no room for so many more descriptors. Takes 2 us where /proc says that there is."""
    if not _has_room(count):
        _find_room(count)


def _has_room(count: int) -> bool:
    try:
        used = os.stat("/proc/self/fd").st_size  # noqa: PTH116 - open ones; 0 before Linux 6.2; a Path takes 5 us
    except OSError:
        return False
    return 0 < used <= resource.getrlimit(resource.RLIMIT_NOFILE)[0] - count


def _find_room(count: int) -> None:
    room: list[int] = []
    try:
        while len(room) < count:
            room.append(os.dup(room[0]) if room else os.eventfd(0))
    finally:
        for fd in room:
            os.close(fd)


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
        await asyncio.sleep(0)  # what other threads have asked for is a task now
        while others := asyncio.all_tasks(loop) - {asyncio.current_task(loop)}:
            await asyncio.sleep(0)  # and begins: one that has not begun cannot say why it ends
            for task in others:
                task.cancel()
            await asyncio.wait(others)
        await loop.shutdown_asyncgens()
        await loop.shutdown_default_executor()
