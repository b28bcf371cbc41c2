"""`kernel.populated`: a region starts missing, whatever the kernel fills, or entering says why not."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from locking import MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT, lock_all, needs_root
from pattern import PAGE, Pattern, content, word
from scenario import play

import aiouffd
from aiouffd.kernel import libc
from aiouffd.kernel.pagemap import Pagemap
from aiouffd.kernel.populated import drop_populated_zeros

if TYPE_CHECKING:
    from collections.abc import Callable

HUGE = 2 << 20
MADV_HUGEPAGE = 14

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

KINDS: dict[str, dict[str, Any]] = {
    "private": {},
    "shared": {"shared": True},
    "huge-private": {"page_size": HUGE},
    "huge-shared": {"page_size": HUGE, "shared": True},
}
ENGINES: dict[str, Callable[[], Any]] = {"pager": aiouffd.Pager, "in_thread": aiouffd.InThread}


def made(kind: str, length: int = 2 * HUGE) -> aiouffd.Region:
    """Return a new region of a kind."""
    return aiouffd.Region(length, **KINDS[kind])


def shows_its_source(region: aiouffd.Region, engine: str = "pager") -> None:
    """Enter a Monitor, and compare each page with the source's."""
    with aiouffd.Monitor(region, Pattern(region.mapped_length), readahead=0, engine=ENGINES[engine]()):
        for page in range(len(region) // PAGE):
            assert region[page * PAGE : page * PAGE + 8] == word(page)


def locked(address: int) -> int:
    """Return how many KiB of the mapping at an address are locked in memory, as smaps says."""
    text = Path("/proc/self/smaps").read_text()
    part = text[text.index(f"{address:x}-") :]
    return int(part[part.index("\nLocked:") :].split()[1])


def made_while_locked(kind: str, flags: int, engine: str) -> None:
    """Scenario."""
    lock_all(flags)
    region = made(kind)
    assert len(region) == 2 * HUGE
    shows_its_source(region, engine)
    if region.page_size == PAGE:
        assert locked(region.address) >= 2 * HUGE >> 10  # more, where the kernel has merged it with a neighbour


@needs_root
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("flags", [MCL_CURRENT | MCL_FUTURE, MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT, MCL_FUTURE])
@pytest.mark.parametrize("kind", ["private", "shared"])
def test_a_region_made_under_mlockall(kind: str, flags: int, engine: str) -> None:
    """Each page shows its source, and is locked in memory, as the process has asked for."""
    play(made_while_locked, kind, flags, engine)


@needs_root
@pytest.mark.usefixtures("huge_pages")
@pytest.mark.parametrize("flags", [MCL_CURRENT | MCL_FUTURE, MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT])
@pytest.mark.parametrize("kind", ["huge-private", "huge-shared"])
def test_huge_pages_made_under_mlockall(kind: str, flags: int) -> None:
    """The kernel fills them even with MCL_ONFAULT."""
    play(made_while_locked, kind, flags, "pager")


def larger_than_memory() -> None:
    """Scenario."""
    lock_all(MCL_CURRENT | MCL_FUTURE)
    total = os.sysconf("SC_PHYS_PAGES") * PAGE
    for shared in (False, True):
        region = aiouffd.Region(3 * total + 5, shared=shared)
        assert len(region) == 3 * total + 5
        if shared:
            assert os.fstat(region.fd).st_size == region.mapped_length
            assert os.fstat(region.fd).st_blocks == 0
        region.close()


@needs_root
def test_a_region_larger_than_memory_under_mlockall() -> None:
    """Nothing of it is filled, not for a moment: it would not fit."""
    play(larger_than_memory)


def locked_after_it_was_made(kind: str, how: str) -> None:
    """Scenario."""
    region = made(kind)
    region[3 * PAGE : 4 * PAGE] = b"x" * PAGE
    if how == "mlock":
        assert _libc.mlock(region.address, region.mapped_length) == 0
    else:
        lock_all(MCL_CURRENT)
    monitor = aiouffd.Monitor(region, Pattern(region.mapped_length), readahead=0)
    if region.fd >= 0:
        with pytest.raises(aiouffd.PopulatedError, match=r"filled \d+ pages .* MCL_ONFAULT"), monitor:
            pass
        assert region.monitor is None
        return
    with monitor:
        assert region[3 * PAGE] == ord("x")  # what the program has written stays
        assert region[5 * HUGE // 4 : 5 * HUGE // 4 + 8] == word(5 * HUGE // 4 // PAGE)
        if region.page_size == PAGE:
            assert region[2 * PAGE : 3 * PAGE] == content(2 * PAGE, PAGE)


@needs_root
@pytest.mark.parametrize("how", ["mlock", "mlockall"])
@pytest.mark.parametrize("kind", ["private", "shared"])
def test_a_region_locked_after_it_was_made(kind: str, how: str) -> None:
    """Private memory is emptied of zeros; of shared memory entering says so, since others may write it."""
    play(locked_after_it_was_made, kind, how)


@needs_root
@pytest.mark.usefixtures("huge_pages")
@pytest.mark.parametrize("kind", ["huge-private", "huge-shared"])
def test_huge_pages_locked_after_they_were_made(kind: str) -> None:
    """The mapping does not even show that it is locked."""
    play(locked_after_it_was_made, kind, "mlockall")


def locked_before_linux_5_18() -> None:
    """Scenario."""
    real = libc.madvise

    def madvise(address: int, length: int, advice: int) -> None:
        real(address, length, 999 if advice == libc.MADV_DONTNEED_LOCKED else advice)

    libc.madvise = madvise
    region = made("private")
    lock_all(MCL_CURRENT)
    shows_its_source(region)


@needs_root
def test_a_kernel_without_dontneed_locked() -> None:
    """Pages are unlocked and dropped."""
    play(locked_before_linux_5_18)


def map_anothers_memfd(holes: bool) -> None:
    """Scenario."""
    fd = os.memfd_create("another's")
    os.ftruncate(fd, 64 * PAGE)
    os.pwrite(fd, content(0, PAGE if holes else 64 * PAGE), 0)
    lock_all(MCL_CURRENT | MCL_FUTURE)
    if holes:
        with pytest.raises(aiouffd.PopulatedError, match=f"fill {63 * PAGE} missing bytes .*MCL_ONFAULT"):
            aiouffd.Region.from_fd(fd)
        assert os.fstat(fd).st_blocks * 512 == PAGE  # nothing was filled
    else:
        assert aiouffd.Region.from_fd(fd)[:] == content(0, 64 * PAGE)


@needs_root
@pytest.mark.parametrize("holes", [True, False])
def test_a_memfd_of_another_process_under_mlockall(holes: bool) -> None:
    """To map it would fill its holes for all who map it: refused. A complete one is mapped."""
    play(map_anothers_memfd, holes)


def two_processes_with_one_memfd() -> None:
    """Scenario."""
    lock_all(MCL_FUTURE)
    region = aiouffd.Region(64 * PAGE, shared=True)
    source = Pattern(64 * PAGE)
    with aiouffd.Monitor(region, source, readahead=0):
        assert region[5 * PAGE : 6 * PAGE] == content(5 * PAGE, PAGE)
        pid = os.fork()  # locks are not inherited
        if pid == 0:
            other = aiouffd.Region.from_fd(region.fd)
            with aiouffd.Monitor(other, source, readahead=0):
                right = other[:] == content(0, 64 * PAGE)
            os._exit(0 if right else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert region[:] == content(0, 64 * PAGE)


@needs_root
def test_two_processes_with_one_memfd() -> None:
    """The one that made it locks its memory, the other has a Monitor of its own: both see the source."""
    play(two_processes_with_one_memfd)


def a_huge_page_by_one_byte(size: int) -> None:
    """Scenario."""
    region = aiouffd.Region(4 * size)
    region.madvise(MADV_HUGEPAGE)
    written = 3 * size // 2
    region[written] = 7
    entry = Path("/proc/self/smaps").read_text()
    assert f"AnonHugePages: {size >> 10:9} kB" in entry[entry.index(f"{region.address:x}-") :]
    with aiouffd.Monitor(region, Pattern(region.mapped_length), readahead=0):
        assert region[written] == 7
        for at in range(0, 4 * size, size // 32):
            if at != written:
                assert region[at : at + 8] == word(at // PAGE)


def test_a_transparent_huge_page() -> None:
    """A write of one byte before entering fills it with zeros; all but the written page show the source.

    With pages of 4 KiB it has 2 MiB, with pages of 16 KiB 32 MiB.
    """
    settings = Path("/sys/kernel/mm/transparent_hugepage")
    if "[never]" in (settings / "enabled").read_text():
        pytest.skip("no transparent huge pages")
    play(a_huge_page_by_one_byte, int((settings / "hpage_pmd_size").read_text()))


def test_what_was_written_before_stays() -> None:
    """Zeros as well, where neither a lock nor a huge page is in play."""
    region = aiouffd.Region(8 * PAGE)
    region[2 * PAGE] = 0
    with Pagemap() as pagemap:
        drop_populated_zeros(region, pagemap)
    assert libc.mincore(region.address, 8 * PAGE)[2] & 1


def served_twice() -> None:
    """Scenario."""
    region = aiouffd.Region(8 * PAGE)
    with aiouffd.Monitor(region, on_exit="populate"):
        pass
    lock_all(MCL_CURRENT)
    with aiouffd.Monitor(region, Pattern(8 * PAGE)):
        assert region[:] == bytes(8 * PAGE)


@needs_root
def test_zeros_that_a_monitor_has_brought_stay() -> None:
    """Only before the first Monitor is entered are zeros taken for the kernel's."""
    play(served_twice)


def beyond_the_limit() -> None:
    """Scenario."""
    os.setgroups([])
    os.setresuid(65534, 65534, 65534)
    import resource

    resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
    lock_all(MCL_FUTURE)
    with pytest.raises(aiouffd.LimitError, match="RLIMIT_MEMLOCK is 1048576"):
        aiouffd.Region(64 << 20)


@needs_root
def test_more_than_may_be_locked() -> None:
    """The error names RLIMIT_MEMLOCK."""
    play(beyond_the_limit)
