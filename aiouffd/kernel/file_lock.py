"""Who may drop pages of a file of memory: nobody else has it then (flock(2)).

Who drops pages knows what was written through his own mappings. What is written through another's he would drop: the
source's bytes would come again in its place, for all. So each who serves a file of memory locks it: one who drops
pages alone, any number of others together.
"""

from __future__ import annotations

import contextlib
import fcntl
import os

from aiouffd.kernel.owned_descriptor import OwnedDescriptor

__all__ = ["locked_anew"]


def locked_anew(fd: int, mode: int, *, alone: bool) -> OwnedDescriptor:
    """Open the file of a descriptor anew, and lock it; the lock is the open file's, with all duplicates of it.

    A descriptor may be another process's, too, and so would its lock be.

    Args:
        fd: of a memfd, or a file in tmpfs or hugetlbfs: no call to these blocks.
        mode: os.O_RDONLY or os.O_RDWR.
        alone: nobody else may have it.

    Returns:
        Closed: there is no /proc, or it may not be opened.

    Raises:
        BlockingIOError: another has it.
    """
    file = OwnedDescriptor()
    with contextlib.suppress(OSError):
        file = OwnedDescriptor(os.open(f"/proc/self/fd/{fd}", mode | os.O_CLOEXEC))
    if not file.closed:
        try:
            fcntl.flock(file.fileno(), (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
    return file
