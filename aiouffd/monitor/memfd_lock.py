"""Who may have a Monitor of a memfd: any number of them, or one that drops pages.

So it is with servers, which serve the memory of other processes: `kernel.file_lock` says why.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING, Final

from aiouffd.errors import BusyError
from aiouffd.kernel.file_lock import locked_anew
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
        try:
            self._file = close_in_children(locked_anew(region.fd, os.O_RDONLY, alone=alone))
        except BlockingIOError as error:
            operation = _DROPS if alone else _SHARES
            raise BusyError(operation, region.address, region.mapped_length, errno.EBUSY) from error

    def close(self) -> None:
        """Let others have it: also where a child that C code has forked has the open file, too."""
        if self._file.intact:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_UN)
        self._file.close()
