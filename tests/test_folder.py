"""`store.folder`: objects in a local folder."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest

import aiouffd
from aiouffd.store.folder import Folder, unwritten

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """An empty store, in a folder that is made for it."""
    return Folder.make(str(tmp_path / "a" / "store"))


def names(folder: Folder) -> list[str]:
    """Return the names of the files in a store."""
    return [path.name for path in Path(folder.path).iterdir()]


def test_objects(folder: Folder) -> None:
    """They are written, read, listed and removed; what is not there is said so."""
    assert folder.put("packs/ab/cd", [b"12", bytearray(b"345"), memoryview(b"6")])
    assert folder.put("x.snap", [b"x"])
    assert folder.read("packs/ab/cd", 0, 6) == b"123456"
    assert folder.read("packs/ab/cd", 2, 4) == b"34"
    assert folder.size("packs/ab/cd") == 6
    assert folder.size("packs/ab/ce") is None
    assert [(entry.path, entry.size) for entry in folder.list("packs")] == [("packs/ab/cd", 6)]
    assert sorted(entry.path for entry in folder.list("")) == ["packs/ab/cd", "x.snap"]
    assert list(folder.list("traces")) == []
    folder.delete("packs/ab/cd")
    folder.delete("packs/ab/cd")
    assert not Path(folder.path, "packs/ab").exists()
    with pytest.raises(aiouffd.StoreError, match=f"^{folder.path}/packs/ab/cd: it is missing"):
        folder.read("packs/ab/cd", 0, 1)


def test_objects_are_private(folder: Folder) -> None:
    """Whatever the umask says."""
    before = os.umask(0)
    try:
        folder.put("packs/ab/cd", [b"x"])
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(Path(folder.path, path).stat().st_mode) for path in ("", "packs", "packs/ab", "packs/ab/cd")]
    assert modes == [0o700, 0o700, 0o700, 0o600]


def test_an_object_may_stay(folder: Folder) -> None:
    """Or be replaced, at once."""
    assert folder.put("x.snap", [b"1"], replace=False)
    assert not folder.put("x.snap", [b"2"], replace=False)
    assert folder.read("x.snap", 0, 9) == b"1"
    assert folder.put("x.snap", [b"3"])
    assert folder.read("x.snap", 0, 9) == b"3"
    assert names(folder) == ["x.snap"]


def test_an_object_is_on_the_disk_before_its_name_is_there(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """First its bytes, then its name, then the folder that has the name."""
    told: list[str] = []
    fsync, rename = os.fsync, os.rename
    inodes = {}

    def note_fsync(fd: int) -> None:
        inodes[len(told)] = os.fstat(fd).st_ino
        told.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    def note_rename(*args: object, **options: object) -> None:
        told.append("rename")
        rename(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    folder.put("x.snap", [b"1"])
    assert told == ["file", "rename", "folder"]
    assert inodes == {0: Path(folder.path, "x.snap").stat().st_ino, 2: Path(folder.path).stat().st_ino}


def test_a_writer_that_fails_leaves_nothing(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says why."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(aiouffd.StoreError, match=r"x\.snap: it cannot be written: No space left on device"):
        folder.put("x.snap", [b"1"])
    assert names(folder) == []


def test_what_a_killed_writer_leaves_has_a_name_of_its_own(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be told from objects."""
    monkeypatch.setattr(os, "unlink", lambda *_, **__: None)
    folder.put("x.snap", [b"1"], replace=False)
    assert sorted(map(unwritten, names(folder))) == [False, True]


def test_it_is_the_folder_that_was_opened(folder: Folder, tmp_path: Path) -> None:
    """Also after it was renamed."""
    folder.put("x.snap", [b"1"])
    (tmp_path / "a").rename(tmp_path / "b")
    assert folder.read("x.snap", 0, 1) == b"1"
    assert folder.is_same(Folder(str(tmp_path / "b" / "store")))
    assert not folder.is_same(Folder(str(tmp_path)))


