"""Which pages were touched first, in order: written while one run is served, read to bring them ahead in the next.

The file, in little-endian order:

| at | what |
| --- | --- |
| 0 | 8 bytes: `aiouffd` and a zero |
| 8 | u32: the version, 3 |
| 12 | u32: the page size |
| 16 | u64: the length of what was served |
| 24 | u64: the number of pages that follow |
| 32 | u32: CRC-32 of them; 0 while the recording goes on |
| 36 | u32: bit 0: the recording is complete; bit 1: it lacks its end, for which there was no room |
| 40 | 32 bytes: the fingerprint of the source (see `fingerprint`), or zeros |
| 72 | u64 each: the offset of a page; plus 1 where it came along with another, and nobody was seen to touch it |

In version 2 no page came along. Version 1 had no fingerprint either: its pages begin at 40. Both are still read.

Version 5 carries bytes of pages. An offset plus 2 is that of a page whose bytes follow; behind the offsets come

| bytes | what |
| --- | --- |
| 32 | what only this version of the source has (see `pages.version_of`) |
| 4 | u32: which hash: 1: XXH3, 2: BLAKE2b, of 16 bytes each |
| 4 | u32: the bytes of a unit: 1 MiB, or a page that is larger |
| 4 | u32: n: of each n offsets the bytes are in the order of the offsets |
| 16 | the hash of all before and of the hashes that follow |
| 16 each | the hashes of the units |
| | zeros up to a multiple of 4,096 |
| | the bytes, in units, of which the last may be shorter |

Version 4, which is still read, does not have n: it is 4,096.

It is written as `PATH.part` and renamed once it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import stat
import struct
import zlib
from array import array
from functools import reduce
from itertools import compress
from operator import or_
from typing import TYPE_CHECKING, Any, Final, Self

import attrs

from aiouffd.engine.ahead.pages import RecordedPages
from aiouffd.engine.present import PresentPages
from aiouffd.errors import SourceError, TraceError
from aiouffd.kernel.files import write_at
from aiouffd.kernel.memory import map_file
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.sources.base import Descriptor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

__all__ = ["Recorder", "Trace", "begin", "differ", "fingerprint", "part_of", "stored"]

log: logging.Logger = logging.getLogger("aiouffd")

MAGIC: Final = b"aiouffd\0"
VERSION: Final = 3
VERSIONS_WITH_PAGES: Final = 4, 5
HEADER: Final = struct.Struct("<8sIIQQII32s")
HEADER_1: Final = struct.Struct("<8sIIQQII")
_ABOUT: Final = struct.Struct("<8xIIQQ")
_COUNT_AT: Final = 24
_STATE_AT: Final = 36
_COMPLETE: Final = 1
_CUT: Final = 2
_ALONG: Final = 1
_KEPT: Final = 2
_MARKS: Final = bytes(range((_ALONG | _KEPT) + 1))
_ARE_TOUCHED: Final = bytes(not mark & _ALONG for mark in range(256))
_ARE_KEPT: Final = bytes(bool(mark & _KEPT) for mark in range(256))
_PART: Final = ".part"
_SAMPLES: Final = 16
_SAMPLE: Final = 4096
_OF_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
_STEP: Final = 1 << 20  # the file grows by so much
_BATCH: Final = 4096  # pages of a trace that are sorted and merged together


@attrs.frozen
class Trace:
    """The content of a recording.

    Attributes:
        page_size: bytes.
        size: bytes of what was served.
        offsets: of the pages, in the order in which they came first, each once.
        source: the fingerprint of the source; zeros: unknown.
        along: offsets of those among them that came along with others, and were not seen to be touched.
        pages: the bytes of some of them; None: of none.
    """

    page_size: int
    size: int
    offsets: array[int]
    source: bytes = bytes(32)
    along: array[int] = attrs.field(factory=lambda: array("Q"))
    pages: RecordedPages | None = attrs.field(default=None, eq=False, repr=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str], page_size: int | None = None, *, source: bytes = bytes(32)) -> Self:
        """Read a file that `Recorder` has written.

        Args:
            path: of the file.
            page_size: of the memory that it is replayed for; None: any.
            source: the fingerprint of the source that it is replayed from; zeros: any.

        Raises:
            TraceError: it is not such a file, not complete, damaged, of another page size, or of another source.
            OSError: it cannot be read.
        """
        with open(path, "rb") as file:  # noqa: PTH123 - a pager has no use for pathlib, which takes 2 ms
            head = file.read(HEADER.size)
            version, *_, count = _ABOUT.unpack_from(head.ljust(HEADER.size, b"\0"))
            if head[: len(MAGIC)] != MAGIC or version not in VERSIONS_WITH_PAGES:
                return cls.parse(head + file.read(), str(path), page_size, source=source)
            head += file.read(min(count * 8, os.fstat(file.fileno()).st_size))
            trace, kept = cls._parsed(head, str(path), page_size, source)
            try:
                about = trace.page_size, trace.size, trace.offsets, kept
                pages = RecordedPages.read(file.fileno(), head, *about, old=version < VERSIONS_WITH_PAGES[-1])
            except TraceError as error:
                log.warning("%s: the bytes of its pages are not used: %s", path, error.reason)
                return trace
        return attrs.evolve(trace, pages=pages)

    @classmethod
    def parse(cls, data: bytes, name: str, page_size: int | None = None, *, source: bytes = bytes(32)) -> Self:
        """As `load`, for bytes, without those of pages; name: of what they were read from, for errors."""
        return cls._parsed(data, name, page_size, source)[0]

    @classmethod
    def _parsed(cls, data: bytes, name: str, page_size: int | None, source: bytes) -> tuple[Self, frozenset[int]]:
        """Return a recording, and the offsets of the pages whose bytes the file carries."""
        if len(data) < HEADER_1.size:
            raise TraceError(name, f"{len(data)} bytes are too few for a recording")
        magic, version, page, size, count, checksum, state = HEADER_1.unpack_from(data)
        if magic != MAGIC:
            raise TraceError(name, "it is not a recording of page faults")
        if not 1 <= version <= VERSIONS_WITH_PAGES[-1]:
            raise TraceError(
                name, f"its version is {version}; this library reads versions up to {VERSIONS_WITH_PAGES[-1]}"
            )
        header = HEADER_1 if version == 1 else HEADER
        recorded = data[HEADER_1.size : header.size].ljust(32, b"\0")
        carries = version in VERSIONS_WITH_PAGES
        body = memoryview(data)[header.size :][: count * 8 if carries else None]
        if not state & _COMPLETE:
            raise TraceError(name, "the recording was not completed: the process that recorded ended too early")
        if len(body) != count * 8:
            raise TraceError(name, f"it announces {count} pages and holds {len(body) / 8:g}: truncated?")
        if zlib.crc32(body) != checksum:
            raise TraceError(name, "its checksum is wrong: it is damaged")
        _check(name, page, recorded, page_size, source)
        # The marks are in the lowest byte, in which no offset of a page has anything.
        plain, low = bytearray(body), bytes(body[::8])
        plain[::8] = bytes(count)
        entries = array("Q", bytes(plain))
        offsets = array("Q", dict.fromkeys(entries))
        every = frozenset(offsets)
        touched = _those(every, entries, low.translate(_ARE_TOUCHED))
        known = _MARKS if carries else _MARKS[: _ALONG + 1]
        if (
            page < mmap.PAGESIZE
            or page & (page - 1)
            or low.translate(None, known)
            or not (version >= VERSION or len(touched) == len(offsets))
            or reduce(or_, offsets, 0) % page
            or max(offsets, default=-1) >= size
        ):
            raise TraceError(name, "it names pages that cannot exist")
        along = array("Q", (at for at in offsets if at not in touched) if len(touched) < len(offsets) else ())
        kept = _those(every, entries, low.translate(_ARE_KEPT))
        return cls(page, size, offsets, recorded, along), kept

    @classmethod
    def replayed(cls, path: str | os.PathLike[str], page_size: int, origin: Any, source: bytes) -> Self:
        """Return the recording at a path as it is replayed from a source, with the bytes of pages that may be shown.

        Args:
            path: of the file.
            page_size: of the memory.
            origin: the source, or a handler.
            source: its fingerprint.

        Raises:
            TraceError, OSError: as `load`.
        """
        return cls.load(path).shown(path, page_size, origin, source)

    def shown(self, path: str | os.PathLike[str], page_size: int, origin: Any, source: bytes) -> Self:
        """Return as much of it as may be shown; as `replayed`, where it was loaded before its source was known."""
        _check(str(path), self.page_size, self.source, page_size, source)
        reason = "" if self.pages is None else self.pages.refusal(origin)
        if not reason:
            return self
        log.warning("%s: the pages come from the source: the bytes that it carries are not used: %s", path, reason)
        return attrs.evolve(self, pages=None)

    def encode(self) -> bytes:
        """Return the content of a file without bytes of pages."""
        return self._encoded(VERSION, frozenset())

    def head(self, kept: frozenset[int]) -> bytes:
        """Return what a file begins with that carries the bytes of some of its pages."""
        return self._encoded(VERSIONS_WITH_PAGES[-1], kept)

    def _encoded(self, version: int, kept: frozenset[int]) -> bytes:
        along = frozenset(self.along)
        body = array("Q", [at | (at in along) * _ALONG | (at in kept) * _KEPT for at in self.offsets]).tobytes()
        about = self.page_size, self.size, len(self.offsets), zlib.crc32(body), _COMPLETE, self.source
        return HEADER.pack(MAGIC, version, *about) + body

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file that `load` reads, in place of one that is there.

        Raises:
            OSError: as `Recorder.create` and `Recorder.complete`.
        """
        recorder = Recorder.create(path, self.page_size, self.size, self.source)
        along = set(self.along)
        recorder.append(array("Q", [offset | (offset in along) for offset in self.offsets]))
        if recorder.is_full:
            recorder.discard()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        recorder.complete()


