"""`Region`: memory to be filled."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import resource
import signal
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from pattern import PAGE
from reader import in_child
from scenario import open_descriptors, play

import aiouffd
from aiouffd import Region
from aiouffd.kernel import libc
from aiouffd.kernel import region as regions
from aiouffd.kernel.memory import address_of, unshare_memory
from aiouffd.kernel.pagemap import Pagemap
from aiouffd.ranges import Range

HUGE = 2 << 20
MADVISE = ("28 ", "233 ")  # its number on x86-64, and on others


def mapped(address: int) -> bool:
    """Tell whether something is mapped at an address."""
    starts = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= address < int(end, 16) for start, end in starts)


@pytest.mark.parametrize("length", [1, PAGE - 1, PAGE, PAGE + 1, 100_003])
@pytest.mark.parametrize("shared", [False, True])
def test_any_length(length: int, shared: bool) -> None:
    """`len()` is exact, the mapping whole pages; it is an mmap, and numpy takes it."""
    region = Region(length, shared=shared)
    assert isinstance(region, mmap.mmap)
    assert len(region) == length
    assert region.mapped_length == (length + PAGE - 1) // PAGE * PAGE
    assert region.address % PAGE == 0
    array = np.frombuffer(region, np.uint8)
    assert array.ctypes.data == region.address
    assert (region.fd >= 0) == shared
    with pytest.raises(BufferError):
        region.close()
    del array
    address = region.address
    region.close()
    assert not mapped(address)
    assert "closed" in repr(region)


def reserved() -> None:
    """Scenario: a forked child has some pages, and allocates others while it finds out which."""
    module: Any = regions
    region, find = Region(8 * PAGE), module.mapped
    at = region.address

    def allocate(page: int) -> None:
        libc.mmap_fixed(at + page * PAGE, PAGE)
        ctypes.memset(at + page * PAGE, page, PAGE)

    def found(start: int, length: int) -> list[Range]:
        there: list[Range] = find(start, length)
        if not mapped(at + 3 * PAGE):
            allocate(3)
        return there

    libc.munmap(at, 8 * PAGE)
    allocate(5)
    module.mapped = found
    module._reserve(region)
    assert find(at, 8 * PAGE)[0].start == at
    assert sum(item.length for item in find(at, 8 * PAGE)) == 8 * PAGE
    for page in (3, 5):
        assert ctypes.string_at(at + page * PAGE, PAGE) == bytes([page]) * PAGE
    os._exit(0)  # the region is not all its own any more


def test_what_a_child_allocates_is_not_taken_from_it() -> None:
    """A place that it did not get is reserved, but for what has come there."""
    play(reserved)


def test_the_last_reference_unmaps() -> None:
    """No close() is needed."""
    region = Region(1 << 20)
    address = region.address
    del region
    gc.collect()
    assert not mapped(address)


@pytest.mark.parametrize("wrong", [0, -1])
def test_no_region_without_bytes(wrong: int) -> None:
    """ValueError, not a mapping of the whole file."""
    with pytest.raises(ValueError, match="at least one byte"):
        Region(wrong)


@pytest.mark.parametrize("wrong", [1, 1000, 4095, 12288])
def test_page_sizes_are_powers_of_two(wrong: int) -> None:
    """ValueError says what a page size is."""
    with pytest.raises(ValueError, match="power of two"):
        Region(PAGE, page_size=wrong)


@pytest.mark.parametrize("wrong", [{"length": "4096"}, {"length": 1.5}, {"length": 1, "page_size": "2M"}])
def test_what_is_no_number_of_bytes(wrong: dict[str, Any]) -> None:
    """A TypeError names it."""
    with pytest.raises(TypeError, match=f"{[*wrong][-1]}= takes a whole number of bytes"):
        Region(**wrong)


def test_shared_regions_share() -> None:
    """Another mapping of the same memfd sees the same bytes, all or the first of them."""
    region = Region(3 * PAGE, shared=True)
    other = Region.from_fd(region.fd)
    part = Region.from_fd(region.fd, PAGE)
    region[5] = 77
    assert other[5] == part[5] == 77
    assert (len(other), len(part)) == (3 * PAGE, PAGE)
    assert other.fd != region.fd


@pytest.mark.usefixtures("huge_pages")
@pytest.mark.parametrize("shared", [False, True])
def test_huge_pages(shared: bool) -> None:
    """Pages of 2 MiB; an odd length is unmapped whole all the same."""
    region = Region(HUGE + 5, page_size=HUGE, shared=shared)
    assert (len(region), region.mapped_length, region.address % HUGE) == (HUGE + 5, 2 * HUGE, 0)
    region[HUGE + 4] = 1
    address = region.address
    region.close()
    assert not mapped(address)
    assert not mapped(address + HUGE)


def test_too_few_huge_pages_is_said_so() -> None:
    """UnsupportedError names the knob, at once and not at the first touch."""
    with pytest.raises(aiouffd.UnsupportedError, match="nr_hugepages"):
        Region(1 << 40, page_size=HUGE)


def test_resize_keeps_the_address_right() -> None:
    """It may move; `address` says where it is now."""
    region = Region(PAGE)
    region[0] = 9
    region.resize(64 << 20)
    assert len(region) == 64 << 20
    assert np.frombuffer(region, np.uint8).ctypes.data == region.address
    assert region[0] == 9


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_missing_is_found(shared: bool) -> None:
    """`Pagemap.missing` gives exactly the pages that nobody has touched."""
    region = Region(64 * PAGE, shared=shared)
    for page in (0, 3, 4, 63):
        region[page * PAGE] = 1
    gaps = Pagemap().missing(region.address, region.mapped_length, region.fd)
    pages = [Range((gap.start - region.address) // PAGE, gap.length // PAGE) for gap in gaps]
    assert pages == [Range(1, 2), Range(5, 58)]


def test_what_a_fork_shares_is_copied_at_once(tmp_path: Path) -> None:
    """Writing to it takes no page faults then, and it holds what it held.

    What was not in memory is not brought, and a file not copied.
    """
    memory = mmap.mmap(-1, 512 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    path = tmp_path / "file"
    path.write_bytes(bytes(256 * PAGE))
    with path.open("rb") as opened:
        file = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    for page in range(256):
        memory[page * PAGE + 1] = page

    def write(where: mmap.mmap) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for page in range(256):
            where[page * PAGE] = 1
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def shared() -> None:
        assert write(memory) >= 256

    def copied() -> None:
        unshare_memory()
        assert write(memory) < 32
        assert write(file) >= 256
        assert all(memory[page * PAGE + 1] == page for page in range(256))
        assert libc.mincore(address_of(memory), len(memory))[256:] == bytes(256)

    in_child(shared)
    in_child(copied)
    assert memory[0] == 0


def emptied_while_served(source: str) -> None:
    """Scenario."""
    region = aiouffd.Region(8 * PAGE)
    origin = aiouffd.BufferSource(b"x" * 8 * PAGE) if source == "data" else None
    with aiouffd.Monitor(region, origin), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert region[0] == (ord("x") if origin else 0)
        region.madvise(mmap.MADV_WILLNEED)
        assert caught == []
        region.madvise(mmap.MADV_DONTNEED, 0, PAGE)
        assert region[0] == 0
        assert [str(item.message) for item in caught] == (
            ["emptied pages read as zeros, and not as the source's data"] if origin else []
        )
        assert all(item.category is RuntimeWarning and item.filename == __file__ for item in caught)
    region.madvise(mmap.MADV_DONTNEED)
    assert len(caught) == bool(origin)


@pytest.mark.parametrize("source", ["data", "zeros"])
def test_emptying_served_memory_warns_that_it_is_zeros(source: str) -> None:
    """At the caller's line, where a source's data were shown; not for zeros, nor for memory that nobody serves."""
    play(emptied_while_served, source)


def emptied_beside_others() -> None:
    """Scenario: the pager's worker is stopped, so that madvise(2) waits until its event is read."""
    region = aiouffd.Region(8 * PAGE)
    with aiouffd.Monitor(region, aiouffd.BufferSource(b"x" * 8 * PAGE)) as monitor, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert region[0] == ord("x")
        os.kill(monitor.pids[1], signal.SIGSTOP)
        try:
            thread = threading.Thread(target=region.madvise, args=(mmap.MADV_DONTNEED, 0, PAGE))
            thread.start()
            where = Path(f"/proc/self/task/{thread.native_id}/syscall")
            while not where.read_text().startswith(MADVISE):
                assert thread.is_alive()
            with pytest.raises(BufferError):  # it is in use
                region.refuse_views()
        finally:
            os.kill(monitor.pids[1], signal.SIGCONT)
        thread.join()
        assert region[0] == 0
        assert region[PAGE] == ord("x")


