"""What holds on each kernel since 5.10, whatever it lacks: run by `boot.py` on kernels of other versions."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from pattern import PAGE, Pattern, Slow, content, peek
from scenario import play

import aiouffd
from aiouffd import Feature, native
from aiouffd.cli import doctor

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 1 << 20
DEADLINE = float(os.environ.get("AIOUFFD_TEST_DEADLINE", "300"))
ENGINES: dict[str, Callable[[], Any]] = {"pager": aiouffd.Pager, "in_thread": aiouffd.InThread}
SOURCES: dict[str, Callable[[int], Any]] = {"near": Pattern, "far": Slow}

each_engine = pytest.mark.parametrize(
    "engine",
    [
        "pager",
        pytest.param("in_thread", marks=pytest.mark.skipif(bool(native.reason()), reason="there is no native part")),
    ],
)


def fails_with_efault(address: int) -> bool:
    """Tell whether a system call on a page fails, as it does where a touch is SIGBUS."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    return libc.write(os.pipe()[1], address, 1) == -1 and ctypes.get_errno() == errno.EFAULT


def test_doctor() -> None:
    """A Monitor with its defaults can run here."""
    report = doctor.examine()
    print("\n".join(report.lines()))
    assert report.ok


def served(engine: str, source: str, shared: bool, readahead: int) -> None:
    """Scenario."""
    region = aiouffd.Region(SIZE, shared=shared)
    with aiouffd.Monitor(region, SOURCES[source](SIZE), engine=ENGINES[engine](), readahead=readahead) as monitor:
        for page in range(0, SIZE // PAGE, 3):
            assert peek(region.address + page * PAGE) == content(page * PAGE, 8)
        monitor.prefetch_sync(0, SIZE)
        assert region[:] == content(0, SIZE)


@each_engine
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("readahead", [0, 2 << 20])
def test_each_byte_is_the_sources(engine: str, source: str, shared: bool, readahead: int) -> None:
    """Touched page by page, and prefetched."""
    play(served, engine, source, shared, readahead, deadline=DEADLINE)


def left(engine: str, shared: bool) -> None:
    """Scenario."""
    region = aiouffd.Region(SIZE, shared=shared)
    with aiouffd.Monitor(region, Pattern(SIZE), engine=ENGINES[engine](), readahead=0):
        for page in range(0, 32, 2):
            _ = region[page * PAGE]
    for page in range(0, 32, 2):
        assert region[page * PAGE : (page + 1) * PAGE] == content(page * PAGE, PAGE)
    assert fails_with_efault(region.address + PAGE)
    _ = region[PAGE]


@each_engine
@pytest.mark.parametrize("shared", [False, True])
def test_missing_pages_are_sigbus_after_leaving(engine: str, shared: bool) -> None:
    """And present ones stay."""
    play(left, engine, shared, status=-signal.SIGBUS, deadline=DEADLINE)


def left_while_read() -> None:
    """Scenario."""
    import threading

    region = aiouffd.Region(SIZE)
    going = True
    seen: set[bytes] = set()

    def read() -> None:
        while going:
            seen.add(peek(region.address + 2 * PAGE))

    with aiouffd.Monitor(region, Pattern(SIZE), readahead=0):
        for page in range(8):
            _ = region[page * 2 * PAGE]
        thread = threading.Thread(target=read)
        thread.start()
    going = False
    thread.join()
    assert seen == {content(2 * PAGE, 8)}


def test_present_pages_stay_accessible_while_it_leaves() -> None:
    """A thread that reads one meanwhile gets no SIGSEGV."""
    play(left_while_read, deadline=DEADLINE)


def emptied_and_forked() -> None:
    """Scenario."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Pattern(SIZE), readahead=0, fork="serve"):
        _ = region[0]
        mmap.mmap.madvise(region, mmap.MADV_DONTNEED, 0, 4 * PAGE)
        assert region[: 4 * PAGE] == bytes(4 * PAGE)
        pid = os.fork()
        if pid == 0:
            os._exit(0 if region[4 * PAGE : 8 * PAGE] == content(4 * PAGE, 4 * PAGE) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_emptied_pages_are_zeros_and_children_are_served() -> None:
    """Layout events work."""
    play(emptied_and_forked, deadline=DEADLINE)


def failing() -> None:
    """Scenario."""

    class Failing(Pattern):
        def read_nowait(self, offset: int, length: int) -> bytes:
            raise OSError(f"no bytes at {offset} for {length}")

    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Failing(SIZE), readahead=0, retries=0):
        _ = region[0]


@pytest.mark.skipif(Feature.POISON not in aiouffd.probe().features, reason="before Linux 6.6 there is no POISON")
def test_a_page_that_cannot_be_had_is_sigbus() -> None:
    """The source fails."""
    play(failing, status=-signal.SIGBUS, deadline=DEADLINE)


def test_write_tracking() -> None:
    """It finds what was written (Linux 6.7), or says what the kernel lacks."""
    region = aiouffd.Region(SIZE)
    if Feature.WP_ASYNC in aiouffd.probe().features:
        with aiouffd.WriteTracker(region) as tracker:
            region[5 * PAGE] = 1
            assert tracker.collect() == [aiouffd.Range(5 * PAGE, PAGE)]
    else:
        with pytest.raises(aiouffd.UnsupportedError, match=r"WP_ASYNC|USER_MODE_ONLY"), aiouffd.WriteTracker(region):
            pass
