"""`kernel.region_file`: a region that is read as a file, and what it raises."""

from __future__ import annotations

import io
import os
import zipfile
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pytest
from pattern import PAGE, Pattern, content
from scenario import play

import aiouffd
from aiouffd.errors import SourceError
from aiouffd.kernel.region_file import RegionFile

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 64 * PAGE + 5
ENGINES = {"pager": aiouffd.Pager, "thread": aiouffd.InThread}


def test_it_has_a_position_of_its_own() -> None:
    """Several files of one region do not disturb each other; what lies behind the end is nothing."""
    region = aiouffd.Region(SIZE)
    region[:] = content(0, SIZE)
    one, other = RegionFile(region), RegionFile(region)
    assert (one.readable(), one.seekable(), one.writable()) == (True, True, False)
    assert one.seek(-5, os.SEEK_END) == SIZE - 5
    assert other.read(8) == content(0, 8)
    assert one.read(8) == content(SIZE - 5, 5)
    assert (one.read(8), one.tell()) == (b"", SIZE)
    for behind in (3, PAGE, 1 << 40):
        assert one.seek(behind, os.SEEK_END) == SIZE + behind
        assert one.read(1) == b""
    for offset, whence in ((-1, os.SEEK_SET), (-SIZE - 1, os.SEEK_END), (0, 9)):
        with pytest.raises(ValueError, match=f"not within a file of {SIZE} bytes"):
            one.seek(offset, whence)
    one.close()
    assert other.readall() == content(8, SIZE - 8)
    region.close()
    with pytest.raises(ValueError, match="closed"):
        other.read(1)


def test_a_region_is_a_file_itself() -> None:
    """`io` and `zipfile` take it, and what it reads is in its own position."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("a", content(0, SIZE))
    region = aiouffd.Region(len(archive.getvalue()))
    region[:] = archive.getvalue()
    for file in (region, region.as_file(16)):
        assert zipfile.ZipFile(file).read("a") == content(0, SIZE)
    assert (region.readable(), region.seekable(), region.writable()) == (True, True, True)
    assert region.seek(2) == 2
    target = np.zeros(2, np.uint16)
    assert region.readinto(target) == 4
    assert target.tobytes() == archive.getvalue()[2:6]
    assert region.read() == archive.getvalue()[6:]
    assert (region.read(), region.read(-1)) == (b"", b"")
    assert io.BufferedReader(region).read(1) == b""  # type: ignore[type-var]


class Torn(Pattern):
    """Has no page 9."""

    def read_nowait(self, offset: int, length: int) -> bytes:
        """Fail where page 9 is asked for."""
        if offset <= 9 * PAGE < offset + length:
            raise SourceError("Torn", offset, length, "page 9 is lost")
        return super().read_nowait(offset, length)


def reads(engine: str) -> None:
    """Scenario: pages that are there, that come, that cannot be had, and that are missing when the Monitor was left."""
    region = aiouffd.Region(SIZE)
    by_file = region.as_file(16)

    def read_file(start: int, length: int) -> bytes:
        by_file.seek(start)
        return by_file.read(length)

    def read_region(start: int, length: int) -> bytes:
        region.seek(start)
        return region.read(length)

    ways: list[Callable[[int, int], bytes]] = [read_file, read_region]
    with aiouffd.Monitor(region, Torn(SIZE), engine=ENGINES[engine](), readahead=0, retries=0) as monitor:
        for way in ways:
            assert way(3 * PAGE - 2, 9) == content(3 * PAGE - 2, 9)
            assert monitor.statistics().pages_prefetch == 2
            with mock.patch.object(monitor, "prefetch_sync", side_effect=AssertionError("asked for what is there")):
                assert way(3 * PAGE - 2, 9) == content(3 * PAGE - 2, 9)
            with pytest.raises(SourceError, match="page 9 is lost"):
                way(9 * PAGE + 5, 3)
    for way in ways:
        assert way(3 * PAGE - 2, 9) == content(3 * PAGE - 2, 9)
        with pytest.raises(aiouffd.ClosedError, match=r"\[49152, 491\d\d\) is not all there, and its Monitor"):
            way(12 * PAGE, 3)


@pytest.mark.kernel
@pytest.mark.parametrize("engine", ENGINES)
def test_errors_and_no_signals(engine: str) -> None:
    """What cannot be had raises, in a Monitor and after it; what is there is not asked for again."""
    play(reads, engine)


def shares_its_position(engine: str) -> None:
    """Scenario: the position moves while a read waits for its pages, and the next page cannot be had."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Torn(SIZE), engine=ENGINES[engine](), readahead=0, retries=0) as monitor:
        real = monitor.prefetch_sync

        def meanwhile(*args: Any) -> None:
            real(*args)
            region.seek(9 * PAGE)

        with mock.patch.object(monitor, "prefetch_sync", side_effect=meanwhile):
            assert region.read(5) == content(0, 5)
        assert region.tell() == 5
        with mock.patch.object(monitor, "prefetch_sync", side_effect=real):
            region.seek(SIZE)
            region.resize(PAGE)
            assert region.read() == b""


@pytest.mark.kernel
@pytest.mark.parametrize("engine", ENGINES)
def test_a_position_that_other_threads_move(engine: str) -> None:
    """Only what was brought is touched."""
    play(shares_its_position, engine)


async def on_its_loop() -> None:
    """Scenario: the thread whose loop serves reads the region."""
    region: Any = aiouffd.Region(SIZE)
    async with aiouffd.Monitor(region, Pattern(SIZE), engine=aiouffd.InProcess(), readahead=0) as monitor:
        with pytest.raises(RuntimeError, match="await prefetch"):
            region.as_file().read(1)
        await monitor.prefetch(0, SIZE)
        assert region.as_file().read() == content(0, SIZE)


@pytest.mark.kernel
def test_a_loop_does_not_wait_for_itself(loop: str) -> None:
    """It raises, and tells what to do."""
    play(on_its_loop, loop=loop)
