"""`sources.overlay`: which layer shows each byte, against layers that are painted one over the other."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aiouffd.sources.overlay import NOBODY, Overlay

SIZE = 60


@st.composite
def places(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Return where one layer has data: (start, end) in order, apart or side by side."""
    ends = sorted(draw(st.sets(st.integers(0, SIZE), max_size=10)))
    return list(zip(ends[::2], ends[1::2], strict=False))


@given(st.lists(places(), max_size=6), st.integers(0, SIZE - 1), st.integers(1, SIZE))
def test_the_uppermost_that_has_data_shows(layers: list[list[tuple[int, int]]], start: int, length: int) -> None:
    """For each byte; parts that touch are of different layers; the pieces of a range are those parts, cut."""
    painted = [NOBODY] * SIZE
    for layer, extents in enumerate(layers):
        for low, high in extents:
            painted[low:high] = [layer] * (high - low)
    overlay = Overlay.of(SIZE, layers)
    ends = [end for _, end in map(overlay.at, overlay.starts)]
    assert [overlay.at(offset)[0] for offset in range(SIZE)] == painted
    assert ends == [*overlay.starts[1:], SIZE]
    assert all(one != other for one, other in zip(overlay.layers, overlay.layers[1:], strict=False))
    stop = min(start + length, SIZE)
    pieces = list(overlay.pieces(start, stop))
    assert [layer for layer, low, high in pieces for _ in range(low, high)] == painted[start:stop]
    assert all(low < high for _, low, high in pieces)


def test_layers_that_show_nothing_are_left_out() -> None:
    """Those that are left are numbered anew; what nobody shows stays so."""
    overlay = Overlay.of(SIZE, [[(0, 10)], [(20, 30)], [(0, 5), (20, 30)]])
    assert set(overlay.layers) == {0, 2, NOBODY}
    again = overlay.only([0, 2])
    assert [again.at(offset)[0] for offset in (0, 5, 10, 20, 30)] == [1, 0, NOBODY, 1, NOBODY]
    assert again.starts == overlay.starts


def test_depth_does_not_show() -> None:
    """A thousand layers of one byte each, and one over all: two parts in the table."""
    layers = [[(number, number + 1)] for number in range(SIZE)] * 16
    assert len(Overlay.of(SIZE, layers).starts) == SIZE
    assert list(Overlay.of(SIZE, [*layers, [(0, SIZE)]]).starts) == [0]
