"""Mappings of a shared region's memory that no userfaultfd watches.

A touch of a missing page there makes the kernel put a page of zeros into the file: for all who map it, and for good.
userfaultfd cannot prevent that: it is about mappings, and seals forbid writing, growing and shrinking, not reading.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from aiouffd.kernel.locked import smaps
from aiouffd.kernel.memory import mappings_of

if TYPE_CHECKING:
    from aiouffd.ranges import Range

__all__ = ["unserved_mappings"]


def unserved_mappings(fd: int) -> list[Range]:
    """Return the mappings of a memfd in this process that report no missing pages; none where there is no /proc.

    Costs a look at /proc/self/maps if the memfd is mapped once, and one at smaps, which takes the kernel some time for
    each GiB that is present, if it is mapped more often.
    """
    mine = mappings_of(os.fstat(fd).st_ino)
    if len(mine) < 2:
        return []
    watched = [mapping for mapping, flags, _ in smaps() if "um" in flags]  # VM_UFFD_MISSING
    return [mapping for mapping in mine if mapping not in watched]
