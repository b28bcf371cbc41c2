"""`monitor.engines.extents`: what a handler may place by itself, and what only the loop may."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

import pytest
from pattern import Pattern

import aiouffd
from aiouffd.engine.mappings import ZEROS, Mapping
from aiouffd.engine.options import Options, Service
from aiouffd.monitor.engines.extents import Extents
from aiouffd.native.faults import Kind

if TYPE_CHECKING:
    from pathlib import Path

PAGE = mmap.PAGESIZE
START = 1 << 20


class Recorder:
    """In place of one that writes a file."""

    note = print


def extents(source: Any, mappings: list[Mapping], end: int, *, recorder: Any = None, **options: Any) -> list[Any]:
    """Return (start page, end page, kind, offset) of each extent."""
    page_size = options.pop("page_size", PAGE)
    made = Extents(Service(source, recorder), Options(**options), page_size)
    return [
        ((it.start - START) // PAGE, (it.end - START) // PAGE, Kind(it.kind), it.offset)
        for it in made.of(mappings, START, START + end * PAGE)
    ]


def mapping(first: int, last: int, offset: int) -> Mapping:
    """Return one in pages."""
    return Mapping(START + first * PAGE, START + last * PAGE, offset if offset == ZEROS else offset * PAGE)


def test_memory_and_the_zeros_behind_it() -> None:
    """The page in which the source ends is the loop's: neither all data nor all zeros."""
    source = aiouffd.BufferSource(bytes(4 * PAGE + 1))
    assert extents(source, [mapping(0, 8, 0)], 8) == [(0, 4, Kind.COPY, 0), (5, 8, Kind.ZEROS, 0)]
    whole = aiouffd.BufferSource(bytes(4 * PAGE))
    assert extents(whole, [mapping(0, 8, 0)], 8) == [(0, 4, Kind.COPY, 0), (4, 8, Kind.ZEROS, 0)]


def test_what_was_emptied_moved_or_added() -> None:
    """Zeros lie where the layout says so, and between the mappings."""
    source = aiouffd.BufferSource(bytes(8 * PAGE))
    shown = extents(source, [mapping(0, 2, 0), mapping(2, 3, ZEROS), mapping(4, 6, 5)], 9)
    assert shown == [
        *((0, 2, Kind.COPY, 0), (2, 3, Kind.ZEROS, 0), (3, 4, Kind.ZEROS, 0), (4, 6, Kind.COPY, 5 * PAGE)),
        (6, 9, Kind.ZEROS, 0),
    ]


def test_a_file_is_read_where_it_is_resident(tmp_path: Path) -> None:
    """The handler asks mincore(2) before it touches the file's mapping."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * (3 * PAGE))
    assert extents(aiouffd.FileSource(path), [mapping(0, 3, 0)], 3) == [(0, 3, Kind.RESIDENT, 0)]


def test_a_source_that_is_one_hole() -> None:
    """All of it is zeros."""
    assert extents(aiouffd.ZeroSource(3 * PAGE), [mapping(0, 3, 0)], 3) == [(0, 3, Kind.ZEROS, 0)]


@pytest.mark.parametrize("source", [Pattern(2 * PAGE), aiouffd.Handler()])
def test_what_is_not_in_memory_is_the_loops(source: Any) -> None:
    """A source behind coroutines shows zeros behind its end; what a handler shows is not known at all."""
    behind = [] if isinstance(source, aiouffd.Handler) else [(2, 3, Kind.ZEROS, 0)]
    assert extents(source, [mapping(0, 3, 0)], 3) == behind


def test_no_extent_hides_a_touch_from_a_recorder() -> None:
    """The loop must see each touch."""
    assert not extents(aiouffd.BufferSource(bytes(3 * PAGE)), [mapping(0, 3, 0)], 3, recorder=Recorder())


@pytest.mark.parametrize("options", [{"write_protect": True}, {"page_size": 2 << 20}])
def test_zeros_that_ZEROPAGE_cannot_map(options: dict[str, Any]) -> None:  # noqa: N802
    """The loop copies them: write-protected ones, and those of huge pages."""
    assert not extents(aiouffd.ZeroSource(1 << 22), [mapping(0, 1024, 0)], 1024, **options)


def test_several_memories() -> None:
    """The pages of each; one that is of two is the loop's, as what is nowhere in memory."""

    class Several:
        size = 8 * PAGE

        def memories(self) -> Any:
            """Two, and behind each what is not in memory."""
            yield 0, 2 * PAGE + 5, (1 << 30, 8 * PAGE, -1, 0)
            yield 2 * PAGE + 5, 6 * PAGE, (1 << 31, 8 * PAGE, 7, 99)

    assert extents(Several(), [mapping(0, 4, 1), mapping(4, 6, 5)], 6) == [
        *((0, 1, Kind.COPY, PAGE), (2, 4, Kind.RESIDENT, 3 * PAGE), (4, 5, Kind.RESIDENT, 5 * PAGE))
    ]


def test_what_is_mapped_piece_by_piece_is_the_loops() -> None:
    """A piece may go while a handler copies from it."""

    class Pieces:
        size = 8 * PAGE

        def memory(self) -> Any:
            """It may be unreadable."""
            return 1 << 30, 8 * PAGE, -2, 0

    assert extents(Pieces(), [mapping(0, 4, 0)], 4) == []
