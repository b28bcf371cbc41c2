"""`pager.process.replay`: what a journal amounts to, against a model of the worker that has written it."""

from __future__ import annotations

import struct
from typing import Any
from unittest.mock import Mock

from hypothesis import given
from hypothesis import strategies as st

from aiouffd.engine.mappings import Mapping, Mappings
from aiouffd.kernel import abi
from aiouffd.pager.process.journal import Content, Journal
from aiouffd.pager.process.replay import last_meta, replay, survey
from aiouffd.pager.process.state import Kind, Meta, Record, SpaceState, State, records

PAGE = 4096
BASE = 0x10000000


def fork(fd: int) -> bytes:
    """Return a FORK message."""
    return struct.pack("=B7xI20x", abi.EVENT_FORK, fd)


def remove(page: int) -> bytes:
    """Return a REMOVE message."""
    return struct.pack("=B7xQQ8x", abi.EVENT_REMOVE, BASE + page * PAGE, BASE + (page + 1) * PAGE)


def event(identity: int, message: bytes, child: int = -1) -> Record:
    """Return the record of an event."""
    return Record(Kind.EVENT, identity, child, message)


def state(**meta: Any) -> State:
    """Return a state with one space: identity 1, descriptor 10."""
    space = SpaceState(1, 10, PAGE, 0, 5, "x", replayed=3, filled=4)
    space.mappings.add(BASE, BASE + 64 * PAGE, 0)
    return State(Meta(**{"next": 2, "owner": 7} | meta), {}, {1: space})


def begun(at_first: State, *further: Record, landed: tuple[int, list[bytes]] = (1, [])) -> Content:
    """Return the content of a journal that begins with a state."""
    return Content([*records(memoryview(at_first.encode())), *further], *landed)


class Model:
    """A worker: its spaces, and a table of descriptors that gives out the lowest free number."""

    def __init__(self) -> None:
        self.spaces: dict[int, tuple[int, Mappings]] = {1: (10, Mappings([Mapping(BASE, BASE + 64 * PAGE, 0)]))}
        self.next = 2
        self.events: list[Record] = []

    def fork(self, which: int) -> None:
        """Have a space fork."""
        identity = self.pick(which)
        fd = next(number for number in range(10, 1000) if number not in {fd for fd, _ in self.spaces.values()})
        self.events.append(event(identity, fork(fd), self.next))
        self.spaces[self.next] = (fd, self.spaces[identity][1].copy())
        self.next += 1

    def remove(self, which: int, page: int) -> None:
        """Have a space empty a page."""
        identity = self.pick(which)
        self.events.append(event(identity, remove(page)))
        self.spaces[identity][1].remove(BASE + page * PAGE, BASE + (page + 1) * PAGE)

    def close(self, which: int) -> None:
        """Drop a space, as long as one is left; its number is free."""
        if len(self.spaces) > 1:
            identity = self.pick(which)
            self.events.append(Record(Kind.CLOSED, identity, -1, b""))
            del self.spaces[identity]

    def pick(self, which: int) -> int:
        """Return the identity of one of the spaces."""
        return list(self.spaces)[which % len(self.spaces)]


def test_two_threads_have_moved_memory_at_once() -> None:
    """The second to where the first has left, before UNMAP told of it."""
    first, second = ((BASE, 64), (BASE + 8 * PAGE, 0))
    told = [
        struct.pack("=B7xQQQ", abi.EVENT_REMAP, source, BASE + to * PAGE, 4 * PAGE) for source, to in (first, second)
    ] + [struct.pack("=B7xQQ8x", abi.EVENT_UNMAP, source, source + 4 * PAGE) for source, _ in (first, second)]
    mappings = replay(begun(state(), *(event(1, message) for message in told))).state.spaces[1].mappings
    assert mappings.find(BASE) == Mapping(BASE, BASE + 4 * PAGE, 8 * PAGE)
    assert mappings.find(BASE + 8 * PAGE) is None


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
    end = replay(begun(state(), *model.events)).state
    found = {space.identity: (space.fd, list(space.mappings)) for space in end.spaces.values()}
    assert found == {identity: (fd, list(mappings)) for identity, (fd, mappings) in model.spaces.items()}
    assert end.meta.next == model.next
    assert end.numbers == {7, *(fd for fd, _ in model.spaces.values())}
    assert all(space.is_child == (space.identity != 1) for space in end.spaces.values())
    again = replay(begun(end)).state
    assert {space.identity: list(space.mappings) for space in again.spaces.values()} == {
        identity: list(mappings) for identity, (_, mappings) in model.spaces.items()
    }


