"""`kernel.sigbus`: missing pages are SIGBUS once a Monitor has left, whatever has become of the process by then."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from pattern import PAGE, Pattern, content, peek
from scenario import play

import aiouffd
from aiouffd import Feature, RegisterMode, Userfaultfd
from aiouffd.kernel import libc, pagemap
from aiouffd.kernel.pagemap import Pagemap
from aiouffd.kernel.sigbus import Sentinel

if TYPE_CHECKING:
    from collections.abc import Callable

HUGE = 2 << 20
ENGINES: dict[str, Callable[[], Any]] = {"pager": aiouffd.Pager, "in_thread": aiouffd.InThread}
PR_SET_DUMPABLE = 4


def child_that(action: Callable[[], object]) -> int:
    """Do something in a forked child; return its exit status, or the negated signal that ended it."""
    pid = os.fork()
    if pid == 0:
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def served(region: aiouffd.Region, engine: Any, **options: Any) -> aiouffd.Monitor:
    """Return a Monitor that serves page by page."""
    return aiouffd.Monitor(region, Pattern(region.mapped_length), readahead=0, engine=engine, **options)


def become_nobody() -> None:
    """Drop every privilege."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


def become_undumpable() -> None:
    """Keep the privileges of the user, without the right to look into itself."""
    assert ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) == 0


CHANGES = {"nobody": become_nobody, "undumpable": become_undumpable}


def left_after_a_change(engine: str, change: str) -> None:
    """Scenario."""
    region = aiouffd.Region(1 << 20)
    with served(region, ENGINES[engine]()):
        assert region[: 4 * PAGE] == content(0, 4 * PAGE)
        CHANGES[change]()
        assert region[8 * PAGE : 9 * PAGE] == content(8 * PAGE, PAGE)
    assert region[: 4 * PAGE] == content(0, 4 * PAGE)
    assert region[8 * PAGE : 9 * PAGE] == content(8 * PAGE, PAGE)
    assert child_that(lambda: region[8 * PAGE]) == 0
    assert child_that(lambda: region[5 * PAGE]) == -signal.SIGSEGV
    print("left", flush=True)
    _ = region[5 * PAGE]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("engine", ENGINES)
def test_privileges_dropped_inside_the_block(engine: str, change: str) -> None:
    """Leaving needs none: present pages stay, also in forked children; missing ones are SIGBUS, and never zeros."""
    if os.geteuid():
        pytest.skip("needs root, to drop it")
    output, _ = play(left_after_a_change, engine, change, status=-signal.SIGBUS)
    assert output == "left\n"


def tracked_as_nobody() -> None:
    """Scenario."""
    region = aiouffd.Region(1 << 20)
    other = aiouffd.Region(1 << 20)
    with served(region, aiouffd.Pager(), track_writes=True) as monitor, aiouffd.WriteTracker(other) as tracker:
        become_nobody()
        region[3 * PAGE] = other[5 * PAGE] = 1
        assert monitor.collect() == [aiouffd.Range(3 * PAGE, PAGE)]
        assert tracker.collect() == [aiouffd.Range(5 * PAGE, PAGE)]


def test_writes_are_tracked_after_privileges_were_dropped() -> None:
    """By a Monitor, and by a WriteTracker: /proc/self/pagemap was opened on entering."""
    if os.geteuid():
        pytest.skip("needs root, to drop it")
    play(tracked_as_nobody)


def populated_as_nobody() -> None:
    """Scenario."""
    region = aiouffd.Region(1 << 20)
    with served(region, aiouffd.Pager(), on_exit="populate") as monitor:
        become_nobody()
        monitor.prefetch_sync(0, 4 * PAGE, timeout=60)
    assert region[:] == content(0, 1 << 20)


def test_the_pager_is_asked_after_privileges_were_dropped() -> None:
    """To prefetch, and to bring everything on leaving: it knows its application by more than its user."""
    if os.geteuid():
        pytest.skip("needs root, to drop it")
    play(populated_as_nobody)


def no_descriptor_left() -> None:
    """Scenario."""
    region = aiouffd.Region(1 << 20)
    with served(region, aiouffd.Pager()):
        _ = region[0]
        taken = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        with pytest.raises(OSError, match="Too many open files"):
            os.pipe()
    assert region[0] == 1
    os.closerange(taken[0], taken[-1] + 1)
    _ = region[PAGE]


def test_leaving_opens_no_descriptor() -> None:
    """A process that has used up RLIMIT_NOFILE leaves its Monitor all the same."""
    play(no_descriptor_left, status=-signal.SIGBUS)


