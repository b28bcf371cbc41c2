"""The reader of `reader.c`, typed: reads the messages of many descriptors, and serves those that one ioctl resolves."""

from __future__ import annotations

import ctypes
import enum
from functools import cache
from typing import TYPE_CHECKING, Any

from aiouffd.native import library

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["WORDS", "Keeper", "Keeps", "NativeReader", "Outcome", "Shown", "declared"]

WORDS = (
    *("FAULTS", "PAGES_FAULT", "BYTES_FETCHED", "COPIES", "EEXIST", "WAKES", "LATENCY", "WRITE_FAULTS"),
    *("CONTINUES", "PAGES_READAHEAD"),
)
"""What is counted, by the names of `aiouffd.engine.statistics.Counter`."""


_LOGGED = 1024


class Outcome(enum.IntEnum):
    """Why `run` returned."""

    IDLE = 0  # nothing came for a while
    MESSAGES = 1  # messages are left for the engine
    DUE = 2  # the loop is due for a turn
    FAILED = 3  # a descriptor could not be read


class Shown(enum.IntEnum):
    """Where the bytes are that a descriptor's mapping shows."""

    NOTHING = 0  # the engine serves each message
    MEMORY = 1
    FILE_PAGES = 2
    MAPPED = 3  # as MEMORY, where it is resident
    ONE_COPY = 4  # in the file that is mapped there, where a note says so


class Keeps(enum.IntEnum):
    """What becomes of a first write to a protected page."""

    ALL_ASKED = 0  # the engine decides
    NONE_DUE = 1  # it goes on, unless the page is to be read
    DUE_KEPT = 2  # it goes on; the bytes of a page that is to be read are kept before


