"""`kernel.pagemap`: which pages are present, by each interface that a kernel may have."""

from __future__ import annotations

import errno
import os
import random

import pytest
from pattern import PAGE

import aiouffd
from aiouffd.kernel import pagemap
from aiouffd.kernel.pagemap import Pagemap, data_ranges
from aiouffd.ranges import Range

HUGE = 2 << 20


def missing_pages(region: aiouffd.Region) -> set[int]:
    """Return the numbers of the missing pages."""
    with Pagemap() as opened:
        gaps = opened.missing(region.address, region.mapped_length, region.fd, region.page_size)
    starts = {at for gap in gaps for at in range(gap.start, gap.end, region.page_size)}
    return {(at - region.address) // region.page_size for at in starts}


def refuse(number: int) -> object:
    """Return what raises OSError with an errno."""

    def call(*_: object, **__: object) -> object:
        raise OSError(number, os.strerror(number))

    return call


INTERFACES = {"PAGEMAP_SCAN": [], "read": ["_scan"], "mincore": ["_scan", "_highest_bytes"]}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("interface", INTERFACES)
def test_each_interface_finds_the_missing_pages(monkeypatch: pytest.MonkeyPatch, interface: str, shared: bool) -> None:
    """PAGEMAP_SCAN; read(2), before Linux 6.7; mincore(2), without /proc. Also over the bounds of one read."""
    for name in INTERFACES[interface]:
        monkeypatch.setattr(Pagemap, name, refuse(errno.ENOTTY if name == "scan" else errno.EACCES))
    monkeypatch.setattr(pagemap, "_PAGES_PER_READ", 64)
    region = aiouffd.Region(500 * PAGE, shared=shared)
    touched = set(random.Random(3).sample(range(500), 200)) | {0, 63, 64, 127, 499}
    for page in touched:
        region[page * PAGE] = 1
    assert missing_pages(region) == set(range(500)) - touched


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.usefixtures("huge_pages")
def test_huge_pages(shared: bool) -> None:
    """Hugetlbfs reports a whole file as data: what counts is what is mapped."""
    region = aiouffd.Region(3 * HUGE, page_size=HUGE, shared=shared)
    region[HUGE] = 1
    assert missing_pages(region) == {0, 2}


def test_a_page_that_only_the_file_has_is_present() -> None:
    """Written through the descriptor, and not mapped yet."""
    region = aiouffd.Region(8 * PAGE, shared=True)
    os.pwrite(region.fd, b"x", 5 * PAGE)
    assert missing_pages(region) == {0, 1, 2, 3, 4, 6, 7}


def test_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """`open_if_possible` has no file then: `missing` works, `scan` says that it is not open."""
    monkeypatch.setattr(pagemap, "_PATH", "/nowhere/pagemap")
    with pytest.raises(FileNotFoundError):
        Pagemap()
    region = aiouffd.Region(4 * PAGE)
    region[PAGE] = 1
    opened = Pagemap.open_if_possible()
    gaps = opened.missing(region.address, region.mapped_length)
    assert gaps == [Range(region.address, PAGE), Range(region.address + 2 * PAGE, 2 * PAGE)]
    with pytest.raises(OSError, match="not open") as caught:
        opened.scan(region.address, PAGE)
    assert caught.value.errno == errno.EBADF


def test_other_errors_are_not_taken_for_an_old_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOMEM of PAGEMAP_SCAN is raised."""
    monkeypatch.setattr(Pagemap, "_scan", refuse(errno.ENOMEM))
    with Pagemap() as opened, pytest.raises(OSError, match="memory"):
        opened.missing(0x10000, PAGE)


def test_data_ranges_end_at_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file with a hole, of one that is longer than what is asked for, and of one that is truncated meanwhile."""
    fd = os.memfd_create("data")
    try:
        os.ftruncate(fd, 10 * PAGE)
        assert list(data_ranges(fd, 10 * PAGE)) == []
        os.pwrite(fd, b"x" * 3 * PAGE, 2 * PAGE)
        os.pwrite(fd, b"x", 9 * PAGE)
        assert list(data_ranges(fd, 10 * PAGE)) == [(2 * PAGE, 5 * PAGE), (9 * PAGE, 10 * PAGE)]
        assert list(data_ranges(fd, 3 * PAGE)) == [(2 * PAGE, 3 * PAGE)]
        assert list(data_ranges(fd, PAGE)) == []
        os.ftruncate(fd, 9 * PAGE + 1)
        assert list(data_ranges(fd, 20 * PAGE)) == [(2 * PAGE, 5 * PAGE), (9 * PAGE, 10 * PAGE)]
        os.ftruncate(fd, 10 * PAGE)
        seek = os.lseek

        def truncate(fd: int, at: int, whence: int) -> int:
            if whence == os.SEEK_HOLE and at == 9 * PAGE:
                os.ftruncate(fd, 9 * PAGE)
            return seek(fd, at, whence)

        monkeypatch.setattr(os, "lseek", truncate)
        assert list(data_ranges(fd, 10 * PAGE)) == [(2 * PAGE, 5 * PAGE)]
    finally:
        os.close(fd)
