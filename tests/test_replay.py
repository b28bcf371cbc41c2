"""`pager.replay`: what a journal amounts to, against a model of the worker that has written it."""

from __future__ import annotations

import struct
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from aiouffd.engine.mappings import Mapping, Mappings
from aiouffd.kernel import abi
from aiouffd.pager.process.journal import CLOSED, Journal
from aiouffd.pager.process.replay import numbers, replay, survey

PAGE = 4096
BASE = 0x10000000


def fork(fd: int) -> bytes:
    """Return a FORK message."""
    return struct.pack("=B7xI20x", abi.EVENT_FORK, fd)


def remove(page: int) -> bytes:
    """Return a REMOVE message."""
    return struct.pack("=B7xQQ8x", abi.EVENT_REMOVE, BASE + page * PAGE, BASE + (page + 1) * PAGE)


CLOSING = bytes([CLOSED]) + bytes(31)


def item(identity: int, fd: int) -> dict[str, Any]:
    """Return a space as it is in a snapshot."""
    mappings = [(BASE, BASE + 64 * PAGE, 0)]
    return {"id": identity, "fd": fd, "tether": -1, "child": False, "ahead": (3, 4), "token": "x", "mappings": mappings}


class Model:
    """A worker: its spaces, and a table of descriptors that gives out the lowest free number."""

    def __init__(self) -> None:
        self.spaces: dict[int, tuple[int, Mappings]] = {1: (10, Mappings([Mapping(BASE, BASE + 64 * PAGE, 0)]))}
        self.next = 2
        self.events: list[tuple[int, bytes]] = []

    def fork(self, which: int) -> None:
        """Have a space fork."""
        identity = self.pick(which)
        fd = next(number for number in range(10, 1000) if number not in {fd for fd, _ in self.spaces.values()})
        self.events.append((identity, fork(fd)))
        self.spaces[self.next] = (fd, self.spaces[identity][1].copy())
        self.next += 1

    def remove(self, which: int, page: int) -> None:
        """Have a space empty a page."""
        identity = self.pick(which)
        self.events.append((identity, remove(page)))
        self.spaces[identity][1].remove(BASE + page * PAGE, BASE + (page + 1) * PAGE)

    def close(self, which: int) -> None:
        """Drop a space, as long as one is left; its number is free."""
        if len(self.spaces) > 1:
            identity = self.pick(which)
            self.events.append((identity, CLOSING))
            del self.spaces[identity]

    def pick(self, which: int) -> int:
        """Return the identity of one of the spaces."""
        return list(self.spaces)[which % len(self.spaces)]


_which = st.integers(0, 9)
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("fork"), _which),
        st.tuples(st.just("close"), _which),
        st.tuples(st.just("remove"), _which, st.integers(0, 63)),
    ),
    max_size=40,
)


@given(_steps)
def test_what_is_served_at_the_end(steps: list[tuple[Any, ...]]) -> None:
    """Forks, ends and changes in any order: exactly what is served is there, under the descriptors of now."""
    model = Model()
    for name, *arguments in steps:
        getattr(model, name)(*arguments)
    snapshot = {"next": 2, "owner": 7, "awaits": -1, "origins": {}, "spaces": [item(1, 10)]}
    state = replay(snapshot, model.events).state
    found = {each["id"]: (each["fd"], list(map(tuple, each["mappings"]))) for each in state["spaces"]}
    assert found == {
        identity: (fd, [(mapping.start, mapping.end, mapping.offset) for mapping in mappings])
        for identity, (fd, mappings) in model.spaces.items()
    }
    assert state["next"] == model.next
    assert numbers(state) == {7, *(fd for fd, _ in model.spaces.values())}
    assert all(each["child"] == (each["id"] != 1) for each in state["spaces"])


def test_a_number_that_is_used_again_belongs_to_the_last() -> None:
    """The child that had descriptor 11 has ended; the one that was forked then has it now."""
    snapshot = {"next": 2, "owner": -1, "awaits": -1, "origins": {}, "spaces": [item(1, 10)]}
    events = [(1, fork(11)), (2, CLOSING), (1, fork(11)), (9, fork(12))]
    end = replay(snapshot, events)
    assert [(each["id"], each["fd"]) for each in end.state["spaces"]] == [(1, 10), (3, 11)]
    assert end.told == [(1, fork(11), 2), (1, fork(11), 3)]


def test_descriptors_of_forked_children_are_known() -> None:
    """A descriptor that a fork event brought is known, committed or not: the keeper must not close it."""
    journal = Journal.create()
    assert survey(journal) is None
    journal.save({"next": 2, "owner": -1, "awaits": -1, "origins": {}, "spaces": [item(1, 10)]})
    journal.reading(1)
    data = fork(33)
    journal.buffers[0][:32] = data
    state = survey(journal)
    assert state is not None
    assert numbers(state) == {10, 33}
