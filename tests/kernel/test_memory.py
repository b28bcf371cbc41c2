"""`kernel.memory`: addresses of buffers, what is mapped where, and memory that travels as a descriptor."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
from pattern import PAGE
from scenario import play

import aiouffd
from aiouffd import native
from aiouffd.kernel import libc
from aiouffd.kernel.memory import (
    ProcessMemory,
    SealedMemory,
    address_of,
    map_file,
    mapped,
    read_parts,
    unreadable,
    write_parts,
    zeros,
)
from aiouffd.ranges import Range


@pytest.mark.parametrize("kind", ["bytes", "bytearray", "memoryview", "mmap", "numpy"])
def test_the_address_of_any_contiguous_buffer(kind: str) -> None:
    """Read-only or not; the bytes there are the buffer's."""
    area = mmap.mmap(-1, PAGE)
    area[:3] = b"abc"
    buffers = {
        "bytes": b"abc",
        "bytearray": bytearray(b"abc"),
        "memoryview": memoryview(b"xabc")[1:],
        "mmap": area,
        "numpy": np.frombuffer(b"abc", np.uint8),
    }
    assert ctypes.string_at(address_of(buffers[kind]), 3) == b"abc"


def test_a_buffer_with_gaps_has_no_address() -> None:
    """BufferError, and no address of something else."""
    with pytest.raises(BufferError):
        address_of(memoryview(b"abcdef")[::2])


def test_what_is_mapped() -> None:
    """The parts of a range, in order, without what was unmapped."""
    region = aiouffd.Region(8 * PAGE)
    start = region.address
    assert sum(item.length for item in mapped(start, 8 * PAGE)) == 8 * PAGE
    libc.munmap(start + 2 * PAGE, 3 * PAGE)
    found = mapped(start, 8 * PAGE)
    assert found == [Range(start, 2 * PAGE), Range(start + 5 * PAGE, 3 * PAGE)]
    assert mapped(start + 2 * PAGE, 3 * PAGE) == []
    libc.mmap_fixed(start + 2 * PAGE, 3 * PAGE)


@pytest.mark.parametrize("access", [mmap.ACCESS_READ, mmap.ACCESS_WRITE, mmap.ACCESS_COPY])
def test_a_file_that_is_mapped(access: int, tmp_path: Path) -> None:
    """Without a descriptor; what is written goes to the file, or does not, or is refused."""
    path = tmp_path / "file"
    path.write_bytes(b"abc" + bytes(2 * PAGE))
    with path.open("r+b") as file:
        mapping = map_file(file.fileno(), 3 + PAGE, access)
    # Not by number: what other tests have left open may be closed by their threads meanwhile.
    assert [entry for entry in Path("/proc/self/fd").iterdir() if entry.exists() and entry.samefile(path)] == []
    assert mapping[:4] == b"abc\0"
    assert len(mapping) == 3 + PAGE
    if access == mmap.ACCESS_READ:
        with pytest.raises(TypeError):
            mapping[0] = 65
    else:
        mapping[0] = 65
        assert path.read_bytes()[:3] == (b"Abc" if access == mmap.ACCESS_WRITE else b"abc")
    start = address_of(mapping)
    mapping.close()
    assert mapped(start, 2 * PAGE) == []


@pytest.mark.parametrize("access", [mmap.ACCESS_READ, mmap.ACCESS_WRITE])
def test_a_file_that_is_mapped_is_no_data_of_the_process(access: int, tmp_path: Path) -> None:
    """RLIMIT_DATA does not limit it: services have that (LimitDATA=)."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with (tmp_path / "file").open("w+b") as file:
        file.truncate(1 << 40)
        resource.setrlimit(resource.RLIMIT_DATA, (1 << 39, before[1]))
        try:
            map_file(file.fileno(), 1 << 40, access).close()
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, before)


def test_without_proc_all_counts_as_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nobody to ask."""

    def missing(path: str) -> bytes:
        raise FileNotFoundError(path)

    monkeypatch.setattr("aiouffd.kernel.files.read", missing)
    assert mapped(0x1000, PAGE) == [Range(0x1000, PAGE)]


def test_zeros_cost_no_memory() -> None:
    """They are read through the kernel's one page of zeros."""
    size = 1 << 20
    assert zeros(size)[:] == bytes(size)
    assert zeros(size) is zeros(size)