class Recorder(OwnedDescriptor):
    """Writes a recording through shared memory, so that it survives the process that writes.

    One process creates and completes it; it travels to the process that notes the pages. Closed before, it stays
    incomplete.

    Args:
        fd: of the file, which begins as `create` has left it; it is the recorder's from now on.
        path: what it is to be called once it is complete.
        most: bytes of pages that are noted at most; None: no bound.
    """

    def __init__(self, fd: int, path: Path | None = None, most: int | None = None) -> None:
        super().__init__(fd)
        self._most = most  # bytes of pages
        self._path = path  # in the process that made it
        self._map: mmap.mmap | None = None
        self._words = memoryview(bytearray(8)).cast("Q")
        self._count = 0
        self._room = 0
        self._full = False
        self._touched = self._along = PresentPages(mmap.PAGESIZE)  # until the file is looked at

    @classmethod
    def create(cls, path: str | os.PathLike[str], page_size: int, size: int, source: bytes = bytes(32)) -> Self:
        """Begin a recording, of memory that shows the source with this fingerprint (zeros: unknown).

        Raises:
            OSError: there can be no file; `filename` is the path. EINVAL: there is something that is not a regular
                file, which is left alone. EBUSY: another process records there.
        """
        from pathlib import Path  # noqa: PLC0415 - as above

        final = Path(os.path.realpath(path))  # a link stays, and its target is replaced
        try:
            recorder = cls(begin(final), final)
        except BlockingIOError:
            raise OSError(errno.EBUSY, "another process records there", os.fspath(path)) from None
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        try:
            os.write(recorder.fileno(), HEADER.pack(MAGIC, VERSION, page_size, size, 0, 0, 0, source))
        except OSError as error:
            recorder.discard()
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        return recorder

    def travel(self) -> Any:
        """Go to another process with the descriptor."""
        return type(self)._arrived, (Descriptor(self._fd),)  # noqa: SLF001 - its own

    @classmethod
    def _arrived(cls, descriptor: Descriptor) -> Self:
        return cls(descriptor.detach())

    @property
    def about(self) -> tuple[int, int, bytes]:
        """What it was created with: page size, size and fingerprint."""
        _, _, page, size, *_, source = HEADER.unpack(os.pread(self._fd, HEADER.size, 0))
        return page, size, source

    @property
    def is_full(self) -> bool:
        """Whether the disk had no room for all that was noted."""
        return self._full

    def note(self, offset: int, start: int = 0, length: int = 0) -> None:
        """Append a page that was touched, and what came with it, each once; a `Note` of `Readahead`."""
        if self._map is None and not self._grow(0):
            return
        page = self._page
        if offset >= 0:
            self.note_pages((offset,))
        if length > page or (length and start != offset):
            for begin, whole in self._touched.missing(start, start + length):
                for low, size in self._along.missing(begin, begin + whole):
                    self._along.add(low, low + size)
                    self.append(array("Q", range(low | _ALONG, low + size, page)))

    def note_pages(self, offsets: Iterable[int]) -> None:
        """As `note`, of pages that came alone: many of them cost little more than one."""
        if (self._map is not None or self._grow(0)) and (entries := self._touched.add_pages(offsets)):
            self.append(array("Q", entries))

    def append(self, entries: array[int]) -> None:
        """Append entries as they are in the file, as far as there is room."""
        if self._count + len(entries) > self._room and not self._grow(len(entries)):
            entries = entries[: max(self._room - self._count, 0)]
        words, count, behind = self._words, self._count, self._count + len(entries)
        words[HEADER.size // 8 + count : HEADER.size // 8 + behind] = entries
        self._count = behind
        words[_COUNT_AT // 8] = behind  # last: what it counts is there

    def _go_on(self) -> None:
        """Begin, or go on behind what a predecessor has noted."""
        _, _, self._page, _, self._count, *_ = HEADER.unpack(os.pread(self._fd, HEADER.size, 0))
        self._touched, self._along = PresentPages(self._page), PresentPages(self._page)
        entries = array("Q", os.pread(self._fd, 8 * self._count, HEADER.size))
        self._touched.add_pages(entry for entry in entries if not entry & _ALONG)
        self._along.add_pages(entry & ~_ALONG for entry in entries if entry & _ALONG)

    def _grow(self, count: int) -> bool:
        """Make room for so many more entries; tell whether there is any."""
        if self._full:
            return False
        if self._map is None:
            self._go_on()
        if self._most is not None and (self._count + count) * self._page > self._most:
            return self._end("it has as many pages as it may have")
        used = HEADER.size + 8 * (self._count + count)
        length = (used // _STEP + 1) * _STEP
        try:
            # Not ftruncate: storing into a hole for which the disk has no room left is SIGBUS.
            os.posix_fallocate(self._fd, 0, length)
            self._map = map_file(self._fd, length, mmap.ACCESS_WRITE)
        except OSError as error:
            return self._end(error.strerror or str(error))
        self._words = memoryview(self._map).cast("Q")
        self._room = (length - HEADER.size) // 8
        if self._most is not None:
            self._room = min(self._room, self._most // self._page)
        return True

    def _end(self, why: str) -> bool:
        self._full = True
        with contextlib.suppress(OSError):  # the block is there, but a file system that copies on write wants another
            os.pwrite(self._fd, struct.pack("<I", _CUT), _STATE_AT)
        name = "a recording"
        with contextlib.suppress(OSError):  # the process that notes the pages has no path, but the file
            name = os.readlink(f"/proc/self/fd/{self._fd}").removesuffix(_PART)  # noqa: PTH115 - pathlib is slow to import
        log.error("%s: first touches are no longer recorded: %s", name, why)
        return False

    def complete(self) -> None:
        """Make it a recording that can be read. Nothing may be noted any more.

        Raises:
            OSError: it cannot be written, and is discarded; an older recording of that name stays. ENOSPC: the disk
                had no room for a single page. EBADF: this process has closed its descriptor. `filename` is the path.
        """
        assert self._path is not None
        if not self.intact:
            self.discard()
            raise OSError(errno.EBADF, "this process has closed the descriptor of the recording", str(self._path))
        _, version, page, size, count, _, state, source = HEADER.unpack(os.pread(self._fd, HEADER.size, 0))
        if state & _CUT and not count:
            path = self._path
            self.discard()
            raise OSError(errno.ENOSPC, f"nothing was recorded: {os.strerror(errno.ENOSPC)}", str(path))
        length = HEADER.size + 8 * count
        try:
            os.ftruncate(self._fd, length)
            body = os.pread(self._fd, length, HEADER.size)
            state |= _COMPLETE
            os.pwrite(self._fd, HEADER.pack(MAGIC, version, page, size, count, zlib.crc32(body), state, source), 0)
            os.fsync(self._fd)
            part_of(self._path).rename(self._path)
        except OSError as error:
            self.discard()
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self.close()

    def complete_now(self) -> None:
        """As `complete`, of what was noted by now: a file of its own. Who notes goes on in one that has no name."""
        assert self._path is not None
        if not self.intact:
            self.complete()  # raises
        part_of(self._path).unlink(missing_ok=True)
        copy = type(self)(begin(self._path), self._path)
        try:
            header = os.pread(self._fd, HEADER.size, 0)
            count = HEADER.unpack(header)[4]
            write_at(copy.fileno(), header + os.pread(self._fd, 8 * count, HEADER.size), 0)
        except OSError as error:
            copy.discard()
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        finally:
            self.close()
        copy.complete()

    def discard(self) -> None:
        """Remove it."""
        assert self._path is not None
        part_of(self._path).unlink(missing_ok=True)
        self.close()


def _those(every: frozenset[int], entries: array[int], marks: bytes) -> frozenset[int]:
    """Return the entries that are marked (1), of which all are `every`."""
    return frozenset(compress(entries, marks)) if 0 in marks else every


def _check(name: str, page: int, recorded: bytes, page_size: int | None, source: bytes) -> None:
    """Raise TraceError for a recording of other pages, or of another source."""
    if page_size is not None and page != page_size:
        raise TraceError(name, f"it was recorded with pages of {page} bytes, not {page_size}")
    if differ(recorded, source):
        raise TraceError(name, "it was recorded from another source, or from another version of it")


def begin(final: Path, mode: int = 0o666) -> int:
    """Return a descriptor of the empty file that will be renamed to `final`; raise what keeps it from that.

    What a process that was killed has left is used again, but not where others could read it, and must not.
    """
    if final.exists() and not final.is_file():
        raise OSError(errno.EINVAL, "is not a regular file")
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        fd = os.open(part_of(final), flags, mode)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, f"{part_of(final).name} is not a regular file")  # noqa: TRY301 - closed below
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it belongs to the open file, which travels
            if mode & _OF_OTHERS or (found.st_uid == os.geteuid() and not found.st_mode & _OF_OTHERS):
                os.ftruncate(fd, 0)
                return fd
            part_of(final).unlink()  # somebody may have it open by now, whatever its mode will be
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def part_of(path: Path) -> Path:
    """Return where a file is written before it has its name."""
    return path.with_name(path.name + _PART)


def stored(source: Any, page_size: int) -> Trace | None:
    """Return the recording that a source has of itself; None: it has none, or none that fits. May block."""
    recording = getattr(source, "recording", None)
    try:
        data = recording() if callable(recording) else None
        return None if data is None else Trace.parse(data, repr(source), page_size)
    except (TraceError, SourceError) as error:
        log.warning("%r: nothing is replayed: %s", source, error)
        return None


def fingerprint(source: Any) -> bytes:
    """Return 32 bytes that tell sources apart; zeros for a handler. May block.

    The first byte says what the others are a hash of. 1: the size and samples of the content, which a copy of a file
    shares. 2: the size and the validator that a server gives. 3: the size. Only the same kinds can be compared.
    """
    size = getattr(source, "size", None)
    if size is None:
        return bytes(32)
    content = b"%d:" % size
    kind = 3
    if (sample := getattr(source, "sample", None)) is not None:
        kind = 1
        places = {(size - 1) * n // (_SAMPLES - 1) // _SAMPLE * _SAMPLE for n in range(_SAMPLES if size else 0)}
        content += b"".join(sample(at, min(_SAMPLE, size - at)) for at in sorted(places))
    elif (validator := getattr(source, "validator", None)) is not None:
        kind = 2
        content += validator.encode()
    import hashlib  # noqa: PLC0415 - it takes 5 ms, and only recordings need it

    return bytes([kind]) + hashlib.blake2b(content, digest_size=31).digest()


def differ(one: bytes, other: bytes) -> bool:
    """Tell whether two fingerprints are certainly of different sources."""
    return one[0] == other[0] and one != other