def huge_left(shared: bool) -> None:
    """Scenario."""
    region = aiouffd.Region(3 * HUGE, page_size=HUGE, shared=shared)
    with served(region, aiouffd.Pager()):
        assert region[HUGE : HUGE + PAGE] == content(HUGE, PAGE)
    assert region[HUGE : HUGE + PAGE] == content(HUGE, PAGE)
    _ = region[2 * HUGE]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.usefixtures("huge_pages")
def test_missing_huge_pages_are_sigbus(shared: bool) -> None:
    """Private and shared: hugetlbfs does not tell its holes, and these read as zeros once."""
    play(huge_left, shared, status=-signal.SIGBUS)


def forked_after_serving_children() -> None:
    """Scenario."""
    region = aiouffd.Region(1 << 20)
    with served(region, aiouffd.Pager(), fork="serve"):
        _ = region[0]
    assert child_that(lambda: region[0]) == 0
    assert child_that(lambda: region[PAGE]) == -signal.SIGSEGV


def test_a_child_forked_after_leaving_reads_no_zeros() -> None:
    """Also where forked children were served before."""
    play(forked_after_serving_children)


def resized_after_leaving(engine: str, shared: bool, touched: bool) -> None:
    """Scenario: it grows, and moves for that; it is cut, and grows again where it lies."""
    region = aiouffd.Region(64 * PAGE, shared=shared)
    with served(region, ENGINES[engine]()):
        if touched:
            assert region[PAGE : 2 * PAGE] == content(PAGE, PAGE)
    beside = aiouffd.Region(PAGE)  # what is mapped last lies below what was mapped before
    for pages in (4096, 32, 33):
        region.resize(pages * PAGE)
        assert all(sigbus_at(region, page) for page in (0, 2, 31))
        assert sigbus_at(region, 1) == (not touched)
        assert not touched or region[PAGE : 2 * PAGE] == content(PAGE, PAGE)
        assert child_that(lambda: region[PAGE]) == (0 if touched else -signal.SIGSEGV)
        assert child_that(lambda: region[0]) == -signal.SIGSEGV
        if pages != 32:
            assert region[-PAGE:] == bytes(PAGE)
    region.resize(31 * PAGE - 7)
    with pytest.raises(aiouffd.BusyError):  # its last page would have to be cleared, and is missing
        region.resize(40 * PAGE)
    del beside


@pytest.mark.parametrize(
    ("engine", "shared", "touched"),
    [("pager", False, True), ("pager", True, False), ("in_thread", False, False), ("in_thread", True, True)],
)
def test_a_region_that_is_resized_after_leaving(engine: str, shared: bool, touched: bool) -> None:
    """What was missing stays SIGBUS when it moves, and what is added is zeros."""
    play(resized_after_leaving, engine, shared, touched)


def registered(pages: int = 64) -> tuple[aiouffd.Region, Userfaultfd, Sentinel]:
    """Return a registered region with pages 1 and 3 present, and what takes it over."""
    region = aiouffd.Region(pages * PAGE)
    uffd = Userfaultfd()
    uffd.register(region.address, pages * PAGE, RegisterMode.MISSING)
    for page in (1, 3):
        uffd.copy(region.address + page * PAGE, content(page * PAGE, PAGE))
    return region, uffd, Sentinel(uffd, Pagemap(), user_mode_only=False)


def sigbus_at(region: aiouffd.Region, page: int) -> bool:
    """Tell whether a touch of a page is SIGBUS: a system call fails with EFAULT in its place."""
    native = ctypes.CDLL(None, use_errno=True)
    native.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    reading, writing = os.pipe()
    try:
        return native.write(writing, region.address + page * PAGE, 1) == -1 and ctypes.get_errno() == errno.EFAULT
    finally:
        os.close(reading)
        os.close(writing)


def without_scan(*_: object, **__: object) -> list[aiouffd.Range]:
    """Be a kernel before 6.7."""
    raise OSError(errno.ENOTTY, "no PAGEMAP_SCAN")


def without_read(*_: object) -> bytes:
    """Be a system without /proc."""
    raise OSError(errno.EBADF, "no /proc/self/pagemap")


