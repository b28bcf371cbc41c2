"""`store.chunk_names`: where chunks begin, and what names them."""

from __future__ import annotations

from typing import Any

from cached import CHUNK, Far, Hashed
from hypothesis import given
from hypothesis import strategies as st
from pattern import Pattern

from aiouffd.store.chunk_names import ChunkNames
from aiouffd.store.codecs import digest


def test_by_hash() -> None:
    """Those of zeros have no name."""
    source = Hashed(20 * 8192 + 100)
    names = ChunkNames(source)
    assert (names.known, names.chunk_size, names.size) == (True, 8192, 20 * 8192 + 100)
    key = digest(source.bytes_of(8192, 8192))
    assert names.of(1) == key
    assert names.fit(1, source.bytes_of(8192, 8192))
    assert not names.fit(1, source.bytes_of(0, 8192))
    assert Hashed(8 * CHUNK).chunk_key(3 * 8) is None
    assert ChunkNames(Hashed(8 * CHUNK)).of(3 * 8) is None


def test_by_what_the_source_is() -> None:
    """Other sources, and other chunks, have other names; a source that does not know what it is has none."""
    one, other = ChunkNames(Far(name="one")), ChunkNames(Far(name="other"))
    found = [names.of(number) for names in (one, other) for number in range(4)]
    assert len(set(found)) == 8
    assert {len(key or b"") for key in found} == {20}
    assert one.fit(0, b"what the source says")
    assert one.of(2) == ChunkNames(Far(name="one")).of(2)
    assert one.of(0) != ChunkNames(Far(name="one", size=5)).of(0)
    unknown: Any = Pattern(1000)
    assert not ChunkNames(unknown).known


@given(st.integers(1, 5 * CHUNK), st.data())
def test_pieces_and_runs(size: int, draw: st.DataObject) -> None:
    """The pieces of a range are that range; runs follow each other, and are no longer than asked for."""
    names = ChunkNames(Far(size))
    offset = draw.draw(st.integers(0, size - 1))
    length = draw.draw(st.integers(1, size - offset))
    at = offset
    for number, start, stop in names.pieces(offset, length):
        assert number * CHUNK + start == at
        assert start < stop <= names.length(number)
        at += stop - start
    assert at == offset + length
    numbers = sorted(draw.draw(st.sets(st.integers(0, 20))))
    runs = names.runs(numbers, 3 * CHUNK + 5)
    assert [number for run in runs for number in run] == numbers
    assert all(run == list(range(run[0], run[0] + len(run))) and len(run) <= 3 for run in runs)
    assert names.runs([1, 2], 5) == [[1], [2]]
