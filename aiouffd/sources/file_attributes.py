"""What the kernel knows of an open file, as far as it can be asked on the event loop.

fstat(2) and lseek(2) may ask a server (NFS, FUSE, CIFS), which may never answer. statx(2) with AT_STATX_DONT_SYNC
(Linux 4.11) returns what the kernel knows already. 9p ignores that flag.
"""

from __future__ import annotations

import ctypes
import os
import struct
from time import monotonic

from aiouffd.errors import ShortReadError, SourceError

__all__ = ["FileSystem", "Pin"]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fstatfs.argtypes = [ctypes.c_int, ctypes.c_char_p]
_statx = getattr(_libc, "statx", None)  # glibc 2.28
if _statx is not None:
    _statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p]

_AT_EMPTY_PATH = 0x1000
_AT_STATX_DONT_SYNC = 0x4000
_STATX_SIZE_AND_MTIME = 0x240
_SIZE = struct.Struct("=40xQ")
_MTIME = struct.Struct("=112xqI")

_IN_MEMORY = frozenset((0x01021994, 0x858458F6, 0x958458F6))  # tmpfs, ramfs, hugetlbfs
_REMOTE = frozenset(
    (
        *(0x65735546, 0x6969, 0x01021997, 0xFF534D42, 0xFE534D42, 0x517B),  # FUSE, NFS, 9p, CIFS, SMB2, SMB
        *(0x00C36400, 0x5346414F, 0x0BD00BD0, 0x47504653, 0x786F4256),  # ceph, AFS, Lustre, GPFS, vboxsf
    )
)
_9P = 0x01021997

_RECENT = 0.001  # seconds for which an answer is used again; kernels before 6.13 stamp files every 1 to 4 ms


class FileSystem:
    """What matters of the file system that an open file is on. Blocks like fstatfs(2).

    Attributes:
        in_memory: a read never waits for a device.
        remote: any system call but a statx with AT_STATX_DONT_SYNC may wait for a server, close(2) too.
        answers_at_once: statx with AT_STATX_DONT_SYNC does not wait.
    """

    def __init__(self, fd: int) -> None:
        data = ctypes.create_string_buffer(256)
        unknown = bool(_libc.fstatfs(fd, data))  # a FUSE server need not answer STATFS
        kind = ctypes.c_long.from_buffer(data).value
        self.in_memory: bool = kind in _IN_MEMORY
        self.remote: bool = unknown or kind in _REMOTE
        self.answers_at_once: bool = _statx is not None and kind != _9P

    def nowait_flag(self, fd: int) -> int | None:
        """Return the flag of preadv2 for reads that do not wait (Linux 4.14); None: this file has no such reads."""
        if not self.answers_at_once:
            return None
        try:
            os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            return os.RWF_NOWAIT
        except OSError:  # EOPNOTSUPP: FUSE; tmpfs, which never waits
            return 0 if self.in_memory else None
        return os.RWF_NOWAIT


class Pin:
    """The size and the time of the last change that a file had when it was opened.

    A file that is written in place, cut, or grows, differs from then on. Not seen: stores through a shared mapping
    that the kernel has not stamped (it does so at the first store after the page was clean); a writer that puts the
    time back; a second change within the resolution of the file's time stamp (1 to 4 ms before Linux 6.13); on remote
    file systems, what the kernel has not been told yet.

    Attributes:
        size: in bytes.
        mtime_ns: in nanoseconds since 1970; -1: any, since the file is written by who reads it.
    """

    __slots__ = ("_buffer", "_fd", "_held", "_until", "mtime_ns", "size")

    def __init__(self, fd: int, size: int, mtime_ns: int) -> None:
        self.size: int = size
        self.mtime_ns: int = mtime_ns
        self._fd = fd
        self._buffer = ctypes.create_string_buffer(256)
        self._held = True
        self._until = 0.0

    def holds_nowait(self) -> bool:
        """Tell whether the file is unchanged as far as the kernel knows. Never waits; asks at most once in 1 ms."""
        now = monotonic()
        if now >= self._until:
            self._until = now + _RECENT
            assert _statx is not None
            if _statx(self._fd, b"", _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, _STATX_SIZE_AND_MTIME, self._buffer) == 0:
                seconds, nanoseconds = _MTIME.unpack_from(self._buffer)
                mtime_ns = seconds * 1_000_000_000 + nanoseconds
                self._held = self.size == _SIZE.unpack_from(self._buffer)[0] and self.mtime_ns in (-1, mtime_ns)
        return self._held

    def changed(self) -> tuple[type[SourceError], str] | None:
        """Return the error for how the file differs, as (type, reason), or None. Asks the file system, and waits."""
        now = os.fstat(self._fd)
        if now.st_size != self.size:
            reason = f"the file has {now.st_size} bytes; it had {self.size} when it was opened"
            return ShortReadError if now.st_size < self.size else SourceError, reason
        if self.mtime_ns not in (-1, now.st_mtime_ns):
            return SourceError, "the file was written after it was opened: open it again"
        return None
