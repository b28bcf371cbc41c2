"""`state`: what a worker must not lose, as records, and back."""

from __future__ import annotations

import json

import attrs
from hypothesis import given
from hypothesis import strategies as st

from aiouffd.engine.mappings import Mapping, Mappings
from aiouffd.pager.process.state import EVENT_SIZE, Kind, Meta, SpaceState, State, encode, records

PAGE = 4096


@given(st.lists(st.tuples(st.sampled_from(Kind), st.integers(0, 1 << 62), st.binary(max_size=50), st.integers(-1, 99))))
def test_records_come_back(given_: list[tuple[Kind, int, bytes, int]]) -> None:
    """In order, with contents of any length; each begins at a multiple of 8 bytes."""
    encoded = [encode(kind, identity, content, child=child) for kind, identity, content, child in given_]
    assert all(len(record) % 8 == 0 for record in encoded)
    found = records(memoryview(b"".join(encoded)))
    assert [(record.kind, record.identity, record.content, record.child) for record in found] == given_


def test_a_layout_event_has_the_size_that_is_said() -> None:
    """The journal has to have room for one before it is read."""
    assert len(encode(Kind.EVENT, 1, bytes(32))) == EVENT_SIZE


def test_a_space_is_its_values_and_its_mappings() -> None:
    """All but the mappings is JSON; these follow. What was moved away is in both."""
    space = SpaceState(3, 7, PAGE, 5, 1, "t", mappings=Mappings([Mapping(PAGE, 3 * PAGE, 0)]))
    space.mappings.remap(PAGE, 9 * PAGE, 2 * PAGE, shared=True)
    first, second = records(memoryview(space.encode_all()))
    assert (first.kind, first.identity, second.kind) == (Kind.SPACE, 3, Kind.MAPPINGS)
    values = json.loads(first.content)
    assert values.pop("left") == [[PAGE, 3 * PAGE, [[PAGE, 3 * PAGE]]]]
    assert values == {field.name: getattr(space, field.name) for field in attrs.fields(SpaceState)[:-1]}
    assert SpaceState.decode(first.content).content == space.content
    mappings = Mappings()
    mappings.unpack(second.content)
    assert list(mappings) == list(space.mappings)


def test_the_descriptors_that_a_state_speaks_of() -> None:
    """Of its spaces and their tethers, its sources, its owner and its predecessor; -1 is none."""
    state = State(
        Meta(owner=3, awaits=-1),
        {1: {"config": 4, "fds": [5, 6]}},
        {2: SpaceState(2, 7, PAGE, 0, 1, "a"), 3: SpaceState(3, 8, PAGE, 0, 1, "b", tether=9)},
    )
    assert state.numbers == {3, 4, 5, 6, 7, 8, 9}
    kinds = [record.kind for record in records(memoryview(state.encode()))]
    assert kinds == [Kind.META, Kind.ORIGIN, Kind.SPACE, Kind.MAPPINGS, Kind.SPACE, Kind.MAPPINGS]
