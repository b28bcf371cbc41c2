"""Writes through a `Monitor`: tracked by the kernel, or told to a handler; and a file that several monitors share."""

from __future__ import annotations

import asyncio
import mmap
import os
import sys
import threading

import pytest
from pattern import PAGE, Pattern, Slow, content
from scenario import eventually, next_error, play

import aiouffd

SIZE = 64 * PAGE


def ranges(found: list[aiouffd.Range]) -> list[tuple[int, int]]:
    """Return (first page, pages) of each range."""
    return [(item.start // PAGE, item.length // PAGE) for item in found]


def tracked_while_filled(*, shared: bool, readahead: int) -> None:
    """Scenario."""
    region = aiouffd.Region(SIZE, shared=shared)
    region[5 * PAGE] = 1  # there before anybody serves
    source = Pattern(SIZE - 8 * PAGE)  # its end lies within the region: zeros come write-protected as well
    with aiouffd.Monitor(region, source, track_writes=True, readahead=readahead) as monitor:
        assert monitor.collect() == []
        assert region[3 * PAGE : 4 * PAGE] == content(3 * PAGE, PAGE)
        assert region[60 * PAGE] == 0
        assert monitor.collect() == []  # loads, and readahead, are no writes
        region[3 * PAGE] = 7
        region[9 * PAGE] = 7  # its first touch is the write
        region[10 * PAGE] = 7
        region[60 * PAGE] = 7
        assert ranges(monitor.collect()) == [(3, 1), (9, 2), (60, 1)]
        assert monitor.collect() == []
        region[10 * PAGE + 1] = 8
        region[5 * PAGE] = 2
        monitor.prefetch_sync(0, SIZE)
        assert ranges(monitor.collect()) == [(5, 1), (10, 1)]
        region.madvise(mmap.MADV_DONTNEED, 20 * PAGE, PAGE)
        if not shared:
            assert region[20 * PAGE] == 0
        assert monitor.collect() == []
        region[20 * PAGE] = 3
        assert ranges(monitor.collect()) == [(20, 1)]
        assert region[11 * PAGE : 12 * PAGE] == content(11 * PAGE, PAGE)


@pytest.mark.parametrize("shared", [False, True], ids=["anonymous", "shared"])
@pytest.mark.parametrize("readahead", [0, 2 << 20])
def test_exactly_what_was_written_to_a_region_that_is_being_filled(shared: bool, readahead: int) -> None:
    """Pages that come by a load are not written; each page that is written is, once."""
    play(run_tracked, shared, readahead)


def run_tracked(shared: bool, readahead: int) -> None:
    """Scenario, by position."""
    tracked_while_filled(shared=shared, readahead=readahead)


def tracked_by_threads() -> None:
    """Scenario."""
    size = 4096 * PAGE
    region = aiouffd.Region(size)
    with aiouffd.Monitor(region, Pattern(size), track_writes=True) as monitor:
        found: set[int] = set()
        written = set(range(0, 4096, 3))

        def write(part: list[int]) -> None:
            for page in part:
                region[page * PAGE] = 1

        def load() -> None:
            for page in range(4096):
                assert region[page * PAGE + 8 : page * PAGE + 16] == content(page * PAGE + 8, 8)

        pages = sorted(written)
        threads = [threading.Thread(target=write, args=(pages[n::4],)) for n in range(4)]
        threads += [threading.Thread(target=load) for _ in range(2)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for item in monitor.collect():
                found.update(range(item.start // PAGE, item.end // PAGE))
        for item in monitor.collect():
            found.update(range(item.start // PAGE, item.end // PAGE))
        assert found == written


def test_writes_that_race_with_collecting_are_seen_once_each() -> None:
    """No write is lost between two calls, and no load is taken for one."""
    play(tracked_by_threads)


def note(path: str, text: str) -> None:
    """Append to a file."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.write(fd, text.encode())
    os.close(fd)


class Watching(aiouffd.Handler):
    """Writes to a file what it is told; fills pages with their number."""

    def __init__(self, log: str) -> None:
        self.log = log

    async def pagefault(self, fault: aiouffd.Fault, batch: aiouffd.Batch) -> None:
        """Fill it."""
        batch.copy(fault.page, bytes([fault.offset // PAGE]) * PAGE)

    async def write(self, fault: aiouffd.Fault, batch: aiouffd.Batch) -> None:
        """Tell it; page 7 raises, page 8 protects itself again."""
        assert fault.write
        assert fault.kind is aiouffd.FaultKind.WP
        note(self.log, f"{fault.offset // PAGE} ")
        if fault.offset == 7 * PAGE:
            raise RuntimeError("no")
        if fault.offset == 9 * PAGE:
            await asyncio.sleep(0.01)


def told_of_writes() -> None:
    """Scenario."""
    fd = os.memfd_create("told")
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Watching(f"/proc/{os.getpid()}/fd/{fd}")) as monitor:
        assert region[3 * PAGE] == 3
        assert os.pread(fd, 100, 0) == b""
        region[3 * PAGE] = 9
        region[3 * PAGE + 1] = 9
        assert region[3 * PAGE] == 9
        region[4 * PAGE] = 9
        assert os.pread(fd, 100, 0) == b"3 4 "
        region[9 * PAGE] = 9
        region[7 * PAGE] = 9  # the handler raises: the writer goes on all the same
        assert region[7 * PAGE : 7 * PAGE + 2] == bytes([9, 7])
        assert os.pread(fd, 100, 0) == b"3 4 9 7 "
        with pytest.raises(aiouffd.HandlerError, match="no"):
            next_error(monitor)
        assert monitor.statistics().write_faults == 4


def test_a_handler_is_told_of_each_first_write() -> None:
    """Synchronously: the writer waits until the handler has returned; a handler that raises stops nobody."""
    play(told_of_writes)


def test_two_ways_of_tracking_at_once() -> None:
    """Either the kernel notes writes, or the handler is told."""
    with pytest.raises(ValueError, match="either"):
        aiouffd.Monitor(aiouffd.Region(PAGE), Watching(""), track_writes=True)
    with pytest.raises(ValueError, match="track_writes=True"):
        aiouffd.Monitor(aiouffd.Region(PAGE)).collect()


class Once(Slow):
    """A source that must be asked for no page twice: it counts in a file that both pagers write to."""

    def __init__(self, size: int, log: str) -> None:
        super().__init__(size)
        self.log = log

    async def read(self, offset: int, length: int) -> bytes:
        """Note it."""
        note(self.log, "".join(f"{at // PAGE}\n" for at in range(offset, offset + length, PAGE)))
        return content(offset, length)


def shared_by_processes(page_size: int) -> None:
    """Scenario: two processes map one memfd, each with a Monitor of its own."""
    log = os.memfd_create("log")
    path = f"/proc/{os.getpid()}/fd/{log}"
    size = SIZE if page_size == PAGE else 4 * page_size
    region = aiouffd.Region(size, shared=True, page_size=page_size)
    with aiouffd.Monitor(region, Once(size, path), readahead=0) as monitor:
        pages = range(0, size, page_size)
        for at in list(pages)[::2]:
            assert region[at : at + PAGE] == content(at, PAGE)
        eventually(lambda: monitor.statistics().pages_fault, len(pages) // 2)
        first = monitor.statistics()
        assert first.minor_faults == 0
        code = f"import sys; sys.path[:0] = {sys.path!r}; import test_writes; test_writes.second("
        code += f"{os.getpid()}, {region.fd}, {size}, {page_size}, {path!r})"
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-c", code],
            os.environ,
        )
        _, status = os.waitpid(pid, 0)
        assert status == 0
        for at in pages:
            assert region[at : at + PAGE] == content(at, PAGE)
        eventually(lambda: monitor.statistics().continues, len(pages) // 2)
        last = monitor.statistics()
        assert last.pages_fault == first.pages_fault, "the second has brought the other half"
        assert last.minor_faults == len(pages) // 2
    read = [int(line) for line in os.pread(log, 1 << 20, 0).split()]
    assert sorted(read) == sorted(set(read)), "a page was fetched twice"
    assert len(read) == size // PAGE


def second(pid: int, fd: int, size: int, page_size: int, path: str) -> None:
    """Be the second process."""
    memfd = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
    region = aiouffd.Region.from_fd(memfd, page_size=page_size)
    with aiouffd.Monitor(region, Once(size, path), readahead=0) as monitor:
        for at in range(0, size, page_size):
            assert region[at : at + PAGE] == content(at, PAGE)
        half = size // page_size // 2
        eventually(lambda: monitor.statistics().pages_fault, half)
        eventually(lambda: monitor.statistics().minor_faults, half)
        eventually(lambda: monitor.statistics().continues, half)


def test_a_shared_region_is_filled_once_for_all() -> None:
    """What one process has brought into the memfd, another maps by CONTINUE, without asking the source."""
    play(shared_by_processes, PAGE)


@pytest.mark.usefixtures("huge_pages")
def test_a_shared_region_of_huge_pages() -> None:
    """The same with hugetlb pages."""
    play(shared_by_processes, 2 << 20)


def minor_neighbours() -> None:
    """Scenario."""
    region = aiouffd.Region(SIZE, shared=True)
    other = mmap.mmap(region.fd, SIZE)
    other[: 32 * PAGE] = content(0, 32 * PAGE)  # half of it is in the file already
    with aiouffd.Monitor(region, Pattern(SIZE), readahead=2 << 20) as monitor:
        for page in range(64):
            assert region[page * PAGE : (page + 1) * PAGE] == content(page * PAGE, PAGE)
        found = monitor.statistics()
        assert found.minor_faults == 2, found  # of 16 pages each


def test_neighbours_in_the_file_come_with_a_minor_fault() -> None:
    """A minor fault maps what the file has around it, and a missing one beside it is fetched."""
    play(minor_neighbours)
