"""`store.view`: chunks side by side in memory, each as long as its segment lasts."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
from pattern import PAGE, content, peek

from aiouffd.kernel import libc
from aiouffd.store.view import View

SIZE = 16 * PAGE + 100


@pytest.fixture
def fd(tmp_path: Path) -> int:
    """Return a file of the pattern."""
    (tmp_path / "file").write_bytes(content(0, 64 * PAGE))
    return os.open(tmp_path / "file", os.O_RDONLY)


def resident(view: View) -> list[int]:
    """Return the pages that may be copied from."""
    return [n for n, byte in enumerate(libc.mincore(view.address, view.length)) if byte & 1]


def test_what_is_shown_is_there_and_nothing_else(fd: int) -> None:
    """Until it is hidden; what is not shown cannot be read, and is not resident."""
    view = View(SIZE)
    assert view.length == 17 * PAGE
    assert resident(view) == []
    view.show(4 * PAGE, 2 * PAGE, fd, 32 * PAGE)
    view.show(9 * PAGE, PAGE, fd, 7 * PAGE)
    assert resident(view) == [4, 5, 9]
    assert peek(view.address + 4 * PAGE, 2 * PAGE) == content(32 * PAGE, 2 * PAGE)
    assert libc.peek([view.address + 9 * PAGE, view.address + 10 * PAGE]) == content(7 * PAGE, 1)
    view.hide(4 * PAGE, 2 * PAGE)
    view.hide(5 * PAGE, PAGE)  # never shown by itself
    assert resident(view) == [9]
    assert libc.peek([view.address + 4 * PAGE]) == b""
    view.show(10 * PAGE, 4 * PAGE, fd, 20 * PAGE, 2 * PAGE)  # two pieces
    assert resident(view) == [9, 10, 11, 12, 13]
    assert (view.has(10 * PAGE), view.has(11 * PAGE), view.has(12 * PAGE)) == (True, False, True)
    view.hide(10 * PAGE, 2 * PAGE)
    assert resident(view) == [9, 12, 13]
    assert peek(view.address + 12 * PAGE, 2 * PAGE) == content(22 * PAGE, 2 * PAGE)
    view.hide(12 * PAGE, 2 * PAGE)
    view.show(4 * PAGE, 0, fd, 0)
    view.show(4 * PAGE, PAGE, -1, 0)  # cannot be mapped
    assert resident(view) == [9]
    view.close()


def test_only_so_many_pieces_are_mapped(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By all views together: a process has 65,530 mappings."""
    from aiouffd.store import view as module

    before = module._pieces[0]
    monkeypatch.setattr(module, "_MOST", before + 3)
    one, other = View(SIZE), View(SIZE)
    for page in (0, 2, 4, 6):
        one.show(page * PAGE, PAGE, fd, 0)
    assert resident(one) == [0, 2, 4]
    one.hide(2 * PAGE, PAGE)
    other.show(4 * PAGE, 2 * PAGE, fd, 0, PAGE)  # two pieces, and there is room for one
    other.show(0, PAGE, fd, 0)
    other.show(PAGE, PAGE, fd, 0)
    assert resident(other) == [0]
    one.close()
    one.show(0, PAGE, fd, 0)  # a thread that comes late: these addresses are others'
    other.show(PAGE, PAGE, fd, 0)
    assert resident(other) == [0, 1]
    other.close()
    assert module._pieces[0] == before


def test_a_mapping_keeps_a_file_that_was_unlinked(fd: int, tmp_path: Path) -> None:
    """Until it is hidden: the disk has its room back then."""
    view = View(SIZE)
    view.show(0, PAGE, fd, PAGE)
    (tmp_path / "file").unlink()
    os.close(fd)
    assert peek(view.address, 8) == content(PAGE, 8)
    assert b"file (deleted)" in Path("/proc/self/maps").read_bytes()
    view.hide(0, PAGE)
    assert b"file (deleted)" not in Path("/proc/self/maps").read_bytes()
    assert mmap.PAGESIZE == PAGE
