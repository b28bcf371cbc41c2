"""`tenant`: memory is told of as it is now."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

import attrs

from aiouffd.engine.mappings import Mapping, Mappings
from aiouffd.engine.statistics import Counter
from aiouffd.pager.client.tenant import Slots, Tenant, root_of
from aiouffd.pager.process.journal import SLOTS, Journal
from aiouffd.pager.process.state import SpaceState, State
from aiouffd.testing import FakeUffd

if TYPE_CHECKING:
    from aiouffd.pager.client.packing import Pack

PAGE = 4096


def test_memory_is_told_of_as_a_dead_pager_knew_it(pack: Pack) -> None:
    """What its state says of the token, but not of a forked child's; without one, as it was opened."""
    uffd: Any = FakeUffd()
    tenant = Tenant(pack, uffd, [Mapping(0, PAGE, 0)], PAGE, tether=7)
    assert tenant.fds == [uffd.fileno(), 7]
    assert tenant.shown(None) == tenant.mappings
    moved = Mappings([Mapping(2 * PAGE, 3 * PAGE, 0)])
    moved.remap(2 * PAGE, PAGE, PAGE)
    child = SpaceState(1, 3, PAGE, 0, 1, tenant.token, is_child=True)
    own = SpaceState(2, 4, PAGE, 0, 1, tenant.token, mappings=moved)
    assert tenant.shown(State(spaces={1: child})) == tenant.mappings
    assert tenant.shown(State(spaces={1: child, 2: own})) == moved
    record = tenant.record(moved)
    assert (record["mappings"], record["left"]) == ([(PAGE, 2 * PAGE, 0)], [(2 * PAGE, 3 * PAGE, None)])


def test_children_become_tenants_with_descriptors_of_their_own(pack: Pack) -> None:
    """Those whose descriptor is there, whatever generation they are of; others' descriptors are left."""
    uffd: Any = FakeUffd()
    tenant = Tenant(pack, uffd, [Mapping(0, PAGE, 0)], PAGE, tether=7)
    shows = Mappings([Mapping(PAGE, 2 * PAGE, 0)])
    tokens = {1: tenant.token, 2: f"{tenant.token}/9", 3: tenant.token, 4: "another's"}
    spaces = {at: SpaceState(at, at, PAGE, 0, 1, token, is_child=True, mappings=shows) for at, token in tokens.items()}
    fds = {at: os.open(os.devnull, os.O_RDONLY) for at in (1, 2, 4)}
    children = tenant.children(State(spaces=spaces), fds)
    assert [root_of(child.token) for child in children] == [tenant.token] * 2
    assert all(child.mappings == shows and child.tether == -1 for child in children)
    assert list(fds) == [4]
    # The next pager was asked for these, and dies before it has opened them: what it has numbers its own so.
    spaces = {1: attrs.evolve(spaces[1], token=children[1].token, mappings=shows)}
    (again,) = tenant.children(State(spaces=spaces), {1: fds.pop(4)})
    assert len({child.token for child in (again, *children)}) == 3
    assert tenant.children(None, {}) == []


def test_a_slot_is_given_anew_as_late_as_possible() -> None:
    """Not while forked children are counted there; 0 where there is none."""
    slots, journal = Slots(), Journal.create()
    taken = [slots.take(journal) for _ in range(SLOTS - 1)]
    assert sorted(taken) == list(range(1, SLOTS))
    assert not slots
    assert slots.take(journal) == 0
    for slot in (7, 0, 9, 5):
        slots.give_back(slot)
    journal.counters_of(7).words[Counter.SPACES] = 1
    assert [slots.take(journal) for _ in range(3)] == [9, 5, 0]
    assert slots
    journal.counters_of(7).words[Counter.SPACES] = 0
    numbers = {slots.user(slot) for slot in range(SLOTS)}
    assert slots.take(journal) == 7
    assert slots.user(7) not in numbers


def test_what_was_counted_for_a_tenant(pack: Pack) -> None:
    """In its slot; and the workers that have died since it came."""
    journal, uffd = Journal.create(), FakeUffd()
    tenant = Tenant(pack, cast("Any", uffd), [Mapping(0, PAGE, 0)], PAGE, slot=3, restarts=2)
    journal.counters.words[Counter.RESTARTS] = 5
    journal.counters.words[Counter.FAULTS] = 1000
    journal.counters_of(3).words[Counter.FAULTS] = 9
    found = tenant.statistics(journal)
    assert (found.faults, found.restarts) == (9, 3)
    journal.counters.words[Counter.RESTARTS] = 0  # another pager, that has not been told yet
    assert tenant.statistics(journal).restarts == 0
