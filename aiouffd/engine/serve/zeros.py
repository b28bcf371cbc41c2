"""Zeros among the bytes of a source: they are mapped, not copied. Pure decisions.

Images of memory are full of zeros. They are searched in blocks; the first byte of a block rules out most others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["BLOCK", "cut"]

BLOCK = 64 << 10
"""Bytes of a block: an operation of its own does not pay for less."""


def cut(length: int, zeros: Sequence[int]) -> Iterator[tuple[int, int, bool]]:
    """Cut `length` bytes where zeros begin or end: (begin, length, whether it is zeros), in order.

    Args:
        length: positive.
        zeros: where the blocks of zeros begin, multiples of `BLOCK` below `length`, in order.
    """
    at = 0
    run = None  # where the zeros began that are being joined
    for begin in zeros:
        if run is not None and begin != at:
            yield run, at - run, True
            run = None
        if run is None:
            if begin > at:
                yield at, begin - at, False
            run = begin
        at = min(begin + BLOCK, length)
    if run is not None:
        yield run, at - run, True
    if at < length:
        yield at, length - at, False
