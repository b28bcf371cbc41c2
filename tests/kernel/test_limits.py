"""`kernel.limits`: an error that names the limit, for each one that can refuse a region or a descriptor."""

from __future__ import annotations

import errno
import gc
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from scenario import open_descriptors, play

import aiouffd
from aiouffd.kernel import limits
from aiouffd.kernel.limits import limit_error, no_huge_pages
from aiouffd.monitor.engines import pager as engines

if TYPE_CHECKING:
    from collections.abc import Callable

HUGE = 2 << 20


def under(name: str, value: int, shared: bool) -> None:
    """Scenario."""
    which = getattr(resource, name)
    resource.setrlimit(which, (value, resource.getrlimit(which)[1]))
    before = open_descriptors() if name != "RLIMIT_NOFILE" else 0
    with pytest.raises(aiouffd.LimitError, match=rf"a region of 1073741824 bytes: .*; {name} is {value}") as caught:
        aiouffd.Region(1 << 30, shared=shared)
    assert isinstance(caught.value, OSError)
    assert "ulimit -" in str(caught.value)
    if before:
        assert open_descriptors() == before


@pytest.mark.parametrize(
    ("name", "value", "shared"),
    [
        ("RLIMIT_AS", 900 << 20, False),
        ("RLIMIT_AS", 900 << 20, True),
        ("RLIMIT_FSIZE", 1 << 20, True),
        ("RLIMIT_NOFILE", 3, True),
    ],
)
def test_a_region_beyond_a_limit(name: str, value: int, shared: bool) -> None:
    """It names the limit, its value and what raises it; no descriptor is left open."""
    play(under, name, value, shared)


def no_descriptor_for_userfaultfd() -> None:
    """Scenario."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    for call in (aiouffd.Userfaultfd, aiouffd.probe, lambda: aiouffd.Region.from_fd(0, 4096)):
        with pytest.raises(
            aiouffd.LimitError, match=r"(opening a userfaultfd|a region of 4096 bytes): .*RLIMIT_NOFILE is 3"
        ):
            call()


def test_no_descriptor_for_a_userfaultfd() -> None:
    """The same for a descriptor of its own."""
    play(no_descriptor_for_userfaultfd)


@pytest.mark.parametrize("shared", [False, True])
def test_no_huge_pages(shared: bool) -> None:
    """There are too few: it says how many are needed, how many are free, and what reserves more."""
    if not Path("/sys/kernel/mm/hugepages/hugepages-2048kB").exists():
        pytest.skip("this kernel has no huge pages of 2 MiB")
    with pytest.raises(
        aiouffd.UnsupportedError, match=r"500000 free huge pages of 2048 KiB \(it has: \d+; .*nr_hugepages"
    ):
        aiouffd.Region(500_000 * HUGE, page_size=HUGE, shared=shared)


@pytest.mark.parametrize("shared", [False, True])
def test_no_such_huge_pages(shared: bool) -> None:
    """A size that the machine does not have: it names those that it has."""
    with pytest.raises(aiouffd.UnsupportedError, match="huge pages of 8 KiB"):
        aiouffd.Region(1 << 20, page_size=8192, shared=shared)


def test_the_sizes_that_there_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All of them, or none."""
    monkeypatch.setattr(limits, "_HUGE_PAGES", tmp_path)
    assert "no size" in str(no_huge_pages(1, 64 << 10))
    for size in ("hugepages-2048kB", "hugepages-1048576kB"):
        (tmp_path / size).mkdir()
    assert "1048576kB, 2048kB" in str(no_huge_pages(1, 64 << 10))
    (tmp_path / "hugepages-2048kB" / "free_hugepages").write_text("3\n")
    assert "4 free huge pages of 2048 KiB (it has: 3;" in str(no_huge_pages(3 * HUGE + 1, HUGE))


def test_the_machine_has_too_many_files_open() -> None:
    """ENFILE is a limit of the machine."""
    error = limit_error("something", errno.ENFILE)
    assert error is not None
    assert (error.limit, error.value) == ("fs.file-max", Path("/proc/sys/fs/file-max").read_text().strip())


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO, 0])
def test_other_errors_are_no_limits(number: int) -> None:
    """None: the caller raises what it has."""
    assert limit_error("something", number) is None


def test_an_unlimited_limit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else may have refused is named with it."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    error = limit_error("a region", errno.ENOMEM)
    assert "RLIMIT_AS is unlimited: " in str(error)
    assert "RLIMIT_DATA (`ulimit -d`), vm.max_map_count" in str(error)


def few_descriptors(engine: aiouffd.Pager | aiouffd.InThread | None, least: int) -> None:
    """Scenario: each number of free descriptors, up to what a Monitor needs to fail at its last one.

    Args:
        engine: None: a pager that lingers.
        least: so many of the numbers are too few.
    """
    region = aiouffd.Region(1 << 20)
    engines._shared._linger = 1000.0
    # The watchdog has a descriptor for as long as the process lives.
    with aiouffd.Monitor(region, engine=engine, on_exit="zeros"):
        pass
    unraisable: list[object] = []
    sys.unraisablehook = unraisable.append
    before = open_descriptors()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    refused = 0
    for limit in range(before, before + 16):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
        try:
            with aiouffd.Monitor(region, aiouffd.BufferSource(bytes(4096)), engine=engine, on_exit="zeros"):
                pass
        except (aiouffd.LimitError, aiouffd.PagerStartError) as error:
            assert "RLIMIT_NOFILE" in str(error)  # noqa: PT017 - it need not be raised
            refused += 1
        gc.collect()
    assert refused > least
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    assert not unraisable
    assert open_descriptors() == before


def few_descriptors_to_start_with() -> None:
    """Scenario: see there."""
    few_descriptors(aiouffd.Pager(), 6)


def few_descriptors_beside_others() -> None:
    """Scenario: see there."""
    few_descriptors(None, 4)


def few_descriptors_in_thread() -> None:
    """Scenario: see there."""
    few_descriptors(aiouffd.InThread(), 6)


@pytest.mark.parametrize(
    "scenario", [few_descriptors_to_start_with, few_descriptors_beside_others, few_descriptors_in_thread]
)
def test_whatever_descriptor_a_monitor_lacks(scenario: Callable[[], None]) -> None:
    """The error names the limit; nothing is closed twice, and none is left open."""
    play(scenario)


def no_descriptor_in_the_native_part() -> None:
    """Scenario: a Monitor is entered with ever more descriptors, until that succeeds."""
    told = set[str]()
    for limit in range(len(list(Path("/proc/self/fd").iterdir())), 100):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        try:
            with aiouffd.Monitor(aiouffd.Region(HUGE), aiouffd.BufferSource(b"x"), engine=aiouffd.InThread()):
                break
        except OSError as error:
            told.add(str(error).partition("RLIMIT")[2])
    assert told
    assert all(text.startswith("_NOFILE is ") for text in told), told


def test_no_descriptor_for_a_monitor_in_a_thread() -> None:
    """The same, wherever it is that one is missing."""
    play(no_descriptor_in_the_native_part)
