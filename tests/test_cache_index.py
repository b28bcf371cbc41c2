"""`store.cache_index`: a table that may be damaged in any way, and never says what was not written to it."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.store.cache_index import COUNTERS, CacheIndex, Entry
from aiouffd.store.codecs import digest, fingerprint

if TYPE_CHECKING:
    from pathlib import Path


def entry(number: int, segment: int = 1) -> Entry:
    """Return one of many."""
    return Entry(digest(b"%d" % number), fingerprint(b"data %d" % number), segment, number, 65536)


@pytest.fixture
def folder(tmp_path: Path) -> int:
    """Return a descriptor of a folder; pytest's own process ends soon."""
    return os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)


def test_what_is_added_is_found(folder: int) -> None:
    """Also by another who opens it; the newest of a key; until it is removed."""
    index, _ = CacheIndex.open(folder, 1000)
    assert index.find(entry(1).key) is None
    index.add([entry(n) for n in range(500)])
    index.add([entry(7, segment=9)])
    other, _ = CacheIndex.open(folder, 1000)
    assert [other.find(entry(n).key) for n in range(500) if n != 7] == [entry(n) for n in range(500) if n != 7]
    assert other.find(entry(7).key) == entry(7, segment=9)
    assert sorted(other.entries()) == sorted([entry(n) for n in range(500) if n != 7] + [entry(7, segment=9)])
    index.remove(entry(7))  # no longer there
    assert other.find(entry(7).key) is not None
    index.remove(entry(7, segment=9))
    assert other.find(entry(7).key) is None


def test_a_full_bucket_forgets_what_lies_in_the_oldest_segment(folder: int) -> None:
    """A table of one bucket."""
    index, _ = CacheIndex.open(folder, 1)
    index.add([entry(n, segment=n + 10) for n in range(8)])
    index.add([entry(100, segment=99)])
    assert index.find(entry(0, segment=10).key) is None
    assert index.find(entry(100).key) == entry(100, segment=99)
    assert len(index.entries()) == 8


@given(st.lists(st.tuples(st.integers(4096, 4096 + 2 * 512 - 1), st.integers(1, 255)), min_size=1, max_size=20))
def test_damaged_bits_are_no_entries(flips: list[tuple[int, int]]) -> None:
    """Whatever flips: a key is what was added, or nothing."""
    with tempfile.TemporaryDirectory() as path:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        index, fd = CacheIndex.open(folder, 8)
        index.add([entry(n) for n in range(12)])
        for at, mask in flips:
            byte = os.pread(fd, 1, at)
            os.pwrite(fd, bytes([byte[0] ^ mask]) if byte else b"", at)
        for number in range(12):
            assert index.find(entry(number).key) in (None, entry(number))
        index.add([entry(3)])
        assert index.find(entry(3).key) == entry(3)
        os.close(fd)
        os.close(folder)


def test_an_index_that_cannot_be_used_is_replaced(folder: int, tmp_path: Path) -> None:
    """Cut, of another version, or too small; those who have the old one learn that."""
    for damage in (lambda path: os.truncate(path, 5000), lambda path: path.write_bytes(b"x" * 9000), None):
        index, _ = CacheIndex.open(folder, 1000)
        index.add([entry(1)])
        (tmp_path / ".index-left").touch()  # by one that was killed
        if damage is not None:
            damage(tmp_path / "index")
        other, _ = CacheIndex.open(folder, 1000 if damage else 9000)
        assert index.replaced
        assert not other.replaced
        assert other.find(entry(1).key) is None
        assert [path.name for path in tmp_path.iterdir()] == ["index"]
    same, _ = CacheIndex.open(folder, 100)
    assert not same.replaced


def test_a_cut_file_has_no_entries(folder: int, tmp_path: Path) -> None:
    """While it is open; and a short bucket is filled again."""
    index, _ = CacheIndex.open(folder, 1)
    index.add([entry(1)])
    os.truncate(tmp_path / "index", 4096 + 100)
    assert index.find(entry(2).key) is None
    assert index.entries() == [index.find(entry(1).key)]
    index.add([entry(2)])
    assert index.find(entry(2).key) == entry(2)


def test_counters_are_of_all(folder: int) -> None:
    """They are added up."""
    index, _ = CacheIndex.open(folder, 1)
    index.count({"hits": 2, "bytes": 1 << 40})
    CacheIndex.open(folder, 1)[0].count({"hits": 3})
    assert index.counters() == dict.fromkeys(COUNTERS, 0) | {"hits": 5, "bytes": 1 << 40}
