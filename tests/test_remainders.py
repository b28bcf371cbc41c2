"""`engine.remainders`: windows in pieces, against a model of which pages came."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.engine.remainders import FIRST_PIECE, Remainders
from aiouffd.engine.runs import Op, Run

PAGE = 4096
BASE = 0x7F0000000000
FIRST = FIRST_PIECE // PAGE


def pages(run: Run) -> range:
    """Return which pages a run holds; its source must have moved along."""
    assert run.src == run.dst - BASE
    assert run.offset == run.dst - BASE
    return range((run.dst - BASE) // PAGE, (run.dst - BASE + run.left) // PAGE)


def window(first: int, count: int, op: int = Op.COPY) -> Run:
    """Return a run."""
    return Run(op, BASE + first * PAGE, first * PAGE, count * PAGE, first * PAGE)


@given(st.integers(0, 50), st.integers(1, 600), st.integers(0, 700), st.sampled_from([Op.COPY, Op.ZEROPAGE]))
def test_the_first_piece_holds_the_page_that_is_waited_for(first: int, count: int, wanted: int, op: int) -> None:
    """A large COPY is divided: the piece with the page now, the rest later, nothing twice and nothing missing."""
    now, later = Remainders(PAGE).split([window(first, count, op)], [BASE + wanted * PAGE])
    (piece,) = now
    if op != Op.COPY or count <= FIRST:
        assert list(pages(piece)) == list(range(first, first + count))
        assert later == []
        return
    assert len(pages(piece)) == FIRST
    if first <= wanted < first + count:
        assert wanted in pages(piece)
        assert pages(piece).start in (wanted, first + count - FIRST)
    else:
        assert pages(piece).start == first
    together = sorted(page for run in [*now, *later] for page in pages(run))
    assert together == list(range(first, first + count))
    assert [pages(run).start for run in later] == sorted((pages(run).start for run in later), reverse=True)


@given(
    st.lists(st.integers(1, 700), min_size=1, max_size=4),
    st.lists(st.one_of(st.none(), st.integers(0, 3000)), max_size=60),
)
def test_each_page_comes_once(counts: list[int], steps: list[int | None]) -> None:
    """Pieces in turn, and out of turn for a page; at the end all have come."""
    rest = Remainders(PAGE)
    at, left = 0, set[int]()
    for count in counts:
        rest.add([window(at, count)])
        left |= set(range(at, at + count))
        at += count + 1
    for wanted in [*steps, *[None] * at]:
        if wanted is None:
            piece = rest.next_piece()
            assert (piece is None) == (not left)
            if piece is not None:
                assert piece.left <= 128 << 10
        else:
            piece = rest.take(BASE + wanted * PAGE)
            assert (piece is None) == (wanted not in left)
            assert piece is None or wanted in pages(piece)
        if piece is not None:
            assert set(pages(piece)) <= left
            left -= set(pages(piece))
        assert sum(run.left for run in rest) == len(left) * PAGE
        assert bool(rest) == bool(left)
    assert not left


def test_a_toucher_that_is_faster_gets_twice_as_much_each_time() -> None:
    """From 128 KiB up to 2 MiB; half as much again once all pieces were faster than the touchers."""
    rest = Remainders(PAGE)
    rest.add([window(0, 8192)])
    at, sizes = 0, []
    for _ in range(7):
        piece = rest.take(BASE + at * PAGE)
        assert piece is not None
        assert pages(piece).start == at
        sizes.append(piece.left >> 10)
        at = pages(piece).stop
    assert sizes == [128, 256, 512, 1024, 2048, 2048, 2048]
    while rest.next_piece() is not None:
        pass
    sizes = []
    for _ in range(6):
        sizes.append(rest._hurried >> 10)
        rest.add([window(0, 1)])
        assert rest.next_piece() is not None
    assert sizes == [1024, 512, 256, 128, 128, 128]


def test_what_is_behind_a_fast_toucher_comes_before_what_he_has_passed() -> None:
    """The next piece goes on behind the page, not at the beginning of the window."""
    rest = Remainders(PAGE)
    rest.add([window(0, 512)])
    piece = rest.take(BASE + 100 * PAGE)
    assert piece is not None
    assert pages(piece).start == 100
    following = rest.next_piece()
    assert following is not None
    assert pages(following).start == pages(piece).stop


@pytest.mark.parametrize("size", [16 << 20, 1 << 30])
def test_pieces_are_of_whole_pages(size: int) -> None:
    """Also where a page is larger than the largest piece: 16 MiB and 1 GiB are sizes of huge pages."""
    rest = Remainders(size)
    run = Run(Op.COPY, 0, 0, 16 * size)
    now, later = rest.split([run], [3 * size])
    assert [(piece.dst, piece.left) for piece in now] == [(3 * size, size)]
    rest.add(later)
    pieces = [rest.take(page * size) for page in range(0, 16, 2)]
    while (piece := rest.next_piece()) is not None:
        pieces.append(piece)
    found = [piece for piece in pieces if piece is not None]
    assert all(piece.dst % size == piece.left % size == 0 for piece in found)
    assert sum(piece.left for piece in found) == 15 * size


def test_after_a_change_of_the_layout() -> None:
    """Each run is replaced by what is still valid of it."""
    rest = Remainders(PAGE)
    rest.add([window(0, 10), window(20, 10)])
    rest.revise(lambda run: [run.part(0, PAGE)] if run.dst == BASE else [])
    assert [list(pages(run)) for run in rest] == [[0]]


def test_only_what_is_kept_is_taken() -> None:
    """Not the page behind, nor the one before."""
    rest = Remainders(PAGE)
    rest.add([window(4, 2)])
    assert rest.take(BASE + 6 * PAGE) is None
    assert rest.take(BASE + 3 * PAGE) is None
    assert rest.take(BASE + 5 * PAGE) is not None
    assert not rest
