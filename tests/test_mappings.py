"""`engine.mappings` against a plain model: a dictionary from page to what it shows."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from aiouffd.engine.mappings import ZEROS, Mapping, Mappings

if TYPE_CHECKING:
    import pytest

PAGE = 4096
PAGES = 48
_page = st.integers(0, PAGES - 1)
_length = st.integers(1, 12)
_operation = st.one_of(
    st.tuples(st.just("add"), _page, _length, st.integers(0, 100)),
    st.tuples(st.just("unmap"), _page, _length),
    st.tuples(st.just("remove"), _page, _length),
    st.tuples(st.just("remap"), _page, st.integers(0, PAGES + 20), _length),
)


def apply(mappings: Mappings, model: dict[int, int], operation: tuple[object, ...]) -> None:
    """Do one operation to both."""
    name, *numbers = operation
    values = [int(str(number)) for number in numbers]
    if name == "add":
        start, length, offset = values
        mappings.add(start, start + length, offset)
        model.update({start + at: offset + at for at in range(length)})
    elif name == "unmap":
        start, length = values
        mappings.unmap(start, start + length)
        for at in range(start, start + length):
            model.pop(at, None)
    elif name == "remove":
        start, length = values
        mappings.remove(start, start + length)
        model.update({at: ZEROS for at in range(start, start + length) if at in model})
    else:
        source, destination, length = values
        mappings.remap(source, destination, length)
        moved = {at: model[at] for at in range(source, source + length) if at in model}
        for at in range(source, source + length):
            model.pop(at, None)
        for at in range(destination, destination + length):
            model.pop(at, None)
        model.update({at - source + destination: shown for at, shown in moved.items()})


def shown(mapping: Mapping | None, address: int) -> int | None:
    """Return what a mapping shows at an address."""
    if mapping is None:
        return None
    return mapping.offset if mapping.offset == ZEROS else mapping.offset + address - mapping.start


def test_shared_memory_stays_until_it_is_unmapped() -> None:
    """Its old place shows the same, unless UNMAP comes: then what others have moved there meanwhile is left."""
    mappings = Mappings([Mapping(0, 4, 0), Mapping(10, 12, 20)])
    mappings.remap(0, 30, 4, shared=True)
    assert list(mappings) == [Mapping(0, 4, 0), Mapping(10, 12, 20), Mapping(30, 34, 0)]
    mappings.remap(10, 1, 2, shared=True)
    mappings.unmapped(0, 4)
    mappings.unmapped(10, 12)
    assert list(mappings) == [Mapping(1, 3, 20), Mapping(30, 34, 0)]
    mappings.remap(1, 50, 2, shared=True)
    mappings.remap(50, 1, 2, shared=True)  # back, before UNMAP has come
    mappings.unmapped(1, 3)
    mappings.unmapped(50, 52)
    assert list(mappings) == [Mapping(1, 3, 20), Mapping(30, 34, 0)]
    mappings.remap(30, 40, 4, shared=True)
    mappings.unmapped(31, 33)  # it has stayed, and a part of it goes
    assert list(mappings) == [Mapping(1, 3, 20), Mapping(30, 31, 0), Mapping(33, 34, 3), Mapping(40, 44, 0)]
    mappings.remap(40, 60, 4, shared=True)
    mappings.remove(41, 42)
    again = Mappings(mappings, mappings.left)  # as a successor has it
    for each in mappings, again:
        each.unmapped(40, 44)  # also of what was emptied there meanwhile
        assert list(each) == [Mapping(1, 3, 20), Mapping(30, 31, 0), Mapping(33, 34, 3), Mapping(60, 64, 0)]


def test_unmap_after_remap_tells_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may have moved memory to the old place meanwhile. So many moves are remembered."""
    monkeypatch.setattr("aiouffd.engine.mappings._MAX_LEFT", 2)
    mappings = Mappings([Mapping(0, 2, 0), Mapping(4, 6, 10)])
    mappings.remap(0, 20, 2)
    mappings.remap(4, 0, 2)
    mappings.unmapped(4, 6)
    mappings.unmapped(0, 2)
    assert list(mappings) == [Mapping(0, 2, 10), Mapping(20, 22, 0)]
    mappings.unmapped(0, 2)  # its own
    assert list(mappings) == [Mapping(20, 22, 0)]
    for start in range(20, 29):
        mappings.remap(start, start + 1, 2)
        assert len(mappings._left) <= 2
    mappings.unmapped(28, 29)
    assert list(mappings) == [Mapping(29, 31, 0)]


