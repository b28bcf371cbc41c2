"""What becomes of the pages that are still missing when nobody serves them any more."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from aiouffd.kernel import libc, pagemap
from aiouffd.kernel.abi import Feature, RegisterMode
from aiouffd.kernel.userfaultfd import Userfaultfd
from aiouffd.ranges import Range

if TYPE_CHECKING:
    from aiouffd.kernel.region import Region

__all__ = ["leave_sigbus"]

_FEW = 1000
"""More missing ranges than this are treated as one: each splits a mapping, and vm.max_map_count is 65530."""


def leave_sigbus(region: Region, uffd: Userfaultfd) -> None:
    """Hand a region over from `uffd` to a descriptor with Feature.SIGBUS, which the region keeps.

    From then on a touch of a missing page is SIGBUS (a system call: EFAULT); what is present stays as it is. The
    cost does not depend on the length, where poisoning would cost page tables.

    A range can be registered with one userfaultfd only, and between the two a touch would read zeros. So what is
    missing is made inaccessible for that moment (0.1 ms): whoever touches it just then gets SIGSEGV instead. What
    is present stays accessible throughout.
    """
    start, length = region.address, region.mapped_length
    try:
        gaps = pagemap.missing(start, length, region.fd)
    except OSError:  # before Linux 6.7
        gaps = [Range(start, length)]
    if len(gaps) > _FEW:
        gaps = [Range(gaps[0].start, gaps[-1].end - gaps[0].start)]
    if not gaps:
        uffd.unregister(start, length)
        return
    sentinel = Userfaultfd(Feature.SIGBUS, user_mode_only=uffd.opened_by == "user-mode-only")
    try:
        for gap in gaps:
            libc.mprotect(gap.start, gap.length, 0)
        uffd.unregister(start, length)
        sentinel.register(start, length, RegisterMode.MISSING)
    finally:
        for gap in gaps:
            libc.mprotect(gap.start, gap.length, mmap.PROT_READ | mmap.PROT_WRITE)
    region.keep(sentinel)