@pytest.mark.parametrize("older", ["scan", "scan and read"])
def test_present_pages_stay_accessible_without_pagemap_scan(monkeypatch: pytest.MonkeyPatch, older: str) -> None:
    """Before Linux 6.7 the pagemap is read, and without /proc mincore tells: only missing pages are protected."""
    monkeypatch.setattr(pagemap.Pagemap, "_scan", without_scan)
    if older == "scan and read":
        monkeypatch.setattr(pagemap.Pagemap, "_highest_bytes", without_read)
    region, uffd, sentinel = registered()
    protected: list[tuple[int, int, int]] = []
    real = libc.mprotect

    def mprotect(address: int, length: int, protection: int) -> None:
        protected.append(((address - region.address) // PAGE, length // PAGE, protection))
        real(address, length, protection)

    monkeypatch.setattr(libc, "mprotect", mprotect)
    sentinel.take_over(region, uffd)
    gaps = [(0, 1), (2, 1), (4, 60)]
    assert protected == [(*gap, 0) for gap in gaps] + [(*gap, 3) for gap in gaps]
    assert region[PAGE] == 2
    assert sigbus_at(region, 0)
    assert sigbus_at(region, 63)


def test_too_many_mappings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel splits no more mappings (ENOMEM) the whole region is inaccessible for that moment."""
    region, uffd, sentinel = registered()
    real = libc.mprotect

    def mprotect(address: int, length: int, protection: int) -> None:
        if length < region.mapped_length:
            raise OSError(errno.ENOMEM, "vm.max_map_count")
        real(address, length, protection)

    monkeypatch.setattr(libc, "mprotect", mprotect)
    sentinel.take_over(region, uffd)
    assert region[PAGE] == 2
    assert sigbus_at(region, 2)


def test_a_part_that_was_unmapped() -> None:
    """A raw munmap of a part of the region does not keep the rest from being settled."""
    region, uffd, sentinel = registered()
    libc.munmap(region.address + 8 * PAGE, 4 * PAGE)
    sentinel.take_over(region, uffd)
    assert region[3 * PAGE] == 4
    assert sigbus_at(region, 2)
    assert sigbus_at(region, 20)
    libc.mmap_fixed(region.address + 8 * PAGE, 4 * PAGE)  # or close() would unmap what another has mapped there


def test_more_missing_ranges_than_mappings_are_split_into() -> None:
    """Every second page of 4,000 is missing: they are one range then."""
    region = aiouffd.Region(4000 * PAGE)
    uffd = Userfaultfd()
    uffd.register(region.address, region.mapped_length, RegisterMode.MISSING)
    for page in range(0, 4000, 2):
        uffd.copy(region.address + page * PAGE, content(page * PAGE, PAGE))
    Sentinel(uffd, Pagemap(), user_mode_only=False).take_over(region, uffd)
    assert all(peek(region.address + page * PAGE) == content(page * PAGE, 8) for page in range(0, 4000, 2))
    assert sigbus_at(region, 1)
    assert sigbus_at(region, 3999)


def kept_inaccessible() -> None:
    """Scenario."""
    region, uffd, sentinel = registered()

    def refuse(*_: object) -> None:
        raise aiouffd.OperationError("UFFDIO_REGISTER", region.address, PAGE, errno.ENOMEM)

    sentinel._uffd.register = refuse  # type: ignore[method-assign, assignment]
    with pytest.raises(aiouffd.OperationError):
        sentinel.take_over(region, uffd)
    assert region[PAGE] == 2
    _ = region[0]


def test_what_cannot_be_settled_is_inaccessible() -> None:
    """The kernel refuses to register it again: SIGSEGV, and no zeros."""
    play(kept_inaccessible, status=-signal.SIGSEGV)


def test_a_descriptor_that_cannot_be_replaced_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing the last one would let waiting threads go with zeros."""
    region, uffd, sentinel = registered()

    def mprotect(*_: object) -> None:
        raise OSError(errno.ENOMEM, "no")

    monkeypatch.setattr(libc, "mprotect", mprotect)
    with pytest.raises(OSError, match="no"):
        sentinel.take_over(region, uffd)
    assert not uffd.closed
    assert uffd in region._keep
    region._keep.clear()
    uffd.close()


def test_a_sigbus_descriptor_is_its_own_sentinel() -> None:
    """With Feature.SIGBUS the region keeps the descriptor that it has; nothing is unregistered."""
    region = aiouffd.Region(8 * PAGE)
    uffd = Userfaultfd(Feature.SIGBUS)
    uffd.register(region.address, region.mapped_length, RegisterMode.MISSING)
    Sentinel(uffd, Pagemap(), user_mode_only=False).take_over(region, uffd)
    assert not uffd.closed
    assert sigbus_at(region, 3)
