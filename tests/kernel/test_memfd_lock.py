"""`monitor.memfd_lock`: a Monitor that drops pages of a memfd is the only one that serves it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from typing import Any

import pytest
from pattern import PAGE, content, peek, word
from scenario import play

import aiouffd

SIZE = 16 * PAGE
LIMITS: dict[str, Any] = {"max_resident": 4 * PAGE}
DROPS = "dropping pages .* of a memfd that another Monitor serves"
SHARES = "serving a memfd of which another Monitor drops pages"
OTHER = """
import os, sys, aiouffd
region = aiouffd.Region.from_fd(os.open(sys.argv[1], os.O_RDWR))
limits = {"max_resident": int(sys.argv[2])} if sys.argv[2] != "0" else {}
try:
    with aiouffd.Monitor(region, aiouffd.BufferSource(bytes(len(region))), **limits):
        print("entered", flush=True)
        sys.stdin.read()
except aiouffd.BusyError as error:
    print(error)
"""


def monitor(region: aiouffd.Region, **options: Any) -> aiouffd.Monitor:
    """Return one of a source that has the pattern."""
    return aiouffd.Monitor(region, aiouffd.BufferSource(content(0, SIZE)), readahead=0, on_exit="zeros", **options)


def excluded() -> None:
    """Scenario: two regions of one process."""
    region = aiouffd.Region(SIZE, shared=True)
    other = aiouffd.Region.from_fd(region.fd)
    for _ in range(2):  # what was left, or refused, holds nothing
        with monitor(region, **LIMITS):
            for options, why in (({}, SHARES), (LIMITS, DROPS)):
                with pytest.raises(aiouffd.BusyError, match=why), monitor(other, **options):
                    pass
            assert peek(region.address + PAGE) == word(1)
        with monitor(region), monitor(other):
            assert peek(region.address + PAGE) == peek(other.address + PAGE) == word(1)
        with monitor(region), pytest.raises(aiouffd.BusyError, match=DROPS), monitor(other, **LIMITS):
            pass


def test_two_regions_of_one_memfd() -> None:
    """Any number of Monitors that drop nothing, or one that does."""
    play(excluded)


def by_another() -> None:
    """Scenario: the other one is another process's, and is killed."""
    region = aiouffd.Region(SIZE, shared=True)
    path, pipe = f"/proc/{os.getpid()}/fd/{region.fd}", subprocess.PIPE

    @contextlib.contextmanager
    def other(limit: int) -> Any:
        arguments = [sys.executable, "-c", OTHER, path, str(limit)]
        with subprocess.Popen(arguments, stdin=pipe, stdout=pipe, text=True) as process:
            assert process.stdout is not None
            yield process.stdout.readline()
            process.kill()

    with monitor(region, **LIMITS), other(0) as said:
        assert SHARES in said
    with other(4 * PAGE) as said:
        assert said == "entered\n"
        with pytest.raises(aiouffd.BusyError, match=SHARES), monitor(region):
            pass
    with monitor(region, **LIMITS):
        assert peek(region.address + PAGE) == word(1)


def test_two_processes() -> None:
    """A process that was killed excludes nobody."""
    play(by_another)