def test_an_unreadable_page_is_never_copied() -> None:
    """A read of it would be EFAULT."""
    assert libc.peek([address_of(unreadable())]) == b""


def test_sealed_memory_is_closed_once() -> None:
    """Its seals are set, an empty one has no mapping, and `close` may be called again."""
    sealed = SealedMemory.from_buffer(b"abc" * PAGE)
    assert fcntl.fcntl(sealed.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
    assert sealed.map is not None
    assert sealed.map[:3] == b"abc"
    assert sealed.size == 3 * PAGE
    sealed.close()
    sealed.close()
    assert sealed.map[:3] == b"abc"
    assert SealedMemory.from_buffer(b"").map is None


def test_a_buffer_that_cannot_be_sealed_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seal is refused: the error is raised, and the descriptor closed."""
    refused = []

    def refuse(fd: int, *_: object) -> int:
        refused.append(Path(f"/proc/self/fd/{fd}"))
        assert "memfd" in str(refused[0].readlink())
        raise OSError("no seals")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(OSError, match="no seals"):
        SealedMemory.from_buffer(b"abc")
    assert "memfd" not in str(refused[0].resolve())


def test_memory_is_read_without_a_fault() -> None:
    """Of a process, whose missing pages are told, and of a memfd."""
    region = aiouffd.Region(4 * PAGE)
    region[0], region[2 * PAGE] = 1, 3
    data = bytearray(4 * PAGE)
    with aiouffd.Userfaultfd() as uffd, ProcessMemory.own(region.address) as own:
        uffd.register(region.address, 4 * PAGE, aiouffd.RegisterMode.MISSING)
        assert own.file == -1
        assert own.page(0, PAGE) == region[:PAGE]
        assert own.page(PAGE, PAGE) == b""
        assert own.read_into(memoryview(data), 0) == [PAGE, 3 * PAGE]
        uffd.unregister(region.address, 4 * PAGE)
    assert data[::PAGE] == bytes([1, 0, 3, 0])
    fd = os.memfd_create("memory")
    os.ftruncate(fd, 2 * PAGE)
    os.pwrite(fd, b"file", PAGE)
    with ProcessMemory(fd) as file:
        assert file.file == fd
        assert file.read_into(memoryview(data)[:PAGE], PAGE) == []
        assert data[:4] == b"file"
        os.ftruncate(fd, PAGE + 4)  # it ends within its last page
        assert file.page(PAGE, PAGE) == b"file".ljust(PAGE, b"\0")
        assert file.page(2 * PAGE, PAGE) == b""
        last = bytearray(2 * PAGE)
        assert file.read_into(memoryview(last), PAGE) == [2 * PAGE]
        assert last == b"file".ljust(2 * PAGE, b"\0")


@pytest.mark.parametrize("missing", ["", "left out"])
def test_parts_of_a_file_by_one_call(missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What ends before its end has fewer bytes, and what is behind it has none; the parts behind that are read."""
    monkeypatch.setattr(native, "reason", lambda: missing)
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    with path.open("rb+", buffering=0) as file:
        wanted = [(2, 3), (8, 4), (20, 1), (0, 1)]
        assert read_parts(file.fileno(), wanted) == [(2, b"234"), (8, b"89"), (20, b""), (0, b"0")]
        assert read_parts(file.fileno(), []) == []
        assert write_parts(file.fileno(), [(1, b"ab"), (6, b"c")]) == (0 if missing else 2)
        assert path.read_bytes() == (b"0123456789" if missing else b"0ab345c789")
        assert write_parts(file.fileno(), [(1, b"no"), (6, memoryview(b"no"))]) == 0
        assert b"no" not in path.read_bytes()


def limited(path: str) -> None:
    """Scenario: a file may not become larger."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, 6))
    with Path(path).open("rb+", buffering=0) as file:
        assert write_parts(file.fileno(), [(0, b"ab"), (5, b"cd"), (0, b"ef")]) == 1
        assert write_parts(file.fileno(), [(6, b"cd")]) == 0
    assert Path(path).read_bytes() == b"ab\0\0\0c"


def test_parts_that_a_disk_does_not_take(tmp_path: Path) -> None:
    """The first that is written in part, or not at all, ends it."""
    (tmp_path / "file").touch()
    play(limited, str(tmp_path / "file"))
