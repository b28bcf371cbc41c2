"""Which pages were touched first, in order: written while one run is served, read to bring them ahead in the next.

The file, in little-endian order:

| at | what |
| --- | --- |
| 0 | 8 bytes: `aiouffd` and a zero |
| 8 | u32: the version, 1 |
| 12 | u32: the page size |
| 16 | u64: the length of what was served |
| 24 | u64: the number of pages that follow |
| 32 | u32: CRC-32 of them; 0 as long as the recording goes on |
| 36 | u32: 1 once the recording is complete, 0 before |
| 40 | u64 each: the offset of a page |

It is written as `PATH.part` and renamed once it is complete.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
import zlib
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import attrs

from aiouffd.errors import TraceError
from aiouffd.sources.base import Descriptor

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Recorder", "Trace"]

log = logging.getLogger("aiouffd")

MAGIC: Final = b"aiouffd\0"
VERSION: Final = 1
HEADER: Final = struct.Struct("<8sIIQQII")
_COUNT_AT: Final = 24
_STEP: Final = 1 << 20  # the file grows by so much
_BATCH: Final = 4096  # pages of a trace that are sorted and merged together


@attrs.frozen
class Trace:
    """What a file says.

    Attributes:
        page_size: bytes.
        size: bytes of what was served.
        offsets: of the pages, in the order of their first touch, each once.
    """

    page_size: int
    size: int
    offsets: array[int]

    @classmethod
    def load(cls, path: str | os.PathLike[str], page_size: int | None = None) -> Self:
        """Read a file that `Recorder` has written for pages of this size; None: of any.

        Raises:
            TraceError: it is not such a file, not complete, damaged, or of another page size.
            OSError: it cannot be read.
        """
        data = Path(path).read_bytes()
        if len(data) < HEADER.size:
            raise TraceError(str(path), f"{len(data)} bytes are too few for a recording")
        magic, version, page, size, count, checksum, complete = HEADER.unpack_from(data)
        body = memoryview(data)[HEADER.size :]
        if magic != MAGIC:
            raise TraceError(str(path), "it is no recording of page faults")
        if version != VERSION:
            raise TraceError(str(path), f"its version is {version}; this library reads version {VERSION}")
        if not complete:
            raise TraceError(str(path), "the recording was not completed: who made it ended too early")
        if len(body) != count * 8:
            raise TraceError(str(path), f"it announces {count} pages and holds {len(body) / 8:g}: truncated?")
        if zlib.crc32(body) != checksum:
            raise TraceError(str(path), "its checksum is wrong: it is damaged")
        if page_size is not None and page != page_size:
            raise TraceError(str(path), f"it was recorded with pages of {page} bytes, not {page_size}")
        offsets = array("Q", bytes(body))
        if page < mmap.PAGESIZE or any(offset % page or offset >= size for offset in offsets):
            raise TraceError(str(path), "it names pages that cannot be")
        return cls(page, size, array("Q", dict.fromkeys(offsets)))

    def ranges(self, begin: int = 0) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """Yield (index behind it, merged (offset, length) of it) for each batch of pages from index `begin` on.

        The order is kept from batch to batch; within one, neighbours are joined to larger reads.
        """
        page = self.page_size
        for at in range(begin, len(self.offsets), _BATCH):
            merged: list[tuple[int, int]] = []
            for offset in sorted(self.offsets[at : at + _BATCH]):
                if merged and sum(merged[-1]) == offset:
                    merged[-1] = (merged[-1][0], merged[-1][1] + page)
                else:
                    merged.append((offset, page))
            yield min(at + _BATCH, len(self.offsets)), merged


class Recorder:
    """Writes a file, in shared memory: what is noted survives the process that notes it.

    One process makes it, and completes it; it travels to the one that notes.
    """

    def __init__(self, fd: int, path: Path | None = None) -> None:
        self.fd = fd
        self._path = path  # in the process that made it
        self._map: mmap.mmap | None = None
        self._words = memoryview(bytearray(8)).cast("Q")
        self._count = 0
        self._room = 0
        self._full = False

    @classmethod
    def create(cls, path: str | os.PathLike[str], page_size: int, size: int) -> Self:
        """Begin a recording.

        Raises:
            OSError: there can be no file.
        """
        final = Path(path)
        fd = os.open(_part(final), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        os.write(fd, HEADER.pack(MAGIC, VERSION, page_size, size, 0, 0, 0))
        return cls(fd, final)

    def travel(self) -> Any:
        """Go to another process with the descriptor."""
        return type(self)._arrived, (Descriptor(self.fd),)  # noqa: SLF001 - its own

    @classmethod
    def _arrived(cls, descriptor: Descriptor) -> Self:
        return cls(descriptor.detach())

    def note(self, offset: int) -> None:
        """Write down a page."""
        if self._count >= self._room and not self._grow():
            return
        words, count = self._words, self._count
        words[HEADER.size // 8 + count] = offset
        self._count = count + 1
        words[_COUNT_AT // 8] = count + 1  # last: what it counts is there

    def _grow(self) -> bool:
        """Make room for more; tell whether there is."""
        if self._full:
            return False
        if self._map is None:  # what a predecessor has noted is kept
            self._count = struct.unpack("<Q", os.pread(self.fd, 8, _COUNT_AT))[0]
        used = HEADER.size + 8 * self._count
        length = (used // _STEP + 1) * _STEP
        try:
            # Not ftruncate: storing into a hole for which the disk has no room left is SIGBUS.
            os.posix_fallocate(self.fd, 0, length)
        except OSError as error:
            self._full = True
            log.error("what is touched is recorded no longer: %s", error.strerror)  # noqa: TRY400 - it is served on
            return False
        self._words.release()
        self._map = mmap.mmap(self.fd, length)
        self._words = memoryview(self._map).cast("Q")
        self._room = (length - HEADER.size) // 8
        return True

    def complete(self) -> None:
        """Make it a recording that can be read; nobody notes any more."""
        assert self._path is not None
        _, version, page, size, count, _, _ = HEADER.unpack(os.pread(self.fd, HEADER.size, 0))
        length = HEADER.size + 8 * count
        os.ftruncate(self.fd, length)
        body = os.pread(self.fd, length, HEADER.size)
        os.pwrite(self.fd, HEADER.pack(MAGIC, version, page, size, count, zlib.crc32(body), 1), 0)
        os.fsync(self.fd)
        _part(self._path).rename(self._path)
        self.close()

    def discard(self) -> None:
        """Give it up, and remove what there is of it."""
        assert self._path is not None
        _part(self._path).unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Give it up as it is."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")