class Keeper(ctypes.Structure):
    """`struct keeper`: the pages of memory of which snapshots are taken."""

    _fields_ = (
        ("start", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
        ("first", ctypes.c_uint64),
        ("at", ctypes.c_uint64),
        ("states", ctypes.c_uint64),
        ("slots", ctypes.c_uint64),
        ("free", ctypes.c_uint64),
        ("area", ctypes.c_uint64),
        ("words", ctypes.c_uint64),
        ("left", ctypes.c_uint64),
        ("kept", ctypes.c_uint64),
        ("page", ctypes.c_uint32),
        ("memory", ctypes.c_int32),
        ("keeps", ctypes.c_int32),
    )


class _Reader(ctypes.Structure):
    _fields_ = (
        ("epoll", ctypes.c_int32),
        ("only", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("limit", ctypes.c_uint32),
        ("spin_ns", ctypes.c_uint64),
        ("landing", ctypes.c_uint64),
        ("identity", ctypes.c_uint64),
        ("words", ctypes.c_uint64 * len(WORDS)),
        ("log", ctypes.c_uint64),
    )


class _Line(ctypes.Structure):
    _fields_ = (
        ("identity", ctypes.c_int64),
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("source", ctypes.c_uint64),
        ("page", ctypes.c_uint32),
        ("mode", ctypes.c_uint32),
        ("shown", ctypes.c_int32),
        ("file", ctypes.c_int32),
        ("more", ctypes.c_uint64),
        ("words", ctypes.c_uint64),
    )


class _More(ctypes.Structure):
    _fields_ = (
        ("near", ctypes.c_uint64),
        ("last", ctypes.c_uint64),
        ("step", ctypes.c_uint64),
        ("recent", ctypes.c_uint64 * 16),
        ("turn", ctypes.c_uint32),
        ("watched", ctypes.c_uint32),
        ("low", ctypes.c_uint64 * 32),
        ("high", ctypes.c_uint64 * 32),
        ("mapped", ctypes.c_uint64),
        ("mtime_ns", ctypes.c_int64),
        ("room", ctypes.c_uint64),
        ("used", ctypes.c_uint64),
    )


class _Found(ctypes.Structure):
    _fields_ = (
        ("fd", ctypes.c_int32),
        ("length", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("events", ctypes.c_uint32),
    )


@cache
def declared() -> ctypes.CDLL:
    """Return the library with the functions of the reader declared; raises as `library`."""
    functions = library()
    state, number = ctypes.c_void_p, ctypes.c_uint64
    functions.aiouffd_reader_new.restype = state
    functions.aiouffd_reader_new.argtypes = [ctypes.POINTER(_Reader)]
    functions.aiouffd_reader_set.argtypes = [state, ctypes.POINTER(_Reader)]
    functions.aiouffd_reader_free.argtypes = [state]
    functions.aiouffd_reader_line.argtypes = [state, ctypes.c_int, ctypes.POINTER(_Line), ctypes.POINTER(_More)]
    functions.aiouffd_reader_keep.argtypes = [state, ctypes.c_int, ctypes.POINTER(Keeper)]
    functions.aiouffd_reader_watch.argtypes = [state, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint32]
    functions.aiouffd_reader_run.argtypes = [state, number, *3 * [ctypes.c_int], ctypes.POINTER(_Found)]
    functions.aiouffd_reader_turns.restype = ctypes.POINTER(number)
    functions.aiouffd_reader_turns.argtypes = [state]
    for name in ("set", "free", "watch"):
        getattr(functions, f"aiouffd_reader_{name}").restype = None
    return functions


class NativeReader:
    """Reads many descriptors into one landing. Used by one thread; the GIL is free while `run` works.

    Args:
        epoll: the descriptor of the epoll set; it stays the caller's.
        words: which words to count in, in the order of `WORDS`.

    Raises:
        NativePartError: there is no native part.
    """

    def __init__(self, epoll: int, words: Sequence[int]) -> None:
        self._functions = declared()
        self._is = _Reader(epoll=epoll, only=-1, words=(ctypes.c_uint64 * len(WORDS))(*words))
        self._state = self._functions.aiouffd_reader_new(self._is)
        if not self._state:
            raise MemoryError
        self._found = _Found()
        self._log = (ctypes.c_uint64 * (1 + 2 * _LOGGED))()
        self._is.log = ctypes.addressof(self._log)
        self.configure()

    def came(self) -> Iterable[tuple[int, list[int]]]:
        """Return the addresses of pages that have come in the last run and are logged, by descriptor, in order."""
        count, self._log[0] = self._log[0], 0
        if not count:
            return ()
        words = self._log[1 : 1 + 2 * count]
        fds, pages = words[::2], words[1::2]
        if fds.count(fds[0]) == count:
            return ((fds[0], pages),)
        found: dict[int, list[int]] = {}
        for fd, page in zip(fds, pages, strict=True):
            found.setdefault(fd, []).append(page)
        return found.items()

    def configure(self, **options: int) -> None:
        """Set `only`, `flags`, `limit`, `spin_ns`, `landing` or `identity`: see `struct reader`."""
        for name, value in options.items():
            setattr(self._is, name, value)
        self._functions.aiouffd_reader_set(self._state, self._is)

    def describe(
        self, fd: int, *, near: int = 0, mapped: int = 0, mtime_ns: int = 0, room: int = 0, used: int = 0, **line: int
    ) -> None:
        """Say what a descriptor shows: see `struct line` and `struct more`. `near` is above 0 where readahead is on."""
        wanted = near or mapped or room or used
        more = _More(near=near, mapped=mapped, mtime_ns=mtime_ns, room=room, used=used) if wanted else None
        if self._functions.aiouffd_reader_line(self._state, fd, _Line(**line), more):
            raise MemoryError

    def keep(self, fd: int, keeper: Keeper | None) -> None:
        """Keep pages of a descriptor, which the caller keeps alive; None: none any more."""
        if self._functions.aiouffd_reader_keep(self._state, fd, keeper):
            raise MemoryError

    def turns(self, fds: Iterable[int]) -> dict[int, int]:
        """Return a number for each descriptor that was described: another whenever messages of it have been read."""
        turns = self._functions.aiouffd_reader_turns(self._state)
        return {fd: turns[fd] for fd in fds}

    def watch(self, fd: int, pairs: Sequence[int]) -> None:
        """Say where the streams of a descriptor are expected: the start and end of each, as addresses."""
        self._functions.aiouffd_reader_watch(self._state, fd, (ctypes.c_uint64 * len(pairs))(*pairs), len(pairs) // 2)

    def run(self, turn_ns: int, *, came: bool, once: bool, fd: int = -1) -> tuple[int, Any]:
        """Read and serve; return an `Outcome`, and what was found (`fd`, `length`, `error`, `events`).

        Args:
            turn_ns: nanoseconds until the loop is due for a turn.
            came: the engine has served something just now, so look for more for a while.
            once: look once.
            fd: read no other descriptor; -1: any.
        """
        found = self._found
        return self._functions.aiouffd_reader_run(self._state, turn_ns, came, once, fd, found), found

    def close(self) -> None:
        """Free it. A call after that raises AttributeError: there is nothing that C could read."""
        self._functions.aiouffd_reader_free(self._state)
        del self._functions
