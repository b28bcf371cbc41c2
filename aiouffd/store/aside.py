"""Calls functions that block in a thread, so that they can be canceled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, TypedDict, TypeVar

from aiouffd.lifetime import begun, result_of
from aiouffd.sources.storage_options import StorageOptions  # noqa: TC001 - options are looked up by the documentation

__all__ = ["Progress", "StoreOptions", "aside"]

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the bytes that are done, and all bytes."""


class StoreOptions(TypedDict, total=False):
    """What all that goes through a snapshot takes.

    Attributes:
        storage_options: for stores behind URLs, as for `open`.
        progress: called with the bytes that are done and all bytes. What it raises ends the work.
    """

    storage_options: StorageOptions | None
    progress: Progress | None


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

    return await result_of(begun(partial(function, *args, progress=report, **options)), canceled.set)
