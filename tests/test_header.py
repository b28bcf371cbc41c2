"""Checked reads of headers."""

from __future__ import annotations

import struct

import pytest
from array_files import region_of

import aiouffd
from aiouffd.formats.header import Cursor, Header


def test_what_the_file_does_not_have() -> None:
    """Is refused before it is read, however it is asked for."""
    header = Header(region_of(b"0123456789"))
    assert header.take(2, 3, "it") == b"234"
    assert header.take(10, 0, "it") == b""
    for start, length in ((0, 11), (10, 1), (-1, 1), (1, -1), (1 << 80, 1), (0, 1 << 80)):
        with pytest.raises(aiouffd.FormatError, match="the thing has") as caught:
            header.take(start, length, "the thing")
        assert caught.value.offset == start


def test_an_error_names_file_and_place() -> None:
    """Also as a ValueError, and after it was pickled."""
    error = Header(region_of(b"0")).wrong(7, "it is bad")
    assert str(error).endswith("at byte 7: it is bad")
    assert str(error).startswith("<Region 1 bytes")
    assert isinstance(error, ValueError)


@pytest.mark.parametrize(
    ("shape", "bits", "size"), [((), 32, 4), ((3, 4), 8, 12), ((0, 5), 64, 0), ((2, 3), 4, 3), ((1 << 60,), 8, 1 << 60)]
)
def test_sizes(shape: tuple[int, ...], bits: int, size: int) -> None:
    """Of any shape."""
    assert Header(region_of(b"0")).size_of(0, shape, bits, "it") == size


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((-1,), "shape"),
        ((True,), "shape"),
        ((2.0,), "shape"),
        (("2",), "shape"),
        ((1 << 63,), "no memory"),
        ((1 << 40, 1 << 40, 0), "no memory"),
        ((1,) * 65, "65 dimensions"),
        ((1,), "4 bits"),
    ],
)
def test_shapes_that_are_none(shape: tuple[int, ...], reason: str) -> None:
    """Are refused."""
    with pytest.raises(aiouffd.FormatError, match=reason):
        Header(region_of(b"0")).size_of(0, shape, 4 if shape == (1,) else 8, "it")


def test_a_cursor() -> None:
    """Reads on from where it is, up to its limit."""
    data = struct.pack("<IQ2sQ3s", 7, 2, b"ab", 3, b"\xff00")
    cursor = Cursor(Header(region_of(data)), 0, 1 << 30)
    assert (cursor.number("I", "it"), cursor.text(2, "it"), cursor.at) == (7, "ab", 14)
    with pytest.raises(aiouffd.FormatError, match="no UTF-8"):
        cursor.text(3, "it")
    with pytest.raises(aiouffd.FormatError, match="the header ends at 25"):
        cursor.take(1, "it")
    with pytest.raises(aiouffd.FormatError, match="has 3 bytes, and 2 are the most"):
        Cursor(Header(region_of(data)), 14, 1 << 30).text(2, "it")
    with pytest.raises(aiouffd.FormatError, match="the header ends at 3"):
        Cursor(Header(region_of(data)), 0, 3).number("I", "it")


def test_a_cursor_brings_blocks_that_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a long header takes few reads, and a short one no more than 64 KiB."""
    brought = []
    region = region_of(bytes(9 << 20))
    monkeypatch.setattr(aiouffd.Region, "bring", lambda _, start, length: brought.append((start, start + length)))
    cursor = Cursor(Header(region), 0, 9 << 20)
    for _ in range(0, 9 << 20, 1024):
        cursor.skip(1024, "it")
    ends = [end for _, end in brought]
    assert ends[0] == 64 << 10
    assert ends[-1] == 9 << 20
    assert len(ends) < 12
