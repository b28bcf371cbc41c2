"""The bytes of pages that a recording carries, so that a replay is one sequential read of a local file.

They are shown only where the source has the same version as when they were kept (`version_of`), the file is the
process's own, and a unit of them has its hash. All others come from the source.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import mmap
import operator
import os
import stat
import struct
from array import array
from bisect import bisect_right
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, Self

import attrs

from aiouffd.errors import TraceError
from aiouffd.kernel import files
from aiouffd.kernel.memory import address_of, populated
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.ranges import align_up, batched
from aiouffd.sources.base import Descriptor

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "MOST",
    "PagesWriter",
    "RecordedPages",
    "Recording",
    "Unit",
    "Units",
    "in_order",
    "sorted_together",
    "unkept",
    "version_of",
]

log: logging.Logger = logging.getLogger("aiouffd")

MOST: Final = 1 << 30
"""Bytes of pages that a recording carries at most, if nothing else is said."""

_SECTION_4: Final = struct.Struct("<32sII")  # the version of the source, which hash, bytes of a unit
_SECTION: Final = struct.Struct("<32sIII")  # and how many offsets are sorted together
_HASH: Final = 16  # bytes
_UNIT: Final = 1 << 20  # bytes that are read and checked together; a page, where that is larger
_BATCH: Final = 4096  # entries of a recording whose pages are sorted by offset, at most; in version 4 always
_PAYS: Final = 2  # times fewer runs of pages, for which more are sorted than a unit has
_XXH3, _BLAKE2 = 1, 2


@attrs.frozen
class Recording:
    """What `record=` takes in place of a path.

    Attributes:
        path: of the file.
        pages: whether the file also carries the bytes of the pages, the first ones first, so that a replay need not
            fetch them: True: up to 1 GiB of them; a number: up to so many bytes. Only its owner may read it then.
    """

    path: str | os.PathLike[str]
    pages: bool | int = False

    @property
    def most(self) -> int:
        """Bytes of pages that the file carries at most."""
        return MOST if self.pages is True else int(self.pages)

    @classmethod
    def of(cls, record: str | os.PathLike[str] | Recording) -> Recording:
        """Return what `record=` was given as one."""
        return record if isinstance(record, Recording) else cls(record)

    def __attrs_post_init__(self) -> None:
        """Check the number."""
        if self.pages < 0:
            raise ValueError(f"pages is True, False or a number of bytes, not {self.pages}")

    def __fspath__(self) -> str:
        return os.fspath(self.path)


def version_of(source: Any) -> bytes:
    """Return 32 bytes that only the same bytes of a source have; zeros: it does not tell, or takes writes. May block.

    Unlike `fingerprint`, it names one file or object, as a cache has to: a sample of the content could miss a change.
    """
    identity = getattr(source, "cache_identity", None) or getattr(source, "identity", None)
    if identity is None or _is_written(source):
        return bytes(32)
    import hashlib  # noqa: PLC0415 - it takes 5 ms, and only recordings need it

    return hashlib.blake2b(repr((source.size, identity)).encode(), digest_size=32).digest()


def unkept(source: Any) -> str:
    """Return why bytes of a source are not kept, whose version is not known."""
    return (
        f"a recording carries no bytes of {source!r:.200}: whether they are the same the next time is not known. A file"
        " that is not written to, a URL whose server sends a strong ETag, and a snapshot say it; a handler does not"
    )


def _is_written(source: Any) -> bool:
    inner = (*getattr(source, "layers", ()), *getattr(source, "parts", ()), getattr(source, "source", None))
    takes = callable(getattr(source, "write", None)) and getattr(source, "writable", True)
    return bool(takes) or any(_is_written(part) for part in inner if part is not None)


def in_order(offsets: array[int], kept: frozenset[int], together: int) -> array[int]:
    """Return the offsets of kept pages in the order of their bytes: so many of a recording at a time are sorted."""
    ordered, all_kept = array("Q"), len(kept) == len(offsets)
    for some in batched(offsets, together):
        ordered.extend(sorted(some if all_kept else kept.intersection(some)))
    return ordered


def sorted_together(offsets: array[int], kept: frozenset[int], page: int) -> int:
    """Return how many offsets of a recording are sorted together, of which some pages are kept.

    What is touched first is to come first, so they are no more than a unit has: except where the pages of more units
    join to far fewer runs, of which each is a COPY.
    """
    few = max(_unit_of(page) // page, 1)
    runs = [
        sum(after != before + page for before, after in pairwise(in_order(offsets, kept, together)))
        for together in (few, _BATCH)
    ]
    return few if runs[0] <= _PAYS * runs[1] else _BATCH


def _hash(kind: int) -> Callable[[Any], bytes] | None:
    """Return a hash that shows damage. XXH3 is ten times as fast, and not everybody has it."""
    if kind == _BLAKE2:
        import hashlib  # noqa: PLC0415 - as above

        return lambda data: hashlib.blake2b(data, digest_size=_HASH).digest()
    with contextlib.suppress(ImportError):
        if kind == _XXH3:
            digest: Callable[[Any], bytes] = importlib.import_module("xxhash").xxh3_128_digest
            return digest
    return None


def _unit_of(page: int) -> int:
    return max(_UNIT, page)


def _joined(offsets: array[int], page: int) -> list[tuple[int, int]]:
    """Return (offset, length) of pages in this order, neighbours joined."""
    ranges: list[tuple[int, int]] = []
    for offset in offsets:
        if ranges and sum(ranges[-1]) == offset:
            ranges[-1] = ranges[-1][0], ranges[-1][1] + page
        else:
            ranges.append((offset, page))
    return ranges


class Unit:
    """Bytes that were read together, and have their hash.

    Args:
        data: of the pages; it may have room for more.
        offsets: of the pages.
        page: bytes of each.
        size: of the source: what is behind it is not among its bytes.

    Attributes:
        parts: offset, length and address of what is here, neighbours joined, in the order of the bytes; whole pages.
    """

    def __init__(self, data: bytearray | mmap.mmap, offsets: array[int], page: int, size: int) -> None:
        ranges = _joined(offsets, page)
        places = itertools.accumulate((length for _, length in ranges), initial=0)
        address = address_of(data)
        self.parts: list[tuple[int, int, int]] = [
            (offset, length, address + place) for (offset, length), place in zip(ranges, places, strict=False)
        ]
        self._sorted = sorted(self.parts)
        self._address, self._data, self._size = address, memoryview(data), size

    def at_hand(self, offset: int, length: int) -> memoryview | None:
        """Return bytes of the source, if all of them are here in one piece."""
        number = bisect_right(self._sorted, offset, key=_first) - 1
        if number < 0:
            return None
        start, there, address = self._sorted[number]
        if offset + length > min(start + there, self._size):
            return None
        return self._data[address - self._address + offset - start :][:length]


class RecordedPages(OwnedDescriptor):
    """The bytes of the pages of a recording. They travel with it.

    Args:
        fd: of the file; it is this object's from now on.
        page_size: in bytes.
        size: of the source.
        version: of the source: see `version_of`.
        offsets: of the pages, in the order of their bytes.
        begin: where in the file these begin.
        kind: of hash.
        hashes: of the units.
        placed: how many units are in the memory already that is to show them.

    Attributes:
        together: pages of a unit.
        placed: as given.
    """

    def __init__(
        self,
        fd: int,
        page_size: int,
        size: int,
        version: bytes,
        offsets: array[int],
        begin: int,
        kind: int,
        hashes: bytes,
        placed: int = 0,
    ) -> None:
        super().__init__(fd)
        self.page_size: int = page_size
        self.version: bytes = version
        self.offsets: array[int] = offsets
        self._size, self._begin, self._kind, self._hashes = size, begin, kind, hashes
        self.together: int = _unit_of(page_size) // page_size
        self.placed: int = placed

    def travel(self) -> Any:
        """Go to another process with the descriptor."""
        about = self.page_size, self._size, self.version, self.offsets, self._begin, self._kind, self._hashes
        return type(self)._arrived, (Descriptor(self._fd), *about, self.placed)  # noqa: SLF001 - its own

    @classmethod
    def _arrived(cls, descriptor: Descriptor, *about: Any) -> Self:
        return cls(descriptor.detach(), *about)

    @classmethod
    def read(
        cls, fd: int, head: bytes, page_size: int, size: int, offsets: array[int], kept: frozenset[int], *, old: bool
    ) -> Self:
        """Read what a file says of its pages.

        Args:
            fd: of the file; it stays the caller's.
            head: what the file begins with, which its hash covers, too.
            page_size: in bytes.
            size: of the source.
            offsets: of the pages of the recording.
            kept: those whose bytes it carries.
            old: it is of version 4.

        Raises:
            TraceError: it is damaged, or another user could have written it; no page of it can be shown.
        """
        status = os.fstat(fd)
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise TraceError("the recording", "another user could have written the bytes of its pages")
        form = _SECTION_4 if old else _SECTION
        section = os.pread(fd, form.size, len(head))
        page_bytes = _unit_of(page_size)
        if len(section) < form.size or (found := form.unpack(section))[2] != page_bytes:
            raise TraceError("the recording", "what it says of the bytes of its pages is damaged")
        version, kind, _, *sizes = found
        digest = _hash(kind)
        if digest is None:
            raise TraceError("the recording", "the bytes of its pages are checked by XXH3: install aiouffd[store]")
        count = -(-len(kept) * page_size // page_bytes)
        rest = os.pread(fd, _HASH * (count + 1), len(head) + len(section))
        check, hashes = rest[:_HASH], rest[_HASH:]
        if len(hashes) != _HASH * count or digest(head + section + hashes) != check:
            raise TraceError("the recording", "what it says of the bytes of its pages is damaged")
        begin = align_up(len(head) + len(section) + len(rest), mmap.PAGESIZE)
        ordered = in_order(offsets, kept, max(*sizes, 1) if sizes else _BATCH)
        return cls(os.dup(fd), page_size, size, version, ordered, begin, kind, hashes)

    def begin(self) -> Units:
        """Return what reads them for a replay."""
        return Units(self)

    def parts_placed(self) -> list[tuple[int, int]]:
        """Return offset and length of what is in the memory already, neighbours joined."""
        return _joined(self.offsets[: self.placed * self.together], self.page_size)

    def refusal(self, source: Any) -> str:
        """Say why none of them may be shown where a source is served; "": they may. May block."""
        if not any(self.version) or self.version != version_of(source):
            return "they are of another source, or of another version of it"
        return ""

    def __len__(self) -> int:
        """Return the number of units."""
        return len(self._hashes) // _HASH

    def load(self, number: int, room: mmap.mmap | None = None) -> Unit | None:
        """Read a unit; None: it is damaged. Blocks.

        Args:
            number: of the unit.
            room: for a unit, of one that is not used any more; None: it has its own.
        """
        with contextlib.suppress(OSError):
            return self._load(number, 0, room)
        return None

    def room(self) -> mmap.mmap:
        """Return what any unit has room in."""
        return populated(self.together * self.page_size)

    def load_nowait(self, number: int) -> Unit | None:
        """As `load`, without waiting for a disk.

        Raises:
            BlockingIOError: that cannot be had, or to hash a unit takes long.
            OSError: it cannot be read at all.
        """
        if self._kind != _XXH3 or self.page_size > _UNIT:
            raise BlockingIOError
        return self._load(number, os.RWF_NOWAIT)

    def _load(self, number: int, flags: int, room: bytearray | mmap.mmap | None = None) -> Unit | None:
        offsets = self.offsets[number * self.together : (number + 1) * self.together]
        length = len(offsets) * self.page_size
        room = bytearray(length) if room is None else room  # a pager has freed some for a unit before
        data = memoryview(room)[:length]
        place, digest = self._begin + number * self.together * self.page_size, _hash(self._kind)
        assert digest is not None  # it was there when the file was opened, by a process of the same installation
        there = os.preadv(self._fd, [data], place, flags)
        if there < len(data) and flags:
            raise BlockingIOError
        if there < len(data) or digest(data) != self._hashes[number * _HASH : (number + 1) * _HASH]:
            return None
        return Unit(room, offsets, self.page_size, self._size)


class Units:
    """Reads the units of a recording for one replay, each once, and one after the other, in whatever thread.

    Args:
        pages: the bytes. They stay open as long as this.
    """

    def __init__(self, pages: RecordedPages) -> None:
        self._pages = pages
        self._read: dict[int, Unit | None] = {}
        self._next = 0  # those before it are not wanted any more

    def read(self, number: int) -> Unit | None:
        """Return a unit; None: it is damaged, or not wanted any more. Blocks where it is not read yet."""
        if number not in self._read and number >= self._next:
            self._read[number] = self._pages.load(number)
        return self._read.get(number)

    def read_nowait(self, number: int) -> bool:
        """Tell whether `read` does not block any more."""
        if number not in self._read:
            with contextlib.suppress(OSError):
                self._read[number] = self._pages.load_nowait(number)
        return number in self._read

    def drop(self, number: int) -> None:
        """Forget a unit: it and those before are not wanted any more."""
        self._next = number + 1
        self._read.pop(number, None)

    def at_hand(self, offset: int, length: int) -> memoryview | None:
        """Return bytes of the source, if a unit that was read has them all in one piece."""
        for unit in list(self._read.values()):
            if unit is not None and (data := unit.at_hand(offset, length)) is not None:
                return data
        return None


class PagesWriter:
    """Writes a recording with the bytes of pages into an empty file, of which its owner alone has the right to read.

    Args:
        fd: of the file; it stays the caller's.
        head: what the file begins with.
        version: of the source.
        page_size: in bytes.
        together: see `sorted_together`.
        count: how many pages will come.

    Raises:
        OSError: the mode cannot be changed.
    """

    def __init__(self, fd: int, head: bytes, version: bytes, page_size: int, together: int, count: int) -> None:
        os.fchmod(fd, 0o600)
        self._fd, self._head, self._unit = fd, head, _unit_of(page_size)
        self._kind = _BLAKE2 if _hash(_XXH3) is None else _XXH3
        self._section = _SECTION.pack(version, self._kind, self._unit, together)
        units = -(-count * page_size // self._unit)
        self._end = align_up(len(head) + len(self._section) + _HASH * (units + 1), mmap.PAGESIZE)
        self._hashes = b""
        self._waiting = bytearray()

    def add(self, data: Any) -> None:
        """Append whole pages, in the order of their bytes. Raises OSError."""
        self._waiting += data
        while len(self._waiting) >= self._unit:
            self._put(self._unit)

    def _put(self, length: int) -> None:
        digest = _hash(self._kind)
        assert digest is not None
        data = bytes(self._waiting[:length])
        files.write_at(self._fd, data, self._end)
        self._hashes += digest(data)
        self._end += length
        del self._waiting[:length]

    def finish(self) -> None:
        """Write what is left, and what the file begins with: before that, it is no recording. Raises OSError."""
        if self._waiting:
            self._put(len(self._waiting))
        digest = _hash(self._kind)
        assert digest is not None
        check = digest(self._head + self._section + self._hashes)
        files.write_at(self._fd, self._head + self._section + check + self._hashes, 0)


_first: Final = operator.itemgetter(0)
