"""`engine.ahead.pages`: the bytes of pages that a recording carries."""

from __future__ import annotations

import os
import random
import struct
from array import array
from typing import TYPE_CHECKING

import pytest
from carried import COUNT, SIZE, carried, made
from pattern import PAGE, content

import aiouffd
from aiouffd.engine.ahead import pages
from aiouffd.engine.ahead.trace import Trace, fingerprint
from aiouffd.kernel.memory import address_of
from aiouffd.ranges import batched
from aiouffd.sources.base import Descriptor

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("kind", ["xxh3", "blake2"])
def test_all_pages_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """In the order of the recording, the last one in part; also where there is no XXH3. Only the owner may read it."""
    if kind == "blake2":
        hash_of = pages._hash
        monkeypatch.setattr(pages, "_hash", lambda kind: None if kind == pages._XXH3 else hash_of(kind))
    order = [*range(COUNT - 1, 0, -1), 0]
    path, source = made(tmp_path, order)
    assert list(Trace.load(path).offsets) == [page * PAGE for page in order]
    assert carried(path) == {page: content(page * PAGE, min(PAGE, SIZE - page * PAGE)) for page in order}
    trace = Trace.replayed(path, PAGE, source, fingerprint(source))
    assert trace.pages is not None
    unit = trace.pages.load(0)
    assert unit is not None
    assert unit.at_hand(255 * PAGE, PAGE) is not None
    assert unit.at_hand(255 * PAGE, 2 * PAGE) is None  # the other one is in another unit
    last = trace.pages.load(2)
    assert last is not None
    assert last.at_hand(0, PAGE) is None
    assert last.at_hand(SIZE - 50, 51) is None
    assert path.stat().st_mode & 0o777 == 0o600
    assert [item.name for item in tmp_path.iterdir() if item.name.endswith(".part")] == []


