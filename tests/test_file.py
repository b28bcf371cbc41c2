"""`sources.file`: a local file, its end, its holes, and what becomes of it when it changes."""

from __future__ import annotations

import asyncio
import errno
import functools
import mmap
import os
import pickle
import sys
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest
from scenario import eventually
from stored import DATA, SIZE, at, travelled

import aiouffd

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with the data."""
    path = tmp_path / "data.bin"
    path.write_bytes(DATA)
    return path


def drop(source: aiouffd.FileSource) -> None:
    """Have the page cache drop the file's pages, or skip the test."""
    os.fsync(source._fd)
    os.posix_fadvise(source._fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if source.locate(0, SIZE) is not None:
        pytest.skip("this file system keeps its pages")


async def test_a_file_by_address_and_by_thread(path: Path) -> None:
    """Resident bytes are located in its mapping; a read gives them too; both after the journey as well."""
    for source in (aiouffd.FileSource(path), travelled(aiouffd.FileSource(path))):
        assert source.size == SIZE
        for offset, length in ((0, 4096), (5, 1), (999_424, 579), (0, SIZE), (4097, 100_000)):
            assert at(source.locate(offset, length), length) == DATA[offset : offset + length]
            assert bytes(await source.read(offset, length)) == DATA[offset : offset + length]
        assert source.hole(0, SIZE) == 0
        await source.aclose()


async def test_bytes_that_are_not_in_memory_are_not_located(path: Path) -> None:
    """What the page cache has dropped would block the loop: it is read by a thread."""
    source = aiouffd.FileSource(path)
    drop(source)
    assert bytes(await source.read(0, SIZE)) == DATA
    assert source.locate(0, SIZE) is not None
    await source.aclose()


async def test_single_pages_of_a_file(path: Path) -> None:
    """They are read where that does not wait; else it is asked whether they are resident; nothing behind a cut."""
    source = aiouffd.FileSource(path)
    for offset, length in ((0, 4096), (40_960, 16_384), (8192, 65_536), (8192, 4096)):
        assert at(source.page(offset, length), length) == DATA[offset : offset + length]
    scratch = source.page(0, 4096)
    assert source.page(4096, 4096) == scratch
    assert source.page(0, 65_536) == source.locate(0, 65_536)
    os.truncate(path, 5000)
    assert source.page(4096, 4096) is None
    assert source.page(8192, 4096) is None
    eventually(lambda: source.page(0, 4096), None)
    await source.aclose()


async def test_bytes_that_are_expected_come_to_hand(path: Path) -> None:
    """A thread reads what is announced, as far as the file goes; what was announced once is not read twice."""
    source = aiouffd.FileSource(path)
    drop(source)
    source.expect(0, 4 * SIZE)
    source.expect(4096, SIZE)
    await asyncio.to_thread(source._threads.shutdown)  # it has done all then
    assert [item[:2] for item in source._populated] == [(0, SIZE)]
    assert at(source.locate(5, SIZE - 5), SIZE - 5) == DATA[5:]
    # Not for long, and not behind the end of a file that is cut: it is asked again then.
    piece = source._populated[0]
    source._populated = (piece._replace(when=0.0),)
    assert at(source.locate(0, SIZE), SIZE) == DATA
    source._populated = (piece._replace(when=float("inf")),)
    os.truncate(path, 5000)
    assert source.locate(0, SIZE) is None
    await source.aclose()


def test_threads_bring_to_hand_while_the_loop_looks(path: Path) -> None:
    """Neither is disturbed."""
    source = aiouffd.FileSource(path)
    done = threading.Event()

    def populate() -> None:
        while not done.is_set():
            source._populate(0, 4096)

    threads = [threading.Thread(target=populate) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for _ in range(300_000):  # one in some 200 failed
            assert source._find_populated(8192, 16384) is None
    finally:
        sys.setswitchinterval(interval)
        done.set()
        for thread in threads:
            thread.join()


def test_holes_are_not_brought_to_hand() -> None:
    """In tmpfs they would take memory, which stays the file's."""
    page = mmap.PAGESIZE
    fd = os.memfd_create("sparse", os.MFD_CLOEXEC)
    try:
        os.truncate(fd, 64 * page)
        for at_page in (3, 4, 9):
            os.pwrite(fd, b"data", at_page * page)
        source = aiouffd.FileSource(f"/proc/self/fd/{fd}")
        blocks = os.fstat(fd).st_blocks
        source.expect(page, 63 * page)
        source._threads.shutdown()
        assert os.fstat(fd).st_blocks == blocks
        assert [item[:2] for item in source._populated] == [(3 * page, 5 * page), (9 * page, 10 * page)]
    finally:
        os.close(fd)


def test_what_is_expected_needs_no_thread(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a hint: where none can be started (RLIMIT_NPROC), nothing fails."""

    def refused(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    source = aiouffd.FileSource(path)
    monkeypatch.setattr(threading.Thread, "start", refused)
    source.expect(0, SIZE)


async def test_a_file_that_mincore_is_silent_about(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To others than its owner mincore tells nothing: RWF_NOWAIT is asked instead. What fails is read, and repeated."""
    source = aiouffd.FileSource(path)
    source._tells = False
    assert source.locate(0, 4096) is None
    assert bytes(source.read_nowait(4096, 4096) or b"") == DATA[4096:8192]
    monkeypatch.setattr(os, "preadv", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    assert source.read_nowait(4096, 4096) is None
    await source.aclose()


_CHANGES = {
    "written": lambda path: path.write_bytes(DATA[::-1]),
    "a byte": lambda path: patch(path, 5000, b"x"),
    "behind": lambda path: patch(path, SIZE - 1, DATA[-1:]),
    "grown": lambda path: patch(path, SIZE, b"more"),
    "cut": lambda path: os.truncate(path, 5000),
    "cut and grown": lambda path: path.write_bytes(bytes(SIZE)),
    "touched": lambda path: os.utime(path, ns=(0, 1)),
}


def patch(path: Path, offset: int, data: bytes) -> None:
    """Write into a file in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("tells", [True, False], ids=["mincore", "no mincore"])
@pytest.mark.parametrize("change", _CHANGES)
async def test_a_file_that_changes(path: Path, change: str, tells: bool) -> None:
    """Neither way of reading mixes old and new bytes: nothing is located any more, and a read says what happened."""
    os.utime(path, ns=(0, 0))  # long ago: the clock of file stamps ticks every few milliseconds only
    for source in (aiouffd.FileSource(path), travelled(aiouffd.FileSource(path))):
        source._tells = tells
        assert bytes(await source.read(0, 8192)) == DATA[:8192]
        await asyncio.to_thread(_CHANGES[change], path)
        for ask in (source.locate, source.page, source.read_nowait):
            eventually(functools.partial(ask, 0, 4096), None)
        with pytest.raises(aiouffd.SourceError, match=r"the file (was written after|has \d+ bytes; it had)"):
            await source.read(0, 4096)
        assert source.hole(0, 4096) == 0
        await source.aclose()
        await asyncio.to_thread(path.write_bytes, DATA)
        os.utime(path, ns=(0, 0))


async def test_a_change_on_the_way_to_the_pager(path: Path) -> None:
    """What is compared is the file as it was when the first source of it was made."""
    os.utime(path, ns=(0, 0))
    source = aiouffd.FileSource(path)
    patch(path, 0, b"x")
    arrived = travelled(source)
    assert arrived.locate(0, 4096) is None
    with pytest.raises(aiouffd.SourceError, match="was written after"):
        await arrived.read(0, 4096)
    await arrived.aclose()


async def test_names_and_modes_are_no_change(path: Path) -> None:
    """A file that is renamed, linked or protected has the same bytes."""
    source = aiouffd.FileSource(path)
    path.chmod(0o600)
    os.link(path, path.with_suffix(".link"))
    path.rename(path.with_suffix(".new"))
    path.with_suffix(".new").unlink()
    source._pin._until = 0.0  # so that it looks again
    assert bytes(await source.read(0, 4096)) == DATA[:4096]
    assert source.locate(0, 4096) is not None
    await source.aclose()


async def test_a_file_that_was_cut(path: Path) -> None:
    """ShortReadError, not zeros, and no hole either."""
    source = aiouffd.FileSource(path)
    os.truncate(path, 5000)
    with pytest.raises(aiouffd.ShortReadError):
        await source.read(4096, 4096)
    assert source.hole(8192, 4096) == 0
    await source.aclose()


def test_a_page_that_was_cut_in_two_is_not_located(path: Path) -> None:
    """The rest of a cut file's last page would be zeros in its mapping: it is read, which fails, instead."""
    source = aiouffd.FileSource(path)
    assert source.locate(4096, 4096) is not None
    os.truncate(path, 5000)
    assert source.locate(4096, 4096) is None
    eventually(lambda: source.locate(0, 4096), None)  # a file that was cut may have been written, too


def test_holes_of_a_sparse_file(tmp_path: Path) -> None:
    """What SEEK_HOLE finds; data is never a hole."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(8 << 20)
        file.seek(1 << 20)
        file.write(b"data" * 1024)
    source = aiouffd.FileSource(path)
    assert source.hole(0, 8 << 20) == 1 << 20
    assert source.hole(4096, 4096) == 4096
    assert source.hole(1 << 20, 4096) == 0
    assert source.hole((1 << 20) + 4096, 8 << 20) == (7 << 20) - 4096
    patch(path, 0, b"data")
    eventually(functools.partial(source.hole, 0, 4096), 0)


def test_a_file_stays_the_one_that_was_opened(path: Path) -> None:
    """Another that takes its name changes nothing, not even on the journey."""
    source = aiouffd.FileSource(path)
    other = path.with_suffix(".new")
    other.write_bytes(b"other")
    other.rename(path)
    assert travelled(source).size == source.size == SIZE
    assert pickle.loads(pickle.dumps(source)).size == 5  # a plain pickle has only the path


@pytest.mark.parametrize("name", ["missing", "."])
def test_files_that_cannot_be_opened(tmp_path: Path, name: str) -> None:
    """SourceError with the path; a directory is no file."""
    with pytest.raises(aiouffd.SourceError, match=str(tmp_path)):
        aiouffd.FileSource(tmp_path / name)


def test_no_thread_is_started_while_the_interpreter_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To start one can wait for ever then, and so can close(2) for a file system. The kernel closes it."""
    path = tmp_path / "x.bin"
    path.write_bytes(b"x" * 4096)
    source = aiouffd.FileSource(path)
    fd, source._file_system = source._fd, SimpleNamespace(remote=True)  # type: ignore[assignment]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "is_finalizing", lambda: True)
        patch.setattr(threading, "Thread", lambda **_: pytest.fail("a thread"))
        source.__del__()
    os.fstat(fd)


def test_a_server_is_not_asked_when_a_source_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the last reference is dropped, on an event loop, neither fstat(2) nor close(2) may wait for one."""
    path = tmp_path / "x.bin"
    path.write_bytes(b"x" * 4096)
    source = aiouffd.FileSource(path)
    fd, source._file_system = source._fd, SimpleNamespace(remote=True)  # type: ignore[assignment]
    thread = Mock()
    with monkeypatch.context() as patch:
        patch.setattr(threading, "Thread", thread)
        patch.setattr(os, "fstat", lambda _: pytest.fail("the server was asked"))
        source.__del__()
    source._fd = -1
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", Mock(side_effect=OSError(errno.ENOTCONN, "the server has gone")))
        thread.call_args.kwargs["target"](*thread.call_args.kwargs["args"])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_descriptor_whose_server_has_gone_is_closed_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """close(2) of a FUSE file is ENOTCONN then, and nobody can do anything about it."""
    path = tmp_path / "x.bin"
    path.write_bytes(b"x" * 4096)
    source = aiouffd.FileSource(path)
    source._file_system = SimpleNamespace(remote=True)  # type: ignore[assignment]
    os.close(source._fd)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", threading.Thread.run)
        source.__del__()
    source._fd = -1
