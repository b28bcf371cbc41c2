"""A local file, copied straight out of its mapping where its pages are in memory.

The loop must not wait for a disk, so it is known before each copy whether the pages are resident: mincore(2) looks
into the page cache and costs 1 us for a page, 30 to 50 us for 2 MiB. A window whose pages are not all there is read
by a thread. Copying from the mapping faults it in as it goes, sixteen pages at a time; a pread first would cost more.

What a toucher in order will want next, a thread brings into memory and into the mapping (MADV_POPULATE_READ), while
the loop copies what is before it: the question and the faults are spared then, 0.25 of 1.4 us a page, and a disk is
read ahead.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import mmap
import os
import stat
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from aiouffd.errors import ShortReadError, SourceError
from aiouffd.kernel import libc
from aiouffd.kernel.memory import address_of, zero_blocks
from aiouffd.sources.base import Descriptor

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FileSource"]

_mincore = ctypes.CDLL(None, use_errno=True).mincore
_mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

_THREADS = 16  # reads of a disk under way at once
_STREAMS = 8  # whose next pieces are remembered
_PEEKED = 64 << 10  # of so many bytes the first is taken along
_SAMPLED = 4
_SMALL = 16 << 10  # bytes that are read sooner than they are mapped
_FRESH = 0.1  # seconds for which what was populated is taken to be resident still, without asking


class _Populated(NamedTuple):
    """Bytes [low, high) that a thread has brought to hand, when, and the first byte of each block of them."""

    low: int
    high: int
    when: float
    firsts: bytes


class FileSource:
    """A regular file, opened now: it is this file that is served, also when another takes its name.

    Its size is taken now, too. Pages behind the end of a file that has been cut since are an error, not zeros.

    Args:
        path: of the file.

    Raises:
        SourceError: it cannot be opened, or is no regular file; the OSError is its cause.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(path)  # noqa: PTH100 - links are not followed: it is a name for people
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise SourceError(f"FileSource({self.path!r})", 0, 0, f"cannot be opened: {error.strerror}") from error
        self._adopt(fd, os.fstat(fd).st_size)

    @classmethod
    def from_descriptor(cls, path: str, descriptor: Descriptor, size: int) -> FileSource:
        """Serve the file that is open already, and had this size when it was opened: it may have been cut since."""
        self = cls.__new__(cls)
        self.path = path
        self._adopt(descriptor.detach(), size)
        return self

    def _adopt(self, fd: int, size: int) -> None:
        self._fd = fd
        self._pool: ThreadPoolExecutor | None = None
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            kind = "a directory" if stat.S_ISDIR(info.st_mode) else "no regular file"
            raise SourceError(repr(self), 0, 0, f"it is {kind}")
        self.size = size
        self.identity = (info.st_dev, info.st_ino, size, info.st_mtime_ns)
        self.sparse = info.st_blocks * 512 < self.size  # else `hole` need not be asked
        self._extent = (0, 0, False)  # start, end, hole: the last answer to that
        self._map: mmap.mmap | None = None
        self._mapped = min(size, info.st_size)
        self._address = 0
        self._expected: deque[tuple[int, int]] = deque(maxlen=_STREAMS)  # start, end
        self._populated: tuple[_Populated, ...] = ()  # replaced as a whole: threads add to it while the loop looks
        self._scratch = memoryview(bytearray(_SMALL))
        self._scratch_address = address_of(self._scratch)
        self._vector = ctypes.create_string_buffer(1 << 10)
        if self._mapped:
            self._map = mmap.mmap(fd, self._mapped, access=mmap.ACCESS_READ)
            self._address = address_of(self._map)
        # To others than the owner and those who may write the file, mincore says that all is resident (it would tell
        # them what others read).
        self._tells = info.st_uid == os.geteuid() or os.access(f"/proc/self/fd/{fd}", os.W_OK)

    def locate(self, offset: int, length: int) -> int | None:
        """Return where the bytes lie in the file's mapping, if reading them would not wait for the disk."""
        # Behind the end of a file that was cut, the rest of its last page would read as zeros (0.4 us, to ask).
        end = offset + length
        if not self._tells or end > self._mapped or end > os.lseek(self._fd, 0, os.SEEK_END):
            return None
        if self._populated and self._piece(offset, end) is not None:
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
        """Return where bytes lie until the next call: for a few, preadv2 costs half of a question and a fault or two.

        RWF_NOWAIT (Linux 4.14) refuses what is resident, too, where the kernel would read ahead: see `locate` then.
        """
        if length <= _SMALL:
            try:
                got = os.preadv(self._fd, [self._scratch[:length]], offset, os.RWF_NOWAIT)
            except OSError:  # also where the file system does not know the flag
                got = -1
            if got >= 0:
                return self._scratch_address if got == length else None  # less: not all is resident
        return self.locate(offset, length)

    def blank(self, offset: int, length: int, block: int) -> list[int]:
        """Return where resident blocks of zeros begin.

        The mapping is not looked at: where the file has been cut meanwhile that would be SIGBUS. pread takes the first
        byte of a block, for as much as a copy of two pages costs: so of four blocks one is looked at first. Zeros
        between two of these are copied.
        """
        if length < block:  # not worth the question
            return []
        piece = self._piece(offset, offset + length) if block == _PEEKED else None
        index, rest = divmod(offset - piece.low, block) if piece is not None else (0, 1)
        if piece is not None and not rest:
            firsts = piece.firsts[index : index + (length + block - 1) // block]
        elif 0 in self._peek(offset, offset + length, _SAMPLED * block):
            firsts = self._peek(offset, offset + length, block)
        else:
            return []
        if 0 not in firsts:
            return []
        data = self._some(offset, length)
        # Less than that: it was cut just now, and what is behind its end is no zeros; the copy finds out.
        return zero_blocks(memoryview(data), block, firsts) if len(data) == length else []

    def _peek(self, low: int, high: int, block: int) -> bytes:
        """Return the first byte of each block of [low, high), as far as the file goes now."""
        return b"".join([self._some(at, 1) for at in range(low, high, block)])

    def _some(self, offset: int, length: int) -> bytes:
        """Return bytes that are resident; nothing if they cannot be read, which the copy finds out."""
        try:
            return os.pread(self._fd, length, offset)
        except OSError:
            return b""

    def _piece(self, offset: int, end: int) -> _Populated | None:
        """Return what was populated around [offset, end) of late."""
        recent = monotonic() - _FRESH
        for piece in self._populated:
            if piece.low <= offset and end <= piece.high and piece.when > recent:
                return piece
        return None

    def expect(self, offset: int, length: int) -> None:
        """Have a thread bring these bytes to hand; what is being brought already is not asked for again."""
        low, high = offset & -mmap.PAGESIZE, min(offset + length, self._mapped)
        for start, end in self._expected:
            if start <= low < end:
                low = end
        if low < high and self._tells:
            self._expected.append((low, high))
            with contextlib.suppress(RuntimeError):  # no thread can be started: it comes when it is asked for
                self._threads.submit(self._populate, low, high)

    def _populate(self, low: int, high: int) -> None:
        try:
            for start, end in self._extents(low, high) if self.sparse else ((low, high),):
                libc.madvise(self._address + start, end - start, libc.MADV_POPULATE_READ)
                # One call of a third of the speed: each of many would wait for the interpreter, which the loop has.
                firsts = libc.peek(range(self._address + start, self._address + end, _PEEKED))
                piece = _Populated(start, end, monotonic(), firsts)
                self._populated = (*self._populated, piece)[-_STREAMS:]  # what another thread adds just now may be lost
        except OSError:  # before Linux 5.14, or the file was cut, or cannot be read: `locate` and `read` find out
            return

    def _extents(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        """Yield what is no hole of [low, high): tmpfs gives memory to a hole that is looked at through a mapping."""
        while low < high:
            start = os.lseek(self._fd, low, os.SEEK_DATA) & -mmap.PAGESIZE  # ENXIO: holes up to the end
            if start >= high:
                return
            low = os.lseek(self._fd, max(start, low), os.SEEK_HOLE)
            yield start, min(low, high)
            low = (low + mmap.PAGESIZE - 1) & -mmap.PAGESIZE

    def memory(self) -> tuple[int, int, int] | None:
        """Return the file's mapping, if the kernel tells which of its pages are in memory."""
        return (self._address, self._mapped, self._fd) if self._tells and self._mapped else None

    def read_nowait(self, offset: int, length: int) -> bytearray | None:
        """Return the bytes if they are in memory: preadv2 with RWF_NOWAIT. For files that mincore is silent about."""
        if self._tells:
            return None
        data = bytearray(length)
        try:
            got = os.preadv(self._fd, [data], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # tmpfs: it does not know the flag, and never waits
                raise
            got = os.preadv(self._fd, [data], offset)
        return data if got == length else None

    def hole(self, offset: int, length: int) -> int:
        """Return how many bytes from `offset` on are in a hole of a sparse file, at most `length`."""
        if not self.sparse:
            return 0
        start, end, hole = self._extent
        if not start <= offset < end:
            try:
                data = os.lseek(self._fd, offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # nothing but a hole up to the end
                    raise
                data = self.size
            hole = data > offset
            end = data if hole else os.lseek(self._fd, offset, os.SEEK_HOLE)
            if os.fstat(self._fd).st_size < self.size:
                return 0  # it was cut: what is behind the end now is no hole
            self._extent = (offset, end, hole)
        return min(end - offset, length) if hole else 0

    async def read(self, offset: int, length: int) -> bytearray:
        """Read in a thread. Canceling gives the result up; the thread goes on to the end of its read."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._read, offset, length)

    @property
    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, "aiouffd-file")
        return self._pool

    def _read(self, offset: int, length: int) -> bytearray:
        data = bytearray(length)
        view = memoryview(data)
        done = 0
        while done < length:
            got = os.preadv(self._fd, [view[done:]], offset + done)
            if got == 0:
                raise ShortReadError(
                    repr(self),
                    offset,
                    length,
                    f"the file ends at {os.fstat(self._fd).st_size}; it had {self.size} bytes when opened",
                )
            done += got
        return data

    async def aclose(self) -> None:
        """Close the file; reads under way are waited for in the background."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def travel(self) -> tuple[Any, tuple[Any, ...]]:
        """Take the open file along."""
        return FileSource.from_descriptor, (self.path, Descriptor(self._fd), self.size)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return FileSource, (self.path,)

    def __del__(self) -> None:
        fd = getattr(self, "_fd", -1)
        if fd >= 0:
            os.close(fd)

    def __repr__(self) -> str:
        return f"FileSource({self.path!r})"
