"""Where the chunks of a cache are: a table in one file, which may be as damaged as it likes.

The file is a page, then buckets of eight slots. A key has one bucket. A slot says in which segment a chunk lies, and
what the fingerprint of its bytes is; it ends with a fingerprint of all this. A slot whose own is wrong is an empty one:
a torn write, a bit that has flipped, or nothing. A slot may also point to what is no longer there: the fingerprint of a
chunk is compared before it is used. So the index is never trusted, only asked, and needs neither a journal nor fsync.

A bucket that is full forgets the chunk whose segment is the oldest. Slots are read by pread(2): through a mapping, a
file that was cut, or a bad sector, would be SIGBUS.
"""

from __future__ import annotations

import os
import secrets
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from aiouffd.kernel import files
from aiouffd.sources.file_attributes import FileSystem
from aiouffd.store.codecs import FINGERPRINT, HASH, fingerprint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["COUNTERS", "ZEROS", "CacheIndex", "Entry"]

COUNTERS: Final = ("hits", "misses", "bytes", "evictions", "waits", "damaged")
"""What is counted, for all processes, in this order behind the header."""
ZEROS: Final = 0xFFFFFFFF
"""In place of a segment: the chunk is zeros, and lies nowhere."""

_PAGE: Final = 4096
_HEADER: Final = struct.Struct("<8sIIQ")
_MAGIC: Final = b"aiouffdx"
_VERSION: Final = 2
_COUNTERS: Final = struct.Struct(f"<{len(COUNTERS)}Q")
_COUNTERS_AT: Final = 64
_SLOTS: Final = 8
_ENTRY: Final = struct.Struct(f"<{HASH}s{FINGERPRINT}sIII")
_SLOT: Final = _ENTRY.size + FINGERPRINT
_BUCKET: Final = _SLOTS * _SLOT


class Entry(NamedTuple):
    """Where a chunk is said to be.

    Attributes:
        key: names the chunk.
        fingerprint: of its bytes.
        segment: number of the segment, or `ZEROS`.
        page: where it begins in the segment, in units of 4 KiB.
        length: in bytes.
    """

    key: bytes
    fingerprint: bytes
    segment: int
    page: int
    length: int


