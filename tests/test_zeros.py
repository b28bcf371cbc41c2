"""`engine.zeros`, and what finds zeros in buffers and files."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiouffd
from aiouffd.engine.serve.zeros import BLOCK, cut
from aiouffd.kernel import libc
from aiouffd.kernel.memory import address_of, zero_blocks

if TYPE_CHECKING:
    from pathlib import Path


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.sampled_from([0, 4096, 8192]))
def test_what_is_cut_is_whole_and_alternates(blank: list[bool], short: int) -> None:
    """All bytes once, in order; zeros exactly where there are zeros; no two neighbours of one kind."""
    length = len(blank) * BLOCK - short
    pieces = list(cut(length, [at * BLOCK for at, zero in enumerate(blank) if zero]))
    at = 0
    for begin, size, zero in pieces:
        assert begin == at
        assert size > 0
        at += size
        assert set(blank[begin // BLOCK : (at + BLOCK - 1) // BLOCK]) == {zero}
    assert at == length
    assert all(one[2] != other[2] for one, other in itertools.pairwise(pieces))


@given(
    st.lists(st.sampled_from(["zeros", "data", "within", "late"]), min_size=1, max_size=12), st.sampled_from([0, 4096])
)
def test_blocks_of_zeros_are_found(kinds: list[str], short: int) -> None:
    """Each of them, the last and shorter one too; none that begins with zeros and has something behind."""
    data = bytearray(len(kinds) * BLOCK - short)
    for index, kind in enumerate(kinds):
        if kind == "data":
            data[index * BLOCK] = 1
        elif kind == "within":
            data[index * BLOCK + 100] = 1
        elif kind == "late":
            data[min((index + 1) * BLOCK, len(data)) - 1] = 1
    expected = [index * BLOCK for index, kind in enumerate(kinds) if kind == "zeros"]
    assert zero_blocks(memoryview(data), BLOCK) == expected


def test_peeking_stops_where_memory_ends() -> None:
    """What cannot be read is no signal: the bytes up to there."""
    memory = mmap.mmap(-1, 4 * 4096)
    memory[0], memory[4096] = 3, 4
    address = address_of(memory)
    assert libc.peek([address, address + 4096]) == b"\x03\x04"
    libc.mprotect(address + 2 * 4096, 4096, 0)
    assert libc.peek([address, address + 4096, address + 2 * 4096, address + 3 * 4096]) == b"\x03\x04"


def test_zeros_of_a_file_that_has_no_holes(tmp_path: Path) -> None:
    """They are found in what is resident; a file that was cut has none, and kills nobody."""
    path = tmp_path / "image"
    path.write_bytes(b"x" * BLOCK + bytes(2 * BLOCK) + bytes(BLOCK - 1) + b"y" + bytes(BLOCK))
    source = aiouffd.FileSource(path)
    assert source.hole(0, source.size) == 0
    assert source.blank(0, 5 * BLOCK, BLOCK) == [BLOCK, 2 * BLOCK, 4 * BLOCK]
    assert source.blank(BLOCK, BLOCK - 4096, BLOCK) == []
    source.expect(0, source.size)
    source._threads.shutdown()
    assert source._find_populated(0, source.size)
    assert source.blank(BLOCK, 4 * BLOCK, BLOCK) == [0, BLOCK, 3 * BLOCK]
    os.truncate(path, BLOCK)
    source._populated = ()
    assert source.blank(0, 5 * BLOCK, BLOCK) == []


@pytest.mark.parametrize("source", [aiouffd.BufferSource(b"a" + bytes(4 * BLOCK))])
def test_zeros_of_a_buffer(source: aiouffd.BufferSource) -> None:
    """From wherever it is looked at."""
    assert source.blank(0, 2 * BLOCK, BLOCK) == [BLOCK]
    assert source.blank(4096, 2 * BLOCK, BLOCK) == [0, BLOCK]


def test_what_is_cut_while_zeros_are_looked_for_is_no_zeros(tmp_path: Path) -> None:
    """Nor is anything looked at behind what was read: the copy says that the bytes are there no longer."""
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(16 * BLOCK))
    source = aiouffd.FileSource(path)
    source._populate(0, source.size)
    os.truncate(path, BLOCK + 4096)
    assert source.blank(0, 16 * BLOCK, BLOCK) == []


def test_a_disk_that_fails_while_zeros_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are none, then: whoever copies the pages is told."""
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(16 * BLOCK))
    source = aiouffd.FileSource(path)
    assert len(source.blank(0, 16 * BLOCK, BLOCK)) == 16
    pread = os.pread

    def fails(fd: int, length: int, offset: int) -> bytes:
        if length > largest:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(fd, length, offset)

    monkeypatch.setattr(os, "pread", fails)
    largest = 1
    assert source.blank(0, 16 * BLOCK, BLOCK) == []
    largest = 0
    assert source.blank(0, 16 * BLOCK, BLOCK) == []
