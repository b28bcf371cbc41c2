"""`criu.image_file`: the encoding of image files, right and wrong."""

from __future__ import annotations

import struct
from pathlib import Path

import criu_images as make
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.criu.image_file import fields, messages, numbers
from aiouffd.errors import HandoffError

PATH = Path("x.img")
_values = st.one_of(st.integers(0, 2**64 - 1), st.binary(max_size=40))
_messages = st.lists(st.tuples(st.integers(1, 2**29 - 1), _values), max_size=8)


@given(st.lists(_messages, max_size=5))
def test_what_was_written_is_read(written: list[list[tuple[int, int | bytes]]]) -> None:
    """Any fields, in any number of messages, in their order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aiouffd.criu.image_file._read", lambda _: make.image(7, map(make.message, written)))
        found = [list(fields(PATH, message)) for message in messages(PATH, 7)]
    as_bytes = [[(n, v if isinstance(v, int) else bytes(v)) for n, v in message] for message in found]
    assert as_bytes == written


def test_numbers_of_fixed_width_and_repeated_ones() -> None:
    """32 and 64 bits; the last of a repeated field counts; fields of bytes are left out."""
    message = memoryview(
        b"\x09" + struct.pack("<Q", 1 << 60) + b"\x15" + struct.pack("<I", 9) + b"\x18\x05\x18\x06\x22\x01x"
    )
    assert numbers(PATH, message) == {1: 1 << 60, 2: 9, 3: 6}


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (b"\x00\x01", "the number 0"),
        (b"\x0b", "unknown kind 3"),
        (b"\x12\x7fx", "127 bytes, but only 1"),
        (b"\x11\0\0", "8 bytes, but only 2"),
        (b"\x08\x80", "ends within a number"),
        (b"\x08" + b"\xff" * 9 + b"\x02", "more than 64 bits"),
        (b"\x08" + b"\x80" * 10 + b"\x01", "more than 64 bits"),
        (b"\x08", "ends within a number"),
    ],
)
def test_what_is_no_message(message: bytes, complaint: str) -> None:
    """The error names the file."""
    with pytest.raises(HandoffError, match=rf"x\.img: .*{complaint}"):
        list(fields(PATH, memoryview(message)))


def test_the_largest_number() -> None:
    """64 bits are allowed."""
    assert numbers(PATH, memoryview(b"\x08" + b"\xff" * 9 + b"\x01")) == {1: 2**64 - 1}
