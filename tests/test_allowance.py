"""`engine.allowance`: who uses up what it may have in a second waits, and nobody else."""

from __future__ import annotations

import asyncio
import itertools
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from engine_world import SIZE, World, turns
from hypothesis import given
from hypothesis import strategies as st
from pattern import PAGE

from aiouffd.engine.ahead.fill import prefetch
from aiouffd.engine.allowance import Allowance, Allowances, Bucket, allowed
from aiouffd.engine.statistics import Counter, Counters

# Numbers that floats hold exactly, so that the model need not be close, but equal.
_takes = st.lists(st.tuples(st.integers(0, 192).map(lambda at: at / 64), st.integers(0, 40)), max_size=30)


@given(rate=st.sampled_from([1, 4, 16]), takes=_takes)
def test_a_bucket_is_its_model(rate: int, takes: list[tuple[float, int]]) -> None:
    """It refills by `rate` a second up to one second's worth, and what is taken goes below zero."""
    now, model = 64.0, float(rate)
    bucket = Bucket(rate, now)
    for pause, tokens in takes:
        now, model = now + pause, min(rate, model + pause * rate)
        assert bucket.level(now) * rate == model
        bucket.take(tokens, now)
        model -= tokens
        assert bucket.level(now) * rate == model


@given(rate=st.sampled_from([1, 4, 16]), takes=_takes)
def test_who_waits_exceeds_no_rate(rate: int, takes: list[tuple[float, int]]) -> None:
    """Whoever takes only from a bucket that is not empty has a second's worth, the time's, and one overdraft."""
    now = began = 64.0
    bucket, taken = Bucket(rate, now), 0
    for pause, tokens in takes:
        now += pause
        if bucket.level(now) > 0:
            bucket.take(tokens, now)
            taken += tokens
        assert taken <= rate * (1 + now - began) + 40


class Rig:
    """An allowance whose time is set by hand, and what it has held."""

    def __init__(self, events: float | None = 4, size: float | None = None) -> None:
        self.now = 1_000.0
        self.held: set[Any] = set()
        self.counters = Counters()
        self.allowance = Allowance("somebody", events, size, self.counters, lambda: self.now)

    def hold(self, space: Any, why: str) -> None:
        """As a dispatcher's."""
        assert space not in self.held
        assert why == "allowance"
        self.held.add(space)

    def release(self, space: Any, why: str) -> None:
        """As a dispatcher's."""
        assert why == "allowance"
        self.held.remove(space)

    def space(self) -> Any:
        """Return a space that has entered."""
        space = _Space(self.allowance)
        self.allowance.enter(space, self)
        return space

    def later(self, seconds: float) -> None:
        """Have the timer go off after so long."""
        self.now += seconds
        timer = self.allowance._timer
        assert timer is not None
        timer.cancel()
        self.allowance._refilled()


class _Space:
    def __init__(self, allowance: Allowance) -> None:
        self.allowance = allowance
        self.uffd = SimpleNamespace()


async def test_all_spaces_are_held_together_until_it_has_refilled() -> None:
    """Also one that comes meanwhile; what is placed meanwhile is waited off as well."""
    rig = Rig()
    one, two = rig.space(), rig.space()
    rig.allowance.read(3)
    assert not rig.held
    rig.allowance.read(9)
    assert rig.held == {one, two}
    three = rig.space()
    assert rig.held == {one, two, three}
    rig.later(1.5)
    assert rig.held == {one, two, three}
    rig.allowance.read(2)
    rig.later(1.0)
    assert rig.held == {one, two, three}
    rig.later(0.5)
    assert not rig.held
    assert rig.counters.words[Counter.SLOWED] == 1
    rig.allowance.leave(one)
    rig.allowance.read(8)
    assert rig.held == {two, three}
    for space in (two, three):
        rig.allowance.leave(space)


async def test_events_and_bytes_are_limited_apart() -> None:
    """Each by its own number, or not at all."""
    rig = Rig(events=None, size=4 * PAGE)
    rig.space()
    rig.allowance.read(1_000_000)
    rig.allowance.placed(4 * PAGE - 1)
    assert not rig.held
    rig.allowance.placed(1)
    assert rig.held
    rig.later(0.01)
    assert not rig.held


async def test_a_client_that_comes_again_gains_nothing() -> None:
    """It is held on coming; who was away for long is as new."""
    rig = Rig()
    space = rig.space()
    rig.allowance.read(400)
    rig.allowance.leave(space)
    assert rig.allowance._timer is None
    again = rig.space()
    assert again in rig.held
    rig.allowance.leave(again)
    rig.now += 101.0
    assert rig.space() not in rig.held


async def test_what_a_new_one_would_equal_is_forgettable() -> None:
    """Nobody shares it, and it is full."""
    rig = Rig()
    seen = [rig.allowance.is_forgettable]
    space = rig.space()
    seen.append(rig.allowance.is_forgettable)
    rig.allowance.read(1)
    rig.allowance.leave(space)
    seen.append(rig.allowance.is_forgettable)
    rig.now += 1.0
    seen.append(rig.allowance.is_forgettable)
    assert seen == [True, False, False, True]


async def test_what_is_brought_ahead_waits_too() -> None:
    """Until more may be placed, or its space is read no longer; without a limit, not at all."""
    rig = Rig()
    one, two = rig.space(), rig.space()
    await allowed(SimpleNamespace(allowance=None))
    await allowed(one)
    rig.allowance.read(8)
    waits = [asyncio.create_task(allowed(space)) for space in (one, two)]
    await turns(5)
    rig.allowance.leave(one)
    await waits[0]
    assert not waits[1].done()
    canceled = asyncio.create_task(allowed(two))
    await turns(5)
    canceled.cancel()
    rig.later(2.0)
    await waits[1]
    rig.allowance.leave(two)


@pytest.mark.parametrize("handler", [False, True])
async def test_a_prefetch_waits(*, handler: bool) -> None:
    """Before its first piece, whatever brings it."""
    from test_presence import Fills

    filler = Fills()
    filler.through.set()
    world = World(0, source=filler) if handler else World(0, located=True)
    rig = Rig()
    world.space.allowance = rig.allowance
    rig.allowance.enter(world.space, rig)
    rig.allowance.read(8)
    async with world.dispatched():
        task = asyncio.create_task(prefetch(world.space, [(0, SIZE)]))
        await turns(20)
        assert not world.uffd.pages
        rig.later(2.0)
        await task
    assert len(world.uffd.pages) == SIZE // PAGE
    rig.allowance.leave(world.space)
    await world.backend.aclose()


async def test_it_is_said_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    """Who is slowed, and what it has used up."""
    rig = Rig()
    space = rig.space()
    with caplog.at_level(logging.WARNING):
        for _ in range(8):
            rig.allowance.read(40)
            rig.later(10.0)
    assert caplog.messages == ["somebody has used up its 4 events a second, and is slowed"] * 2
    rig.allowance.leave(space)


def test_clients_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """One has one; those that a new one would equal are forgotten; without a limit there is none."""
    allowances, counters = Allowances(), Counters()
    assert allowances.of("a", None, None, counters) is None
    one = allowances.of("a", 4, None, counters)
    assert one is not None
    one.read(400)
    assert allowances.of("b", 4, None, counters) is not one
    other = Counters()
    assert allowances.of("a", 4, None, other) is one
    assert one.counters is other
    assert [name for name, _, _ in allowances._known] == ["a"]
    times = itertools.count(one._clock() + 1_000.0)
    monkeypatch.setattr(one, "_clock", lambda: next(times))
    assert allowances.of("a", None, 4, counters) is not one
