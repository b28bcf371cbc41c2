"""Faults that need nothing but a COPY of what is at hand, in a mapping that is known.

A space is some thirty objects. Where one loop serves a thousand of them, they have left the processor's caches by the
time that the next fault comes, and to bring them back costs 10 us, more than all the rest that is done here. So what
such a fault needs lies packed in one place: a line of memory for each descriptor, and a `Way` that spaces share.
"""

from __future__ import annotations

import fcntl
import struct
from time import perf_counter_ns
from typing import TYPE_CHECKING, TypeAlias

from aiouffd.engine.statistics import Counter
from aiouffd.kernel import abi

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiouffd.engine.statistics import Counters

__all__ = ["LINE", "FastPath", "Way"]

_ioctl = fcntl.ioctl
_COPY = abi.UFFDIO_COPY
_pack_copy = abi.COPY_STRUCT.pack_into
_MESSAGE = abi.PAGEFAULT_MESSAGE.unpack_from
LINE = struct.Struct("=2i3q")
_NOBODY = -1
_FAULTS, _PAGES_FAULT, _COPIES = int(Counter.FAULTS), int(Counter.PAGES_FAULT), int(Counter.COPIES)
_BYTES_FETCHED, _LATENCY = int(Counter.BYTES_FETCHED), int(Counter.LATENCY)


Way: TypeAlias = "tuple[Callable[[int, int], int | None], int, int, int]"
"""How the pages of a source come into some spaces: a plain tuple, which is unpacked soonest, of

- where (offset, length) of the source lies, until the next call; None: not at hand;
- bytes of the source;
- bytes of a page;
- bits of UFFDIO_COPY.
"""


class FastPath:
    """What is known of each descriptor, and the faults that this is enough for.

    Attributes:
        lines: of each descriptor, `LINE`: whose it is (below 0: nobody's), the number of its way (0: none is open), and
            the start, end and offset of the mapping that it is open for.
    """

    def __init__(self, counters: Counters) -> None:
        self._words = counters.words
        self.lines = bytearray()
        self._ways: list[Way | None] = [None]
        self._argument = bytearray(abi.COPY_STRUCT.size)
        self._users = [0]  # of each way, how many descriptors

    def admit(self, fd: int, identity: int) -> None:
        """Make room for a descriptor."""
        missing = max(0, fd + 1 - len(self.lines) // LINE.size)
        self.lines += LINE.pack(_NOBODY, 0, 0, 0, 0) * missing
        LINE.pack_into(self.lines, fd * LINE.size, identity, 0, 0, 0, 0)

    def dismiss(self, fd: int) -> None:
        """Forget a descriptor, before it is closed."""
        self.block(fd)
        LINE.pack_into(self.lines, fd * LINE.size, _NOBODY, 0, 0, 0, 0)

    def open(self, fd: int, start: int, end: int, offset: int, way: Way) -> None:
        """Serve the mapping [start, end), which shows the source from `offset` on, on this way from now on."""
        self.block(fd)
        number = self._number(way)
        self._users[number] += 1
        LINE.pack_into(self.lines, fd * LINE.size, self._line(fd)[0], number, start, end, offset)

    def block(self, fd: int) -> None:
        """Serve it on this way no longer: its layout has changed, or it is about to be left."""
        identity, number, *_ = self._line(fd)
        if number:
            LINE.pack_into(self.lines, fd * LINE.size, identity, 0, 0, 0, 0)
            self._users[number] -= 1
            if not self._users[number]:
                self._ways[number] = None  # with its source

    def _number(self, way: Way) -> int:
        if way in self._ways:
            return self._ways.index(way)
        if None not in self._ways[1:]:
            self._ways.append(None)
            self._users.append(0)
        number = self._ways.index(None, 1)
        self._ways[number] = way
        return number

    def _line(self, fd: int) -> tuple[int, ...]:
        return LINE.unpack_from(self.lines, fd * LINE.size)

    def serve(self, fd: int, line: tuple[int, int, int, int, int], message: memoryview) -> bool:
        """Resolve the fault that `message` is, if a COPY is all that it takes; tell whether it is done."""
        _, number, start, end, first = line
        way = self._ways[number]
        if way is None or message[0] != abi.EVENT_PAGEFAULT:
            return False
        began = perf_counter_ns()
        locate, size, page_size, mode = way
        _, flags, address, _ = _MESSAGE(message)
        page = address & -page_size
        offset = first + page - start
        if flags & 6 or not start <= page < end or offset + page_size > size:
            return False
        try:
            source = locate(offset, page_size)
        except Exception:  # noqa: BLE001 - a defect of the source, which is told where it happens again
            return False
        if source is None:
            return False
        words = self._words
        words[_FAULTS] += 1
        # Counted first: whoever has the page may kill this process before it goes on, and that is no vain life.
        words[_PAGES_FAULT] += 1
        argument = self._argument
        _pack_copy(argument, 0, page, source, page_size, mode, 0)
        try:
            _ioctl(fd, _COPY, argument)
        except OSError:
            words[_FAULTS] -= 1
            words[_PAGES_FAULT] -= 1
            return False
        words[_COPIES] += 1
        words[_BYTES_FETCHED] += page_size
        words[_LATENCY + (perf_counter_ns() - began).bit_length()] += 1
        return True
