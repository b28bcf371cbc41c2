"""`store.seek_table`: which frames of a file have which bytes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from seekable import MAGIC, seek_table, seekable

import aiouffd
from aiouffd.store.seek_table import FOOTER, LARGEST_FRAME, SeekTable, table_length


def decoded(data: bytes) -> SeekTable:
    """Return the table of a file."""
    length = table_length(data[-FOOTER.size :], len(data), "x")
    return SeekTable.decode(data[-length:], len(data), "x")


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=12), st.booleans(), st.data())
def test_each_byte_is_found(parts: list[bytes], checksums: bool, data: st.DataObject) -> None:
    """In any frame, those that hold nothing included; the bytes of a record are those of the frame."""
    file = seekable(parts, checksums=checksums)
    table = decoded(file)
    whole = b"".join(parts)
    assert (table.size, table.largest) == (len(whole), max(map(len, parts)))
    for number, part in enumerate(parts):
        record = table.find(number)
        assert (record is None) == (not part)
        if record is not None:
            frame = file[record.offset : record.offset + record.length]
            assert bytes(table.expand(record, frame)) == part
            if checksums:
                with pytest.raises(ValueError, match="its checksum is another"):
                    table.expand(record._replace(check=b"none"), frame)
    if whole:
        offset = data.draw(st.integers(0, len(whole) - 1))
        length = data.draw(st.integers(1, len(whole) - offset))
        within = table.within(offset, length)
        start = table.start_of(within.start)
        assert start <= offset < start + table.length_of(within.start)
        pieces = b"".join(parts[number] for number in within)
        assert pieces[offset - start : offset - start + length] == whole[offset : offset + length]


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"", "ordinary .zst file.*zstd -d.*aiouffd snapshot create.*t2sz"),
        (seekable([b"x"])[:-1], "ordinary .zst file"),
        (seek_table([], magic=MAGIC ^ 1), "ordinary .zst file"),
        (seek_table([], flags=0x04), "flags 0x04, which are unknown"),
        (struct.pack("<IBI", 1 << 27, 0x80, MAGIC), "134217728 frames do not fit in 9 bytes"),
        (struct.pack("<IBI", (1 << 27) + 1, 0x80, MAGIC), "134217729 frames are more than there may be"),
        (b"?" + seekable([b"x"]), "it was cut, or is damaged: its frames have 10 bytes, and 11 are before"),
        (seekable([b"x"])[1:], "it was cut, or is damaged: its frames have 10 bytes, and 9 are before"),
        (seekable([b"x"]).replace(struct.pack("<I", 21), struct.pack("<I", 22)), "1 frames are not all of its frame"),
        (bytes(9) + seek_table([(9, LARGEST_FRAME + 1)], 0), "a frame of 67108865 bytes would be decompressed"),
        (bytes(5000) + seek_table([(0, 5), (5000, 3000)], 0), "a frame of 0 bytes does not hold 5"),
        (bytes(5000) + seek_table([(5000, 3)], 0), "a frame of 5000 bytes does not hold 3"),
    ],
)
def test_what_is_damaged(file: bytes, reason: str) -> None:
    """A typed error names the file, and says what to do."""
    with pytest.raises(aiouffd.StoreError, match=f"^x.*{reason}"):
        decoded(file)


@given(st.binary(max_size=60))
def test_any_bytes(data: bytes) -> None:
    """They are a table whose frames are in the file, or a StoreError."""
    for file in (data, data + struct.pack("<I", MAGIC), data + FOOTER.pack(len(data) // 8, 0, MAGIC)):
        try:
            table = decoded(file)
        except aiouffd.StoreError:
            continue
        assert table.places[-1] <= len(file)
