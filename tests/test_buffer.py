"""`sources.buffer`: bytes in memory."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stored import DATA, SIZE, at, travelled

import aiouffd
from aiouffd.pager.process.serialization import pack

_places = st.tuples(st.integers(0, SIZE - 1), st.integers(1, 300_000))
BUFFER = aiouffd.BufferSource(DATA)
TRAVELLED = travelled(BUFFER)


@given(_places)
def test_a_buffer_is_always_at_hand(place: tuple[int, int]) -> None:
    """The same bytes by address, by view, and after the journey; the journey copies once."""
    offset, length = place[0], min(place[1], SIZE - place[0])
    for source in (BUFFER, TRAVELLED):
        assert source.size == SIZE
        assert at(source.locate(offset, length), length) == DATA[offset : offset + length]
        assert bytes(source.read_nowait(offset, length)) == DATA[offset : offset + length]


def test_a_buffer_travels_in_one_memfd() -> None:
    """However often it travels: one sealed copy; a plain pickle carries the bytes."""
    first, second = pack(BUFFER)[1][0].fd, pack(BUFFER)[1][0].fd
    assert first == second
    assert len(pack(BUFFER)[0]) < 1000
    assert bytes(pickle.loads(pickle.dumps(BUFFER)).read_nowait(0, SIZE)) == DATA
    empty = travelled(aiouffd.BufferSource(b""))
    assert empty.size == 0


def test_a_buffer_must_be_contiguous() -> None:
    """Half of every second byte is refused, not misread."""
    with pytest.raises(ValueError, match="contiguous"):
        aiouffd.BufferSource(memoryview(DATA)[::2])


def test_a_buffer_that_is_served_cannot_be_resized() -> None:
    """Its address has been given away."""
    data = bytearray(4096)
    source = aiouffd.BufferSource(data)
    with pytest.raises(BufferError):
        data.extend(bytes(1 << 20))
    assert source.size == 4096
