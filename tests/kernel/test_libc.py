"""`kernel.libc`: system calls that raise OSError with the errno."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from pattern import PAGE
from processes import slice_of
from scenario import play

from aiouffd.kernel import abi, libc
from aiouffd.kernel.memory import address_of
from aiouffd.kernel.region import HUGE_PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


@pytest.fixture
def place() -> Iterator[int]:
    """Eight pages that are mapped by nobody else; unmapped at the end."""
    with mmap.mmap(-1, 9 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        address = address_of(area)
    libc.mmap_fixed(address, 8 * PAGE)
    yield address
    libc.munmap(address, 8 * PAGE)


WRONG: dict[str, Callable[[int], object]] = {
    "mprotect": lambda place: libc.mprotect(place + 1, PAGE, READ_WRITE),
    "madvise": lambda place: libc.madvise(place, PAGE, 999),
    "munmap": lambda place: libc.munmap(place + 1, PAGE),
    "mremap": lambda place: libc.mremap(place + 1, PAGE, PAGE, 0),
    "mmap_fixed": lambda place: libc.mmap_fixed(place + 1, PAGE),
    "lock_on_fault": lambda place: libc.syscall(abi.SYS_MLOCK2, place, PAGE, 999),
    "mincore": lambda place: libc.mincore(place + 1, PAGE),
}


@pytest.mark.parametrize("call", WRONG)
def test_what_the_kernel_refuses_is_an_oserror(place: int, call: str) -> None:
    """EINVAL, with its text."""
    with pytest.raises(OSError, match="Invalid argument") as caught:
        WRONG[call](place)
    assert caught.value.errno == errno.EINVAL


def test_bytes_are_copied_to_a_file_and_within_memory(place: int) -> None:
    """All of them; a bad address is EFAULT, and a file grows by zeros."""
    ctypes.memset(place, 7, 2 * PAGE)
    with os.fdopen(os.memfd_create("x"), "r+b") as file:
        libc.write_memory(file.fileno(), place, PAGE, PAGE)
        libc.allocate(file.fileno(), 3 * PAGE, PAGE)
        assert os.fstat(file.fileno()).st_size == 4 * PAGE
        assert os.pread(file.fileno(), 3 * PAGE, 0) == bytes(PAGE) + b"\7" * PAGE + bytes(PAGE)
        libc.copy_memory(place + 4 * PAGE, place, 2 * PAGE)
        assert ctypes.string_at(place + 4 * PAGE, 2 * PAGE) == b"\7" * 2 * PAGE
        libc.mprotect(place + 7 * PAGE, PAGE, 0)
        with pytest.raises(OSError, match="Bad address"):
            libc.write_memory(file.fileno(), place + 7 * PAGE, PAGE, 0)
        with pytest.raises(OSError, match="Bad address"):
            libc.copy_memory(place, place + 7 * PAGE, PAGE)


def test_mincore_has_a_byte_for_each_page(place: int) -> None:
    """Of the machine's page size, a last partial page included; bit 0 says that it is in memory."""
    assert len(libc.mincore(place, 8 * PAGE)) == 8
    assert len(libc.mincore(place, 7 * PAGE + 1)) == 8
    ctypes.memset(place + 3 * PAGE, 1, 1)
    assert [value & 1 for value in libc.mincore(place, 8 * PAGE)] == [0, 0, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(("size", "expected"), [(4096, 16), (16 << 10, 4), (64 << 10, 1)])
def test_mincores_vector_is_that_of_the_machine(monkeypatch: pytest.MonkeyPatch, size: int, expected: int) -> None:
    """With larger pages the kernel writes fewer bytes."""
    monkeypatch.setattr(mmap, "PAGESIZE", size)
    monkeypatch.setattr(libc._libc, "mincore", lambda *_: 0)
    assert len(libc.mincore(0x10000, 64 << 10)) == expected


def test_mremap_returns_the_new_place(place: int) -> None:
    """The content moves along."""
    ctypes.memset(place, 7, PAGE)
    target = place + 4 * PAGE
    assert libc.mremap(place, PAGE, PAGE, libc.MREMAP_MAYMOVE | libc.MREMAP_FIXED, target) == target
    assert ctypes.string_at(target, 1) == b"\7"
    libc.mmap_fixed(place, PAGE)


def test_locking_fills_nothing(place: int) -> None:
    """Each page is locked when it comes; `munlock` lifts that."""
    try:
        libc.lock_on_fault(place, 8 * PAGE)
    except OSError:
        pytest.skip("RLIMIT_MEMLOCK is too low")
    assert not any(value & 1 for value in libc.mincore(place, 8 * PAGE))
    with pytest.raises(OSError, match="Invalid argument"):
        libc.madvise(place, PAGE, mmap.MADV_DONTNEED)
    libc.munlock(place, 8 * PAGE)
    libc.madvise(place, PAGE, mmap.MADV_DONTNEED)


def test_what_begins_to_be_written(tmp_path: Path) -> None:
    """Any part of a file; of a pipe there is none."""
    with (tmp_path / "file").open("wb") as file:
        file.write(b"x" * 4 * PAGE)
        libc.write_out(file.fileno(), PAGE, 100 * PAGE)
    ends = os.pipe()
    with pytest.raises(OSError, match="Illegal seek"):
        libc.write_out(ends[1], 0, PAGE)
    for end in ends:
        os.close(end)


def test_a_hole_is_punched() -> None:
    """The pages are gone, the size stays."""
    fd = os.memfd_create("hole")
    try:
        os.pwrite(fd, b"x" * 4 * PAGE, 0)
        libc.punch_hole(fd, PAGE, 2 * PAGE)
        assert os.pread(fd, 4 * PAGE, 0) == b"x" * PAGE + bytes(2 * PAGE) + b"x" * PAGE
        assert os.fstat(fd).st_blocks * 512 == 2 * PAGE
    finally:
        os.close(fd)


def test_peek_stops_at_what_cannot_be_read(place: int) -> None:
    """And raises no signal."""
    ctypes.memset(place, 5, 1)
    libc.mprotect(place + 2 * PAGE, PAGE, libc.PROT_NONE)
    try:
        assert libc.peek([place, place + PAGE]) == b"\5\0"
        assert libc.peek([place, place + 2 * PAGE, place + PAGE]) == b"\5"
        assert libc.peek([place + 2 * PAGE]) == b""
    finally:
        libc.mprotect(place + 2 * PAGE, PAGE, READ_WRITE)


def test_freed_memory_is_kept() -> None:
    """Buffers of megabytes cost their page faults once, also several at once, of another thread."""
    code = """
import resource, threading
from aiouffd.kernel import libc
libc.keep_freed_memory(64 << 20)
def work():
    for _ in range(8):
        buffers = [b"x" * (2 << 20) for _ in range(8)]
        buffers.clear()
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
    process = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(process.stdout) < 3 * 8 * (2 << 20) // PAGE  # of 8 times 8 buffers; there are other faults, too


def allocate_while_signals_come() -> None:
    """Scenario: more of them than a call takes; at the end all pages are there."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    with os.fdopen(os.memfd_create("x", os.MFD_HUGETLB | 21 << 26), "r+b") as file:
        os.ftruncate(file.fileno(), 6 * HUGE_PAGE)
        signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
        for _ in range(20):
            libc.allocate(file.fileno(), 0, 6 * HUGE_PAGE)
            assert os.fstat(file.fileno()).st_blocks * 512 == 6 * HUGE_PAGE
            libc.punch_hole(file.fileno(), 0, 6 * HUGE_PAGE)
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.mark.usefixtures("huge_pages")
def test_a_signal_does_not_keep_huge_pages_from_being_allocated() -> None:
    """The page that a thread waits for would be taken for one that cannot be had: a supervisor's SIGTERM is enough."""
    play(allocate_while_signals_come, deadline=60)


def slices() -> None:
    """Scenario: policy and nice value stay as they are; threads that are started later have the same."""
    os.nice(3)
    before = slice_of(threading.get_native_id())
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    libc.ask_for_short_slices()
    assert os.sched_getscheduler(0) == os.SCHED_BATCH
    assert slice_of(threading.get_native_id()) == before
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    libc.ask_for_short_slices()
    assert (os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)) == (os.SCHED_OTHER, 3)
    seen = list[int | None]()
    thread = threading.Thread(target=lambda: seen.append(slice_of(threading.get_native_id())))
    thread.start()
    thread.join()
    assert [slice_of(threading.get_native_id()), *seen] == [100_000] * 2


def test_a_thread_asks_for_short_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel refuses them, nothing is raised."""
    if slice_of(os.getpid()) is None:
        pytest.skip("the kernel tells nothing of slices, or they cannot be chosen (before Linux 6.12)")
    monkeypatch.setattr(abi, "SYS_SCHED_SETATTR", 100_000)  # ENOSYS
    libc.ask_for_short_slices()
    play(slices)
