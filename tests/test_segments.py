"""`store.segments`: files that are written once, continued by one at a time, and removed as a whole."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from typing import TYPE_CHECKING

import pytest

from aiouffd.store.segments import Place, Segments

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
PAGE = mmap.PAGESIZE


def segments(path: Path, limit: int = 8 * MIB) -> Segments:
    """Return those of a folder, as one more process has them."""
    return Segments(os.open(path, os.O_RDONLY | os.O_DIRECTORY), limit, contextlib.nullcontext)


def data(number: int, length: int = 64 << 10) -> bytes:
    """Return bytes that tell chunks apart."""
    return (b"%08d" % number) * (length // 8)


def read(place: Place) -> bytes:
    """Return the bytes at a place."""
    assert place.segment is not None
    return bytes(place.segment.read(place.offset, place.length))


def test_chunks_lie_one_behind_the_other_on_pages(tmp_path: Path) -> None:
    """In files of mode 0600, also those that are no multiple of a page; found by number, and read at once."""
    mine = segments(tmp_path)
    sizes = [64 << 10, 104, 8192]
    first = mine.append([data(n, size) for n, size in enumerate(sizes)])
    second = mine.append([data(9)])
    assert [place.offset // PAGE for place in [*first, *second]] == [1, 17, 18, 20]
    assert [read(place) for place in first] == [data(n, size) for n, size in enumerate(sizes)]
    ((number, file),) = mine.files()
    assert file.st_mode & 0o777 == 0o600
    assert file.st_size == mine.size == MIB
    other = segments(tmp_path).find(number)
    assert other is not None
    assert other.read(second[0].offset, second[0].length) == data(9)
    into = memoryview(bytearray(64 << 10))
    assert other.fill_nowait(second[0].offset, into)
    assert into == data(9)
    assert not other.fill_nowait(MIB - 100, into)  # too few bytes
    assert mine.find(number + 1) is None


def test_a_full_segment_is_followed_by_another(tmp_path: Path) -> None:
    """One call may need several."""
    mine = segments(tmp_path)
    places = mine.append([data(n) for n in range(40)])
    assert len(mine.files()) == 3
    assert [read(place) for place in places] == [data(n) for n in range(40)]


def test_what_a_process_has_begun_another_continues(tmp_path: Path) -> None:
    """When it has ended, and not before; behind all that it may have written; not after the machine has restarted."""
    first = segments(tmp_path)
    (place,) = first.append([data(1)])
    second = segments(tmp_path)
    second.append([data(2)])
    assert len(first.files()) == 2
    first.close()
    second.close()
    third = segments(tmp_path)
    third.append([data(3), data(4)])
    assert len(first.files()) == 2
    assert read(place) == data(1)
    third.close()
    for number, _ in third.files():  # their first pages are of another boot
        fd = os.open(tmp_path / f"{number:08x}.segment", os.O_RDWR)
        os.pwrite(fd, b"x", 12)
        os.close(fd)
    segments(tmp_path).append([data(5)])
    assert len(first.files()) == 3


def test_a_damaged_first_page_is_not_believed(tmp_path: Path) -> None:
    """What it says is taken would be written over, while others show it."""
    mine = segments(tmp_path)
    before = mine.append([data(1), data(2)])
    mine.close()
    ((number, _),) = mine.files()
    fd = os.open(tmp_path / f"{number:08x}.segment", os.O_RDWR)
    for bit in range(12, 24):  # of the word that says how much is taken
        page = bytearray(os.pread(fd, 100, 0))
        page[32 + bit // 8] ^= 1 << bit % 8
        os.pwrite(fd, page, 0)
        other = segments(tmp_path)
        other.append([data(3)])
        other.close()
        assert [read(place) for place in before] == [data(1), data(2)]
        page[32 + bit // 8] ^= 1 << bit % 8
        os.pwrite(fd, page, 0)
    os.close(fd)


def test_room_is_taken_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails in the middle, as a process that is killed there, leaves a place that nobody uses again."""
    mine = segments(tmp_path)
    (before,) = mine.append([data(1)])
    real = os.pwrite

    def short(fd: int, view: memoryview, offset: int) -> int:
        if len(view) < 100:
            return real(fd, view, offset)
        real(fd, view[:PAGE], offset)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", short)
    with pytest.raises(OSError, match="No space"):
        mine.append([data(2)])
    monkeypatch.setattr(os, "pwrite", real)
    mine.close()
    (after,) = segments(tmp_path).append([data(3)])
    assert after.offset == before.offset + 2 * (64 << 10)
    assert read(before) == data(1)


def test_the_bound_holds_and_what_is_in_use_stays(tmp_path: Path) -> None:
    """By the time of their last use; a segment that is open or mapped keeps its bytes until it is let go."""
    mine = segments(tmp_path)
    places = []
    for number in range(200):
        places += mine.append([data(number)])
        assert sum(file.st_size for _, file in mine.files()) <= 8 * MIB
        if number == 115:
            os.utime(places[0].segment.fd)  # type: ignore[union-attr]
    assert mine.take_evictions() > 0
    assert mine.evictions == 0
    assert [read(place) for place in places] == [data(n) for n in range(200)]
    gone = [place.segment.gone for place in places]  # type: ignore[union-attr]
    assert not gone[0]  # it was used
    assert any(gone)
    assert not gone[-1]
    number = min(place.segment.number for place, is_gone in zip(places, gone, strict=True) if is_gone)  # type: ignore[union-attr]
    assert mine.find(number) is None


def test_an_own_segment_that_was_evicted_is_not_continued(tmp_path: Path) -> None:
    """What others cannot find is of no use."""
    mine = segments(tmp_path)
    mine.append([data(1)])
    assert segments(tmp_path).evict(0) == 1
    mine.append([data(2)])
    assert len(mine.files()) == 1


def test_what_is_no_segment(tmp_path: Path) -> None:
    """Other files stay; a link or a folder in its place is not opened."""
    mine = segments(tmp_path)
    (tmp_path / "precious").touch()
    (tmp_path / "00000007.segment").symlink_to(tmp_path / "precious")
    (tmp_path / "00000008.segment").mkdir()
    os.mkfifo(tmp_path / "00000009.segment")
    assert mine.find(8) is mine.find(9) is None
    with pytest.raises(OSError, match="symbolic links"):
        mine.find(7)
    assert (tmp_path / "precious").exists()


def test_when_it_was_used_is_noted_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in five seconds."""
    (place,) = segments(tmp_path).append([data(1)])
    noted: list[int] = []
    monkeypatch.setattr(os, "utime", noted.append)
    for _ in range(3):
        place.segment.touch()  # type: ignore[union-attr]
    assert noted == [place.segment.fd]  # type: ignore[union-attr]


def test_the_last_number(tmp_path: Path) -> None:
    """A file that has it takes nothing from others: chunks are not kept, as if the disk were full."""
    (tmp_path / "fffffffe.segment").touch()
    with pytest.raises(OSError, match="no numbers are left") as caught:
        segments(tmp_path).append([data(1)])
    assert caught.value.errno == errno.EFBIG


def test_a_clock_that_was_put_back(tmp_path: Path) -> None:
    """What was used before that does not outlive what is used now."""
    mine = segments(tmp_path)
    mine.append([data(n) for n in range(40)])
    os.utime(tmp_path / "00000002.segment", (1 << 32, 1 << 32))
    assert mine.evict(2 * MIB) == 1
    assert sorted(number for number, _ in mine.files()) == [1, 3]
