"""A local file, copied straight out of its mapping where its pages are in memory.

The event loop must not wait for a disk or a server. So it asks before each copy whether the pages are resident:
mincore(2) looks into the page cache and costs 1 us for a page, 30 to 50 us for 2 MiB. A thread reads what is not
resident. A copy out of the mapping maps the pages as it goes, sixteen at a time; a pread first would cost more.

A thread reads ahead of a sequential toucher: it brings the next pages into memory and into the mapping
(MADV_POPULATE_READ) while the loop copies those before them. That saves mincore and the page faults, 0.25 of 1.4 us a
page.

For files on remote file systems (FUSE, NFS) the only system calls on the loop are mincore and statx with
AT_STATX_DONT_SYNC: all others may wait for the server, even if the bytes are resident.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import threading
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from aiouffd.errors import BusyError, ShortReadError, SourceError
from aiouffd.kernel import libc
from aiouffd.kernel.files import write_at
from aiouffd.kernel.memory import address_of, map_file, write_parts, zero_blocks
from aiouffd.kernel.owned_descriptor import inode
from aiouffd.lifetime import until_exit
from aiouffd.sources.base import Descriptor
from aiouffd.sources.daemon_threads import DaemonThreads
from aiouffd.sources.file_attributes import FileSystem, Pin
from aiouffd.sources.holes import Holes, next_data

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

__all__ = ["FileSource"]

_mincore = ctypes.CDLL(None, use_errno=True).mincore
_mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

_THREADS = 16  # limit of reads under way
_STREAMS = 8  # ranges that are remembered as expected, or as populated
_PEEK_BLOCK = 64 << 10  # the first byte of each block of this size is remembered with a populated range
_PEEK_SAMPLE = 4  # of so many blocks one is looked at first
_SMALL = 16 << 10  # a read of up to so many bytes costs less than a copy out of the mapping
_POPULATED_TTL = 0.1  # seconds for which populated pages are taken to be resident, without mincore
_FIRST_EXTENTS = 1 << 10  # of a sparse file that are looked up when it is opened
_MORE_EXTENTS = 1 << 12  # looked up by a thread in one go


class _Populated(NamedTuple):
    """Bytes [low, high) that a thread has made resident, when it did, and the first byte of each block of them."""

    low: int
    high: int
    when: float
    firsts: bytes


class FileSource:
    """A regular file, as it is when the source is made.

    The source serves this file, also if another file takes its name. A file that is written, cut, or grows while it is
    served is an error for the pages that are read from then on; the loop notices it within 1 ms. See
    `attributes.Pin` for changes that cannot be seen.

    Opening blocks, as open(2) does.

    A writable source takes back what was written to memory (`Monitor(..., write_back=True)`). It has the file for
    itself, as far as others ask for the same lock (flock(2)): one writable source of a file at a time. That others
    write the file is not noticed then.

    Args:
        path: of the file.
        writable: `write` and `sync` may be called.

    Attributes:
        path: absolute; links are kept.
        size: in bytes.
        identity: equal for sources of the same bytes.
        sparse: whether the file may have holes.

    Raises:
        SourceError: the file cannot be opened, or is not a regular file. `__cause__` is the OSError.
        BusyError: another writable source of the file exists, in whatever process.
    """

    def __init__(self, path: str | os.PathLike[str], *, writable: bool = False) -> None:
        self.path: str = os.path.abspath(path)  # noqa: PTH100 - resolve() would follow links
        try:
            access = os.O_RDWR if writable else os.O_RDONLY
            fd = os.open(self.path, access | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise SourceError(f"FileSource({self.path!r})", 0, 0, f"cannot be opened: {error.strerror}") from error
        status = os.fstat(fd)
        if writable:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it belongs to the open file, which travels
            except OSError as error:
                os.close(fd)
                operation = f"writing to {self.path}, as another program or source does"
                raise BusyError(operation, 0, 0, errno.EBUSY) from error
        self._adopt(fd, status.st_size, -1 if writable else status.st_mtime_ns)

    @classmethod
    def from_descriptor(cls, path: str, descriptor: Descriptor, size: int, mtime_ns: int) -> FileSource:
        """Make a source of an open file that had this size and time when the first source of it was made."""
        self = cls.__new__(cls)
        self.path = path
        self._adopt(descriptor.detach(), size, mtime_ns)
        return self

    def _adopt(self, fd: int, size: int, mtime_ns: int) -> None:
        """Set up; the descriptor belongs to this object."""
        self._fd, self._inode = fd, inode(fd)
        self.writable: bool = mtime_ns == -1
        self._pool: DaemonThreads | None = None
        self._begun: Future[None] | None = None  # to be written to the disk
        self._file_system = FileSystem(fd)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise SourceError(repr(self), 0, 0, f"it is {kind}")
        self.size = size
        # The time of change of the inode as well: a program can put the other one back.
        changed_ns = -1 if self.writable else status.st_ctime_ns
        self.identity: tuple[int, ...] = (status.st_dev, status.st_ino, size, mtime_ns, changed_ns)
        self._pin = Pin(fd, size, mtime_ns)
        self.sparse: bool = status.st_blocks * 512 < self.size and not self.writable  # a hole may be written
        self._holes = Holes(fd, size if self.sparse else 0)
        self._looking = False  # whether a thread looks up holes
        if not self._file_system.remote:
            with contextlib.suppress(OSError):
                self._holes.look_up(_FIRST_EXTENTS)
        self._map: mmap.mmap | None = None
        self._mapped = min(size, status.st_size)
        self._address = 0
        self._expected: deque[tuple[int, int]] = deque(maxlen=_STREAMS)  # (start, end)
        self._populated: tuple[_Populated, ...] = ()  # replaced as a whole: threads add to it while the loop reads it
        self._scratch = memoryview(bytearray(_SMALL))
        self._scratch_address = address_of(self._scratch)
        self._vector = ctypes.create_string_buffer(1 << 10)
        if self._mapped:
            self._map = map_file(fd, self._mapped, mmap.ACCESS_READ)
            self._address = address_of(self._map)
        self._nowait = self._file_system.nowait_flag(fd)
        self._quick_end = not self._file_system.remote  # elsewhere lseek asks the server
        # mincore says that all pages are resident unless the caller owns the file or may write it. (Otherwise it would
        # tell what others read.)
        owned = status.st_uid == os.geteuid() or os.access(f"/proc/self/fd/{fd}", os.W_OK)
        self._tells = owned and self._file_system.answers_at_once

    def locate(self, offset: int, length: int) -> int | None:
        """Return the address of the bytes in the mapping of the file, if they are resident."""
        end = offset + length
        if not self._tells or end > self._mapped or not self._pin.holds_nowait():
            return None
        # Behind the end of a file that was cut, the rest of its last page would read as zeros.
        if self._quick_end and end > os.lseek(self._fd, 0, os.SEEK_END):  # 0.25 us
            return None
        if self._populated and self._find_populated(offset, end) is not None:
            return self._address + offset
        skew = offset % mmap.PAGESIZE
        start = self._address + offset - skew
        pages = (length + skew + mmap.PAGESIZE - 1) // mmap.PAGESIZE
        if pages > len(self._vector):
            self._vector = ctypes.create_string_buffer(pages)
        if _mincore(start, length + skew, self._vector) or self._vector.raw.find(b"\0", 0, pages) >= 0:
            return None
        return start + skew

    def page(self, offset: int, length: int) -> int | None:
        """Return the address of the bytes until the next call, if they are resident.

        For a few pages preadv2 costs half of mincore and a page fault or two. RWF_NOWAIT also refuses resident bytes
        if the kernel would read ahead; `locate` does not.
        """
        if length <= _SMALL and self._nowait is not None and self._pin.holds_nowait():
            try:
                got = os.preadv(self._fd, [self._scratch[:length]], offset, self._nowait)
            except OSError:
                got = -1
            if got >= 0:
                return self._scratch_address if got == length else None  # less: not all bytes are resident
        return self.locate(offset, length)

    def blank(self, offset: int, length: int, block: int) -> list[int]:
        """Return where resident blocks of zeros begin.

        Does not look at the mapping: where the file has been cut meanwhile, that would be SIGBUS. A read of the first
        byte of a block costs as much as a copy of two pages, so one block of four is looked at first. Zeros between
        two of these are copied.
        """
        if length < block:  # it would cost more than it saves
            return []
        piece = self._find_populated(offset, offset + length) if block == _PEEK_BLOCK else None
        index, rest = divmod(offset - piece.low, block) if piece is not None else (0, 1)
        if piece is not None and not rest:
            firsts = piece.firsts[index : index + (length + block - 1) // block]
        elif 0 in self._peek(offset, offset + length, _PEEK_SAMPLE * block):
            firsts = self._peek(offset, offset + length, block)
        else:
            return []
        found: list[int] = []
        for at in (offset + number * block for number, first in enumerate(firsts) if not first):
            size = min(block, offset + length - at)
            # Most blocks that begin with a zero have something else in their first page.
            for part in (min(mmap.PAGESIZE, size), size):
                data = self._read_resident(at, part)
                if len(data) < part:
                    return []  # The file was cut just now. What is behind its end is not zeros; the copy finds out.
                if not zero_blocks(memoryview(data), block):
                    break
            else:
                found.append(at - offset)
        return found

    def _peek(self, low: int, high: int, block: int) -> bytes:
        """Return the first byte of each block of [low, high), as far as the file goes now."""
        return b"".join([self._read_resident(at, 1) for at in range(low, high, block)])

    def _read_resident(self, offset: int, length: int) -> bytes:
        """Return bytes that are resident, or fewer. Does not wait, unless the kernel has just dropped their pages."""
        if self._nowait is None:  # a read asks the server, even for resident bytes
            return b""
        try:
            return os.pread(self._fd, length, offset)
        except OSError:
            return b""

    def _find_populated(self, offset: int, end: int) -> _Populated | None:
        """Return the range around [offset, end) that was populated within the last 0.1 s."""
        recent = monotonic() - _POPULATED_TTL
        for piece in self._populated:
            if piece.low <= offset and end <= piece.high and piece.when > recent:
                return piece
        return None

    def expect(self, offset: int, length: int) -> None:
        """Have a thread populate these bytes, unless it does that already."""
        low, high = offset & -mmap.PAGESIZE, min(offset + length, self._mapped)
        for start, end in self._expected:
            if start <= low < end:
                low = end
        if low < high and self._tells:
            self._expected.append((low, high))
            with contextlib.suppress(RuntimeError):  # no thread can be started: the bytes are read when they are needed
                self._threads.submit(self._populate, low, high)

    def _populate(self, low: int, high: int) -> None:
        try:
            for start, end in self._extents(low, high) if self.sparse or self.writable else ((low, high),):
                libc.madvise(self._address + start, end - start, libc.MADV_POPULATE_READ)
                # One call, a third as fast: each of many calls would wait for the GIL, which the loop has.
                firsts = libc.peek(range(self._address + start, self._address + end, _PEEK_BLOCK))
                piece = _Populated(start, end, monotonic(), firsts)
                self._populated = (*self._populated, piece)[-_STREAMS:]  # may lose what another thread adds now
        except OSError:  # before Linux 5.14, or the file was cut, or cannot be read: `locate` and `read` find out
            return

    def _extents(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        """Yield the data in [low, high). On tmpfs a look at a hole through a mapping allocates memory for it."""
        while low < high:
            start = os.lseek(self._fd, low, os.SEEK_DATA) & -mmap.PAGESIZE  # ENXIO: no data up to the end
            if start >= high:
                return
            low = os.lseek(self._fd, max(start, low), os.SEEK_HOLE)
            yield start, min(low, high)
            low = (low + mmap.PAGESIZE - 1) & -mmap.PAGESIZE

    def memory(self) -> tuple[int, int, int, int] | None:
        """Return the mapping of the file, if the kernel tells which of its pages are resident."""
        known = self._tells and self._mapped and not self.writable
        return (self._address, self._mapped, self._fd, self._pin.mtime_ns) if known else None

    def read_nowait(self, offset: int, length: int) -> bytearray | None:
        """Return the bytes if they are resident. For files that mincore tells nothing about."""
        if self._tells or self._nowait is None or not self._pin.holds_nowait():
            return None
        data = bytearray(length)
        return data if self.fill_nowait(offset, memoryview(data)) else None

    def fill_nowait(self, offset: int, view: memoryview) -> bool:
        """Read into memory, if the bytes are resident; tell whether they were."""
        if self._nowait is None or not self._pin.holds_nowait():
            return False
        try:
            return os.preadv(self._fd, [view], offset, self._nowait) == len(view)
        except OSError:  # BlockingIOError: not resident; what else it is, `read` says, which is repeated
            return False

    def hole(self, offset: int, length: int) -> int:
        """Return how many bytes from `offset` on are known to be in a hole of the file, at most `length`.

        A thread looks up more holes where they are not known yet.
        """
        if not self.sparse or not self._file_system.answers_at_once or not self._pin.holds_nowait():
            return 0
        if offset >= self._holes.known and not self._holes.complete and not self._looking:
            self._looking = True
            with contextlib.suppress(RuntimeError):  # no thread can be started: holes are read, as zeros
                self._threads.submit(self._look_up)
        return self._holes.at(offset, length)

    def _look_up(self) -> None:
        with contextlib.suppress(OSError):  # SEEK_DATA fails here: `_looking` stays, so that this is not tried again
            while not self._holes.complete and self._pool is not None:
                self._holes.look_up(_MORE_EXTENTS)

    def data(self) -> list[tuple[int, int]]:
        """Return (start, end) of all that is no hole, in order. Blocks.

        Raises:
            SourceError: the file has changed, or its file system does not tell.
        """
        found = []
        at = 0
        try:
            while at < self.size:
                start, at = next_data(self._fd, at, self.size)
                if start < at:
                    found.append((start, at))
            change = self._pin.changed()
        except OSError as error:
            raise SourceError(repr(self), at, 0, f"its holes cannot be found: {error.strerror}") from error
        if change is not None:
            raise SourceError(repr(self), at, 0, change[1])
        if self._file_system.remote and self.sparse and found == [(0, self.size)]:  # NFS before 4.2, some of FUSE
            raise SourceError(repr(self), 0, 0, "its file system does not tell where its holes are: copy it to a disk")
        return found

    def mappable(self, start: int, end: int) -> list[tuple[int, int, int, int]] | None:
        """Return (start, end, descriptor, place in its file) of the files that have [start, end); None: it is written.

        Raises:
            SourceError: the file has changed.
        """
        if self.writable:
            return None
        if not self._pin.holds_nowait():
            raise SourceError(repr(self), start, end - start, "the file has changed since it was opened")
        return [(start, end, self._fd, start)]

    def sample(self, offset: int, length: int) -> bytes:
        """Return some bytes, to tell this file from others. Blocks."""
        return os.pread(self._fd, length, offset)

    async def read(self, offset: int, length: int) -> bytearray:
        """Read in a thread. Canceling is safe; the thread ends its read.

        Raises:
            SourceError: the file has changed. ShortReadError: it has been cut.
            OSError: as pread(2).
        """
        import asyncio  # noqa: PLC0415 - 20 ms, that a program with a loop has spent already

        return await asyncio.get_running_loop().run_in_executor(self._threads, self._read, offset, length)

    @property
    def _threads(self) -> DaemonThreads:
        if self._pool is None:
            self._pool = DaemonThreads(_THREADS, "aiouffd-file")
        return self._pool

    def _read(self, offset: int, length: int) -> bytearray:
        data = bytearray(length)
        self.fill(offset, memoryview(data))
        return data

    def fill(self, offset: int, view: memoryview) -> None:
        """Read into memory. Blocks; raises as `read`."""
        length, done = len(view), 0
        while done < length:
            got = os.preadv(self._fd, [view[done:]], offset + done)
            if got == 0:
                break
            done += got
        change = self._pin.changed()  # asked after the read: what was written before it is noticed
        if done < length and change is None:
            change = ShortReadError, f"the file ended at {offset + done}"
        if change is not None:
            kind, reason = change
            raise kind(repr(self), offset, length, reason)

    async def write(self, offset: int, data: Any) -> None:
        """Write in a thread. Canceling is safe; the thread ends its write. The file does not grow.

        Raises:
            SourceError: the source is not writable, or the file has been cut.
            OSError: as pwrite(2): ENOSPC, for example.
        """
        await self.write_many([(offset, data)])

    async def write_many(self, parts: list[tuple[int, Any]]) -> None:
        """As `write`, for several (offset, data), in one thread."""
        import asyncio  # noqa: PLC0415 - as in `read`

        await asyncio.get_running_loop().run_in_executor(self._threads, self._write_many, parts)

    def _write_many(self, parts: list[tuple[int, Any]]) -> None:
        change = self._pin.changed()
        for offset, data in parts:
            length = len(data) if isinstance(data, bytes) else memoryview(data).nbytes
            if not self.writable or change is not None or offset + length > self.size:
                reason = change[1] if change is not None else "it is not writable, or shorter"
                raise SourceError(repr(self), offset, length, reason)
        for offset, data in parts[write_parts(self._fd, parts) :]:
            write_at(self._fd, data, offset)

    def begin_sync(self, offset: int, length: int) -> None:
        """Have a thread begin to write to the disk what was written there. `sync` tells what fails.

        One at a time: on a busy disk that takes long, and reads need threads. The rest is left to `sync`.
        """
        if self._begun is None or self._begun.done():
            with contextlib.suppress(RuntimeError):  # no thread can be started
                self._begun = self._threads.submit(self._write_out, offset, length)

    def _write_out(self, offset: int, length: int) -> None:
        with contextlib.suppress(OSError):
            libc.write_out(self._fd, offset, length)

    async def sync(self) -> None:
        """Have what was written be on the disk (fsync(2))."""
        import asyncio  # noqa: PLC0415 - as in `read`

        await asyncio.get_running_loop().run_in_executor(self._threads, os.fsync, self._fd)

    async def aclose(self) -> None:
        """Let the threads end. Does not wait for reads under way."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def travel(self) -> tuple[Any, tuple[Any, ...]]:
        """Return what makes this source from the open file."""
        return FileSource.from_descriptor, (self.path, Descriptor(self._fd), self.size, self._pin.mtime_ns)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _opened, (self.path, self.writable)

    @until_exit
    def __del__(self) -> None:
        fd = getattr(self, "_fd", -1)
        if fd < 0:
            return
        if not self._file_system.remote:
            _close(fd, self._inode)
        else:
            # fstat(2) and close(2) wait for an answer of the server. Where no thread can be started, it stays open.
            with contextlib.suppress(RuntimeError):
                threading.Thread(target=_close, args=(fd, self._inode), daemon=True).start()

    def __repr__(self) -> str:
        return f"FileSource({self.path!r}{', writable=True' if self.writable else ''})"


def _opened(path: str, writable: bool) -> FileSource:  # noqa: FBT001 - of a pickle
    return FileSource(path, writable=writable)


def _close(fd: int, known: tuple[int, int] | None) -> None:
    """Close a descriptor, unless its number is another file's by now."""
    with contextlib.suppress(OSError):  # the server has gone: fstat fails, and the descriptor is closed all the same
        if inode(fd) in (known, None):
            os.close(fd)
