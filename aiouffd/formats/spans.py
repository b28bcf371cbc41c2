"""The bytes that an array has, as ranges: what a prefetch of it brings."""

from __future__ import annotations

import itertools
import mmap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["place_of", "spans"]


def place_of(array: Any) -> tuple[int, tuple[int, ...], tuple[int, ...], int]:
    """Return (address, shape, strides in bytes, bytes of an element) of a numpy array or a torch tensor."""
    if hasattr(array, "__array_interface__") and not hasattr(array, "data_ptr"):
        return array.__array_interface__["data"][0], array.shape, array.strides, array.itemsize
    size = array.element_size()
    return array.data_ptr(), tuple(array.shape), tuple(size * stride for stride in array.stride()), size


def spans(start: int, shape: Sequence[int], strides: Sequence[int], itemsize: int) -> Iterator[tuple[int, int]]:
    """Yield (start, length) ranges with all elements of an array.

    Gaps that are no whole page are left out, since all their pages come anyway: so there are no more ranges than pages.

    Args:
        start: where the first element is, in bytes.
        shape: the number of elements along each axis.
        strides: bytes from an element to the next along each axis; negative ones go down.
        itemsize: bytes of an element.
    """
    outer: list[tuple[int, int]] = []  # (stride, number) of the axes that cut it into pieces
    length = itemsize
    for stride, number in sorted((abs(stride), number) for stride, number in zip(strides, shape, strict=True)):
        if number == 0:
            return
        if outer or stride - length >= mmap.PAGESIZE:
            outer += [(stride, number)] if number > 1 else []
        elif number > 1:
            length = max(length, stride * (number - 1) + length)
    first = start + sum(stride * (number - 1) for stride, number in zip(strides, shape, strict=True) if stride < 0)
    if length:
        for steps in itertools.product(*(range(0, stride * number, stride) for stride, number in reversed(outer))):
            yield first + sum(steps), length
