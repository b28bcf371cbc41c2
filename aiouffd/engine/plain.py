"""Plain faults: a page is missing in a mapping that is known, its bytes are in memory, and one COPY places them.

This is the one place where plain faults are served in Python: alone (`FastPath.serve`) or several of one wake-up
(`serve_together`), with readahead on or off. Whatever is not plain after all is left to the backend of the space.

A space is some thirty objects. Where one loop serves a thousand of them, they have left the processor's caches by the
time that the next fault comes, and to bring them back costs 10 us, more than all the rest that is done here. So what a
plain fault without readahead needs lies packed in one place: a slot of memory for each descriptor, and a `PlainSource`
that spaces share.
"""

from __future__ import annotations

import errno
import fcntl
import struct
import sys
from collections.abc import Callable
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from aiouffd.engine.one_copy import OneCopy
from aiouffd.engine.remainders import FIRST_PIECE
from aiouffd.engine.resolver import DONTWAKE
from aiouffd.engine.statistics import Counter
from aiouffd.kernel import abi

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiouffd.engine.mappings import Mappings
    from aiouffd.engine.readahead import NotePages, Readahead
    from aiouffd.engine.statistics import Counters

__all__ = ["SLOT", "FastPath", "PlainFaults", "PlainSource", "serve_together"]

_ioctl = fcntl.ioctl
_COPY = abi.UFFDIO_COPY
_pack_copy = abi.COPY_ARGUMENT.pack_into
_result = struct.Struct("=q").unpack_from
_MESSAGE = abi.PAGEFAULT_MESSAGE.unpack_from
SLOT = struct.Struct("=2i3q")
_NOBODY = -1
_FAULTS, _COPIES, _LATENCY = int(Counter.FAULTS), int(Counter.COPIES), int(Counter.LATENCY)
_PAGES_FAULT, _PAGES_READAHEAD = int(Counter.PAGES_FAULT), int(Counter.PAGES_READAHEAD)
_BYTES_FETCHED, _CONTINUES = int(Counter.BYTES_FETCHED), int(Counter.CONTINUES)
_BLOCK = FIRST_PIECE  # what is looked at for zeros at once: larger than any window that is placed here


PlainSource: TypeAlias = tuple[
    Callable[[int, int], int | None] | None,
    int,
    int,
    int,
    bool,
    Callable[[int, int, int], list[int]] | None,
    "tuple[int, int, int, int] | OneCopy | None",
]
"""How the pages of a source come into some spaces: a plain tuple, which is unpacked soonest, of

- where (offset, length) of the source lies, until the next call; None: it must be waited for. Or, in place of this
  function, None: nothing is copied, and plain is what is in the file which all spaces map, the last of these;
- bytes of the source;
- bytes of a page;
- bits of UFFDIO_COPY;
- whether neighbours come along (readahead);
- which blocks of (offset, length, block size) are zeros, where these are mapped and not copied; or None;
- where all of it lies, for the native part: what `Source.memory` returns; or None. Or the file that all spaces map.
"""


class _Space(Protocol):
    """What is needed of a space."""

    readahead: Readahead
    mappings: Mappings
    uffd: Any

    @property
    def is_bringing(self) -> bool: ...
    def wake(self, ranges: list[tuple[int, int]], *, each: bool) -> None: ...


def _window(readahead: Readahead, source: PlainSource, offset: int, low: int, high: int) -> tuple[int, int] | None:
    """Return (start, length) of what to bring for a fault; None where that takes more than one small COPY."""
    _, size, page_size, _, _, blank, _ = source
    window = readahead.neighbours(offset, low, min(high, size & -page_size))
    if window is not None and blank is not None and blank(*window, _BLOCK):
        readahead.not_placed(offset, window)
        return None
    return window


class PlainFaults(Protocol):
    """Where a space has its plain faults served."""

    def open(
        self,
        fd: int,
        start: int,
        end: int,
        offset: int,
        source: PlainSource,
        bound: Any = None,
        note: NotePages | None = None,
    ) -> None:
        """Serve the plain faults of [start, end), which shows the source from `offset` on, until `close`.

        With `bound`, at most as many as there is room for; or none at all.
        """

    def close(self, fd: int) -> None:
        """Leave the plain faults of a descriptor to the engine: its layout has changed, or it is about to be left."""

    def keep(self, fd: int, kept: Any) -> None:
        """Have first writes to protected pages of a descriptor go on, by the rules of `engine.kept`, until `dismiss`.

        A reader need not do that: what it leaves, the engine decides.
        """


