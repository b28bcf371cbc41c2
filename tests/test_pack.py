"""`store.pack`: the header of a pack, and its name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiouffd
from aiouffd.store.codecs import digest
from aiouffd.store.pack import Frame, decode_header, encode_header, header_length, identity, is_whole, offsets

frames = st.builds(
    Frame,
    st.integers(1, 0xFFFFFF),
    st.integers(0, 2),
    st.binary(min_size=20, max_size=20),
    st.binary(min_size=16, max_size=16),
)


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
    data = bytearray(encode_header([Frame(5, 1, bytes(20), bytes(16))]))
    data[at : at + len(value)] = value
    with pytest.raises(aiouffd.StoreError, match=complaint):
        decode_header(bytes(data), "x")


def test_where_frames_are() -> None:
    """One behind the other, behind the header."""
    assert list(offsets([Frame(5, 0, b"", b""), Frame(7, 0, b"", b"")])) == [96, 101, 108]


def test_a_whole_pack() -> None:
    """Its header is the one that it is named by, and each frame is the one of the header."""
    frames = [Frame(len(data), 0, b"h" * 20, digest(data, 16)) for data in (b"first", b"second")]
    header = encode_header(frames)
    data, name = header + b"firstsecond", digest(header, 16)
    assert is_whole(data, name)
    for broken in (data[:-1], data + b"x", data.replace(b"first", b"First"), b"", data.replace(b"h" * 20, b"H" * 20)):
        assert not is_whole(broken, name)


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
