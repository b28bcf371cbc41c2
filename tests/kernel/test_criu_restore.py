"""A real CRIU: its images are read right, and the rig that runs it works, with CRIU's own daemon."""

from __future__ import annotations

import mmap
import shutil
from typing import TYPE_CHECKING

import criu_images as make
import criu_rig
import pytest
from served import free_port

from aiouffd.criu.images import REMOTE, PageFlag, TaskImage, read_task

if TYPE_CHECKING:
    from criu_rig import Checkpoint

SIZE = 64 << 20


def first_words(task: TaskImage) -> dict[int, int]:
    """Return the first word of each lazy page, by address."""
    found = {}
    for number, path in enumerate(task.files):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for run in task.lazy():
                if run.file == number:
                    for at in range(0, run.length, make.PAGE):
                        place = run.offset + at
                        found[run.address + at] = int.from_bytes(data[place : place + 8], "little")
    return found


def is_pattern(words: dict[int, int]) -> bool:
    """Tell whether the subject's memory is in there, each page at its place."""
    start = next(address for address, value in words.items() if value == criu_rig.word(0))
    return all(words[start + page * make.PAGE] == criu_rig.word(page) for page in range(SIZE // make.PAGE))


def move_half_to_a_parent(checkpoint: Checkpoint) -> None:
    """Make of one checkpoint two: the latter half of each run is left to a parent, as an incremental dump does it.

    Such a dump itself takes soft-dirty bits, which few kernels have.
    """
    task = read_task(checkpoint.images, checkpoint.pid)
    parent = checkpoint.images / "before"
    parent.mkdir()
    for name in (f"pagemap-{task.pid}.img", task.files[0].name, f"mm-{task.pid}.img"):
        shutil.copy(checkpoint.images / name, parent / name)
    (checkpoint.images / "parent").symlink_to("before")
    entries, pages = [], bytearray()
    whole = task.files[0].read_bytes()
    for run in task.runs:
        count = run.length // make.PAGE
        lazy = run.flags & PageFlag.LAZY
        kept = (count + 1) // 2
        entries.append({1: run.address, 2: kept, 4: int(lazy) | make.PRESENT})
        pages += whole[run.offset : run.offset + kept * make.PAGE]
        if count > kept:
            entries.append({1: run.address + kept * make.PAGE, 2: count - kept, 4: int(lazy) | make.PARENT})
    pages_id = int(task.files[0].stem.removeprefix("pages-"))
    (checkpoint.images / f"pagemap-{task.pid}.img").write_bytes(make.pagemap(pages_id, entries))
    task.files[0].write_bytes(pages)


def test_local_images(checkpoint: Checkpoint) -> None:
    """Every page of 64 MiB is where the images say, in one layer and in two; CRIU restores both alike."""
    checkpoint.start("scan")
    checkpoint.dump()
    task = read_task(checkpoint.images, checkpoint.pid)
    words = first_words(task)
    assert is_pattern(words)
    assert all(any(run.address in bounds for bounds in task.mappings) for run in task.runs)
    move_half_to_a_parent(checkpoint)
    layered = read_task(checkpoint.images, checkpoint.pid)
    assert len(layered.files) == 2
    assert first_words(layered) == words
    checkpoint.go()
    restore = checkpoint.restore(lazy=False)
    assert len(checkpoint.results()) == 1
    checkpoint.finish(restore)


def test_a_lazy_restore_by_its_own_daemon(checkpoint: Checkpoint) -> None:
    """The rig: from local images, 64 MiB, not a wrong word."""
    checkpoint.start("scan")
    checkpoint.dump()
    checkpoint.go()
    daemon = checkpoint.lazy_pages()
    restore = checkpoint.restore()
    ((verdict, pid, _),) = checkpoint.results()
    assert (verdict, pid) == ("ok", str(checkpoint.pid))
    checkpoint.finish(daemon)
    checkpoint.finish(restore)


def test_a_page_server(checkpoint: Checkpoint) -> None:
    """The rig: the dump keeps the lazy pages, the images know that, and CRIU's own daemon fetches them."""
    port = free_port()
    checkpoint.start("scan")
    dump = checkpoint.dump_to_server(port)
    task = read_task(checkpoint.images, checkpoint.pid)
    assert all(run.file == REMOTE for run in task.lazy())
    assert sum(run.length for run in task.lazy()) >= SIZE
    checkpoint.go()
    daemon = checkpoint.lazy_pages("--page-server", "--address", "127.0.0.1", "--port", str(port))
    restore = checkpoint.restore()
    assert len(checkpoint.results()) == 1
    for process in (daemon, restore, dump):
        checkpoint.finish(process)


@pytest.mark.parametrize("mode", ["scan", "tree"])
def test_the_subject_checks_itself(checkpoint: Checkpoint, mode: str) -> None:
    """Restored at once, without a daemon, it finds nothing wrong: what it finds elsewhere is the daemon's."""
    checkpoint.start(mode)
    checkpoint.dump()
    checkpoint.go()
    restore = checkpoint.restore(lazy=False)
    results = checkpoint.results()
    assert len(results) == 1 if mode == "scan" else len(results) > 20
    checkpoint.finish(restore)
