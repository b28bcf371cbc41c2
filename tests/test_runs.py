"""`engine.runs`: parts, joins, and what is left of a run after a change of the layout."""

from __future__ import annotations

import ctypes
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.engine.mappings import ZEROS, Mapping, Mappings
from aiouffd.engine.runs import FOR_FAULT, Op, Purpose, Run, merge, still_valid, zero_runs
from aiouffd.engine.statistics import Counter
from aiouffd.kernel.memory import address_of

PAGE = 4096
BASE = 0x10000000


def described(run: Run) -> tuple[object, ...]:
    """Return all that a run says."""
    return run.op, run.dst, run.offset, run.left, run.src, run.owner, run.purpose


def test_a_part_is_of_the_same_kind() -> None:
    """Addresses, offsets and source move along; ZEROS stays."""
    owner = object()
    run = Run(Op.COPY, BASE, 8 * PAGE, 4 * PAGE, 1 << 20, owner, FOR_FAULT)
    assert described(run.part(PAGE, 2 * PAGE)) == (
        *(Op.COPY, BASE + PAGE, 9 * PAGE, 2 * PAGE, (1 << 20) + PAGE, owner, FOR_FAULT),
    )
    assert described(run) == (Op.COPY, BASE, 8 * PAGE, 4 * PAGE, 1 << 20, owner, FOR_FAULT)
    assert Run(Op.ZEROPAGE, BASE, ZEROS, 4 * PAGE).part(PAGE, PAGE).offset == ZEROS
    assert Run(Op.COPY, BASE, 0, 4 * PAGE).part(PAGE, PAGE).offset == PAGE


def test_a_run_moves_forward() -> None:
    """As it is worked off."""
    run = Run(Op.COPY, BASE, 0, 4 * PAGE, 1 << 20)
    run.advance(PAGE)
    assert described(run)[1:5] == (BASE + PAGE, PAGE, 3 * PAGE, (1 << 20) + PAGE)
    zeros = Run(Op.ZEROPAGE, BASE, ZEROS, 4 * PAGE)
    zeros.advance(PAGE)
    assert (zeros.dst, zeros.offset, zeros.left) == (BASE + PAGE, ZEROS, 3 * PAGE)


@pytest.mark.parametrize(
    ("op", "begin", "count", "covered"),
    [
        *((Op.COPY, 4, 4, True), (Op.COPY, 5, 1, True), (Op.COPY, 3, 2, False), (Op.COPY, 7, 2, False)),
        *((Op.COPY, 3, 6, False), (Op.POISON, 5, 1, False), (Op.COPY, 8, 1, False)),
    ],
)
def test_what_a_run_covers(op: int, begin: int, count: int, covered: bool) -> None:
    """All that another does, by the same operation."""
    assert Run(Op.COPY, 4 * PAGE, 0, 4 * PAGE).covers(Run(op, begin * PAGE, 0, count * PAGE)) == covered


def test_names_are_the_kernels() -> None:
    """As in its header."""
    names = [Run(op, BASE, 0, PAGE).name for op in range(6)]
    assert names == [
        *("UFFDIO_COPY", "UFFDIO_ZEROPAGE", "UFFDIO_CONTINUE", "UFFDIO_POISON"),
        *("UFFDIO_WRITEPROTECT", "UFFDIO_WRITEPROTECT"),
    ]
    assert repr(Run(Op.POISON, BASE, 0, PAGE)) == "<Run UFFDIO_POISON [0x10000000, 0x10001000)>"


_pieces = st.lists(
    st.tuples(
        st.integers(0, 30),
        st.sampled_from([Op.COPY, Op.ZEROPAGE]),
        st.sampled_from([0, 1]),
        st.sampled_from([0, PAGE]),
        st.sampled_from([0, 1]),
    ),
    max_size=12,
    unique_by=lambda piece: piece[0],
)
OWNERS = [object(), object()]
PURPOSES = [FOR_FAULT, Purpose(Counter.PAGES_PREFETCH, [])]