def runs_of(path: Path) -> list[tuple[int, int]]:
    """Return the first page and the number of pages of each run whose bytes a recording carries, in order."""
    pages = Trace.load(path).pages
    assert pages is not None
    units = [pages.load(number) for number in range(len(pages))]
    return [(offset // PAGE, length // PAGE) for unit in units if unit for offset, length, _ in unit.parts]


def test_what_is_touched_first_comes_first(tmp_path: Path) -> None:
    """Within a unit in the order of the offsets. Where the pages of more units join to few runs, those are one COPY."""
    scattered = [page for page in range(COUNT - 1, -1, -1) if page % 3]
    path, _ = made(tmp_path, scattered)
    assert runs_of(path)[0][0] == min(scattered[:256]) > COUNT // 3
    assert carried(path).keys() == set(scattered)
    dense = random.Random(2).sample(range(COUNT), COUNT)
    path, _ = made(tmp_path, dense)
    assert runs_of(path) == [(0, 256), (256, 256), (512, COUNT - 512)]
    assert carried(path).keys() == set(dense)


def test_the_version_before_is_read(tmp_path: Path) -> None:
    """It has its pages sorted together, 4,096 at a time, and does not say so."""
    order = [page for page in range(COUNT - 1, -1, -1) if page % 3]
    path, source = made(tmp_path, order)
    offsets = array("Q", [page * PAGE for page in order])
    head = Trace(PAGE, SIZE, offsets, fingerprint(source)).head(frozenset(offsets))
    head = head[:8] + struct.pack("<I", 4) + head[12:]
    units = [content_of(some) for some in batched(sorted(order), 256)]
    section = pages._SECTION_4.pack(pages.version_of(source), pages._XXH3, 1 << 20)
    digest = pages._hash(pages._XXH3)
    assert digest is not None
    hashes = b"".join(map(digest, units))
    data = head + section + digest(head + section + hashes) + hashes
    path.write_bytes(data + bytes(-len(data) % PAGE) + b"".join(units))
    assert carried(path) == {page: content(page * PAGE, min(PAGE, SIZE - page * PAGE)) for page in order}
    trace = Trace.replayed(path, PAGE, source, fingerprint(source))
    assert (list(trace.offsets), runs_of(path)[0]) == (list(offsets), (1, 2))


def content_of(pages: list[int]) -> bytes:
    """Return the bytes of pages; what is behind the end of the source is zeros."""
    return b"".join(content(page * PAGE, min(PAGE, SIZE - page * PAGE)).ljust(PAGE, b"\0") for page in pages)


def test_units_are_read_once(tmp_path: Path) -> None:
    """What is not wanted any more is not read, and faults find what is there."""
    path, _ = made(tmp_path, list(range(COUNT)))
    ours = Trace.load(path).pages
    assert ours is not None
    units = ours.begin()
    units.drop(0)
    assert units.read(0) is None
    assert units.read(1) is units.read(1)
    assert units.at_hand(255 * PAGE, PAGE) is None
    there = units.at_hand(300 * PAGE, 2 * PAGE)
    assert there is not None
    assert bytes(there) == content(300 * PAGE, 2 * PAGE)


def test_a_room_for_one_unit_after_the_other(tmp_path: Path) -> None:
    """The last one, which is shorter, too. What was placed of them is told where they arrive."""
    path, _ = made(tmp_path, [9, *range(20, 20 + COUNT - 21), 3])
    pages = Trace.load(path).pages
    assert pages is not None
    room = pages.room()
    for number in range(len(pages)):
        unit, other = pages.load(number, room), pages.load(number)
        assert unit is not None
        assert other is not None
        assert [part[:2] for part in unit.parts] == [part[:2] for part in other.parts]
        for offset, length, address in unit.parts:
            place = address - address_of(room)
            length = min(length, SIZE - offset)  # noqa: PLW2901
            assert room[place : place + length] == content(offset, length)
    assert pages.parts_placed() == []
    pages.placed = 1
    maker, (descriptor, *about) = pages.travel()
    arrived = maker(Descriptor(os.dup(descriptor.fd)), *about)
    first = 1 << 20
    unit = pages.load(0)
    assert unit is not None
    assert arrived.parts_placed() == [(offset, length) for offset, length, _ in unit.parts]
    assert sum(length for _, length in arrived.parts_placed()) == first
    assert maker(Descriptor(os.dup(descriptor.fd)), *about[:-1]).placed == 0  # as the version before has sent it


def test_the_first_ones_are_kept_where_there_is_no_room_for_all(tmp_path: Path) -> None:
    """As many as the bytes allow; all are in the recording."""
    path, _ = made(tmp_path, [9, 2, 5, 7], most=3 * PAGE - 1)
    assert carried(path) == {page: content(page * PAGE, PAGE) for page in (9, 2)}
    assert [offset // PAGE for offset in Trace.load(path).offsets] == [9, 2, 5, 7]
    again = Trace.parse(path.read_bytes(), "bytes")  # as a store has it
    assert ([offset // PAGE for offset in again.offsets], again.pages) == ([9, 2, 5, 7], None)


def test_a_unit_that_is_damaged_is_not_shown(tmp_path: Path) -> None:
    """Nor is it, where the file ends too early. The others are."""
    path, _ = made(tmp_path, list(range(COUNT)))
    place = path.stat().st_size - COUNT * PAGE + 256 * PAGE + 5
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\xff")
    assert set(carried(path)) == {*range(256), *range(512, COUNT)}
    os.truncate(path, path.stat().st_size - 1)
    assert set(carried(path)) == set(range(256))


def test_what_says_where_they_are_is_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whichever byte of it is another one, no byte of a page is shown, and the recording is damaged or as it was."""
    path, source = made(tmp_path, [4, 3])
    good = path.read_bytes()
    head = len(good) - 2 * PAGE
    unchecked = 0
    for at in range(head):
        path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        try:
            trace = Trace.replayed(path, PAGE, source, bytes(32))
        except aiouffd.TraceError:
            continue
        if trace.pages is not None:
            assert good[at] == 0
            unchecked += 1
            assert carried(path) == {page: content(page * PAGE, PAGE) for page in (3, 4)}
    assert 0 < unchecked < PAGE  # zeros in front of the bytes
    assert "damaged" in caplog.text


def test_another_version_of_the_source_shows_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that was written to where no sample of it is, and its time put back; a copy; what tells no version."""
    path, source = made(tmp_path, [1, 2, 3])
    image, copy = tmp_path / "image", tmp_path / "copy"
    before = image.stat()
    copy.write_bytes(image.read_bytes())
    with image.open("r+b") as file:
        file.seek(2 * PAGE)
        file.write(b"changed")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    for other in (aiouffd.FileSource(image), aiouffd.FileSource(copy), aiouffd.BufferSource(copy.read_bytes())):
        trace = Trace.replayed(path, PAGE, other, fingerprint(other))
        assert (trace.pages, len(trace.offsets)) == (None, 3)
    assert caplog.text.count("of another source, or of another version of it") == 3
    assert Trace.replayed(path, PAGE, source, fingerprint(source)).pages is not None  # it was opened before


def test_a_file_that_another_may_write_shows_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its pages could be anything."""
    path, source = made(tmp_path, [1, 2])
    path.chmod(0o620)
    assert Trace.replayed(path, PAGE, source, fingerprint(source)).pages is None
    path.chmod(0o600)
    os.chown(path, 12345, -1)
    assert Trace.replayed(path, PAGE, source, fingerprint(source)).pages is None
    assert caplog.text.count("another user could have written the bytes of its pages") == 2


def test_what_is_written_to_has_no_version(tmp_path: Path) -> None:
    """Neither in a layer of it. A file, a layer that is not written to, and a snapshot have one."""
    image = tmp_path / "image"
    image.write_bytes(bytes(4 * PAGE))
    written, read = aiouffd.FileSource(image, writable=True), aiouffd.FileSource(image)
    assert any(pages.version_of(read))
    assert any(pages.version_of(aiouffd.LayeredSource([read, image])))
    for source in (written, aiouffd.LayeredSource([written]), aiouffd.ZeroSource(PAGE), aiouffd.Handler()):
        assert not any(pages.version_of(source))
        assert "carries no bytes" in pages.unkept(source)


def test_what_a_recording_is_made_of() -> None:
    """A path, and how many bytes of pages."""
    assert aiouffd.Recording.of("x") == aiouffd.Recording("x")
    assert [aiouffd.Recording("x", pages=each).most for each in (False, True, 0, 5)] == [0, 1 << 30, 0, 5]
    assert os.fspath(aiouffd.Recording("x", pages=True)) == "x"
    with pytest.raises(ValueError, match="not -1"):
        aiouffd.Recording("x", pages=-1)
