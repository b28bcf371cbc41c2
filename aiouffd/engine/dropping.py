"""Dropping pages: of a memfd, for all who map it, or of this process. In any thread, while the loop waits."""

from __future__ import annotations

import errno
import mmap
from typing import TYPE_CHECKING, TypeAlias

from aiouffd.kernel import libc

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiouffd.kernel.owned_descriptor import OwnedDescriptor

__all__ = ["Part", "drop"]

Part: TypeAlias = tuple[int, int, list[tuple[int, int]]]
"""Of offsets: where they start and end, and the same of the addresses where they are shown."""


def drop(file: OwnedDescriptor | None, parts: Iterable[Part]) -> list[tuple[int, int, OSError | None]]:
    """Drop pages, in any thread while the loop waits; return the start and end of each part, and why it stays."""
    outcomes: list[tuple[int, int, OSError | None]] = []
    for low, high, places in parts:
        failure = None
        try:
            if file is not None:
                libc.punch_hole(file.fileno(), low, high - low)
            else:
                for start, end in places:
                    _empty(start, end)
        except OSError as error:
            failure = error
        outcomes.append((low, high, failure))
    return outcomes


def _empty(start: int, end: int, advice: int = mmap.MADV_DONTNEED) -> None:
    try:
        libc.madvise(start, end - start, advice)
    except OSError as error:
        if error.errno == errno.EINVAL and advice == mmap.MADV_DONTNEED:
            _empty(start, end, libc.MADV_DONTNEED_LOCKED)
        elif error.errno != errno.ENOMEM:  # a part of it is not mapped any more; the rest was emptied
            raise
