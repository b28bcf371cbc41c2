"""The file behind a client's memory: a memfd that some clients send beside their userfaultfd.

Who has it can drop pages of the client, and read them without asking its process. Clients map it from its beginning
on: a region's `offset` is its place in the file, as in the snapshot. Other memory files may come along, such as the
bitmap of faults that a branch of Firecracker sends, which is small.

A file that cannot be used is no reason to turn a client away: it is served as if it had sent none.
"""

from __future__ import annotations

import fcntl
import logging
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiouffd.handoff.firecracker import Regions

__all__ = ["is_memory", "memory_file"]

log: logging.Logger = logging.getLogger("aiouffd.server")

_F_SEAL_FUTURE_WRITE: Final = 0x10  # Linux 5.1
_UNWRITABLE: Final = fcntl.F_SEAL_WRITE | _F_SEAL_FUTURE_WRITE  # a page cannot be dropped either


def is_memory(fd: int) -> bool:
    """Tell whether a descriptor is of memory: a memfd, or a file in tmpfs or hugetlbfs. No call to these blocks."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)  # EINVAL for all other files, whatever their names
    except OSError:
        return False
    return True


def memory_file(fds: Iterable[int], regions: Regions, peer: str) -> int:
    """Return that of some descriptors which is the file behind the regions; -1: there is none that can be used.

    That its pages are the regions' is the client's word. If it is not true, the client loses its own bytes, and may
    cost others theirs that have handed over the same file, where it could write as well.
    """
    wrong = {fd: _what_is_wrong(fd, regions) for fd in fds if is_memory(fd)}
    found = [fd for fd, reason in wrong.items() if not reason]
    if len(found) == 1:
        return found[0]
    if wrong:
        reason = f"{len(found)} files may be it" if found else "; ".join(wrong.values())
        log.warning("%s: its memory file is not used: %s", peer, reason)
    return -1


def _what_is_wrong(fd: int, regions: Regions) -> str:
    size, page = os.fstat(fd).st_size, os.fstatvfs(fd).f_bsize
    if size < regions.end:
        return f"it has {size:#x} bytes, and the regions reach to {regions.end:#x}"
    if page != regions.page_size:
        return f"it has pages of {page} bytes, and the regions of {regions.page_size}"
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        return "it is not open for reading and writing"
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _UNWRITABLE:
        return "it is sealed against writing"
    return ""
