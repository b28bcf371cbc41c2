"""`engine.serve.extents`: what a source says without waiting, and the runs that bring it."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import pytest
from engine_world import BASE, LOCATED, SIZE, World
from hypothesis import given
from hypothesis import strategies as st
from pattern import PAGE, Pattern, content

from aiouffd.engine.runs import FOR_FAULT, Op, Run
from aiouffd.engine.serve.extents import Extents
from aiouffd.engine.serve.zeros import BLOCK
from aiouffd.engine.statistics import Counters
from aiouffd.kernel.memory import address_of

if TYPE_CHECKING:
    from collections.abc import Callable


class Source:
    """Has what the test gives it."""

    def __init__(self, size: int = SIZE, **methods: Any) -> None:
        self.size = size
        vars(self).update(methods)

    async def read(self, offset: int, length: int) -> bytes:
        """Return the bytes."""
        return content(offset, length)


def extents(**methods: Any) -> Extents:
    """Return the extents of a source."""
    return Extents(Source(**methods), Counters())


def test_what_is_local_and_plain() -> None:
    """As the source has methods, and says of itself."""
    nothing: Callable[..., None] = lambda *_: None  # noqa: E731 - as attributes of a source are
    assert not extents().local
    assert extents(locate=nothing).local
    assert extents(read_nowait=nothing).local
    assert not extents(read_nowait=nothing, local=False).local
    assert not extents().may_be_plain
    assert not extents(read_nowait=nothing).may_be_plain
    assert extents(locate=nothing).may_be_plain
    assert extents(page=nothing).may_be_plain
    assert not extents(locate=nothing, hole=nothing).may_be_plain
    assert extents(locate=nothing, hole=nothing, sparse=False).may_be_plain
    assert not extents(locate=nothing, hole=nothing, sparse=True).may_be_plain
    assert extents(page=nothing, hole=nothing, plain=True).may_be_plain


def test_spaces_that_are_alike_share_a_plain_source() -> None:
    """The same tuple: it is compared by the fast path."""
    page: Any = LOCATED.locate
    blank: Any = LOCATED.read_nowait
    source = extents(locate=abs, page=page, blank=blank)
    off, on, protected = World(0), World(4 * PAGE), World(0, write_protect=True)
    assert source.plain_source(off.space) is source.plain_source(World(0).space)
    assert source.plain_source(off.space) == (page, SIZE, PAGE, 0, False, blank, None)
    assert source.plain_source(on.space) == (page, SIZE, PAGE, 0, True, blank, None)
    protected.space.write_protect = True
    protected.space.resolver.mode = 2
    assert source.plain_source(protected.space) == (page, SIZE, PAGE, 2, False, None, None)


@given(st.integers(0, 40 * PAGE), st.integers(0, 45), st.integers(1, 45), st.sets(st.integers(0, 50)))
def test_a_window_is_split_where_it_changes(size: int, first: int, count: int, holes: set[int]) -> None:
    """Zeros behind the end and in holes, whole pages of data, and the last one that is partial."""

    def hole(offset: int, length: int) -> int:
        assert offset + length <= size
        page = end = offset // PAGE
        while end in holes:
            end += 1
        return min((end - page) * PAGE, length) if page in holes else 0

    source = extents(size=size, hole=hole)
    at, left = first * PAGE, count * PAGE
    while left:
        kind, length = source.split(at, left, PAGE)
        assert 0 < length <= left
        assert length % PAGE == 0
        pages = range(at // PAGE, (at + length) // PAGE)
        whole = [(page + 1) * PAGE <= size for page in pages]
        if kind == "zeros":
            assert at >= size or all(page in holes for page in pages)
        elif kind == "data":
            assert all(whole)
        else:
            assert (kind, length, whole) == ("tail", PAGE, [False])
            assert at < size
        at, left = at + length, left - length


def placed(runs: list[Run]) -> dict[int, bytes]:
    """Return what each page would hold."""
    return {
        run.dst + at: bytes(PAGE) if run.op == Op.ZEROPAGE else ctypes.string_at(run.src + at, PAGE)
        for run in runs
        for at in range(0, run.left, PAGE)
    }


@pytest.mark.parametrize("how", ["locate", "read_nowait"])
@pytest.mark.parametrize("cut", [0, 100, PAGE])
def test_what_is_in_memory(how: str, cut: int) -> None:
    """Comes by runs; the tail of the last page is zeros."""
    world = World(0)
    source = extents(size=4 * PAGE - cut, **{how: getattr(LOCATED, how)})
    runs: list[Run] = []
    done = source.add_at_hand(world.space, BASE + PAGE, PAGE, 3 * PAGE, runs, FOR_FAULT)
    if how == "locate" and cut:
        assert not done  # what lies behind its end in memory is nobody's
        assert not runs
        return
    assert done
    expected = content(PAGE, 3 * PAGE - cut) + bytes(cut)
    assert b"".join(data for _, data in sorted(placed(runs).items())) == expected
    assert all(run.purpose is FOR_FAULT and run.offset == run.dst - BASE for run in runs)
    assert source._words[9] == 3 * PAGE - cut


@pytest.mark.parametrize("given_", [None, b"", bytes(PAGE - 1), bytes(PAGE + 1), memoryview(bytes(2 * PAGE))[::2]])
def test_what_must_be_waited_for(given_: Any) -> None:
    """Nothing is added, and nothing counted, for what is not all there in one piece."""
    source = extents(read_nowait=lambda _offset, _length: given_)
    runs: list[Run] = []
    assert not source.add_at_hand(World(0).space, BASE, 0, PAGE, runs, FOR_FAULT)
    assert not runs
    assert not any(source._words)
    assert not extents().add_at_hand(World(0).space, BASE, 0, PAGE, runs, FOR_FAULT)


@pytest.mark.parametrize("how", ["locate", "data"])
@pytest.mark.parametrize("maps", [True, False])
def test_blocks_of_zeros_are_mapped(how: str, maps: bool) -> None:
    """Where ZEROPAGE is possible: the pages around them are copied."""
    size = 5 * BLOCK
    data = bytearray(b"x" * BLOCK + bytes(2 * BLOCK) + b"y" * BLOCK + bytes(BLOCK))
    world = World(0)
    world.space.write_protect = not maps
    address = address_of(data)
    source = extents(
        size=size,
        locate=lambda offset, _length: address + offset,
        blank=lambda offset, length, block: [
            at for at in range(0, length, block) if not any(data[offset + at : offset + at + block])
        ],
    )
    runs: list[Run] = []
    if how == "locate":
        assert source.add_at_hand(world.space, BASE, 0, size, runs, FOR_FAULT)
    else:
        source.add_data(world.space, Run(Op.COPY, BASE, 0, size, purpose=FOR_FAULT), bytes(data), runs)
    assert b"".join(page for _, page in sorted(placed(runs).items())) == bytes(data)
    kinds = [(run.op, run.left // BLOCK) for run in sorted(runs, key=lambda run: run.dst)]
    assert all(run.purpose is FOR_FAULT and run.offset == run.dst - BASE for run in runs)
    assert kinds == ([(Op.COPY, 1), (Op.ZEROPAGE, 2), (Op.COPY, 1), (Op.ZEROPAGE, 1)] if maps else [(Op.COPY, 5)])
    assert source._words[7] == (3 * BLOCK // PAGE if maps else 0)


def test_the_owner_keeps_the_bytes() -> None:
    """A run that waits must not point into freed memory."""
    world = World(0)
    runs: list[Run] = []
    data = content(0, PAGE)
    extents().add_data(world.space, Run(Op.COPY, BASE, 0, PAGE, purpose=FOR_FAULT), data, runs)
    assert runs[0].owner is data
    runs.clear()
    extents(size=100).add_data(world.space, Run(Op.COPY, BASE, 0, PAGE, purpose=FOR_FAULT), content(0, 100), runs)
    (run,) = runs
    assert isinstance(run.owner, bytearray)
    assert run.src == address_of(run.owner)
    assert bytes(run.owner) == content(0, 100) + bytes(PAGE - 100)
    runs.clear()
    source = extents(read_nowait=Pattern(SIZE).read_nowait)
    source.add_at_hand(world.space, BASE, 0, PAGE, runs, FOR_FAULT)
    assert bytes(runs[0].owner) == content(0, PAGE)


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, 4, ("data", 4)),
        (0, 8, ("data", 5)),  # up to the partial page
        (5, 3, ("tail", 1)),
        (6, 2, ("zeros", 2)),
        (2, 3, ("data", 3)),
    ],
)
def test_a_window_over_the_end_of_the_source(offset: int, length: int, expected: tuple[str, int]) -> None:
    """In pages, of a source of five and a half; of five it is the same, but that there is no tail."""
    for size, tail in ((5 * PAGE + PAGE // 2, True), (5 * PAGE, False)):
        source = extents(size=size)
        kind, found = source.split(offset * PAGE, length * PAGE, PAGE)
        if not tail and expected[0] == "tail":
            assert (kind, found) == ("zeros", length * PAGE)
        else:
            assert (kind, found // PAGE) == expected


def test_holes_are_asked_for_within_the_source() -> None:
    """Whole pages of them are zeros; less than a page is data."""
    asked: list[tuple[int, int]] = []
    holes = iter([3 * PAGE + 100, PAGE - 1, 0])

    def hole(offset: int, length: int) -> int:
        asked.append((offset, length))
        return next(holes)

    source = extents(size=10 * PAGE, hole=hole)
    assert source.split(4 * PAGE, 8 * PAGE, PAGE) == ("zeros", 3 * PAGE)
    assert source.split(4 * PAGE, 2 * PAGE, PAGE) == ("data", 2 * PAGE)
    assert source.split(8 * PAGE, 8 * PAGE, PAGE) == ("data", 2 * PAGE)
    assert asked == [(4 * PAGE, 6 * PAGE), (4 * PAGE, 2 * PAGE), (8 * PAGE, 2 * PAGE)]


@pytest.mark.parametrize("how", ["locate", "read_nowait"])
def test_what_is_fetched_is_counted_piece_by_piece(how: str) -> None:
    """In bytes."""
    world, runs = World(0), list[Run]()
    source = extents(**{how: getattr(LOCATED, how)})
    for page in (0, 4):
        assert source.add_at_hand(world.space, BASE + page * PAGE, page * PAGE, 2 * PAGE, runs, FOR_FAULT)
    assert source._words[9] == 4 * PAGE
