"""Dropping pages: of a memfd, for all who map it, or of this process. In any thread, while the loop waits."""

from __future__ import annotations

import errno
import mmap
import os
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

from aiouffd.engine.runs import Op
from aiouffd.kernel import abi, libc
from aiouffd.ranges import align_up

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from aiouffd.kernel.owned_descriptor import OwnedDescriptor

__all__ = ["Outcomes", "Part", "drop", "huge_pages", "is_own", "under_way"]

Part: TypeAlias = tuple[int, int, list[tuple[int, int]]]
"""Of offsets: where they start and end, and the same of the addresses where they are shown."""
Outcomes: TypeAlias = list[tuple[int, int, OSError | None]]
"""Of parts: where they start and end, and why they stay; None: they do not."""


def drop(file: OwnedDescriptor | None, parts: Iterable[Part], spaces: Iterable[Any]) -> Outcomes:
    """Drop pages, in any thread while the loop waits; return the start and end of each part, and why it stays.

    Args:
        file: the memfd that is shown; None: private memory of this process.
        parts: what is dropped.
        spaces: that show it.
    """
    outcomes: Outcomes = []
    for low, high, places in parts:
        failure = None
        try:
            if file is not None:
                libc.punch_hole(file.fileno(), low, high - low)
            else:
                for space in spaces:  # one: no engine of this process serves forked children
                    for start, end in places:
                        _empty_own(space, start, end)
        except OSError as error:
            failure = error
        outcomes.append((low, high, failure))
    return outcomes


def is_own(space: Any, start: int, end: int) -> bool:
    """Tell whether private memory is the region's: it may have been unmapped, and be other memory by now.

    In its own process the kernel is asked for no layout events. It protects only what is registered for that.
    """
    return bool(space.uffd.try_writeprotect(start, end - start, abi.WRITEPROTECT_MODE_WP) != -errno.ENOENT)


def _empty_own(space: Any, start: int, end: int) -> None:
    """Empty what is still the region's. Other memory of which a part is no longer does not keep the rest."""
    if is_own(space, start, end):
        _empty(start, end)
    elif end - start > space.page_size:
        middle = start + align_up((end - start) // 2, space.page_size)
        _empty_own(space, start, middle)
        _empty_own(space, middle, end)


def _empty(start: int, end: int, advice: int = mmap.MADV_DONTNEED) -> None:
    try:
        libc.madvise(start, end - start, advice)
    except OSError as error:
        if error.errno == errno.EINVAL and advice == mmap.MADV_DONTNEED:
            _empty(start, end, libc.MADV_DONTNEED_LOCKED)
        elif error.errno != errno.ENOMEM:  # a part of it is not mapped any more; the rest was emptied
            raise


def huge_pages(space: Any, file: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield what of a hugetlb memfd may be there: SEEK_DATA takes all of it for data.

    CONTINUE maps a page that the file has, write-protected, and is EFAULT where it has none.
    """
    size = space.page_size
    if os.fstat(file).st_blocks:
        for shown in space.mappings.addresses(0, length):
            for at in range(shown.start, shown.end, size):
                if space.uffd.try_continue(at, size, abi.CONTINUE_MODE_WP) != -errno.EFAULT:
                    offset = shown.offset + at - shown.start
                    yield offset, offset + size


def under_way(space: Any, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of addresses [start, end) that are being brought: their bytes may have been read already."""
    yield from ((low, high) for low, high, _ in space.flights.within(start, end))
    for run in chain(space.remainders, space.deferred):
        low, high = max(run.dst, start), min(run.dst + run.left, end)
        if run.op <= Op.CONTINUE and low < high:
            yield low, high
