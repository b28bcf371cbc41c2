"""The table of `faults.c`, typed: which regions are served in the faulting thread, and what they show."""

from __future__ import annotations

import ctypes
import enum
import errno
import os
from functools import cache
from typing import TYPE_CHECKING, Any

from aiouffd.errors import AccessError, BusyError
from aiouffd.native import holding, library

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["COUNTERS", "LATENCIES", "Extent", "Kind", "Served", "copying", "finalizing", "handler", "wake"]

COUNTERS = (
    *("FAULTS", "PAGES_FAULT", "PAGES_READAHEAD", "PAGES_ZERO", "BYTES_FETCHED"),
    *("COPIES", "ZEROPAGES", "CONTINUES", "EEXIST"),
)
"""What `Served.counters` returns, by the names of `aiouffd.engine.statistics.Counter`; the latencies follow."""
LATENCIES = 48


class Kind(enum.IntEnum):
    """What is done about a missing page."""

    COPY = 1
    ZEROS = 2
    RESIDENT = 3  # as COPY, of those pages of a file that are in memory


class Extent(ctypes.Structure):
    """Addresses [start, end) show the bytes at `source`, which are those at `offset` of the file `fd`."""

    _fields_ = (
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("source", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("kind", ctypes.c_int32),
        ("fd", ctypes.c_int32),
        ("mtime_ns", ctypes.c_int64),
    )


class _Options(ctypes.Structure):
    _fields_ = (
        ("uffd", ctypes.c_int32),
        ("pipe", ctypes.c_int32),
        ("shared", ctypes.c_int32),
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
        ("close", slot),
        ("open", slot),
        ("show", slot, number, number, ctypes.c_void_p, number),
        ("remove", slot, ctypes.c_int),
        ("beat", slot),
        ("below",),
        ("handler",),
        ("counters", slot, ctypes.c_void_p),
        ("finalizing",),
    ):
        getattr(table, f"aiouffd_{name}").argtypes = arguments
    for name in ("loop", "open", "remove", "counters", "finalizing"):
        getattr(table, f"aiouffd_{name}").restype = None
    table.aiouffd_below.restype = table.aiouffd_handler.restype = number
    return table


@cache
def copying() -> Callable[[int, int, int, int, int], int]:
    """Return a function of (descriptor, dst, src, length, mode): UFFDIO_COPY with the GIL held, for short runs.

    It returns bytes done, or a negated errno.
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
    """Let the threads go that wait for pages of a range: each touches again. The GIL is held meanwhile."""
    _waking()(start, length)


def handler() -> int:
    """Return the address of the handler that has SIGBUS now; 0: nobody has it, 1: it is ignored."""
    return int(_table().aiouffd_handler())


def finalizing() -> None:
    """Say that the interpreter ends, in the calling thread: no other thread gets the GIL back from a fault."""
    _table().aiouffd_finalizing()


class Served:
    """A record of the table, closed until `open`. The handler of SIGBUS is installed with the first.

    Args:
        uffd: a descriptor with Feature.SIGBUS; it stays the caller's, as all of these, until `remove`.
        pipe: where to write what must be asked of the loop; non-blocking.
        page_size: in bytes.
        readahead: what one fault brings at most, in bytes; 0: the page alone.
        mode: bits of COPY and CONTINUE: 2 for pages that come write-protected.
        shared: the memory is registered for minor faults as well.
        warning: seconds that a thread waits, while the loop does not run, until it says so; 0: for ever.
        limit: seconds until it has SIGBUS; 0: for ever.

    Raises:
        NativePartError: there is no part in C.
        BusyError: 256 regions are served, or others have taken SIGBUS eight times.
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
        warning: float = 0.0,
        limit: float = 0.0,
    ) -> None:
        self._table = _table()
        self._pid = os.getpid()
        options = _Options(uffd, pipe, shared, mode, page_size, readahead, _milliseconds(warning), _milliseconds(limit))
        displaced = ctypes.c_int()
        slot = self._table.aiouffd_add(options, displaced)
        if slot in (-errno.ENOSPC, -errno.EBUSY):
            raise BusyError("SIGBUS", 0, 0, errno.EBUSY)
        if slot < 0:
            raise AccessError(
                "reading /proc/self/pagemap",
                "It tells a page that is missing from one that cannot be had. Have /proc mounted, and the process"
                f" dumpable (prctl(2)): {os.strerror(-slot)}",
            )
        self._slot = slot

    @property
    def here(self) -> bool:
        """Whether this is the process whose memory it is: in a forked child the table is empty."""
        return os.getpid() == self._pid

    def loop(self, thread: int) -> None:
        """Say which thread (its native identifier) runs the loop: it must not wait for itself."""
        self._table.aiouffd_loop(self._slot, thread)

    def close(self) -> bool:
        """Keep handlers out: those that come wait. False where one that is inside has not left in 5 s."""
        return not self.here or self._table.aiouffd_close(self._slot) == 0

    def open(self) -> None:
        """Let handlers in."""
        if self.here:
            self._table.aiouffd_open(self._slot)

    def show(self, start: int, end: int, extents: Sequence[Extent]) -> None:
        """Say where the region lies and what it shows, while it is closed; what no extent has is asked of the loop."""
        packed = (Extent * len(extents))(*extents)
        self._table.aiouffd_show(self._slot, start, end, packed, len(extents))

    def beat(self) -> int:
        """Say that the loop runs. 0: SIGBUS is ours; 1: it is again, another had taken it; -1: it is not."""
        return int(self._table.aiouffd_beat(self._slot))

    def below(self) -> int:
        """Return the address of the handler that gets what is not ours; 0 and 1: the default, and to ignore it."""
        return int(self._table.aiouffd_below())

    def counters(self) -> list[int]:
        """Return what handlers have counted: `COUNTERS`, and then the latencies by bit length of the nanoseconds."""
        values = (ctypes.c_uint64 * (len(COUNTERS) + LATENCIES))()
        if self.here:
            self._table.aiouffd_counters(self._slot, values)
        return list(values)

    def remove(self, *, for_good: bool) -> None:
        """Leave the table, closed. Threads that wait touch again. The last one gives SIGBUS back, if `for_good`.

        That must not be where missing pages are zeros from now on: a thread may be on its way into the handler.
        """
        if self.here:
            self._table.aiouffd_remove(self._slot, for_good)


def _milliseconds(seconds: float) -> int:
    return min(int(seconds * 1000), 0xFFFFFFFF)
