"""One process at a time fetches a chunk: a lock for each key, which ends with its holder.

A lock is one byte of a file, chosen by the key, that is locked with an OFD lock (fcntl F_OFD_SETLK, Linux 3.15). The
kernel drops it when the process that holds it ends, in whatever way. Two keys that share a byte only wait for each
other in vain.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from aiouffd.kernel.owned_descriptor import OwnedDescriptor

__all__ = ["KeyLocks"]

_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid


class KeyLocks:
    """Locks of keys, for the threads of this process and for other processes. Thread-safe; none of it waits.

    Args:
        file: may be written. It stays open as long as this object.
    """

    def __init__(self, file: OwnedDescriptor) -> None:
        self._file = file
        self._mine: set[int] = set()
        self._lock = threading.Lock()

    def try_lock(self, key: bytes) -> bool:
        """Lock a key, unless somebody has it; tell whether it is locked by the caller now.

        Raises:
            OSError: as fcntl(2): the file system knows no locks, or there are too many.
        """
        place = _place(key)
        with self._lock:
            if place in self._mine:  # the kernel lets one open file description have the same lock twice
                return False
            try:
                self._set(fcntl.F_WRLCK, place)
            except BlockingIOError:
                return False
            except PermissionError:  # EACCES, as EAGAIN, of some file systems
                return False
            self._mine.add(place)
            return True

    def unlock(self, key: bytes) -> None:
        """Give a key up that the caller has locked."""
        place = _place(key)
        with self._lock:
            self._mine.discard(place)
            self._set(fcntl.F_UNLCK, place)

    def _set(self, kind: int, place: int) -> None:
        fcntl.fcntl(self._file.fileno(), fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, place, 1, 0))


def _place(key: bytes) -> int:
    return int.from_bytes(key[:7], "little")
