"""What a row is, and the contestants that touch pages in random order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import attrs
import numpy as np

from benchmarks.contestants import PAGE, Arena, warm
from benchmarks.native import touch

MIB = 1 << 20


@attrs.frozen
class Bar:
    """A bound on the ratio of ours to a peer."""

    peer: str
    limit: float
    at_least: bool = False

    def holds(self, ratio: float) -> bool:
        """Tell whether a ratio is within the bound."""
        return ratio >= self.limit if self.at_least else ratio <= self.limit


@attrs.frozen
class Row:
    """One line of the table.

    Attributes:
        name: for `--rows`.
        title: what is measured.
        unit: of each figure; smaller is better.
        contestants: name -> a function that runs once and returns a figure. "aiouffd" is ours.
        bars: what ours is held against.
        repeats: rounds, where they are not as many as usual.
        left_out: contestants that cannot run on this machine -> why; under "aiouffd" the row cannot.
        remark: asks for what a reader must know of this machine's figures, or None.
        setup: how ours is configured.
    """

    name: str
    title: str
    unit: str
    contestants: dict[str, Callable[[], float]]
    bars: tuple[Bar, ...] = ()
    repeats: int | None = None
    left_out: dict[str, str] = attrs.field(factory=dict)
    remark: Callable[[], str | None] = lambda: None
    setup: str = "defaults"


def shuffled(size: int, seed: int = 1, share: float = 1.0) -> np.ndarray:
    """Return the numbers of all pages, or of a share of them, in random order."""
    pages = np.random.default_rng(seed).permutation(size // PAGE).astype(np.uint32)
    return pages[: int(len(pages) * share)]


Serve = Callable[[int], contextlib.AbstractContextManager[Arena]]


def touching(serve: Serve, size: int, threads: int, share: float = 1.0) -> Callable[[], float]:
    """Return a contestant: microseconds a page, all pages or a share of them touched in random order."""

    def once() -> float:
        pages = shuffled(size, share=share)
        warm(size)
        with serve(size) as arena:
            return touch(arena.address, pages, threads) / len(pages) * 1e6

    return once


def processor(serve: Serve, size: int, threads: int, share: float = 1.0) -> Callable[[], float]:
    """Return a contestant: microseconds of processor time of the handler a fault."""

    def once() -> float:
        pages = shuffled(size, share=share)
        warm(size)
        with serve(size) as arena:
            before = arena.cpu()
            touch(arena.address, pages, threads)
            return (arena.cpu() - before) / len(pages) * 1e6

    return once
