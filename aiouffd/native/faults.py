"""The table of regions that are served in the faulting thread, typed (`table.c`, `signal.c`)."""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import struct
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from aiouffd.errors import AccessError, BusyError, LimitError
from aiouffd.native import holding, library

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["COUNTERS", "EXTENT", "LATENCIES", "Extent", "Kind", "Served", "copying", "finalizing", "handler", "wake"]

COUNTERS = (
    *("FAULTS", "PAGES_FAULT", "PAGES_READAHEAD", "PAGES_ZERO", "BYTES_FETCHED"),
    *("COPIES", "ZEROPAGES", "CONTINUES", "EEXIST", "SEQUENTIAL"),
)
"""What `Served.counters` returns first, by the names of `aiouffd.engine.statistics.Counter`."""
LATENCIES = 48
_Counted = ctypes.c_uint64 * (len(COUNTERS) + LATENCIES)


class Kind(enum.IntEnum):
    """How a missing page of an extent is filled."""

    COPY = 1
    ZEROS = 2
    RESIDENT = 3  # as COPY, for those pages of a file that are in memory


class Extent(NamedTuple):
    """Addresses [start, end) show the bytes at `source`, which are those at `offset` of the file `fd`."""

    start: int
    end: int
    source: int
    offset: int
    kind: Kind
    fd: int
    mtime_ns: int


EXTENT = struct.Struct("=4Q2iq")
"""Of an `Extent`, as the native part reads it. An array of ctypes would be a new type for each count: 15 us."""


class _Options(ctypes.Structure):
    _fields_ = (
        ("uffd", ctypes.c_int32),
        ("pipe", ctypes.c_int32),
        ("shared", ctypes.c_int32),
        ("asks_to_write", ctypes.c_int32),
        ("mode", ctypes.c_uint32),
        ("page", ctypes.c_uint64),
        ("readahead", ctypes.c_uint64),
        ("warning_ms", ctypes.c_uint32),
        ("limit_ms", ctypes.c_uint32),
    )


@cache
def _table() -> ctypes.CDLL:
    """Return the library, its functions declared."""
    table = library()
    slot, number = ctypes.c_int, ctypes.c_uint64
    for name, *arguments in (
        ("add", ctypes.POINTER(_Options), ctypes.POINTER(ctypes.c_int)),
        ("loop", slot, ctypes.c_int),
        ("tell_writes", slot),
        ("close", slot),
        ("open", slot),
        ("show", slot, number, number, ctypes.c_void_p, number),
        ("remove", slot, ctypes.c_int),
        ("beat", slot),
        ("below",),
        ("handler",),
        ("refuse", slot, number),
        ("counters", slot, ctypes.c_void_p),
        ("finalizing",),
    ):
        getattr(table, f"aiouffd_{name}").argtypes = arguments
    for name in ("loop", "tell_writes", "open", "remove", "refuse", "counters", "finalizing"):
        getattr(table, f"aiouffd_{name}").restype = None
    table.aiouffd_below.restype = table.aiouffd_handler.restype = number
    return table


@cache
def copying() -> Callable[[int, int, int, int, int], int]:
    """Return a function of (descriptor, dst, src, length, mode): UFFDIO_COPY with the GIL held, for short runs.

    The function returns bytes done, or a negated errno.
    """
    function: Any = holding().aiouffd_copy
    function.argtypes = [ctypes.c_int, *[ctypes.c_uint64] * 4]
    function.restype = ctypes.c_int64
    return function  # type: ignore[no-any-return]


@cache
def _waking() -> Callable[[int, int], None]:
    function: Any = holding().aiouffd_wake
    function.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
    function.restype = None
    return function  # type: ignore[no-any-return]


def wake(start: int, length: int) -> None:
    """Wake the threads that wait for pages of a range: each touches again. The GIL is held meanwhile."""
    _waking()(start, length)


def handler() -> int:
    """Return the address of the installed handler of SIGBUS; 0: SIG_DFL, 1: SIG_IGN."""
    return int(_table().aiouffd_handler())


def finalizing() -> None:
    """Say that the calling thread finalizes the interpreter: no other thread gets the GIL back from a fault."""
    _table().aiouffd_finalizing()


