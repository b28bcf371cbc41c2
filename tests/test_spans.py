"""The bytes of arrays as ranges."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.formats.spans import place_of, spans

PAGE = mmap.PAGESIZE


def found(base: Any, view: Any) -> list[tuple[int, int]]:
    """Return the ranges of a view, relative to the array that it is a view of."""
    address, shape, strides, itemsize = place_of(view)
    return list(spans(address - place_of(base)[0], shape, strides, itemsize))


def test_a_whole_array_is_one_range() -> None:
    """In whatever order its axes are."""
    base = np.zeros((20, 30, 40), np.float32)
    for view in (base, base.T, base[::-1], base.transpose(1, 0, 2), base[:, :, ::-1]):
        assert found(base, view) == [(0, base.nbytes)]
    assert found(base, base[3:4, 4:5, 5:6]) == [((3 * 1200 + 4 * 40 + 5) * 4, 4)]


def test_rows_that_are_pages_apart() -> None:
    """Each is a range; those that share pages with their neighbours are one."""
    base = np.zeros((100, PAGE), np.uint8)
    assert found(base, base[::2]) == [(row * PAGE, PAGE) for row in range(0, 100, 2)]
    assert found(base, base[:, 1:]) == [(1, 100 * PAGE - 1)]
    assert found(base, base[::3]) == [(row * PAGE, PAGE) for row in range(0, 100, 3)]
    assert found(base, base[9:2:-3]) == [(3 * PAGE, PAGE), (6 * PAGE, PAGE), (9 * PAGE, PAGE)]
    assert found(base, base[:2, 5]) == [(5, PAGE + 1)]


def test_nothing() -> None:
    """An array without elements has no bytes."""
    base = np.zeros((100, PAGE), np.uint8)
    assert found(base, base[:0]) == found(base, base[:, :0]) == found(base, base[5:2, ::7]) == []


STEPS = st.integers(-5, 5).filter(bool)


@given(st.lists(st.tuples(st.integers(1, 9), STEPS), min_size=1, max_size=3), st.permutations(range(3)))
def test_all_elements_are_in_the_ranges(axes: list[tuple[int, int]], order: list[int]) -> None:
    """And no whole page that has none, except between neighbours; none overlap."""
    base = np.zeros([12 * abs(step) for _, step in axes] + [1500], np.uint8)
    view = base[(*(slice(None, None, step) for _, step in axes), slice(0, 3))]
    view = view[tuple(slice(0, number) for number, _ in axes)]
    view = view.transpose([axis for axis in order if axis < view.ndim] + list(range(3, view.ndim)))
    view[:] = 1
    ranges = found(base, view)
    flat = base.reshape(-1)
    inside = np.zeros(base.nbytes, bool)
    for start, length in ranges:
        assert not inside[start : start + length].any()
        inside[start : start + length] = True
        assert flat[start]
        assert flat[start + length - 1]
        gaps = np.diff(np.flatnonzero(flat[start : start + length]))
        assert not gaps.size or gaps.max() <= PAGE
    assert not flat[~inside].any()


def test_a_tensor_of_torch() -> None:
    """Has the same ranges as the array that it shares memory with."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    base = np.zeros((9, 3 * PAGE), np.uint8)
    tensor = torch.from_numpy(base)
    assert found(base, tensor[::3, :PAGE]) == found(base, base[::3, :PAGE]) != []
