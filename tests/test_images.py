"""`criu.images`: CRIU's image files, right ones and all kinds of wrong ones."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import criu_images as make
import pytest
from chance import bytes_by_chance, cases
from criu_images import LAZY, PAGE, PARENT, PRESENT
from scenario import open_descriptors

from aiouffd.criu.images import REMOTE, PageFlag, PageRun, read_task
from aiouffd.criu.lazy_pages import LazyPages
from aiouffd.criu.page_server import HEADER_4_1, HEADER_4_2
from aiouffd.engine.options import Options
from aiouffd.errors import HandoffError
from aiouffd.ranges import Range

if TYPE_CHECKING:
    import random
    from pathlib import Path

PID = 77
BASE = 0x7F00_0000_0000
ENTRIES = [
    {1: BASE, 2: 4, 4: LAZY | PRESENT},
    {1: BASE + 4 * PAGE, 2: 2, 4: PRESENT},
    {1: BASE + 8 * PAGE, 2: 0, 4: LAZY | PRESENT, 5: 8},
]
BOUNDS = [(BASE, BASE + 3 * PAGE), (BASE + 3 * PAGE, BASE + 12 * PAGE), (BASE + 12 * PAGE, BASE + 20 * PAGE)]


def test_a_task(tmp_path: Path) -> None:
    """Runs lie where the PRESENT ones before them end; both numbers of pages count; lazy ones are cut at bounds."""
    make.write(tmp_path, PID, ENTRIES, BOUNDS, 14 * PAGE)
    task = read_task(tmp_path, PID)
    both = PageFlag.LAZY | PageFlag.PRESENT
    assert task.runs == (
        PageRun(BASE, 4 * PAGE, 0, 0, both),
        PageRun(BASE + 4 * PAGE, 2 * PAGE, 0, 4 * PAGE, PageFlag.PRESENT),
        PageRun(BASE + 8 * PAGE, 8 * PAGE, 0, 6 * PAGE, both),
    )
    assert task.mappings == tuple(Range(start, end - start) for start, end in BOUNDS)
    assert task.files == (tmp_path / "pages-1.img",)
    assert [(run.address, run.length, run.offset) for run in task.lazy()] == [
        (BASE, 3 * PAGE, 0),
        (BASE + 3 * PAGE, PAGE, 3 * PAGE),
        (BASE + 8 * PAGE, 4 * PAGE, 6 * PAGE),
        (BASE + 12 * PAGE, 4 * PAGE, 10 * PAGE),
    ]


def test_pages_with_a_server(tmp_path: Path) -> None:
    """What is LAZY alone takes no room in the file, and is marked as remote."""
    entries = [{1: BASE, 2: 4, 4: LAZY}, {1: BASE + 4 * PAGE, 2: 1, 4: PRESENT}]
    make.write(tmp_path, PID, entries, BOUNDS, PAGE)
    remote, local = read_task(tmp_path, PID).runs
    assert (remote.file, remote.offset, remote.lazy) == (REMOTE, REMOTE, True)
    assert (local.file, local.offset, local.lazy) == (0, 0, False)
    make.write(tmp_path, PID, entries[:1], BOUNDS, 0)
    (tmp_path / "pages-1.img").unlink()
    assert len(read_task(tmp_path, PID).runs) == 1  # no byte is here, so no file is needed


def test_the_version_of_criu(tmp_path: Path) -> None:
    """CRIU 4.2 counts pages in 64 bits, and so does its page server: the newest images tell, if they have a page."""
    for entries, wide in (([{1: BASE, 2: 1, 4: PRESENT}], False), ([{1: BASE, 2: 1, 4: LAZY, 5: 1}], True), ([], None)):
        make.write(tmp_path, PID, entries, BOUNDS, PAGE)
        assert read_task(tmp_path, PID).wide_counts is wide
        found = LazyPages(tmp_path, options=Options())._find_header([PID + 1, PID])
        assert found == (HEADER_4_1 if wide is False else HEADER_4_2)


def test_images_without_flags(tmp_path: Path) -> None:
    """Old images mark only what is a parent's; all else is present."""
    old = tmp_path / "old"
    make.write(old, PID, [{1: BASE, 2: 9}], BOUNDS, 9 * PAGE)
    make.write(tmp_path, PID, [{1: BASE, 2: 1}, {1: BASE + PAGE, 2: 2, 3: 1}], BOUNDS, PAGE)
    (tmp_path / "parent").symlink_to("old")
    runs = read_task(tmp_path, PID).runs
    assert [(run.file, run.offset, int(run.flags)) for run in runs] == [(0, 0, PRESENT), (1, PAGE, PARENT)]


