"""One copy, in a file of memory, of what all spaces of a source show: they map the file privately.

A page is put in the file once, and mapped by CONTINUE wherever it is touched: read-only, in a private mapping too, so
that the first write makes a page of the writer's own. What a space has emptied is zeros there, and no page of the file.

The file cannot tell which of its pages are complete: a page is there while it is being written, one of a large folio
since its neighbour was, and one of hugetlb whenever it is asked for. So each page has a note, in a memfd as well. Both
outlive the process that has written them. A page without a note is written again.

A space that does not map the file there gets a page of its own, copied from the file.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import re
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, Self

from aiouffd.engine.resolver import Resolver
from aiouffd.engine.runs import Op
from aiouffd.engine.statistics import Counter
from aiouffd.kernel import abi, libc
from aiouffd.kernel.memory import MAP_NORESERVE, address_of, map_file
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.ranges import align_up

if TYPE_CHECKING:
    from aiouffd.engine.readahead import Readahead
    from aiouffd.engine.runs import Run
    from aiouffd.engine.statistics import Counters

__all__ = ["OneCopy", "page_size_of"]

log: logging.Logger = logging.getLogger("aiouffd")

_ABSENT, _IN_FILE, _ZEROS = b"\0\1\2"
_ALIKE: Final = re.compile(rb"(.)\1*", re.DOTALL)
_NO_ROOM: Final = (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT)
_NOT_MAPPED: Final = (-errno.EINVAL, -errno.EFAULT)  # what CONTINUE answers: other memory, or another file
_MFD_HUGE_SHIFT: Final = 26
_HUGE: Final = 2 << 20


def page_size_of(kind: Literal["small", "huge"] | None) -> int:
    """Return how large a page of such a file is; 0: there is none."""
    return 0 if kind is None else mmap.PAGESIZE if kind == "small" else _HUGE


class _Space(Protocol):
    """What is needed of a space."""

    uffd: Any
    page_size: int
    counters: Counters
    write_protect: bool


class OneCopy:
    """The file and its notes. Used on one loop.

    Args:
        notes: of `create`; they belong to this object.
        file: likewise, open for writing.
        page: bytes of a page.
    """

    def __init__(self, notes: OwnedDescriptor, file: OwnedDescriptor, page: int) -> None:
        self._file, self._page = file, page
        self._notes = map_file(notes.fileno(), os.fstat(notes.fileno()).st_size, mmap.ACCESS_WRITE)
        # Of hugetlb, unreserved, at a place that the kernel chooses: 2 MiB aligned. See `_write` for what is not there.
        flags, size = mmap.MAP_SHARED | MAP_NORESERVE, os.fstat(file.fileno()).st_size
        self._map = mmap.mmap(file.fileno(), size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._address = address_of(self._map)
        self._full = False

    @classmethod
    def create(cls, size: int, page: int) -> tuple[OwnedDescriptor, OwnedDescriptor]:
        """Make the notes and the empty file for `size` bytes. None but its owner and root can open it anew to write.

        Raises:
            OSError: as memfd_create(2) and ftruncate(2).
        """
        huge = page > mmap.PAGESIZE
        flags = os.MFD_HUGETLB | (page.bit_length() - 1) << _MFD_HUGE_SHIFT if huge else 0
        file = OwnedDescriptor(os.memfd_create("aiouffd-one-copy", os.MFD_CLOEXEC | flags))
        notes = OwnedDescriptor(os.memfd_create("aiouffd-one-copy-notes", os.MFD_CLOEXEC))
        os.fchmod(file.fileno(), 0o400)
        os.ftruncate(file.fileno(), align_up(size, page))
        os.ftruncate(notes.fileno(), align_up(size, page) // page)
        return notes, file

    @classmethod
    def of(cls, fds: list[int], page: int) -> Self:
        """Return that of descriptors which stay the caller's."""
        notes, file = (OwnedDescriptor(os.dup(fd)) for fd in fds)
        return cls(notes, file, page)

    def split(self, kind: str, offset: int, length: int) -> tuple[str, int]:
        """Cut whole pages of the source, of a kind, to what is known alike; "zeros" is what is known to be that."""
        first = offset // self._page
        found = _ALIKE.match(self._notes, first, first + length // self._page)
        if found is None:
            return kind, length
        return "zeros" if found[1][0] == _ZEROS else kind, (found.end() - first) * self._page

    def has(self, offset: int) -> bool:
        """Tell whether the page at an offset is in the file."""
        return self._notes[offset // self._page] == _IN_FILE

    def around(self, offset: int, low: int, high: int, block: int) -> tuple[int, int] | None:
        """Return (start, length) of what is to be mapped for a touch of the page at an offset; None: it is not there.

        That are its neighbours as well, as far as they are in the file: to map them takes no memory.

        Args:
            offset: of a page.
            low: where that begins which is shown at its address.
            high: where it ends.
            block: bytes; the neighbours are those in the aligned block of this size.
        """
        if not self.has(offset):
            return None
        notes, page, start = self._notes, self._page, offset - offset % max(block, self._page)
        first = last = offset // page
        while first > max(low, start) // page and notes[first - 1] == _IN_FILE:
            first -= 1
        while last + 1 < min(high, start + block) // page and notes[last + 1] == _IN_FILE:
            last += 1
        return first * page, (last + 1 - first) * page

    def widened(
        self, windows: list[tuple[int, int]], offset: int, low: int, high: int, readahead: Readahead
    ) -> list[tuple[int, int]]:
        """Return what to bring for a fault: what the readahead has chosen, or all that is there around it, if more."""
        there = self.around(offset, low, high, readahead.around) if readahead.limit and not readahead.follows else None
        if there is None or not all(there[0] <= start and start + size <= sum(there) for start, size in windows):
            return windows
        readahead.brought(*there)
        return [there]

    def note_of(self, offset: int) -> int:
        """Return where in this process the note of the page at an offset is."""
        return address_of(self._notes) + offset // self._page

    def address(self, offset: int) -> int:
        """Return where in this process the page at an offset is."""
        return self._address + offset

    def put(self, offset: int, source: int, length: int) -> int:
        """Write pages to the file that it does not have. Returns 0, or the errno for which that was not possible."""
        while length:
            kind = self._notes[offset // self._page]
            _, part = self.split("", offset, length)
            if kind != _IN_FILE:
                number = self._write(offset, source, part)
                if number:
                    return number
                self._note(offset, part, _IN_FILE)
            offset, source, length = offset + part, source + part, length - part
        return 0

    def put_zeros(self, offset: int, length: int) -> None:
        """Take note that pages of the source are zeros, which need not be in the file."""
        self._note(offset, length, _ZEROS)

    def enter(self, space: _Space) -> Resolver:
        """Return what resolves the runs of a space."""
        return _Resolver(self, space)

    def no_room(self) -> None:
        """Say once that pages are copied for each space."""
        if not self._full:
            self._full = True
            log.warning("there is no room for more pages in the file that all clients map: each gets its own copy")

    def _write(self, offset: int, source: int, length: int) -> int:
        try:
            if self._page == mmap.PAGESIZE:
                libc.write_memory(self._file.fileno(), source, length, offset)
            else:  # there is no write(2) to hugetlbfs; and a page that cannot be had is SIGBUS, when it is touched
                libc.allocate(self._file.fileno(), offset, length)
                libc.copy_memory(self._address + offset, source, length)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def _note(self, offset: int, length: int, kind: int) -> None:
        first, count = offset // self._page, length // self._page
        self._notes[first : first + count] = bytes([kind]) * count


class _Resolver(Resolver):
    """Puts the bytes of a COPY in the file, and has the page mapped from there."""

    __slots__ = ("_one_copy",)

    def __init__(self, one_copy: OneCopy, space: _Space) -> None:
        super().__init__(space.uffd, space.page_size, space.counters, abi.COPY_MODE_WP if space.write_protect else 0)
        self._one_copy = one_copy

    def resolve(self, run: Run, *, wake: bool) -> int:
        """As of any resolver."""
        if run.offset < 0 or run.op > Op.CONTINUE:
            return super().resolve(run, wake=wake)
        if run.op == Op.ZEROPAGE:
            self._one_copy.put_zeros(run.offset, run.left)
            return super().resolve(run, wake=wake)
        if run.op == Op.COPY:
            number = self._one_copy.put(run.offset, run.src, run.left)
            if number in _NO_ROOM:
                self._one_copy.no_room()
                return super().resolve(run, wake=wake)
            if number:
                return -number
            run.op, run.src, run.owner = Op.CONTINUE, self._one_copy.address(run.offset), None
        self._words[Counter.CONTINUES] += 1  # first: its toucher may kill this process before it goes on
        result = self._uffd.try_continue(run.dst, run.left, self._modes[wake][Op.CONTINUE])
        if result in _NOT_MAPPED:
            run.op, run.src = Op.COPY, self._one_copy.address(run.offset)
        elif result > 0:
            run.advance(result)
        return super().resolve(run, wake=wake) if run.left else 0
