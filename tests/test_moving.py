"""`engine.moving` with a scripted kernel: what is moved, what is copied, and when a move is tried again."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from aiouffd.engine import moving
from aiouffd.engine.moving import Moving, huge_pages_come
from aiouffd.engine.statistics import Counters
from aiouffd.kernel.memory import address_of
from aiouffd.kernel.pagemap import Pagemap
from aiouffd.kernel.region import HUGE_PAGE

if TYPE_CHECKING:
    from pathlib import Path

PAGE = 4096
BASE = 64 * HUGE_PAGE
SOURCE = bytearray(b"\1" * (4 * HUGE_PAGE))
SRC = address_of(SOURCE)


class Kernel:
    """Notes what is moved and copied, as (offset, bytes); `answers` come before what it does by itself."""

    def __init__(self) -> None:
        self.moves: list[tuple[int, int]] = []
        self.copies: list[tuple[int, int]] = []
        self.modes: set[int] = set()
        self.answers: list[int] = []
        self.copied: list[int] = []

    def try_move(self, dst: int, src: int, length: int, mode: int) -> int:
        """UFFDIO_MOVE."""
        assert dst % HUGE_PAGE == src % HUGE_PAGE == 0
        self.modes.add(mode)
        self.moves.append((dst - BASE, length))
        return self.answers.pop(0) if self.answers else length

    def try_copy(self, dst: int, src: int, length: int, mode: int) -> int:
        """UFFDIO_COPY."""
        assert src - SRC == dst - BASE
        self.modes.add(mode)
        self.copies.append((dst - BASE, length))
        return self.copied.pop(0) if self.copied else length


class Page(moving._Page):
    """Memory that comes as the test says."""

    made = 0
    huge = True

    def __init__(self) -> None:
        self.address: int = HUGE_PAGE
        Page.made += 1

    def comes(self, pagemap: Pagemap, source: int) -> bool:
        """Tell it."""
        return Page.huge


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A kernel that has huge pages, whatever this one has."""
    monkeypatch.setattr(moving, "_Page", Page)
    Page.made, Page.huge = 0, True
    return Kernel()


def copying(kernel: Kernel, counters: Counters | None = None) -> Moving:
    """Return what is tested."""
    return Moving(kernel, Pagemap.__new__(Pagemap), counters or Counters())


def test_whole_huge_pages_are_moved_and_the_rest_is_copied(kernel: Kernel) -> None:
    """What is before the first boundary, and behind the last, is one COPY each; one memory serves for all moves."""
    counters = Counters()
    assert copying(kernel, counters).try_copy(BASE + PAGE, SRC + PAGE, 3 * HUGE_PAGE, 1) == 3 * HUGE_PAGE
    assert kernel.moves == [(HUGE_PAGE, HUGE_PAGE), (2 * HUGE_PAGE, HUGE_PAGE)]
    assert kernel.copies == [(PAGE, HUGE_PAGE - PAGE), (3 * HUGE_PAGE, PAGE)]
    assert kernel.modes == {1}
    assert Page.made == 1
    assert counters.snapshot().moves == 2


@pytest.mark.parametrize(
    ("start", "length", "mode"), [(0, HUGE_PAGE - PAGE, 0), (PAGE, 2 * HUGE_PAGE - 2 * PAGE, 0), (0, HUGE_PAGE, 3)]
)
def test_what_has_no_whole_huge_page_is_one_copy(kernel: Kernel, start: int, length: int, mode: int) -> None:
    """Nor is what comes write-protected cut or moved."""
    assert copying(kernel).try_copy(BASE + start, SRC + start, length, mode) == length
    assert (kernel.copies, kernel.moves, Page.made) == ([(start, length)], [], 0)


@pytest.mark.parametrize("number", [errno.EEXIST, errno.EBUSY, errno.EINVAL, errno.EAGAIN, errno.ENOENT])
def test_what_cannot_be_moved_is_copied(kernel: Kernel, number: int) -> None:
    """The COPY says what is wrong, if anything is: its answer counts."""
    one = copying(kernel)
    kernel.answers, kernel.copied = [-number, -number], [-errno.EAGAIN]
    assert one.try_copy(BASE, SRC, HUGE_PAGE, 0) == -errno.EAGAIN
    assert one.try_copy(BASE, SRC, HUGE_PAGE, 0) == HUGE_PAGE
    assert kernel.copies == [(0, HUGE_PAGE)] * 2
    assert kernel.moves == [(0, HUGE_PAGE)]  # not tried again at once