def test_parents(tmp_path: Path) -> None:
    """A run in a parent is found there, in pieces, through two generations; its flags are the youngest's."""
    make.write(tmp_path / "a", PID, [{1: BASE, 2: 8, 4: PRESENT}], BOUNDS, 8 * PAGE, 5)
    middle = [{1: BASE, 2: 2, 4: PRESENT}, {1: BASE + 2 * PAGE, 2: 4, 4: PARENT | LAZY}]
    make.write(tmp_path / "b", PID, middle, BOUNDS, 2 * PAGE, 6)
    young = [{1: BASE + PAGE, 2: 3, 4: PARENT | LAZY}, {1: BASE + 8 * PAGE, 2: 1, 4: LAZY | PRESENT}]
    make.write(tmp_path / "c", PID, young, BOUNDS, PAGE, 7)
    (tmp_path / "b" / "parent").symlink_to("../a")
    (tmp_path / "c" / "parent").symlink_to("../b")
    task = read_task(tmp_path / "c", PID)
    assert [path.name for path in task.files] == ["pages-7.img", "pages-6.img", "pages-5.img"]
    assert [(run.address - BASE, run.length, run.file, run.offset) for run in task.runs] == [
        (PAGE, PAGE, 1, PAGE),
        (2 * PAGE, 2 * PAGE, 2, 2 * PAGE),
        (8 * PAGE, PAGE, 0, 0),
    ]
    assert all(run.lazy for run in task.runs)


def test_parents_that_are_not_there(tmp_path: Path) -> None:
    """No link, a broken one, a circle, a page that the parent has not: each is named."""
    make.write(tmp_path, PID, [{1: BASE, 2: 2, 4: PARENT}], BOUNDS, 0)
    link, old = tmp_path / "parent", tmp_path / "old"
    for target, complaint in (
        (None, "no link"),
        ("nothing", "leads nowhere"),
        (".", "leads back"),
        ("parent", "leads nowhere"),
    ):
        link.unlink(missing_ok=True)
        if target is not None:
            link.symlink_to(target)
        with pytest.raises(HandoffError, match=complaint):
            read_task(tmp_path, PID)
    link.unlink()
    link.symlink_to("old")
    for entries in ([{1: BASE, 2: 1, 4: PRESENT}], [{1: BASE, 2: 2, 4: LAZY}], []):
        make.write(old, PID, entries, BOUNDS, PAGE)
        with pytest.raises(HandoffError, match=r"pagemap-77.img: has no .*page at"):
            read_task(tmp_path, PID)


_WRONG_PAGEMAPS = {
    "no file of pages": make.image(make.PAGEMAP, []),
    "a file number too large": make.pagemap(1 << 32, ENTRIES),
    "no address": make.pagemap(1, [{2: 1, 4: PRESENT}]),
    "no number of pages": make.pagemap(1, [{1: BASE, 4: PRESENT}]),
    "no pages": make.pagemap(1, [{1: BASE, 2: 0, 4: PRESENT}]),
    "not aligned": make.pagemap(1, [{1: BASE + 1, 2: 1, 4: PRESENT}]),
    "2**64 - 1 pages": make.pagemap(1, [{1: BASE, 2: 1, 5: 2**64 - 1, 4: PRESENT}]),
    "the end of all addresses": make.pagemap(1, [{1: 2**64 - PAGE, 2: 1, 4: PRESENT}]),
    "overlapping": make.pagemap(1, [{1: BASE, 2: 2, 4: PRESENT}, {1: BASE + PAGE, 2: 1, 4: PRESENT}]),
    "not in order": make.pagemap(1, [{1: BASE + PAGE, 2: 1, 4: PRESENT}, {1: BASE, 2: 1, 4: PRESENT}]),
    "no flag": make.pagemap(1, [{1: BASE, 2: 1, 4: 0}]),
    "a lazy page in no mapping": make.pagemap(1, [{1: BASE + 19 * PAGE, 2: 2, 4: LAZY | PRESENT}]),
    "more pages than the file has": make.pagemap(1, [{1: BASE, 2: 15, 4: PRESENT}]),
    "a file that is not there": make.pagemap(2, ENTRIES),
    "another kind of image": make.image(make.MM, []),
    "no image": b"\x7fELF" + bytes(60),
    "nothing": b"",
    "an end within a length": make.pagemap(1, ENTRIES) + b"\x01",
    "an end within a message": make.pagemap(1, ENTRIES) + struct.pack("<I", 9) + b"\x08\x01",
    "an end within a number": make.image(make.PAGEMAP, [b"\x08\x80"]),
    "a number of 65 bits": make.image(make.PAGEMAP, [b"\x08" + b"\xff" * 9 + b"\x02"]),
    "a number without end": make.image(make.PAGEMAP, [b"\x08" + b"\xff" * 11]),
    "a field of no number": make.image(make.PAGEMAP, [b"\x00\x01"]),
    "a field of an old kind": make.image(make.PAGEMAP, [b"\x0b"]),
    "a field longer than its message": make.image(make.PAGEMAP, [b"\x12\x7fx"]),
    "a double at the end": make.image(make.PAGEMAP, [b"\x11\0\0"]),
}


