"""A reader of messages, and memory whose faults it reads, against the kernel: in a child process only."""

from __future__ import annotations

import os
import select
import struct
from typing import Any

from pattern import PAGE, content
from worlds import FEATURES, KernelWorld

import aiouffd
from aiouffd.engine.reading import NativeReader, PythonReader
from aiouffd.engine.statistics import Counters
from aiouffd.kernel import abi
from aiouffd.kernel.events import MESSAGES
from aiouffd.native.reader import Outcome

__all__ = ["PAGES", "SOURCE", "TURN", "Rig", "first"]

PAGES = 64
SOURCE = 40
"""Pages that the source has, and half a page more."""
TURN = 10_000_000_000


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


def first(page: int) -> bytes:
    """Return how the world tells a page of the source."""
    return content(page * PAGE, PAGE)
