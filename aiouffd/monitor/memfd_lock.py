"""Who may have a Monitor of a memfd: any number of them, or one that drops pages.

A Monitor that drops pages of a file knows what was written through it, and through its forked children. What is written
through another Monitor's mapping it would drop: the source's bytes would come again in its place, for all. So the file
is locked (flock(2)), as a file is that a source writes to.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from typing import TYPE_CHECKING, Final

from aiouffd.errors import BusyError
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.lifetime import close_in_children

if TYPE_CHECKING:
    from aiouffd.kernel.region import Region

__all__ = ["MemfdLock"]

_DROPS: Final = "dropping pages (max_resident, write_back) of a memfd that another Monitor serves"
_SHARES: Final = "serving a memfd of which another Monitor drops pages (max_resident, write_back)"


class MemfdLock:
    """A Monitor's lock of its region's memfd, for as long as it serves. Without /proc there is none.

    Args:
        region: shared.
        alone: pages are dropped.

    Raises:
        BusyError: another Monitor, of whatever process, excludes this one.
    """

    def __init__(self, region: Region, *, alone: bool) -> None:
        self._file = OwnedDescriptor()
        with contextlib.suppress(OSError):
            # A lock belongs to the open file, and the region's may be another process's, too.
            self._file = OwnedDescriptor(os.open(f"/proc/self/fd/{region.fd}", os.O_RDONLY | os.O_CLOEXEC))
        close_in_children(self._file)
        try:
            self._lock(fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        except BlockingIOError as error:
            self._file.close()
            operation = _DROPS if alone else _SHARES
            raise BusyError(operation, region.address, region.mapped_length, errno.EBUSY) from error

    def close(self) -> None:
        """Let others have it: also where a child that C code has forked has the open file, too."""
        self._lock(fcntl.LOCK_UN)
        self._file.close()

    def _lock(self, how: int) -> None:
        if self._file.intact:
            fcntl.flock(self._file.fileno(), how | fcntl.LOCK_NB)
