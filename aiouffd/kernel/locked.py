"""Mapping memory in a process that locks its memory: mlockall(MCL_FUTURE) fills each new mapping with zeros.

MCL_FUTURE | MCL_ONFAULT fills only mappings of huge pages: the kernel does not mark them as locked, so that it forgets
the ONFAULT.
"""

from __future__ import annotations

import contextlib
import mmap
import re
from typing import TYPE_CHECKING, Final

from aiouffd.kernel import files, libc
from aiouffd.kernel.memory import address_of
from aiouffd.ranges import Range

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["empty_locked", "is_locked", "is_populated", "new_mappings_are_populated", "smaps"]

_NOTHING_LOCKED: Final = re.compile(rb"^VmLck:\s+0 kB$", re.MULTILINE)
_FLAGS: Final = re.compile(r"^VmFlags:(.*)$", re.MULTILINE)


def new_mappings_are_populated(page_size: int = mmap.PAGESIZE) -> bool:
    """Tell whether the kernel fills new mappings: mlockall(MCL_FUTURE) is in force. Costs some microseconds."""
    with mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        address = address_of(page)
        if page_size == mmap.PAGESIZE:
            return is_populated(address)
        return any(address in mapping and "lo" in flags for mapping, flags, _ in smaps())


def is_locked(address: int) -> bool:
    """Tell whether a mapping is locked in memory, as far as there is a /proc. Takes long only where something is."""
    with contextlib.suppress(OSError):
        if _NOTHING_LOCKED.search(files.read("/proc/self/status")):
            return False
    return any(address in mapping and "lo" in flags for mapping, flags, _ in smaps())


def is_populated(address: int) -> bool:
    """Tell whether a page is in memory."""
    return bool(libc.mincore(address, mmap.PAGESIZE)[0] & 1)


def empty_locked(address: int, length: int, fd: int = -1) -> None:
    """Drop all pages of a locked mapping: of the memfd behind it, if there is one. It is not locked any more.

    Raises:
        OSError: EINVAL: huge pages that are private, before Linux 5.18.
    """
    libc.munlock(address, length)
    if fd >= 0:
        libc.punch_hole(fd, 0, length)
    else:
        libc.madvise(address, length, mmap.MADV_DONTNEED)


def smaps() -> Iterator[tuple[Range, list[str], str]]:
    """Yield each mapping of this process, its VmFlags and its part of /proc/self/smaps; none if there is no /proc."""
    try:
        text = files.read("/proc/self/smaps").decode("utf-8", "replace")
    except OSError:
        return
    bounds = list(re.finditer(r"^([0-9a-f]+)-([0-9a-f]+) .*$", text, re.MULTILINE))
    for match, behind in zip(bounds, [*(item.start() for item in bounds[1:]), len(text)], strict=True):
        start, end = int(match[1], 16), int(match[2], 16)
        description = text[match.end() : behind]
        flags = _FLAGS.search(description)
        yield Range.between(start, end), flags[1].split() if flags else [], description
