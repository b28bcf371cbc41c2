"""`kernel.sharing`: private memory that a pager is to drop becomes shared, and nobody sees it."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
from pattern import PAGE, content
from scenario import open_descriptors, play

import aiouffd
from aiouffd.errors import PopulatedError
from aiouffd.kernel import libc, sharing
from aiouffd.kernel.pagemap import Pagemap
from aiouffd.ranges import Range

PAGES = 256
SIZE = PAGES * PAGE
LIMIT = 64 * PAGE


def becomes_shared(path: str) -> None:
    """Scenario: private memory, with views, is dropped, saved, emptied, resized and left."""
    Path(path).write_bytes(content(0, SIZE))
    region, model = aiouffd.Region(SIZE - 100), bytearray(content(0, SIZE - 100))
    view, address = memoryview(region), region.address
    with aiouffd.Monitor(
        region, aiouffd.FileSource(path, writable=True), max_resident=LIMIT, write_back=True
    ) as monitor:
        assert region.address == address
        assert view == model
        assert 0 < monitor.statistics().resident <= LIMIT
        view[5 * PAGE] = model[5 * PAGE] = 77
        monitor.flush_sync()
        monitor.evict_sync(0, len(region))
        assert monitor.residency() in ([], [Range(SIZE - PAGE, PAGE - 100)])  # whole pages only
        child = os.fork()
        if not child:
            os._exit(view[0])
        assert os.waitpid(child, 0)[1] != 0  # it is not the child's
        region.madvise(mmap.MADV_DONTNEED, 7 * PAGE, PAGE - 50)
        model[7 * PAGE : 8 * PAGE] = bytes(PAGE)
        assert view == model
        view.release()
        region.resize(2 * SIZE)
        assert region[:] == model + bytes(2 * SIZE - len(model))
        region.resize(100 * PAGE)
        assert region[:] == model[: 100 * PAGE]
        assert os.fstat(region.fd).st_size == 100 * PAGE
    region.resize(200 * PAGE)
    region.madvise(mmap.MADV_DONTNEED, 150 * PAGE, PAGE)
    assert os.fstat(region.fd).st_size == 200 * PAGE
    region.close()
    assert Path(path).read_bytes()[5 * PAGE] == 77


def had_bytes() -> None:
    """Scenario: what was there before stays, and is no copy of the source; children are served where that is wanted."""
    region = aiouffd.Region(SIZE)
    region[3 * PAGE] = 99
    with aiouffd.Monitor(region, aiouffd.BufferSource(content(0, SIZE)), max_resident=LIMIT, fork="serve") as monitor:
        assert region[3 * PAGE : 4 * PAGE] == b"\x63" + bytes(PAGE - 1)
        assert region[4 * PAGE :] == content(4 * PAGE, SIZE - 4 * PAGE)
        monitor.evict_sync(0, SIZE)
        assert monitor.residency() == [Range(3 * PAGE, PAGE)]
        child = os.fork()
        if not child:
            os._exit(region[4 * PAGE : 5 * PAGE] != content(4 * PAGE, PAGE))
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_private_memory_becomes_shared(tmp_path: Path) -> None:
    """At its place, with its bytes; its own methods go on as they did."""
    play(becomes_shared, str(tmp_path / "file"))
    play(had_bytes)


def test_memory_that_is_locked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel would fill it. What cannot become shared is private still."""
    with aiouffd.Region(PAGE) as region, Pagemap() as pagemap:
        monkeypatch.setattr(sharing, "new_mappings_are_populated", lambda: True)
        with pytest.raises(PopulatedError, match="shared=True"):
            sharing.share(region, pagemap)
        monkeypatch.undo()
        monkeypatch.setattr(libc, "mmap_fixed", lambda *_, **__: region.seek(-1))
        opened = open_descriptors()
        with pytest.raises(ValueError, match="seek"):
            sharing.share(region, pagemap)
        assert (region.fd, open_descriptors()) == (-1, opened)