@given(_pieces)
def test_what_is_joined_does_the_same(pieces: list[tuple[int, int, int, int, int]]) -> None:
    """Each page is filled by the same operation, from the same place, for the same purpose; nothing more is joined."""

    def pages(runs: list[Run]) -> dict[int, tuple[object, ...]]:
        return {
            run.dst + at: (run.op, run.offset + at, run.op == Op.COPY and (run.src + at, run.owner), run.purpose)
            for run in runs
            for at in range(0, run.left, PAGE)
        }

    runs = [
        Run(op, BASE + page * PAGE, page * PAGE + skew, PAGE, (1 << 20) + page * PAGE, OWNERS[owner], PURPOSES[purpose])
        for page, op, owner, skew, purpose in pieces
    ]
    before = pages(runs)
    merged = merge(runs)
    assert pages(merged) == before
    assert [run.dst for run in merged] == sorted(run.dst for run in merged)
    for one, other in itertools.pairwise(merged):
        if one.dst + one.left == other.dst:
            alike = one.op == other.op and one.purpose is other.purpose and one.offset + one.left == other.offset
            assert not alike or (one.op == Op.COPY and one.owner is not other.owner)


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 8), st.integers(-1, 20)), max_size=6),
    st.integers(0, 20),
    st.integers(1, 12),
    st.integers(-1, 20),
)
def test_only_what_is_shown_still_is_valid(
    mapped: list[tuple[int, int, int]], begin: int, count: int, offset: int
) -> None:
    """Page by page: its address shows what the run was made for; memory that grew, or nothing, shows zeros."""
    mappings = Mappings()
    shown: dict[int, int] = {}
    for start, length, first in mapped:
        mappings.add(BASE + start * PAGE, BASE + (start + length) * PAGE, first * PAGE if first >= 0 else ZEROS)
        for at in range(length):
            shown[start + at] = (first + at) * PAGE if first >= 0 else ZEROS
    run = Run(Op.COPY, BASE + begin * PAGE, offset * PAGE if offset >= 0 else ZEROS, count * PAGE, 1 << 20)
    expected = [
        begin + at
        for at in range(count)
        if shown.get(begin + at, ZEROS) == (ZEROS if offset < 0 else (offset + at) * PAGE)
    ]
    parts = still_valid(run, mappings, PAGE)
    found = [(part.dst - BASE) // PAGE + at for part in parts for at in range(part.left // PAGE)]
    assert found == expected
    assert all(part.src - (1 << 20) == part.dst - run.dst for part in parts)


def test_zeros_are_mapped_or_copied() -> None:
    """By one ZEROPAGE, or by COPYs out of a small buffer of zeros."""
    (run,) = zero_runs(BASE, 0, 100 * PAGE, PAGE, FOR_FAULT, mapped=True)
    assert described(run) == (Op.ZEROPAGE, BASE, 0, 100 * PAGE, 0, None, FOR_FAULT)
    for offset in (0, 8 * PAGE, ZEROS):
        runs = list(zero_runs(BASE, offset, 100 * PAGE, PAGE, FOR_FAULT, mapped=False))
        assert [run.left for run in runs] == [64 * PAGE, 36 * PAGE]
        assert [run.dst for run in runs] == [BASE, BASE + 64 * PAGE]
        assert [run.offset for run in runs] == ([offset, offset + 64 * PAGE] if offset >= 0 else [ZEROS, ZEROS])
        assert all(run.op == Op.COPY and run.purpose is FOR_FAULT for run in runs)
        assert all(run.src == address_of(run.owner) for run in runs)
        assert all(ctypes.string_at(run.src, run.left) == bytes(run.left) for run in runs)
    assert [run.left for run in zero_runs(0, 0, 4 << 20, 2 << 20, FOR_FAULT, mapped=False)] == [2 << 20] * 2


def test_what_is_left_of_a_run() -> None:
    """Of a mapping from offset 0 on, of another one, and of what is not mapped, which shows zeros."""
    mappings = Mappings([Mapping(BASE, BASE + 4 * PAGE, 0), Mapping(BASE + 4 * PAGE, BASE + 6 * PAGE, 20 * PAGE)])

    def left(begin: int, offset: int, count: int) -> list[tuple[int, int, int]]:
        run = Run(Op.ZEROPAGE, BASE + begin * PAGE, offset if offset < 0 else offset * PAGE, count * PAGE)
        return [
            ((part.dst - BASE) // PAGE, part.left // PAGE, part.offset // PAGE)
            for part in still_valid(run, mappings, PAGE)
        ]

    assert left(0, 0, 4) == [(0, 4, 0)]
    assert left(1, 1, 6) == [(1, 3, 1)]
    assert left(3, 19, 2) == [(4, 1, 20)]
    assert left(5, ZEROS, 3) == [(6, 1, -1), (7, 1, -1)]
    assert left(0, 1, 4) == []
