"""Memory of a client whose pages were filled before it was handed over: they never fault, and are never fetched.

mlockall(MCL_FUTURE), MAP_POPULATE and transparent huge pages fill a mapping with zeros. The client would run on zeros
in place of its snapshot. A server cannot mend that: private pages of another process cannot be dropped. It can tell.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING, Final

from aiouffd.handoff.own_threads import in_own_thread
from aiouffd.kernel import abi
from aiouffd.kernel.pagemap import Pagemap

if TYPE_CHECKING:
    from aiouffd.handoff.arrival import Handoff
    from aiouffd.handoff.firecracker import Regions
    from aiouffd.ranges import Range

__all__ = ["PagemapOf", "warn_of_zeros", "zeros_before_handoff"]

log: logging.Logger = logging.getLogger("aiouffd.server")

_MAX_LOOKS: Final = 64
_MAX_REGIONS: Final = 64


class PagemapOf(Pagemap):
    """The pagemap of another process."""

    def __init__(self, pid: int) -> None:
        self._own(os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC))


def zeros_before_handoff(pid: int, regions: Regions) -> int:
    """Return how many bytes of a client's regions are present, if all of those that are looked at are zeros; else 0.

    Call it before the first fault is served. It waits for the lock of the client's address space. A client that is
    handed over again has pages that were served before: it is told from others by their content.

    Args:
        pid: of the client.
        regions: of its handoff.

    Raises:
        OSError: the process has ended, may not be looked at, or the kernel has no PAGEMAP_SCAN (before Linux 6.7).
    """
    if len(regions.mappings) > _MAX_REGIONS:  # a microVM has a few; thousands would take time from the other clients
        return 0
    with PagemapOf(pid) as pagemap:
        anyof = abi.PAGE_IS_PRESENT | abi.PAGE_IS_SWAPPED
        present = [
            item
            for mapping in regions.mappings
            for item in pagemap.scan(mapping.start, mapping.end - mapping.start, anyof=anyof)
        ]
    total = sum(item.length for item in present)
    return total if total and not any(_content(pid, present, regions.page_size)) else 0


async def warn_of_zeros(handoff: Handoff) -> None:
    """Say if a client's memory was filled with zeros before it was handed over."""
    with contextlib.suppress(OSError):
        filled = await in_own_thread(zeros_before_handoff, handoff.peer.pid, handoff.regions)
        if filled:
            how = "%s: %d bytes of its memory are zeros already, and are never fetched (mlockall? MAP_POPULATE?)"
            log.warning(how, handoff.peer, filled)


def _content(pid: int, present: list[Range], page_size: int) -> bytes:
    """Return bytes of some pages, spread over all that are present."""
    pages = [(item, item.length // page_size) for item in present]
    step = max(1, sum(count for _, count in pages) // _MAX_LOOKS)
    places = [item.start + index * page_size for item, count in pages for index in range(0, count, step)]
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return b"".join(os.pread(memory, page_size, place) for place in places[:: max(1, len(places) // _MAX_LOOKS)])
    finally:
        os.close(memory)