@given(st.lists(_operation, max_size=30))
def test_every_address_shows_what_the_model_says(operations: list[tuple[object, ...]]) -> None:
    """After any sequence of events, `find`, `locate` and iteration agree with the model, and stay sorted."""
    mappings, model = Mappings(), dict[int, int]()
    for operation in operations:
        apply(mappings, model, operation)
    for address in range(PAGES * 2 + 40):
        assert shown(mappings.find(address), address) == model.get(address)
        start, end, offset = mappings.locate(address)
        assert (start <= address < end) == (address in model)
        if address in model:
            assert shown(Mapping(start, end, offset), address) == model[address]
    listed = list(mappings)
    assert all(mapping.start < mapping.end for mapping in listed)
    assert all(before.end <= after.start for before, after in itertools.pairwise(listed))
    assert sum(mapping.end - mapping.start for mapping in listed) == len(model)


@given(st.lists(_operation, max_size=20), st.lists(_operation, max_size=10), _page, _length)
def test_runs_cover_exactly_what_is_mapped(
    first: list[tuple[object, ...]], then: list[tuple[object, ...]], start: int, length: int
) -> None:
    """`runs` yields each mapped address of a range once, in order; a forked copy is independent of its parent."""
    mappings, model = Mappings(), dict[int, int]()
    for operation in first:
        apply(mappings, model, operation)
    child, child_model = mappings.copy(), dict(model)
    for operation in then:
        apply(mappings, model, operation)
    for which, expected in ((mappings, model), (child, child_model)):
        found = [at for run in which.runs(start, start + length) for at in range(run.start, run.end)]
        assert found == [at for at in range(start, start + length) if at in expected]


@given(st.lists(_operation, max_size=20), st.integers(0, 100), _length)
def test_addresses_are_where_an_offset_is_shown(operations: list[tuple[object, ...]], offset: int, length: int) -> None:
    """`addresses` is the inverse of `find`, for offsets that are shown more than once as well."""
    mappings, model = Mappings(), dict[int, int]()
    for operation in operations:
        apply(mappings, model, operation)
    found = {
        (address, run.offset + address - run.start)
        for run in mappings.addresses(offset, offset + length)
        for address in range(run.start, run.end)
    }
    assert found == {(address, value) for address, value in model.items() if offset <= value < offset + length}


def test_giving_back_page_by_page_does_not_grow_the_list() -> None:
    """A balloon that removes neighbouring pages one at a time leaves two mappings, not thousands."""
    mappings = Mappings([Mapping(0, 1 << 20, 0)])
    for page in range(0, 1 << 19, 4096):
        mappings.remove(page, page + 4096)
    assert list(mappings) == [Mapping(0, 1 << 19, ZEROS), Mapping(1 << 19, 1 << 20, 1 << 19)]


