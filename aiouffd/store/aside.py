"""Calls functions that block in a thread, so that they can be canceled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

__all__ = ["Progress", "aside"]

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the bytes that are done, and all bytes."""

_Result = TypeVar("_Result")


class _CanceledError(Exception):
    """Ends a function in its thread."""


async def aside(
    function: Callable[..., _Result], *args: Any, progress: Progress | None = None, **options: Any
) -> _Result:
    """Call a function that reports its progress, in a thread.

    Canceling is safe: the function ends at its next report, and this waits for that.
    """
    canceled = threading.Event()

    def report(done: int, whole: int) -> None:
        if canceled.is_set():
            raise _CanceledError
        if progress is not None:
            progress(done, whole)

    task = asyncio.ensure_future(asyncio.to_thread(function, *args, progress=report, **options))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        canceled.set()
        await asyncio.gather(task, return_exceptions=True)
        raise
