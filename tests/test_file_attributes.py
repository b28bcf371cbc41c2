"""`sources.file_attributes`: the file system of a file, and whether the file is still as it was."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from aiouffd.errors import ShortReadError, SourceError
from aiouffd.sources import file_attributes
from aiouffd.sources.file_attributes import FileSystem, Pin

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def fd() -> Iterator[int]:
    """A file of ten bytes that was written long ago."""
    fd = os.memfd_create("file", os.MFD_CLOEXEC)
    os.write(fd, bytes(10))
    os.utime(fd, ns=(5, 5))
    yield fd
    os.close(fd)


def test_a_file_in_memory(fd: int) -> None:
    """A read of it never waits."""
    kind = FileSystem(fd)
    assert (kind.in_memory, kind.remote, kind.answers_at_once) == (True, False, True)


@pytest.mark.parametrize(("number", "at_once"), [(0x65735546, True), (0x6969, True), (0x01021997, False)])
def test_remote_file_systems(fd: int, number: int, at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """FUSE, NFS and 9p, of which the last ignores AT_STATX_DONT_SYNC."""

    class Libc:
        @staticmethod
        def fstatfs(_: int, data: bytearray) -> int:
            data[:8] = number.to_bytes(8, "little")  # type: ignore[index,unused-ignore]
            return 0

    monkeypatch.setattr(file_attributes, "_libc", Libc)
    kind = FileSystem(fd)
    assert (kind.in_memory, kind.remote, kind.answers_at_once) == (False, True, at_once)


def test_a_file_system_that_does_not_tell() -> None:
    """It may be a remote one."""
    assert FileSystem(-1).remote


def test_a_pin_holds_until_the_file_changes(fd: int) -> None:
    """Size or time of change; asked at most once in a millisecond."""
    pin = Pin(fd, 10, 5)
    assert pin.holds_nowait()
    assert pin.changed() is None
    os.pwrite(fd, b"x", 0)
    found = pin.changed()
    assert found is not None
    assert found[0] is SourceError
    pin._until = float("inf")
    assert pin.holds_nowait()  # as it was a moment ago
    pin._until = 0.0
    assert not pin.holds_nowait()
    os.utime(fd, ns=(5, 5))
    pin._until = 0.0
    assert pin.holds_nowait()  # a writer that puts the time back is not seen


@pytest.mark.parametrize(("size", "kind"), [(9, ShortReadError), (11, SourceError), (10, None)])
def test_another_size_is_a_change(fd: int, size: int, kind: type[Exception] | None) -> None:
    """Also with the same time; a shorter file has an error of its own."""
    pin = Pin(fd, 10, 5)
    os.truncate(fd, size)
    os.utime(fd, ns=(5, 5))
    found = pin.changed()
    assert (None if found is None else found[0]) is kind
    assert pin.holds_nowait() == (kind is None)