_WRONG_MAPPINGS = {
    "two messages": make.image(make.MM, [b"", b""]),
    "a number for a mapping": make.image(make.MM, [make.message([(14, 5)])]),
    "no bounds": make.image(make.MM, [make.message([(14, make.message([(1, BASE)]))])]),
    "an end before the start": make.mm([(BASE + PAGE, BASE)]),
    "not aligned": make.mm([(BASE, BASE + 1)]),
    "overlapping": make.mm([(BASE, BASE + 2 * PAGE), (BASE + PAGE, BASE + 3 * PAGE)]),
    "none at all": make.mm([]),
}


@pytest.mark.parametrize(
    ("kind", "image"),
    [
        *(pytest.param("pagemap", image, id=f"pagemap: {what}") for what, image in _WRONG_PAGEMAPS.items()),
        *(pytest.param("mm", image, id=f"mappings: {what}") for what, image in _WRONG_MAPPINGS.items()),
    ],
)
def test_wrong_images(tmp_path: Path, kind: str, image: bytes) -> None:
    """Each is an error that names a file of the directory."""
    make.write(tmp_path, PID, ENTRIES, BOUNDS, 14 * PAGE)
    (tmp_path / f"{kind}-{PID}.img").write_bytes(image)
    with pytest.raises(HandoffError) as caught:
        read_task(tmp_path, PID)
    assert caught.value.peer.startswith(str(tmp_path))


def test_the_highest_mapping_is_left_out(tmp_path: Path) -> None:
    """[vsyscall] is in the image, at an address that no process may touch."""
    make.write(tmp_path, PID, ENTRIES, [*BOUNDS, (0xFFFF_FFFF_FF60_0000, 0xFFFF_FFFF_FF60_1000)], 14 * PAGE)
    assert len(read_task(tmp_path, PID).mappings) == len(BOUNDS)


def test_what_is_no_file(tmp_path: Path) -> None:
    """A directory, a FIFO, a sparse giant: an error, no wait, no memory, no descriptor left."""
    make.write(tmp_path, PID, ENTRIES, BOUNDS, 14 * PAGE)
    path = tmp_path / f"mm-{PID}.img"
    before = open_descriptors()
    path.unlink()
    path.mkdir()
    with pytest.raises(HandoffError, match="cannot be read"):
        read_task(tmp_path, PID)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(HandoffError, match="not a regular file"):
        read_task(tmp_path, PID)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(HandoffError, match="an image has at most"):
        read_task(tmp_path, PID)
    assert open_descriptors() == before


# Mutations

_SEEDS = (make.pagemap(1, ENTRIES), make.mm(BOUNDS), make.pagemap(1, [{1: BASE, 2: 2, 4: PARENT | LAZY}, *ENTRIES[2:]]))


def mutated(rng: random.Random) -> tuple[int, bytes]:
    """Draw a right image with some bytes changed, taken out, put in, or cut off; and which of the three it was."""
    which = rng.randrange(3)
    data = bytearray(_SEEDS[which])
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, max(len(data) - 1, 0))
        kind = rng.choice(("change", "flip", "remove", "insert", "cut"))
        if kind == "change":
            data[at : at + 1] = bytes_by_chance(rng, 9, 1)
        elif kind == "flip" and data:
            data[at] ^= 1 << rng.randint(0, 7)
        elif kind == "remove":
            del data[at : at + rng.randint(1, 9)]
        elif kind == "insert":
            data[at:at] = bytes_by_chance(rng, 9, 1)
        else:
            del data[at:]
    return which, bytes(data)


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images over older ones, of which each example damages one and puts it right again."""
    directory = tmp_path_factory.mktemp("images")
    make.write(directory / "old", PID, ENTRIES, BOUNDS, 14 * PAGE)
    make.write(directory, PID, ENTRIES, BOUNDS, 14 * PAGE)
    (directory / "parent").symlink_to("old")
    return directory


def survives(case: tuple[int, bytes], directory: Path) -> None:
    """Read it: a task whose runs are in order, in their files, and in mappings where lazy; or a `HandoffError`."""
    which, data = case
    damaged = directory / (f"mm-{PID}.img" if which == 1 else f"pagemap-{PID}.img")
    right = damaged.read_bytes()
    damaged.write_bytes(data)
    try:
        task = read_task(directory, PID)
    except HandoffError as error:
        assert error.peer.startswith(str(directory))  # noqa: PT017 - both ends are allowed
        return
    finally:
        damaged.write_bytes(right)
    end = 0
    for run in task.runs:
        assert end <= run.address < run.end
        end = run.end
        assert run.file == REMOTE or 0 <= run.offset <= task.files[run.file].stat().st_size - run.length
    pieces = list(task.lazy())
    assert sum(piece.length for piece in pieces) == sum(run.length for run in task.runs if run.lazy)
    for piece in pieces:
        assert any(piece.address in bounds and piece.end <= bounds.end for bounds in task.mappings)


def test_mutated_images_are_survived(two_layers: Path) -> None:
    """5,000 of them."""
    for case in cases(5_000, mutated):
        with case as drawn:
            survives(drawn, two_layers)


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_mutated_images_are_survived_at_length(two_layers: Path) -> None:
    """100,000 of them."""
    for case in cases(100_000, mutated):
        with case as drawn:
            survives(drawn, two_layers)