def test_what_is_no_object(folder: Folder) -> None:
    """A pipe in its place is not waited for."""
    os.mkfifo(Path(folder.path, "x.snap"))
    with pytest.raises(aiouffd.StoreError, match="it is no regular file"):
        folder.read("x.snap", 0, 1)


def test_what_is_no_folder(tmp_path: Path) -> None:
    """To open it is an error; to make it, too, where a file has its place."""
    (tmp_path / "file").touch()
    for place in ("file", "missing"):
        with pytest.raises(aiouffd.StoreError, match=place):
            Folder(str(tmp_path / place))
    with pytest.raises(aiouffd.StoreError, match="this folder cannot be made: File exists"):
        Folder.make(str(tmp_path / "file"))


def test_an_empty_folder_that_is_removed_while_it_is_written_to(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `delete` of another process removes it: it is made again, if not for ever."""
    make, turns = folder._make_folder, [2]

    def vanishing(path: str) -> int:
        fd = make(path)
        if turns[0]:
            turns[0] -= 1
            Path(folder.path, path).rmdir()
        return fd

    monkeypatch.setattr(folder, "_make_folder", vanishing)
    assert folder.put("packs/a/b", [b"data"])
    assert folder.read("packs/a/b", 0, 9) == b"data"
    turns[0] = 99
    with pytest.raises(aiouffd.StoreError, match="it cannot be written: No such file"):
        folder.put("packs/c/d", [b"data"])


def test_what_is_written_is_removed_meanwhile(folder: Folder) -> None:
    """As by who cleans up, or collects without a grace period: it is an error, and not an object without its bytes."""

    def data() -> Iterator[bytes]:
        yield b"data"
        for path in Path(folder.path, "indexes").iterdir():
            path.unlink()

    with pytest.raises(aiouffd.StoreError, match="what was written of it was removed meanwhile"):
        folder.put("indexes/a", data())
    assert folder.size("indexes/a") is None


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_hard_links(folder: Folder, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """As vfat is: an object stays all the same, and other errors are errors."""
    error = OSError(number, os.strerror(number))
    monkeypatch.setattr(os, "link", Mock(side_effect=error))
    test_an_object_may_stay(folder)
    error.errno = errno.EIO
    with pytest.raises(aiouffd.StoreError, match="it cannot be written"):
        folder.put("y.snap", [b"1"], replace=False)
    assert names(folder) == ["x.snap"]


def test_a_manifest_in_place_of_another(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written where the other one is still there; nobody else gives the name to a file between look and write."""
    assert not folder.put("x.snap", [b"2"], instead_of=b"1")
    folder.put("x.snap", [b"12"])
    for other in (b"", b"1", b"123", b"13"):
        assert not folder.put("x.snap", [b"2"], instead_of=other)
    looks, differs = list[bool](), folder._differs

    def look(*arguments: Any) -> bool:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other_one.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        looks.append(differs(*arguments))
        return looks[-1]

    other_one = Folder(folder.path)
    monkeypatch.setattr(folder, "_differs", look)
    assert folder.put("x.snap", [b"2"], instead_of=b"12")
    assert (folder.read("x.snap", 0, 9), looks) == (b"2", [False])
    assert names(folder) == ["x.snap"]


def test_a_folder_that_another_process_has_locked(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for, and not for ever: what replaces nothing that it has looked at goes on."""
    monkeypatch.setattr("aiouffd.store.folder._PATIENCE", 0.05)
    folder.put("x.snap", [b"1"])
    other = Folder(folder.path)
    fcntl.flock(other.fd, fcntl.LOCK_EX)
    with pytest.raises(aiouffd.StoreError, match="has its folder locked"):
        folder.put("x.snap", [b"2"], instead_of=b"1")
    assert folder.put("x.snap", [b"3"])
    fcntl.flock(other.fd, fcntl.LOCK_UN)
    monkeypatch.setattr("aiouffd.store.folder._PATIENCE", 60.0)
    assert folder.put("x.snap", [b"4"], instead_of=b"3")
