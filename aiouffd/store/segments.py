"""The files of a cache that hold chunks: each of 64 MiB, written once, from its beginning to its end.

A segment is written by pwrite(2), by one process at a time: the one that has the file locked (flock). It begins with a
page that says, in the order `_HEADER`, what it is, in which boot of the machine it was begun, and how much of it is
taken; then comes the fingerprint of that. Room is taken before it is written to, so a process that continues the
segment of one that was killed writes behind all that the other can have written. Not continued are a segment whose
first page is damaged, and one of an earlier boot: what its first page says may be older than its chunks.

What has been written stays as it is, until the file is unlinked as a whole. A mapping of it shows the same bytes for as
long as it lasts. The file has its whole length from the beginning (sparse), so a mapping never reaches behind its end.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import stat
import struct
import threading
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import WeakValueDictionary

from aiouffd.kernel import files
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.ranges import align_up
from aiouffd.sources.file_attributes import FileSystem
from aiouffd.store.codecs import FINGERPRINT, fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

__all__ = ["LARGEST", "Place", "Segment", "Segments"]

LARGEST: Final = 64 << 20
_SMALLEST: Final = 1 << 20
_PARTS: Final = 8  # segments of which a small cache consists
_HEADER: Final = struct.Struct("<8sI16s4xQ")
_MAGIC: Final = b"aiouffdc"
_VERSION: Final = 2
_NONE: Final = 0xFFFFFFFF  # no number of a segment: see `cache_index.ZEROS`
_NAME: Final = re.compile(r"[0-9a-f]{8}\.segment")
_READING: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # no waiting for the writer of a pipe
_WRITING: Final = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
_TOUCH: Final = 5.0  # seconds between two notes of when a segment was used
_TRIED: Final = 8  # segments of others that are looked at, whether they can be continued


class Segment:
    """An open segment. Thread-safe.

    Args:
        number: its name.
        fd: belongs to this object from now on.
        size: its bytes, those that are not taken yet included.
    """

    def __init__(self, number: int, fd: int, size: int) -> None:
        self.number = number
        self.size = size
        self._held = OwnedDescriptor(fd)
        self._nowait = FileSystem(fd).nowait_flag(fd)
        self._touched = 0.0

    @property
    def fd(self) -> int:
        """Its descriptor, which stays this object's."""
        return self._held.fileno()

    @property
    def gone(self) -> bool:
        """Whether the file has been unlinked. The descriptor and mappings keep its bytes, and its room on the disk."""
        return os.fstat(self.fd).st_nlink == 0

    def read(self, offset: int, length: int) -> bytearray:
        """Return bytes; fewer where a file was cut. Raises OSError. Blocks."""
        data = bytearray(length)
        view, done = memoryview(data), 0
        while done < length and (got := os.preadv(self.fd, [view[done:]], offset + done)):
            done += got
        return data[:done] if done < length else data

    def fill_nowait(self, offset: int, view: memoryview) -> bool:
        """Read bytes that are in the page cache; tell whether all were. Does not wait."""
        return self.read_nowait(offset, view) == len(view)

    def read_nowait(self, offset: int, view: memoryview) -> int:
        """Read bytes that are in the page cache; return how many were. Does not wait."""
        if self._nowait is None:
            return 0
        try:
            return os.preadv(self.fd, [view], offset, self._nowait)
        except OSError:
            return 0

    def touch(self) -> None:
        """Note that it is in use, at most once in 5 s."""
        now = time.monotonic()
        if now - self._touched > _TOUCH:
            self._touched = now
            with contextlib.suppress(OSError):
                os.utime(self.fd)


class Place(NamedTuple):
    """Where a chunk is; a chunk of zeros is in no segment.

    Attributes:
        segment: which holds it, or None.
        offset: in the segment, a multiple of the page size.
        length: of the chunk.
    """

    segment: Segment | None
    offset: int
    length: int


class _Active(NamedTuple):
    """The segment that this process writes to.

    Attributes:
        writer: has it locked.
        segment: the same, to be read.
        used: bytes that are taken.
    """

    writer: OwnedDescriptor
    segment: Segment
    used: int


