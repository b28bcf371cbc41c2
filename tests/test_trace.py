"""`engine.trace`: what is noted is read back, and nothing else is taken for a recording."""

from __future__ import annotations

import struct
import zlib
from array import array
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pattern import PAGE

from aiouffd.engine.ahead.trace import HEADER, Recorder, Trace
from aiouffd.errors import TraceError
from aiouffd.sources.base import Descriptor

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 1 << 30


def record(path: Path, offsets: list[int]) -> bytes:
    """Write a recording; return the file."""
    recorder = Recorder.create(path, PAGE, SIZE)
    for offset in offsets:
        recorder.note(offset)
    recorder.complete()
    return path.read_bytes()


def test_the_order_is_kept_and_each_page_is_there_once(tmp_path: Path) -> None:
    """Also with more pages than the file grows by at once."""
    offsets = [(number * 7919 % 200_000) * PAGE for number in range(200_000)]
    record(tmp_path / "trace", [*offsets, *offsets[:100]])
    trace = Trace.load(tmp_path / "trace", PAGE)
    assert list(trace.offsets) == offsets
    assert (trace.page_size, trace.size) == (PAGE, SIZE)
    assert not (tmp_path / "trace.part").exists()


def test_a_successor_goes_on_where_its_predecessor_was_killed(tmp_path: Path) -> None:
    """What was noted is in the file at once; who comes next is given the same descriptor."""
    recorder = Recorder.create(tmp_path / "trace", PAGE, SIZE)
    for number in (1, 2):
        make, arguments = recorder.travel()
        (descriptor,) = arguments
        other = make(Descriptor(descriptor.fd))
        other.note(number * PAGE)
        other._map = None  # killed: nothing is closed or written any more
    recorder.complete()
    assert list(Trace.load(tmp_path / "trace", PAGE).offsets) == [PAGE, 2 * PAGE]


def test_a_recording_that_was_not_completed_leaves_the_old_one_alone(tmp_path: Path) -> None:
    """The name is given when all is there."""
    record(tmp_path / "trace", [PAGE])
    Recorder.create(tmp_path / "trace", PAGE, SIZE).note(2 * PAGE)
    assert list(Trace.load(tmp_path / "trace", PAGE).offsets) == [PAGE]
    with pytest.raises(TraceError, match="not completed"):
        Trace.load(tmp_path / "trace.part", PAGE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:0], "0 bytes are too few"),
        (lambda data: data[:20], "20 bytes are too few"),
        (lambda data: b"AIOUFFD" + data[7:], "no recording"),
        (lambda data: data[:8] + struct.pack("<I", 2) + data[12:], "version is 2"),
        (lambda data: data[:-8], "truncated"),
        (lambda data: data[:-3], "truncated"),
        (lambda data: data + bytes(8), "truncated"),
        (lambda data: data[:-8] + bytes(8), "checksum"),
        (lambda data: data[:36] + bytes(4) + data[40:], "not completed"),
    ],
)
def test_what_is_no_recording_is_an_error_that_says_why(tmp_path: Path, change: object, message: str) -> None:
    """Wrong, truncated, damaged, of another version."""
    data = record(tmp_path / "trace", [PAGE, 3 * PAGE])
    assert callable(change)
    (tmp_path / "trace").write_bytes(change(data))
    with pytest.raises(TraceError, match=message) as caught:
        Trace.load(tmp_path / "trace", PAGE)
    assert str(tmp_path / "trace") in str(caught.value)


def test_a_recording_of_other_pages(tmp_path: Path) -> None:
    """It is for one page size, and names only pages that can be."""
    record(tmp_path / "trace", [PAGE])
    with pytest.raises(TraceError, match="pages of 4096 bytes, not 2097152"):
        Trace.load(tmp_path / "trace", 2 << 20)
    for offset in (SIZE, 17):
        body = struct.pack("<Q", offset)
        head = HEADER.pack(b"aiouffd\0", 1, PAGE, SIZE, 1, zlib.crc32(body), 1)
        (tmp_path / "trace").write_bytes(head + body)
        with pytest.raises(TraceError, match="cannot be"):
            Trace.load(tmp_path / "trace", PAGE)


@given(st.binary(max_size=200))
def test_any_bytes_are_an_error_or_a_recording(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """Nothing else is raised."""
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    head = HEADER.pack(b"aiouffd\0", 1, PAGE, SIZE, len(data) // 8, zlib.crc32(data), 1)
    for content in (data, head + data):
        path.write_bytes(content)
        try:
            trace = Trace.load(path, PAGE)
        except TraceError:
            continue
        assert list(trace.offsets) == [*dict.fromkeys(trace.offsets)]


@given(st.lists(st.integers(0, 10_000), unique=True, max_size=300))
def test_ranges_bring_each_page_once(pages: list[int]) -> None:
    """Merged where pages follow each other, and behind each batch the index to go on from."""
    trace = Trace(PAGE, SIZE, array("Q", [page * PAGE for page in pages]))
    found: list[int] = []
    for index, ranges in trace.ranges():
        brought = [page for start, length in ranges for page in range(start, start + length, PAGE)]
        assert brought == sorted(set(brought))
        found += brought
        assert all(low[0] + low[1] < high[0] for low, high in pairwise(ranges))
        assert set(found) == set(trace.offsets[:index])
    assert len(found) == len(pages)