def test_other_threads_run_while_memory_is_emptied() -> None:
    """Among them are those that start another pager, should it be killed just then."""
    play(emptied_beside_others)


def test_only_a_part_is_emptied() -> None:
    """Within the region: else the error is that of mmap."""
    region = aiouffd.Region(2 * PAGE)
    plain = mmap.mmap(-1, 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for start, length in ((2 * PAGE, PAGE), (-PAGE, PAGE), (0, -1)):
        for memory in (region, plain):
            with pytest.raises(ValueError, match=r"madvise (start out of bounds|length invalid)"):
                memory.madvise(mmap.MADV_DONTNEED, start, length)
    for memory in (region, plain):
        with pytest.raises(OSError, match="Invalid argument"):
            memory.madvise(mmap.MADV_DONTNEED, 3, PAGE)
        memory[:] = b"x" * 2 * PAGE
        memory.madvise(mmap.MADV_DONTNEED, PAGE, 100 * PAGE)
        assert (memory[0], memory[PAGE]) == (ord("x"), 0)


def test_a_memfd_that_cannot_be_mapped_leaves_no_descriptor() -> None:
    """It is shorter than what is asked for."""
    region = aiouffd.Region(PAGE, shared=True)
    before = open_descriptors()
    with pytest.raises(ValueError, match="length"):
        aiouffd.Region.from_fd(region.fd, 100 * PAGE)
    assert open_descriptors() == before


def test_only_a_region_that_grows_is_inaccessible_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that shrinks does not move: other threads may touch it."""
    protected: list[int] = []
    monkeypatch.setattr(libc, "mprotect", lambda _start, _length, protection: protected.append(protection))
    change = SimpleNamespace(moved=lambda *_: None)
    region = aiouffd.Region(8 * PAGE)
    region.listen(cast("Any", SimpleNamespace(may_wait=True, change=lambda work: work(change))))
    region.resize(4 * PAGE)
    assert libc.PROT_NONE not in protected
    region.resize(6 * PAGE)
    assert libc.PROT_NONE in protected
    region.listen(None)


def test_a_block_closes_it() -> None:
    """By `close`, which does not unmap what is served: that of mmap.mmap would."""
    with Region(PAGE) as region:
        assert region[0] == 0
    assert region.closed
    region = Region(PAGE)
    region.monitor = object()
    with pytest.raises(aiouffd.BusyError), region:
        pass
    region.monitor = None
    assert region[0] == 0
