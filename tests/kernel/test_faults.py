"""`native.faults`: the table of regions that are served in the faulting thread."""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
import touchers
from pattern import PAGE, content
from scenario import play

import aiouffd
from aiouffd.errors import LimitError
from aiouffd.kernel import abi
from aiouffd.kernel.abi import Feature, RegisterMode
from aiouffd.kernel.memory import address_of
from aiouffd.native import faults
from aiouffd.native.faults import EXTENT, Extent, Kind, Served

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 64 * PAGE


class Record(Served):
    """One that knows its descriptor."""

    uffd: int


def with_a_record(work: Callable[[Any, Record, int, bytes], None], **options: Any) -> None:
    """Call `work` with a registered region, its record, the end of its pipe, and bytes that may be shown."""
    region = aiouffd.Region(SIZE)
    data = content(0, SIZE)
    reading, writing = os.pipe2(os.O_NONBLOCK)
    with aiouffd.Userfaultfd(Feature.SIGBUS) as uffd:
        uffd.register(region.address, SIZE, RegisterMode.MISSING)
        served = Record(uffd.fileno(), writing, page_size=PAGE, **{"readahead": 0, **options})
        served.uffd = uffd.fileno()
        work(region, served, reading, data)
        assert served.close()
        uffd.unregister(region.address, SIZE)
        served.remove(for_good=True)


def sum_of(region: aiouffd.Region, first: int, pages: int) -> int:
    """Touch pages without the GIL."""
    return int(touchers.free().sum(region.address + first * PAGE, pages))


def extents_shown() -> None:
    """Scenario: memory, zeros, and nothing."""

    def work(region: Any, served: Record, _: int, data: bytes) -> None:
        start = region.address
        served.show(
            start,
            start + SIZE,
            [
                Extent(start, start + 8 * PAGE, address_of(data), 0, Kind.COPY, -1, 0),
                Extent(start + 8 * PAGE, start + SIZE, 0, 0, Kind.ZEROS, -1, 0),
            ],
        )
        served.open()
        assert sum_of(region, 0, 8) == sum(range(1, 9))
        assert sum_of(region, 8, 8) == 0
        counted = dict(zip(faults.COUNTERS, served.counters(), strict=False))
        assert counted["FAULTS"] == counted["PAGES_FAULT"] == 16
        assert (counted["COPIES"], counted["ZEROPAGES"], counted["PAGES_ZERO"]) == (8, 8, 8)
        assert sum(served.counters()[len(faults.COUNTERS) :]) == 16
        assert len(served.counters()) == len(faults.COUNTERS) + faults.LATENCIES
        assert served.here

    with_a_record(work)


def test_what_an_extent_shows() -> None:
    """Each page once, and it is counted."""
    play(extents_shown)


def windows() -> None:
    """Scenario: touches in order bring more and more."""

    def work(region: Any, served: Record, _: int, data: bytes) -> None:
        start = region.address
        served.show(start, start + SIZE, [Extent(start, start + SIZE, address_of(data), 0, Kind.COPY, -1, 0)])
        served.open()
        assert sum_of(region, 0, 64) == sum(range(1, 65))
        counted = dict(zip(faults.COUNTERS, served.counters(), strict=False))
        assert counted["FAULTS"] < 8
        assert counted["PAGES_FAULT"] + counted["PAGES_READAHEAD"] == 64

    with_a_record(work, readahead=1 << 20)


def test_readahead() -> None:
    """A sequence of touches takes few faults."""
    play(windows)


def asked() -> None:
    """Scenario: what is in no extent is asked for, and comes when the waiters are woken."""

    def work(region: Any, served: Record, reading: int, data: bytes) -> None:
        start = region.address
        served.show(start, start + SIZE, [])
        served.open()
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(sum_of(region, 5, 1)))
        thread.start()
        while True:
            try:
                message = os.read(reading, 4096)
                break
            except BlockingIOError:
                served.beat()
        code, flags, address, toucher = abi.PAGEFAULT_MESSAGE.unpack(message)
        assert (code, flags, address & -PAGE, toucher) == (0x12, 0, start + 5 * PAGE, thread.native_id)
        assert faults.copying()(served.uffd, start + 5 * PAGE, address_of(data) + 5 * PAGE, PAGE, 1) == PAGE
        assert faults.copying()(served.uffd, start + 5 * PAGE, address_of(data), PAGE, 1) == -errno.EEXIST
        faults.wake(start + 5 * PAGE, PAGE)
        thread.join()
        assert seen == [6]

    with_a_record(work)


def test_what_is_asked_for() -> None:
    """The message is the kernel's, and the thread sleeps until the page has come."""
    play(asked)


def displaced() -> None:
    """Scenario: another handler is installed."""

    def work(region: Any, served: Record, _: int, data: bytes) -> None:
        start = region.address
        served.show(start, start + SIZE, [Extent(start, start + SIZE, address_of(data), 0, Kind.COPY, -1, 0)])
        served.open()
        assert served.beat() == 0
        touchers.free().take_sigbus(1)
        theirs = faults.handler()
        assert served.beat() == 1
        assert served.below() == theirs
        assert faults.handler() not in (0, 1, theirs)
        assert sum_of(region, 0, 1) == 1

    with_a_record(work)


def test_another_handler_is_put_below() -> None:
    """`beat` says so."""
    play(displaced)


def too_many() -> None:
    """Scenario: there is no room, and then there is."""
    with aiouffd.Userfaultfd(Feature.SIGBUS) as uffd:
        _, writing = os.pipe2(os.O_NONBLOCK)
        records = [Served(uffd.fileno(), writing, page_size=PAGE, readahead=0) for _ in range(256)]
        with pytest.raises(LimitError):
            Served(uffd.fileno(), writing, page_size=PAGE, readahead=0)
        records.pop().remove(for_good=True)
        records.append(Served(uffd.fileno(), writing, page_size=PAGE, readahead=0))
        before = faults.handler()
        for record in records:
            record.remove(for_good=True)
        assert faults.handler() != before


def test_there_is_room_for_256() -> None:
    """One more is a LimitError; the last one gives SIGBUS back."""
    play(too_many)


def test_the_structs_are_those_of_the_library() -> None:
    """An extent has the size that table.h gives it: four addresses, two numbers and a time."""
    assert EXTENT.size == 4 * 8 + 2 * 4 + 8