class FastPath:
    """What is known of each descriptor, and the faults that this is enough for.

    Args:
        spaces: by descriptor.

    Attributes:
        slots: of each descriptor, `SLOT`: whose it is (below 0: nobody's), the number of its plain source (0: the fast
            path is closed), and the start, end and offset of the mapping that it is open for.
    """

    def __init__(self, spaces: Mapping[int, _Space]) -> None:
        self._words: dict[int, memoryview] = {}  # where the faults of a descriptor are counted
        self._spaces = spaces
        self.slots: bytearray = bytearray()
        self._sources: list[PlainSource | None] = [None]
        self._argument = bytearray(abi.COPY_ARGUMENT.size)
        self._users = [0]  # of each source, how many descriptors

    def admit(self, fd: int, identity: int, counters: Counters) -> None:
        """Make room for a descriptor."""
        self._words[fd] = counters.words
        missing = max(0, fd + 1 - len(self.slots) // SLOT.size)
        self.slots += SLOT.pack(_NOBODY, 0, 0, 0, 0) * missing
        SLOT.pack_into(self.slots, fd * SLOT.size, identity, 0, 0, 0, 0)

    def dismiss(self, fd: int) -> None:
        """Forget a descriptor, before it is closed."""
        self.close(fd)
        SLOT.pack_into(self.slots, fd * SLOT.size, _NOBODY, 0, 0, 0, 0)
        self._words.pop(fd, None)

    def open(
        self,
        fd: int,
        start: int,
        end: int,
        offset: int,
        source: PlainSource,
        bound: Any = None,
        note: NotePages | None = None,
    ) -> None:
        """From now on, serve the mapping [start, end), which shows the source from `offset` on, here.

        Not what is bounded: the engine has as much to do for its pages.
        """
        self.close(fd)
        if bound is not None:
            return
        number = self._number(source)
        self._users[number] += 1
        SLOT.pack_into(self.slots, fd * SLOT.size, self._slot(fd)[0], number, start, end, offset)

    def close(self, fd: int) -> None:
        """From now on, serve nothing of it here: its layout has changed, or it is about to be left."""
        identity, number, *_ = self._slot(fd)
        if number:
            SLOT.pack_into(self.slots, fd * SLOT.size, identity, 0, 0, 0, 0)
            self._users[number] -= 1
            if not self._users[number]:
                self._sources[number] = None  # nothing keeps it any more

    def keep(self, fd: int, kept: Any) -> None:
        """Leave writes to the engine."""

    def _number(self, source: PlainSource) -> int:
        if source in self._sources:
            return self._sources.index(source)
        if None not in self._sources[1:]:
            self._sources.append(None)
            self._users.append(0)
        number = self._sources.index(None, 1)
        self._sources[number] = source
        return number

    def _slot(self, fd: int) -> tuple[int, ...]:
        return SLOT.unpack_from(self.slots, fd * SLOT.size)

    def serve(  # noqa: PLR0911 - one function on purpose: a call more is a tenth of a fault
        self, fd: int, slot: tuple[int, int, int, int, int], message: memoryview
    ) -> bool:
        """Resolve the fault that `message` is, if it is plain; tell whether it is done."""
        _, number, start, end, first = slot
        source = self._sources[number]
        if source is None or message[0] != abi.EVENT_PAGEFAULT:
            return False
        began = perf_counter_ns()
        locate, size, page_size, mode, readahead, *_ = source
        _, flags, address, _ = _MESSAGE(message)
        page = address & -page_size
        offset = first + page - start
        if flags & (6 if locate else 2) or not start <= page < end or offset + page_size > size:
            return False
        if locate is None:
            return self._map(fd, source, page, offset, began)
        low, length, along, done = offset, page_size, 0, 0
        try:
            if readahead:
                space = self._spaces[fd]
                if space.is_bringing:
                    return False
                window = _window(space.readahead, source, offset, first, first + end - start)
                if window is None:
                    return False
                low, length = window
                along = length // page_size - 1
            where = locate(low, length)
        except Exception:  # noqa: BLE001 - a defect of the source, which is reported where it happens again
            if readahead:
                self._spaces[fd].readahead.forget(0, sys.maxsize)
            return False
        words = self._words[fd]
        if where is not None:
            words[_FAULTS] += 1
            # Counted first: the toucher may kill this process before it goes on, and that is no vain life.
            words[_PAGES_FAULT] += 1
            if along:
                words[_PAGES_READAHEAD] += along
            argument = self._argument
            _pack_copy(argument, 0, page + low - offset, where, length, mode, 0)
            try:
                _ioctl(fd, _COPY, argument)
            except OSError as error:
                words[_FAULTS] -= 1
                words[_PAGES_FAULT] -= 1
                words[_PAGES_READAHEAD] -= along
                done = _result(argument, 32)[0] if error.errno == errno.EAGAIN else 0  # else it is what was before
            else:
                words[_COPIES] += 1
                words[_BYTES_FETCHED] += length
                words[_LATENCY + (perf_counter_ns() - began).bit_length()] += 1
                return True
        if readahead and _count_part(self._spaces[fd].readahead, words, offset, page_size, (low, length), done):
            words[_FAULTS] += 1
            words[_LATENCY + (perf_counter_ns() - began).bit_length()] += 1
            return True
        return False

    def _map(self, fd: int, source: PlainSource, page: int, offset: int, began_ns: int) -> bool:
        """Map a page from the file that all map, if it is there; tell whether it is done."""
        _, _, page_size, mode, readahead, _, file = source
        if readahead or not isinstance(file, OneCopy) or not file.has(offset):
            return False
        words, argument = self._words[fd], self._argument
        words[_FAULTS] += 1  # these first, as above
        words[_PAGES_FAULT] += 1
        words[_CONTINUES] += 1
        abi.ZEROPAGE_ARGUMENT.pack_into(argument, 0, page, page_size, mode, 0)
        try:
            _ioctl(fd, abi.UFFDIO_CONTINUE, argument)
        except OSError:
            words[_FAULTS] -= 1
            words[_PAGES_FAULT] -= 1
            words[_CONTINUES] -= 1
            return False
        words[_LATENCY + (perf_counter_ns() - began_ns).bit_length()] += 1
        return True


def _count_part(
    readahead: Readahead, words: memoryview, offset: int, page_size: int, window: tuple[int, int], done: int
) -> bool:
    """Count what a COPY has placed of a window before it met a page that was present already.

    Returns:
        Whether the faulting page is among it. If not, the rest of the window is for the backend.
    """
    low, length = window
    if done > 0:
        holds = low <= offset < low + done
        words[_COPIES] += 1
        words[_BYTES_FETCHED] += done
        words[_PAGES_FAULT] += holds
        words[_PAGES_READAHEAD] += done // page_size - holds
        if holds:
            readahead.not_brought(low + done, low + length)
            return True
        window = low + done, length - done
    readahead.not_placed(offset, window)
    return False


def serve_together(
    space: _Space, source: PlainSource, counters: Counters, faults: list[tuple[int, int, int]], began_ns: int
) -> list[tuple[int, int, int]]:
    """Resolve what is plain of the faults of one wake-up, with no run or flight; return the others.

    Several are copied with DONTWAKE, and then share one WAKE. Faults are (page address, flags, thread id), in
    order of address, read at `began_ns`. If the source has readahead, the space must not bring anything already.
    """
    locate, size, page_size, mode, readahead, *_ = source
    if locate is None:
        return faults
    last, find, copy, words = faults[-1][0], space.mappings.locate, space.uffd.try_copy, counters.words
    left: list[tuple[int, int, int]] = []
    asleep: list[tuple[int, int]] = []  # start and end of each window whose touchers are asleep still
    start = stop = first = covered = copied = copies = placed = 0
    for fault in faults:
        page = fault[0]
        if page < covered:  # in the window of the one before
            if placed:
                words[_PAGES_FAULT] += 1
                words[_PAGES_READAHEAD] -= 1
            else:
                left.append(fault)
            continue
        if not start <= page < stop:
            start, stop, first = find(page)
        offset = first + page - start
        window: tuple[int, int] | None = (offset, page_size)
        if readahead and first >= 0 and offset + page_size <= size:
            window = _window(space.readahead, source, offset, first, first + stop - start)
        if window is None or first < 0 or offset + page_size > size:
            left.append(fault)
            continue
        low, length = window
        at, along, placed = page + low - offset, length // page_size - 1, False
        covered = at + length
        where, done, alone = locate(low, length), 0, False
        if where is not None:
            words[_PAGES_FAULT] += 1  # counted first, as above
            words[_PAGES_READAHEAD] += along
            alone = last < covered and not asleep  # no other thread waits: the COPY itself wakes
            done = copy(at, where, length, mode if alone else mode | DONTWAKE)
            placed = done == length
            if placed:
                copies += 1
                copied += length
            else:
                words[_PAGES_FAULT] -= 1
                words[_PAGES_READAHEAD] -= along
        if not placed and readahead and _count_part(space.readahead, words, offset, page_size, window, done):
            placed, covered = True, at + done
        if not placed:
            left.append(fault)
        elif not alone:
            asleep.append((at, covered))
    if len(left) < len(faults):
        _count_copies(words, copies, copied, len(faults) - len(left), began_ns)
    if asleep:
        space.wake(asleep, each=bool(left))  # the threads of those that are left would fault anew for nothing
    return left


def _count_copies(words: memoryview, copies: int, copied: int, faults: int, began_ns: int) -> None:
    words[_COPIES] += copies
    words[_BYTES_FETCHED] += copied
    words[_LATENCY + (perf_counter_ns() - began_ns).bit_length()] += faults