def test_a_part_that_was_moved_is_not_copied(kernel: Kernel) -> None:
    """The rest is, and how far that has come is said; memory out of which single pages were moved is not used again."""
    one = copying(kernel)
    kernel.answers, kernel.copied = [5 * PAGE], [PAGE]
    assert one.try_copy(BASE, SRC, HUGE_PAGE, 0) == 6 * PAGE
    assert kernel.copies == [(5 * PAGE, HUGE_PAGE - 5 * PAGE)]
    kernel.answers, kernel.copied = [], [-errno.EEXIST]
    assert one.try_copy(BASE, SRC, PAGE, 0) == -errno.EEXIST
    one.try_copy(BASE, SRC, 2 * HUGE_PAGE, 0)
    assert kernel.moves[1:] == [(0, HUGE_PAGE), (HUGE_PAGE, HUGE_PAGE)]
    assert Page.made == 2


def test_what_is_given_is_moved_itself(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is a huge page; else one is filled with its bytes."""
    one, is_huge = copying(kernel), [True, False]
    monkeypatch.setattr(moving, "_is_huge", lambda *_: is_huge.pop(0))

    def try_move(dst: int, src: int, length: int, _: int) -> int:
        kernel.moves.append((dst, src))
        return length

    monkeypatch.setattr(kernel, "try_move", try_move)
    source = 7 * HUGE_PAGE
    for _ in range(2):
        assert one.try_copy(BASE, source, HUGE_PAGE, 0, given=True) == HUGE_PAGE
    assert one.try_copy(BASE, source, HUGE_PAGE, 0) == HUGE_PAGE
    assert one.try_copy(BASE, source + PAGE, HUGE_PAGE, 0, given=True) == HUGE_PAGE
    assert kernel.moves == [(BASE, source)] + 3 * [(BASE, HUGE_PAGE)]
    assert Page.made == 1


def test_where_no_huge_page_comes_it_is_tried_less_and_less(kernel: Kernel) -> None:
    """After 1, 3, 7 huge pages that are copied, and so on; one that comes is followed by others at once."""
    one = copying(kernel)
    Page.huge = False
    for _ in range(1 + 1 + 1 + 3 + 1 + 7 + 1):
        assert one.try_copy(BASE, SRC, HUGE_PAGE, 0) == HUGE_PAGE
    assert (Page.made, kernel.moves) == (4, [])
    Page.huge = True
    for _ in range(15 + 3):
        one.try_copy(BASE, SRC, HUGE_PAGE, 0)
    assert len(kernel.moves) == 3


def test_where_there_is_no_room_for_a_page_beside_it_it_is_copied(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where no huge page comes: a process may have as much memory as it is allowed to (RLIMIT_AS)."""

    def refused() -> Page:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    one = copying(kernel)
    with monkeypatch.context() as patch:
        patch.setattr(moving, "_Page", refused)
        assert one.try_copy(BASE, SRC, HUGE_PAGE, 0) == HUGE_PAGE
    assert kernel.copies == [(0, HUGE_PAGE)]
    for _ in range(2):
        assert one.try_copy(BASE, SRC, HUGE_PAGE, 0) == HUGE_PAGE
    assert kernel.moves == [(0, HUGE_PAGE)]


def test_whether_huge_pages_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where they are switched off, or the kernel has none."""
    for text, come in (("always [madvise] never", True), ("always madvise [never]", False)):
        (tmp_path / "enabled").write_text(text)
        monkeypatch.setattr(moving, "_ENABLED", str(tmp_path / "enabled"))
        assert huge_pages_come() == come
    monkeypatch.setattr(moving, "_ENABLED", str(tmp_path / "none"))
    assert not huge_pages_come()


def test_memory_that_is_gone_is_no_signal() -> None:
    """A huge page is not filled from a bad address; from a good one it has the bytes."""
    with Pagemap() as pagemap:
        page = moving._Page()
        if not page.comes(pagemap, SRC):
            pytest.skip("this kernel gives no huge page now")
        assert bytes(memoryview(page._memory)[:PAGE]) == b"\1" * PAGE
        assert not moving._Page().comes(pagemap, 4096)