class Segments:
    """The segments in one folder. Thread-safe. All of it blocks; errors are OSErrors.

    Args:
        folder: a descriptor of the folder; it stays the caller's.
        limit: bytes of all segments together.
        exclusive: gives a block during which no other process adds or removes a segment.

    Attributes:
        evictions: how many were removed to make room.
    """

    def __init__(
        self,
        folder: int,
        limit: int,
        exclusive: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._folder = folder
        self._limit = limit
        self._exclusive = exclusive
        self.evictions: int = 0
        self.size: int = min(max(limit // _PARTS, _SMALLEST), LARGEST) & -mmap.PAGESIZE
        self._boot = bytes.fromhex(files.read("/proc/sys/kernel/random/boot_id").decode().strip().replace("-", ""))
        self._open: WeakValueDictionary[int, Segment] = WeakValueDictionary()
        self._active: _Active | None = None
        self._lock = threading.Lock()

    @property
    def largest(self) -> int:
        """The largest chunk that fits."""
        return self.size - mmap.PAGESIZE

    def at_hand(self, number: int) -> Segment | None:
        """Return a segment that is open already; it may be gone. Does not block."""
        return self._open.get(number)

    def find(self, number: int) -> Segment | None:
        """Return a segment; None: it is gone."""
        known = self._open.get(number)
        if known is not None and not known.gone:  # another may have its number by now
            return known
        try:
            fd = os.open(_name(number), _READING, dir_fd=self._folder)
        except FileNotFoundError:
            return None
        return self._adopted(number, fd)

    def _adopted(self, number: int, fd: int) -> Segment | None:
        """Return the segment of a descriptor, which is closed if it is none."""
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            os.close(fd)
            return None
        segment = self._open[number] = Segment(number, fd, found.st_size)
        return segment

    def append(self, parts: Sequence[Any]) -> list[Place]:
        """Write chunks, none larger than `largest`; return where they are."""
        places: list[Place] = []
        with self._lock:
            while len(places) < len(parts):
                active = self._room(memoryview(parts[len(places)]).nbytes)
                used = active.used
                some: list[tuple[int, memoryview]] = []
                for part in parts[len(places) :]:
                    view = memoryview(part).cast("B")
                    if used + len(view) > active.segment.size:
                        break
                    some.append((used, view))
                    used = align_up(used + len(view), mmap.PAGESIZE)
                # Taken before anything is written there.
                header = _HEADER.pack(_MAGIC, _VERSION, self._boot, used)
                files.write_at(active.writer.fileno(), header + fingerprint(header), 0)
                self._active = active._replace(used=used)
                for offset, view in some:
                    files.write_at(active.writer.fileno(), view, offset)
                    places.append(Place(active.segment, offset, len(view)))
        return places

    def _room(self, length: int) -> _Active:
        """Return a segment of this process's own with room for a chunk."""
        active = self._active
        if active is not None and not active.segment.gone and active.used + length <= active.segment.size:
            return active
        self.close()
        with self._exclusive():
            return self._continued(length) or self._begun()

    def _continued(self, length: int) -> _Active | None:
        """Return a segment that a process has left unfinished."""
        for number, _ in sorted(self.files(), key=lambda file: -file[1].st_mtime_ns)[:_TRIED]:
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                writer = OwnedDescriptor(os.open(_name(number), _WRITING, dir_fd=self._folder))
                fcntl.flock(writer.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                used = self._used(writer.fileno())
                segment = self.find(number)
                if segment is not None and used and used + length <= segment.size:
                    return _Active(writer, segment, used)
        return None

    def _used(self, fd: int) -> int:
        """Return how much of a segment is taken; 0: it is not known."""
        data = os.pread(fd, _HEADER.size + FINGERPRINT, 0)
        header, check = data[: _HEADER.size], data[_HEADER.size :]
        if fingerprint(header) != check:
            return 0
        magic, version, boot, used = _HEADER.unpack(header)
        known = (magic, version, boot) == (_MAGIC, _VERSION, self._boot) and used % mmap.PAGESIZE == 0
        return used if known else 0

    def _begun(self) -> _Active:
        """Return a new segment; make room for it first."""
        self.evict(self._limit - self.size)
        number = max((number for number, _ in self.files()), default=0) + 1
        if number >= _NONE:
            raise OSError(errno.EFBIG, "no numbers are left for its files: clear it")
        writer = OwnedDescriptor(os.open(_name(number), _WRITING | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self._folder))
        try:
            fcntl.flock(writer.fileno(), fcntl.LOCK_EX)
            os.ftruncate(writer.fileno(), self.size)
            segment = self.find(number)
            assert segment is not None, "no other process removes one now"
        except BaseException:
            os.unlink(_name(number), dir_fd=self._folder)
            raise
        return _Active(writer, segment, mmap.PAGESIZE)

    def evict(self, limit: int) -> int:
        """Remove those that have not been used for longest until no more than `limit` bytes are left.

        Within a block of `exclusive`. What is mapped stays.

        Returns:
            how many were removed.
        """
        now = time.time_ns()  # later is of a clock that was put back: what is in use has a new time within 5 s

        def last_used(file: tuple[int, os.stat_result]) -> int:
            return file[1].st_mtime_ns if file[1].st_mtime_ns <= now else 0

        found = sorted(self.files(), key=last_used)
        total = sum(file.st_size for _, file in found)
        removed = 0
        for number, file in found:
            if total <= limit:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(_name(number), dir_fd=self._folder)
            total -= file.st_size
            removed += 1
        self.evictions += removed
        return removed

    def take_evictions(self) -> int:
        """Return `evictions`, and count from 0 again. Within a block of `exclusive`."""
        taken, self.evictions = self.evictions, 0
        return taken

    def files(self) -> list[tuple[int, os.stat_result]]:
        """Return the number and the status of all segments."""
        found = []
        for name in files.names(self._folder):
            if _NAME.fullmatch(name):
                with contextlib.suppress(FileNotFoundError):
                    found.append((int(name[:8], 16), os.stat(name, dir_fd=self._folder, follow_symlinks=False)))
        return found

    def let_go(self) -> None:
        """Close the own segment if it has been evicted: an open file keeps its room on the disk."""
        with self._lock:
            if self._active is not None and self._active.segment.gone:
                self.close()

    def close(self) -> None:
        """Let another process continue what this one has begun."""
        active, self._active = self._active, None
        if active is not None:
            active.writer.close()


def _name(number: int) -> str:
    return f"{number:08x}.segment"