def test_each_change_is_a_new_generation() -> None:
    """Whoever has waited can see that the layout changed meanwhile."""
    mappings = Mappings([Mapping(0, 10, 0)])
    seen = {mappings.generation}
    for event in ("remove", "unmap", "remap"):
        getattr(mappings, event)(*((4, 20, 2) if event == "remap" else (0, 2)))
        assert mappings.generation not in seen
        seen.add(mappings.generation)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6), st.integers(-1, 60)), max_size=10),
    st.integers(1, 4),
    st.integers(0, 45),
    st.lists(st.tuples(st.integers(50, 90), st.integers(1, 6), st.integers(-1, 60)), max_size=3),
)
def test_what_is_packed_is_unpacked(
    mapped: list[tuple[int, int, int]], most: int, begin: int, before: list[tuple[int, int, int]]
) -> None:
    """In portions, from any address on, into what is empty and into what holds other mappings."""
    mappings, other = Mappings(), Mappings()
    for target, runs in ((mappings, mapped), (other, before)):
        for start, length, offset in runs:
            target.add(start * PAGE, (start + length) * PAGE, offset if offset < 0 else offset * PAGE)
    expected = other.copy()
    for run in mappings.runs(begin * PAGE, 1 << 40):
        expected.add(run.start, run.end, run.offset)
    at, portions = begin * PAGE, 0
    while True:
        data, end = mappings.pack(at, most)
        assert len(data) % 24 == 0
        assert len(data) // 24 <= most
        other.unpack(data)
        if not data:
            assert end == at
            break
        assert end > at
        at = end
        portions += 1
    assert list(other) == list(expected)
    count = len(list(mappings.runs(begin * PAGE, 1 << 40)))
    assert portions == (count + most - 1) // most


def test_what_is_packed_in_order_continues_what_is_there() -> None:
    """The portions of one list are joined where they were one mapping."""
    mappings = Mappings([Mapping(0, 4 * PAGE, 0), Mapping(8 * PAGE, 9 * PAGE, ZEROS)])
    first = Mappings([Mapping(0, 2 * PAGE, 0)])
    first.unpack(mappings.pack(2 * PAGE, 9)[0])
    assert list(first) == list(mappings)


def test_mappings_say_what_they_show() -> None:
    """For errors and logs."""
    mappings = Mappings([Mapping(0, 0x4000, 0x8000), Mapping(0x8000, 0x9000, ZEROS)])
    assert repr(mappings) == "Mappings([0x0, 0x4000) at 0x8000, [0x8000, 0x9000) zeros)"


def test_a_mapping_is_found_by_each_of_its_addresses() -> None:
    """And by no other."""
    first, second = Mapping(0x1000, 0x4000, 0x8000), Mapping(0x8000, 0x9000, ZEROS)
    mappings = Mappings([first, second])
    found = [mappings.find(address) for address in (0xFFF, 0x1000, 0x3FFF, 0x4000, 0x7FFF, 0x8FFF, 0x9000)]
    assert found == [None, first, first, None, None, second, None]


def test_what_is_mapped_and_unmapped_piece_by_piece() -> None:
    """What continues is joined on either side; the neighbours of what is unmapped stay whole."""
    mappings = Mappings([Mapping(0, 2 * PAGE, 0), Mapping(4 * PAGE, 6 * PAGE, 4 * PAGE)])
    mappings.add(2 * PAGE, 4 * PAGE, 2 * PAGE)
    assert list(mappings) == [Mapping(0, 6 * PAGE, 0)]
    mappings.add(6 * PAGE, 8 * PAGE, 10 * PAGE)
    mappings.add(8 * PAGE, 9 * PAGE, 12 * PAGE)
    assert list(mappings) == [Mapping(0, 6 * PAGE, 0), Mapping(6 * PAGE, 9 * PAGE, 10 * PAGE)]
    mappings.unmap(4 * PAGE, 6 * PAGE)
    assert list(mappings) == [Mapping(0, 4 * PAGE, 0), Mapping(6 * PAGE, 9 * PAGE, 10 * PAGE)]
    mappings.unmap(4 * PAGE, 6 * PAGE)
    assert len(mappings) == 2
    mappings.unmap(2 * PAGE, 7 * PAGE)
    assert list(mappings) == [Mapping(0, 2 * PAGE, 0), Mapping(7 * PAGE, 9 * PAGE, 11 * PAGE)]
    mappings.add(20 * PAGE, 21 * PAGE, 0)
    mappings.add(7 * PAGE, 9 * PAGE, 11 * PAGE)
    mappings.add(2 * PAGE, 3 * PAGE, 2 * PAGE)
    assert list(mappings) == [
        *(Mapping(0, 3 * PAGE, 0), Mapping(7 * PAGE, 9 * PAGE, 11 * PAGE), Mapping(20 * PAGE, 21 * PAGE, 0)),
    ]
