"""A reader of messages, and memory whose faults it reads, against the kernel: in a child process only."""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import struct
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pattern import PAGE, content
from worlds import FEATURES, KernelWorld

import aiouffd
from aiouffd.engine.one_copy import OneCopy
from aiouffd.engine.reading import NativeReader, PythonReader
from aiouffd.engine.statistics import Counters
from aiouffd.kernel import abi
from aiouffd.kernel.events import MESSAGES
from aiouffd.native.reader import Outcome

if TYPE_CHECKING:
    from aiouffd.engine.plain import PlainSource

__all__ = ["PAGES", "SOURCE", "TURN", "Rig", "Sharing", "first"]

PAGES = 64
SOURCE = 40
"""Pages that the source has, and half a page more."""
TURN = 10_000_000_000
_MAP_FIXED = 0x10
_libc = ctypes.CDLL(None)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


class Rig:
    """A reader, and memory whose faults it reads."""

    def __init__(self, kind: str, source: Any = None, features: aiouffd.Feature = FEATURES) -> None:
        self.world = KernelWorld(PAGES, features)
        self.fd = self.world.uffd.fileno()
        os.set_blocking(self.fd, False)
        self.counters = Counters()
        self.epoll = select.epoll()
        self.epoll.register(self.fd, select.EPOLLIN)
        self.reader: Any = NativeReader(self.epoll) if kind == "native" else PythonReader(self.epoll, {})
        self.landing = memoryview(bytearray(MESSAGES * abi.MESSAGE_SIZE))
        self.identity = memoryview(bytearray(8)).cast("q")
        self.reader.land(self.landing, self.identity)
        self.reader.admit(self.fd, 7, self.counters)
        self.source = source or aiouffd.BufferSource(content(0, SOURCE * PAGE + PAGE // 2))

    def open(self, *, offset: int = 0, bound: Any = None, note: Any = None) -> None:
        """Serve the memory out of the source, page by page."""
        source = self.source
        locate = getattr(source, "page", source.locate)
        plain = (locate, source.size, PAGE, 0, False, None, source.memory())
        self.reader.open(self.fd, self.world.at(0), self.world.at(PAGES), offset, plain, bound, note)

    def run(self, expected: Outcome) -> Any:
        """Run the reader once over what there is."""
        outcome, found = self.reader.run(TURN, came=False, once=True)
        assert outcome == expected, (outcome, found)
        return found

    def left(self) -> list[int]:
        """Run it, and return the pages of the faults that it leaves."""
        found = self.run(Outcome.MESSAGES)
        assert (found.fd, found.error) == (self.fd, 0)
        addresses = [
            struct.unpack_from("=16xQ", self.landing, at)[0] for at in range(0, found.length, abi.MESSAGE_SIZE)
        ]
        return [self.world.page(address) for address in addresses]

    def counts(self, **expected: int) -> None:
        """Assert what was counted."""
        found = self.counters.snapshot()
        assert {name: getattr(found, name) for name in expected} == expected


class Sharing(Rig):
    """A reader, and memory that maps a file which others map, too."""

    def __init__(self, kind: str, offset: int = 0) -> None:
        super().__init__(kind, features=FEATURES | aiouffd.Feature.MINOR_SHMEM)
        fds = OneCopy.create(self.source.size, PAGE)
        self.file = OneCopy(*fds, PAGE)
        start, length = self.world.at(0), PAGES * PAGE
        self.world.uffd.unregister(start, length)
        memory = _libc.mmap(start, length, mmap.PROT_READ, mmap.MAP_PRIVATE | _MAP_FIXED, fds[1].fileno(), offset)
        assert memory == start
        modes = aiouffd.RegisterMode.MISSING | aiouffd.RegisterMode.MINOR
        self.world.uffd.register(start, length, modes)
        self.offset = offset

    def put(self, *pages: int) -> None:
        """Put pages of the source in the file."""
        for page in pages:
            assert self.file.put(page * PAGE, self.source.locate(page * PAGE, PAGE) or 0, PAGE) == 0

    def share(self, *, around: int = 0, note: Any = None) -> None:
        """Serve what is in the file, with so many bytes of readahead."""
        plain: PlainSource = (None, self.source.size, PAGE, 0, around > 0, None, self.file)
        self.reader.open(self.fd, self.world.at(0), self.world.at(PAGES), self.offset, plain, None, note)
        readahead = SimpleNamespace(limit=around, is_at_random=False, around=around, expected=list)
        self.reader.refresh(SimpleNamespace(uffd=self.world.uffd, readahead=readahead))


def first(page: int) -> bytes:
    """Return how the world tells a page of the source."""
    return content(page * PAGE, PAGE)