class CacheIndex:
    """The index of one cache. All of it blocks; errors are OSErrors. Whoever writes excludes other writers.

    Args:
        fd: of the file, which stays the caller's.
        buckets: how many it has.

    Attributes:
        nowait: the flag with which `find` does not wait; None: there is none.
    """

    def __init__(self, fd: int, buckets: int) -> None:
        self._fd = fd
        self._buckets = buckets
        self.nowait: int | None = FileSystem(fd).nowait_flag(fd)

    @classmethod
    def open(cls, folder: int, chunks: int) -> tuple[CacheIndex, int]:
        """Open or make the index for so many chunks; return it and its descriptor, which is the caller's to close.

        Within a block that excludes other processes: an index that is damaged or too small is replaced.
        """
        least = max(1, 2 * chunks // _SLOTS)
        try:
            fd = os.open("index", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=folder)
        except FileNotFoundError:
            fd = -1
        if fd >= 0:
            header = os.pread(fd, _HEADER.size, 0)
            if len(header) == _HEADER.size:
                magic, version, slot, buckets = _HEADER.unpack(header)
                whole = os.fstat(fd).st_size == _PAGE + buckets * _BUCKET
                if (magic, version, slot) == (_MAGIC, _VERSION, _SLOT) and whole and buckets >= least:
                    return cls(fd, buckets), fd
            os.close(fd)
        return cls._made(folder, least)

    @classmethod
    def _made(cls, folder: int, buckets: int) -> tuple[CacheIndex, int]:
        for left in files.names(folder):  # by one that was killed here
            if left.startswith(".index-"):
                os.unlink(left, dir_fd=folder)
        name = f".index-{secrets.token_hex(8)}"
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
        try:
            os.ftruncate(fd, _PAGE + buckets * _BUCKET)
            os.pwrite(fd, _HEADER.pack(_MAGIC, _VERSION, _SLOT, buckets), 0)
            os.rename(name, "index", src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            os.close(fd)
            os.unlink(name, dir_fd=folder)
            raise
        return cls(fd, buckets), fd

    @property
    def replaced(self) -> bool:
        """Whether the file has another index in its place: of a process that needs a larger one."""
        return os.fstat(self._fd).st_nlink == 0

    def _bucket(self, key: bytes) -> int:
        return _PAGE + int.from_bytes(key[:8], "little") % self._buckets * _BUCKET

    def find(self, key: bytes) -> Entry | None:
        """Return what is known of a key of 20 bytes, or None."""
        return self._find(key, 0)

    def find_nowait(self, key: bytes) -> Entry | None:
        """As `find`, where that need not wait, and does not fail."""
        try:
            return None if self.nowait is None else self._find(key, self.nowait)
        except OSError:
            return None

    def _find(self, key: bytes, flags: int) -> Entry | None:
        data = bytearray(_BUCKET)
        os.preadv(self._fd, [data], self._bucket(key), flags)
        for at in range(0, len(data) - _SLOT + 1, _SLOT):
            if data.startswith(key, at):
                entry = _decoded(bytes(data[at : at + _SLOT]))
                if entry is not None:
                    return entry
        return None

    def add(self, entries: Sequence[Entry]) -> None:
        """Note where chunks are; a key that is known is noted anew."""
        for entry in entries:
            at = self._bucket(entry.key)
            data = os.pread(self._fd, _BUCKET, at).ljust(_BUCKET, b"\0")
            slots = [_decoded(data[n * _SLOT : (n + 1) * _SLOT]) for n in range(_SLOTS)]
            keys = [None if slot is None else slot.key for slot in slots]
            if entry.key in keys:
                chosen = keys.index(entry.key)
            elif None in keys:
                chosen = keys.index(None)
            else:
                chosen = min(range(_SLOTS), key=lambda n: slots[n].segment)  # type: ignore[union-attr]
            packed = _ENTRY.pack(*entry)
            os.pwrite(self._fd, packed + fingerprint(packed), at + chosen * _SLOT)

    def remove(self, entry: Entry) -> None:
        """Forget an entry, if it is still there."""
        at = self._bucket(entry.key)
        data = os.pread(self._fd, _BUCKET, at)
        packed = _ENTRY.pack(*entry)
        for place in range(0, len(data) - _SLOT + 1, _SLOT):
            if data.startswith(packed, place):
                os.pwrite(self._fd, bytes(_SLOT), at + place)

    def entries(self) -> list[Entry]:
        """Return all entries."""
        found = []
        for bucket in range(self._buckets):
            data = os.pread(self._fd, _BUCKET, _PAGE + bucket * _BUCKET)
            if data.count(0) == len(data):
                continue
            slots = (_decoded(data[at : at + _SLOT]) for at in range(0, len(data) - _SLOT + 1, _SLOT))
            found += [entry for entry in slots if entry is not None]
        return found

    def counters(self) -> dict[str, int]:
        """Return what all processes have counted."""
        data = os.pread(self._fd, _COUNTERS.size, _COUNTERS_AT).ljust(_COUNTERS.size, b"\0")
        return dict(zip(COUNTERS, _COUNTERS.unpack(data), strict=True))

    def count(self, more: Mapping[str, int]) -> None:
        """Add to the counters."""
        known = self.counters()
        values = [(known[name] + more.get(name, 0)) % (1 << 64) for name in COUNTERS]
        os.pwrite(self._fd, _COUNTERS.pack(*values), _COUNTERS_AT)


def _decoded(slot: bytes) -> Entry | None:
    packed = slot[: _ENTRY.size]
    return Entry(*_ENTRY.unpack(packed)) if fingerprint(packed) == slot[_ENTRY.size :] else None