class Served:
    """A record of the table, closed until `open`. The first one installs the handler of SIGBUS.

    Args:
        uffd: a descriptor with Feature.SIGBUS. It stays the caller's, like `pipe`, and open until `remove`.
        pipe: non-blocking; handlers write to it what they ask of the loop.
        page_size: in bytes.
        readahead: what one fault brings at most, in bytes; 0: the page alone.
        mode: bits of COPY and CONTINUE: 2 for pages that come write-protected.
        shared: the memory is registered for minor faults as well.
        asks_to_write: the loop lifts the protection of a page that is written to.
        warning: seconds that a thread waits, while the loop does not run, until it says so; 0: for ever.
        limit: seconds until the thread gets SIGBUS; 0: for ever.

    Raises:
        NativePartError: there is no native part.
        LimitError: 256 regions are served.
        BusyError: other handlers of SIGBUS were installed eight times.
        AccessError: /proc/self/pagemap cannot be read.
    """

    def __init__(
        self,
        uffd: int,
        pipe: int,
        *,
        page_size: int,
        readahead: int,
        mode: int = 0,
        shared: bool = False,
        asks_to_write: bool = False,
        warning: float = 0.0,
        limit: float = 0.0,
    ) -> None:
        self._table = _table()
        self._pid = os.getpid()
        times = _milliseconds(warning), _milliseconds(limit)
        options = _Options(uffd, pipe, shared, asks_to_write, mode, page_size, readahead, *times)
        displaced = ctypes.c_int()
        slot = self._table.aiouffd_add(options, displaced)
        if slot == -errno.ENOSPC:
            hint = "leave a Monitor, or serve with Pager()"
            raise LimitError("one more region", "the number of regions of InThread()", "256", hint, errno.EUSERS)
        if slot == -errno.EBUSY:
            raise BusyError("SIGBUS", 0, 0, errno.EBUSY)
        if -slot in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise OSError(-slot, os.strerror(-slot))  # whoever enters says which limit that is
        if slot < 0:
            raise AccessError(
                "reading /proc/self/pagemap",
                "It tells a page that is missing from one that cannot be had. Have /proc mounted, and the process"
                f" dumpable (prctl(2)): {os.strerror(-slot)}",
            )
        self._slot = slot

    @property
    def here(self) -> bool:
        """Whether this process made it. In a forked child the table is empty."""
        return os.getpid() == self._pid

    def loop(self, thread: int) -> None:
        """Say which thread (its native identifier) runs the loop: it cannot wait for itself."""
        self._table.aiouffd_loop(self._slot, thread)

    def close(self) -> bool:
        """Keep handlers out: new ones wait. False if one that was inside has not left in 5 s."""
        return not self.here or self._table.aiouffd_close(self._slot) == 0

    def tell_writes(self) -> None:
        """Have the loop asked about writes to pages that are there, which may be protected; while it is closed."""
        if self.here:
            self._table.aiouffd_tell_writes(self._slot)

    def open(self) -> None:
        """Let handlers in again."""
        if self.here:
            self._table.aiouffd_open(self._slot)

    def show(self, start: int, end: int, extents: Sequence[Extent]) -> None:
        """Say where the region lies and what it shows, while it is closed. The loop is asked for everything else."""
        packed = b"".join([EXTENT.pack(*extent) for extent in extents])
        self._table.aiouffd_show(self._slot, start, end, packed, len(extents))

    def beat(self) -> int:
        """Say that the loop runs. 0: SIGBUS is ours; 1: it is again, another handler had taken it; -1: it is not."""
        return int(self._table.aiouffd_beat(self._slot))

    def below(self) -> int:
        """Return the address of the handler below ours; 0: SIG_DFL, 1: SIG_IGN."""
        return int(self._table.aiouffd_below())

    def refuse(self, page: int) -> None:
        """Say that a page cannot be had, where the kernel cannot be told (UFFDIO_POISON, Linux 6.6).

        A thread that asks for it gets SIGBUS, until the next `show`. With more than 64 such pages, for any page.
        """
        self._table.aiouffd_refuse(self._slot, page)

    def counters(self) -> list[int]:
        """Return what handlers have counted: `COUNTERS`, then the latencies by bit length of their nanoseconds."""
        values = _Counted()
        if self.here:
            self._table.aiouffd_counters(self._slot, values)
        return list(values)

    def remove(self, *, for_good: bool) -> None:
        """Leave the table, closed. Threads that wait touch again. The last one gives SIGBUS back, if `for_good`.

        `for_good` must be False where missing pages are zeros from now on: a thread may be on its way into the handler.
        """
        if self.here:
            self._table.aiouffd_remove(self._slot, for_good)


def _milliseconds(seconds: float) -> int:
    return min(int(seconds * 1000), 0xFFFFFFFF)
