"""`pager.process.inaccessible`: the pager on kernels before Linux 6.6, of which UFFDIO_POISON is taken away here."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import os
import signal
from typing import Any

import pytest
from pattern import PAGE, peek, word
from scenario import next_error, play

import aiouffd
from aiouffd.kernel.abi import Feature
from aiouffd.kernel.userfaultfd import Userfaultfd, kernel_features
from aiouffd.monitor import registration
from aiouffd.pager.process import inaccessible

SIZE = 1 << 20
BROKEN = 10
"""So many pages cannot be had."""


def forget_poison(patience: float = inaccessible.PATIENCE) -> None:
    """Have the kernel refuse UFFDIO_POISON to this process as one that has none; wait so long for an answer."""
    lacking = kernel_features() & ~Feature.POISON
    vars(registration)["kernel_features"] = lambda: lacking
    Userfaultfd.try_poison = lambda *_: -errno.EINVAL  # type: ignore[method-assign]
    inaccessible.PATIENCE = patience
    inaccessible._GRACE = 0.3


class Broken:
    """Has no page below the tenth. The pager that it travels to believes what this process does."""

    size = SIZE

    def __init__(self, patience: float = inaccessible.PATIENCE) -> None:
        self._patience = patience

    async def read(self, offset: int, length: int) -> bytes:
        """Fail, or return the pattern."""
        if offset < BROKEN * PAGE:
            raise aiouffd.SourceError("Broken", offset, length, "no such page")
        return word(offset // PAGE) * (length // 8)

    def __reduce__(self) -> Any:
        return arrive, (self._patience,)


def arrive(patience: float) -> Broken:
    """Rebuild a source."""
    forget_poison(patience)
    return Broken()


def system_calls() -> None:
    """Scenario: a system call on such a page fails, and the process goes on; at last a thread touches one."""
    faulthandler.enable(all_threads=False)  # of a thread that runs meanwhile it can write nothing, and gives up
    forget_poison()
    libc = ctypes.CDLL(None)
    libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    _, pipe = os.pipe()
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Broken(), readahead=0, retries=0) as monitor:
        for page in (3, 5):
            assert libc.write(pipe, region.address + page * PAGE, 1) == -1
            with pytest.raises(aiouffd.SourceError, match="no such page"):
                next_error(monitor)
        assert peek(region.address + 20 * PAGE) == word(20)
        assert monitor.statistics().restarts == 0
        print("so far", flush=True)
        peek(region.address + 4 * PAGE)


def test_the_process_makes_the_page_inaccessible() -> None:
    """EFAULT for a system call, SIGSEGV for a touch, and no hang; the log says why."""
    output, errors = play(system_calls, status=-signal.SIGSEGV)
    assert output == "so far\n"
    assert "cannot be had, and this kernel has no UFFDIO_POISON" in errors
    assert "in peek" in errors


def with_the_gil(caught: bool) -> None:
    """Scenario: the thread that touches such a page holds the GIL: nothing in Python runs."""
    forget_poison()
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Broken(0.5), readahead=0, retries=0):
        if caught:
            signal.signal(signal.SIGBUS, lambda *_: None)
        _ = region[3 * PAGE]


@pytest.mark.parametrize(("caught", "number"), [(False, signal.SIGBUS), (True, signal.SIGKILL)])
def test_a_process_that_cannot_is_ended(caught: bool, number: signal.Signals) -> None:
    """By SIGBUS, with the line that touched; by SIGKILL where it catches that."""
    _, errors = play(with_the_gil, caught, status=-number)
    assert "holds the GIL. The process is ended (SIGBUS)" in errors
    assert ("in with_the_gil" in errors) is not caught


def in_a_child() -> None:
    """Scenario: a forked child touches such a page; nothing of it could make the page inaccessible."""
    forget_poison()
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Broken(), readahead=0, retries=0) as monitor:
        child = os.fork()
        if child == 0:
            peek(region.address + 3 * PAGE)
            os._exit(0)
        with pytest.raises(aiouffd.SourceError, match="no such page"):
            next_error(monitor)
        with pytest.raises(aiouffd.OperationError, match="UFFDIO_POISON"):
            next_error(monitor)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert peek(region.address + 20 * PAGE) == word(20)


def test_a_forked_child_waits_and_the_log_says_so() -> None:
    """Its parent is not asked to do anything about its own page, and not ended."""
    _, errors = play(in_a_child)
    assert "wait until the Monitor is left, or their process ends" in errors
    assert "is ended" not in errors