def test_a_number_that_is_used_again_belongs_to_the_last() -> None:
    """The child that had descriptor 11 has ended; the one that was forked then has it now."""
    further = [event(1, fork(11), 2), Record(Kind.CLOSED, 2, -1, b""), event(1, fork(11), 3), event(9, fork(12), 4)]
    end = replay(begun(state(), *further))
    assert [(space.identity, space.fd) for space in end.state.spaces.values()] == [(1, 10), (3, 11)]
    assert end.told == [(1, fork(11), 2), (1, fork(11), 3)]
    assert end.state.meta.next == 10  # above all that were ever named


def test_what_landed_and_was_not_committed() -> None:
    """It is applied last; children get the next identities. What landed for a space that is gone is nothing."""
    end = replay(begun(state(), event(1, remove(0)), landed=(1, [fork(33), remove(1), fork(34)])))
    assert [(space.identity, space.fd, len(space.mappings)) for space in end.state.spaces.values()] == [
        (1, 10, 2),
        (2, 33, 2),
        (3, 34, 2),
    ]
    assert end.fresh == [fork(33), remove(1), fork(34)]
    assert len(end.told) == 4
    assert end.state.meta.next == 4
    assert replay(begun(state(), landed=(8, [fork(33)]))).fresh == []


def test_what_is_emptied_of_a_file_is_so_for_all_who_map_it() -> None:
    """Wherever it lies, also a child that was forked just now; not where memory is private, or another file."""
    shown = {}
    for file, other in (("one", "one"), ("one", "two"), ("", "")):
        at_first = state()
        at_first.spaces[1].file = file
        at_first.spaces[2] = SpaceState(2, 11, PAGE, 0, 5, "y", file=other)
        at_first.spaces[2].mappings.add(2 * BASE, 2 * BASE + 64 * PAGE, 0)
        end = replay(begun(at_first, event(1, remove(3)), landed=(1, [fork(33), remove(5)]))).state
        offsets = [[row.offset // PAGE for row in end.spaces[identity].mappings] for identity in (1, 2, 3)]
        shown[file, other] = [*offsets, end.spaces[2].changed]
    parts, whole, before = [0, -1, 4, -1, 6], [0], [0, -1, 4]
    assert shown["one", "one"] == [parts, parts, parts, True]
    assert shown["one", "two"] == [parts, whole, parts, False]
    assert shown["", ""] == [parts, whole, before, False]


def test_what_is_in_no_file_costs_the_others_nothing() -> None:
    """Layout events come by the thousand, and so do spaces."""
    end = replay(begun(state(), event(1, remove(3))))
    space, spaces = end.state.spaces[1], Mock()
    end.state.spaces = spaces
    end.event(space, remove(5), -1)
    assert [row.offset // PAGE for row in space.mappings] == [0, -1, 4, -1, 6]
    assert not spaces.mock_calls  # they are not looked through


def test_other_records() -> None:
    """How far a space was filled, what is used no longer, and what is known besides."""
    further = [
        Record(Kind.ORIGIN, 5, -1, b'{"config": 40, "fds": [41]}'),
        Record(Kind.ORIGIN, 6, -1, b'{"config": 42, "fds": []}'),
        Record(Kind.RETIRED, 6, -1, b""),
        Record(Kind.AHEAD, 1, -1, struct.pack("=qq", 8, 9)),
        Record(Kind.META, 0, -1, b'{"next": 30, "owner": 50, "awaits": 51, "spin_us": 1}'),
        event(1, remove(2)),
    ]
    content = begun(state(), *further)
    end = replay(content).state
    assert (end.spaces[1].replayed, end.spaces[1].filled, end.spaces[1].changed) == (8, 9, True)
    assert list(end.origins) == [5]
    assert end.numbers == {10, 40, 41, 50, 51}
    assert end.meta == Meta(30, 50, 51, 1) == last_meta(content.records)


def test_descriptors_of_forked_children_are_known() -> None:
    """A descriptor that a fork event brought is known, committed or not: the keeper must not close it."""
    journal = Journal.create()
    assert survey(journal) is None
    assert last_meta(journal.load().records) is None
    journal.change(journal.write_anew(0, state(owner=-1).encode()))
    journal.before_reading()
    journal.identity[0] = 1
    journal.buffer[:32] = fork(33)
    found = survey(journal)
    assert found is not None
    assert found.numbers == {10, 33}
