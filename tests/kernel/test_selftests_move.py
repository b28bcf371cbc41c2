"""The cases of the kernel's own selftest of userfaultfd that are about UFFDIO_MOVE (Linux 6.8).

Only the process itself may move its pages, so the reader is a thread here. That nothing is copied shows in the
pages' frames, which are at the other address what they were before.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
from faults import frame
from kinds import Memory, map_at, memory, on, place, poke
from pattern import PAGE, content
from reader import ReaderThread, Resolver
from scenario import play

import aiouffd
from aiouffd import FaultFlag, Feature, RegisterMode, Userfaultfd
from aiouffd.kernel import abi, libc
from aiouffd.kernel.pagemap import Pagemap

PMD = 2 << 20
CHUNKS = 4

MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15
MADV_COLLAPSE = 25  # Linux 6.1


class Mover(Resolver):
    """Moves a piece of the source to where it is missing."""

    def __init__(self, source: Memory, target: Memory, chunk: int) -> None:
        super().__init__(target)
        self.source = source.address
        self.chunk = chunk

    def missing(self, uffd: Userfaultfd, page: int, fault: aiouffd.PageFault) -> None:
        """Move the piece that the page is in."""
        assert fault.flags == FaultFlag(0)
        offset = (page - self.start) // self.chunk * self.chunk
        assert uffd.move(self.start + offset, self.source + offset, self.chunk) == self.chunk


def move_all(source: Memory, target: Memory, chunk: int) -> None:
    """Have every page of the target come from the source, by chunks, and follow each."""
    for page in range(source.pages):
        poke(source.page(page), content(page * PAGE, PAGE))
    libc.madvise(source.address, source.length, libc.MADV_DONTFORK)
    mover = Mover(source, target, chunk)
    with Userfaultfd(Feature.MOVE) as uffd:
        assert uffd.register(target.address, target.length, RegisterMode.MISSING) & aiouffd.Ioctl.MOVE
        with ReaderThread(mover, uffd):
            step = chunk // PAGE
            for first in range(0, target.pages, step):
                numbers = range(first, first + step)
                for page in numbers:
                    assert source.read(page) == content(page * PAGE, PAGE)
                frames = [frame(source.page(page)) for page in numbers]
                for page in numbers:
                    assert target.read(page) == content(page * PAGE, PAGE)
                assert [frame(target.page(page)) for page in numbers] == frames
                for page in numbers:
                    assert source.read(page) == bytes(PAGE)
        assert mover.seen == {"missing": target.length // chunk}


def huge(area: Memory) -> int:
    """Return how many bytes of it are mapped by huge entries."""
    return sum(found.length for found in Pagemap().scan(area.address, area.length, mask=abi.PAGE_IS_HUGE))


def aligned(extra: int, advice: int) -> Memory:
    """Map anonymous memory from `extra` bytes behind a boundary of huge pages on."""
    length = CHUNKS * PMD
    address = place(length + PMD) + extra
    map_at(address, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    libc.madvise(address, length, advice)
    return Memory(address, length // PAGE, PAGE, False, -1, None)


# move


def move(kind: str) -> None:
    """Scenario."""
    source, target = memory(kind, 64), memory(kind, 64)
    libc.madvise(source.address, source.length, MADV_NOHUGEPAGE)
    move_all(source, target, PAGE)


@on("move", ["anonymous"])
def test_move(kind: str) -> None:
    """Each page comes with its bytes and its frame at its first touch, and is gone where it was."""
    play(move, kind)


def move_pmd(extra: int, advice: int, chunk: int, stays_huge: bool) -> None:
    """Scenario."""
    source = aligned(0, MADV_HUGEPAGE)
    target = aligned(extra, advice)
    for page in range(source.pages):
        poke(source.page(page), b"x")
    libc.madvise(source.address, source.length, MADV_COLLAPSE)  # the first touch may have found no huge page free
    assert huge(source) == source.length
    move_all(source, target, chunk)
    assert huge(target) == (target.length if stays_huge else 0)


# move-pmd, move-pmd-split


@pytest.fixture
def thp() -> None:
    """Transparent huge pages."""
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("this kernel has no transparent huge pages")


@pytest.mark.usefixtures("thp")
@pytest.mark.parametrize("advice", [MADV_HUGEPAGE], ids=["move-pmd-on-anonymous"])
def test_move_pmd(advice: int) -> None:
    """A huge page moves whole: one fault, and huge it stays."""
    play(move_pmd, 0, advice, PMD, True)


@pytest.mark.usefixtures("thp")
@pytest.mark.parametrize(
    ("extra", "chunk", "advice"),
    [
        (0, PMD, MADV_NOHUGEPAGE),  # the fault itself has made the table of small entries that is in the way
        (0, PMD // 2, MADV_HUGEPAGE),
        (PAGE, PMD, MADV_HUGEPAGE),
    ],
    ids=["move-pmd-split-on-anonymous", "move-pmd-split-half-on-anonymous", "move-pmd-split-unaligned-on-anonymous"],
)
def test_move_pmd_split(extra: int, chunk: int, advice: int) -> None:
    """A huge page that the target has no room for, or of which a part is moved, is split on the way."""
    play(move_pmd, extra, advice, chunk, False)
