"""`store.pack`: the header of a pack, and its name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiouffd
from aiouffd.store.pack import Frame, decode_header, encode_header, header_length, identity, offsets

frames = st.builds(Frame, st.integers(1, 0xFFFFFF), st.integers(0, 2), st.binary(min_size=20, max_size=20))


@given(st.lists(frames, max_size=20), st.binary(max_size=10))
def test_what_is_encoded_comes_back(given: list[Frame], behind: bytes) -> None:
    """Whatever follows it."""
    data = encode_header(given)
    assert len(data) == header_length(len(given))
    assert decode_header(data + behind, "x") == given


@given(st.lists(frames, min_size=1, max_size=5), st.data())
def test_a_cut_header(given: list[Frame], data: st.DataObject) -> None:
    """Each one is noticed."""
    whole = encode_header(given)
    with pytest.raises(aiouffd.StoreError, match=r"^some/pack: "):
        decode_header(whole[: data.draw(st.integers(0, len(whole) - 1))], "some/pack")


@given(st.lists(frames, min_size=1, max_size=5), st.data())
def test_a_damaged_header(given: list[Frame], data: st.DataObject) -> None:
    """Nothing but a StoreError, or frames that can be."""
    whole = bytearray(encode_header(given))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = decode_header(bytes(whole), "x")
    except aiouffd.StoreError:
        return
    assert all(frame.length and frame.codec in (0, 1, 2) for frame in found)


@pytest.mark.parametrize(
    ("at", "value", "complaint"),
    [(0, b"a" * 8, "no pack"), (8, b"\2\0\0\0", "its version is 2"), (12, b"\xff" * 4, "announces 4294967295 chunks")],
)
def test_what_no_pack_says(at: int, value: bytes, complaint: str) -> None:
    """The error says what is wrong."""
    data = bytearray(encode_header([Frame(5, 1, bytes(20))]))
    data[at : at + len(value)] = value
    with pytest.raises(aiouffd.StoreError, match=complaint):
        decode_header(bytes(data), "x")


def test_where_frames_are() -> None:
    """One behind the other, behind the header."""
    assert list(offsets([Frame(5, 0, b""), Frame(7, 0, b"")])) == [64, 69, 76]


def test_an_identity_is_of_content_and_compression() -> None:
    """Other hashes, another order, another codec or level: another name."""
    one, two = bytes(20), bytes([1]) * 20
    names = [
        identity([one, two], "zstd", 3),
        identity([two, one], "zstd", 3),
        identity([one], "zstd", 3),
        identity([one, two], "lz4", 3),
        identity([one, two], "zstd", 4),
    ]
    assert len(set(names)) == len(names)
    assert names[0] == identity([one, two], "zstd", 3)
    assert len(names[0]) == 16
