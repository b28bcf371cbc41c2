"""`store.index`: where each chunk is."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from snapshots import CHUNK, HEADER_SIZE, a_pack, a_record, encoded_index

import aiouffd
from aiouffd.store.index import GROUP, PACK, RECORD, Index, Record

SIZE = 1300 * CHUNK + 5
PACKS = [a_pack(1), a_pack(2)]
SOME = [a_record(0), a_record(511, 1), a_record(512), a_record(1300, length=5)]
RECORDS_AT = HEADER_SIZE + 2 * PACK.size + 3 * GROUP.size

chunks = st.sets(st.integers(0, 1300), max_size=60) | st.sets(st.integers(500, 530))


@given(chunks, st.data())
def test_it_finds_what_was_put_in(present: set[int], data: st.DataObject) -> None:
    """Each chunk, and which are zeros, as a set says it."""
    records = {chunk: a_record(chunk, chunk % 2, length=1 + chunk % 5) for chunk in present}
    index = Index(encoded_index(SIZE, PACKS, records.values()), "x")
    assert (index.size, index.chunk_size, index.chunks, index.records) == (SIZE, CHUNK, 1301, len(present))
    assert [index.pack(number) for number in range(index.packs)] == PACKS
    assert {chunk: found for chunk in range(1301) if (found := index.find(chunk))} == records
    assert list(index.find_all()) == sorted(records.values())
    low = data.draw(st.integers(0, 1301))
    high = data.draw(st.integers(low, 1301))
    assert list(index.find_all(low, high)) == [records[c] for c in sorted(present) if low <= c < high]
    assert list(index.present(low, high)) == sorted(chunk for chunk in present if low <= chunk < high)
    assert index.absent(low, high) == min((c for c in present if low <= c < high), default=high) - low


def test_the_last_chunk_may_be_shorter() -> None:
    """The others are not."""
    index = Index(encoded_index(SIZE, PACKS, SOME), "x")
    assert [index.length_of(chunk) for chunk in (0, 1299, 1300)] == [CHUNK, CHUNK, 5]


@given(st.integers(0, len(encoded_index(SIZE, PACKS, SOME)) - 1))
def test_a_cut_index(length: int) -> None:
    """Each one is noticed when it is opened."""
    with pytest.raises(aiouffd.StoreError, match=r"^some/index: "):
        Index(encoded_index(SIZE, PACKS, SOME)[:length], "some/index")


@given(st.lists(st.tuples(st.integers(0, RECORDS_AT + 4 * RECORD.size - 1), st.integers(1, 255)), min_size=1))
def test_a_damaged_index(flips: list[tuple[int, int]]) -> None:
    """Nothing but a StoreError, or records that can be."""
    data = bytearray(encoded_index(SIZE, PACKS, SOME))
    for at, flip in flips:
        data[at] ^= flip
    try:
        index = Index(data, "x")
    except aiouffd.StoreError:
        return
    for chunk in index.present(0, index.chunks):
        try:
            record = index.find(chunk)
        except aiouffd.StoreError:
            continue
        assert record is not None
        assert record.offset + record.length <= index.pack(record.pack).length
        assert record.length <= index.length_of(chunk)


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        (a_record(7, pack=2), "its pack 2 is none of 2"),
        (a_record(7, codec=9), "its codec 9 is unknown"),
        (a_record(7, length=0), "its frame of 0 bytes cannot hold 65536"),
        (a_record(7, length=CHUNK + 1), "its frame of 65537 bytes cannot hold 65536"),
        (a_record(7, codec=0, length=100), "its frame of 100 bytes cannot hold 65536"),
        (a_record(7, offset=10), r"its frame \[10, 110\) is not in its pack"),
        (a_record(7, offset=(10 << 20) - 99), "is not in its pack of 10485760 bytes"),
        (a_record(7, offset=0xFFFFFFFF), "is not in its pack"),
    ],
)
def test_a_record_that_cannot_be(record: Record, complaint: str) -> None:
    """The error names the index, the chunk, and its place in the image."""
    index = Index(encoded_index(SIZE, PACKS, [a_record(6), record, a_record(8)]), "some/index")
    with pytest.raises(aiouffd.StoreError, match=rf"^some/index, chunk 7 \[458752, 524288\): .*{complaint}") as caught:
        index.find(7)
    assert (caught.value.chunk, caught.value.offset, caught.value.length) == (7, 7 * CHUNK, CHUNK)
    assert index.find(6) is not None
    assert index.find(8) is not None


@pytest.mark.parametrize(
    ("form", "at", "value", "complaint"),
    [
        ("8s", 0, b"aiouffdp", "no index"),
        ("I", 8, 2, "its version is 2; this library reads version 1"),
        ("I", 12, 1000, "chunk_size"),
        ("I", 12, 4096, "chunk_size"),
        ("Q", 16, 0, "asks for"),
        ("Q", 16, (1 << 64) - 1, "asks for"),
        ("Q", 24, (1 << 64) - 1, "asks for"),
        ("I", 32, 0xFFFFFFFF, "asks for"),
        ("B", 40, 1, "asks for"),
        ("Q", HEADER_SIZE + 2 * PACK.size, 1, "begins at record 1, and not at 0"),
        ("B", HEADER_SIZE + 2 * PACK.size + 8, 0, "begins at record"),
        ("B", RECORDS_AT - 1, 0x80, "its groups have 5 chunks"),
    ],
)
def test_what_no_index_says(form: str, at: int, value: Any, complaint: str) -> None:
    """It is noticed when it is opened."""
    data = bytearray(encoded_index(SIZE, PACKS, SOME))
    struct.pack_into("<" + form, data, at, value)
    with pytest.raises(aiouffd.StoreError, match=complaint):
        Index(data, "x")


def test_chunks_behind_the_end() -> None:
    """A bit of a chunk that the image does not have, with a record for it."""
    data = encoded_index(SIZE, PACKS, [*SOME, a_record(1301)])
    with pytest.raises(aiouffd.StoreError, match="its groups have 5 chunks, and its header 5"):
        Index(data, "x")


def test_a_record_that_cannot_be_read() -> None:
    """A disk that fails, and a copy that was cut: the error names the chunk; what is in memory is known."""

    class Failing(bytes):
        def __getitem__(self, where: Any) -> Any:
            if where.start == RECORDS_AT:
                raise OSError(5, "Input/output error")
            return super().__getitem__(slice(where.start, where.stop - (where.start == RECORDS_AT + RECORD.size)))

    index = Index(Failing(encoded_index(SIZE, PACKS, SOME)), "x")
    for chunk, complaint in ((0, r"x, chunk 0 .*Input/output error"), (511, r"x, chunk 511 .*it was cut")):
        with pytest.raises(aiouffd.StoreError, match=complaint):
            index.find(chunk)
        with pytest.raises(aiouffd.StoreError, match=complaint):
            list(index.find_all(chunk))
    assert index.find(512) == SOME[2]
    assert list(index.present(0, 513)) == [0, 511, 512]
    assert index.pack(1) == PACKS[1]
