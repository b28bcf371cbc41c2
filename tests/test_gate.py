"""`engine.gate`: the bound on what is under way."""

from __future__ import annotations

import asyncio

import pytest

from aiouffd.engine.serve.gate import Gate
from aiouffd.engine.serve.precedence import Precedence


async def entered(gate: Gate, size: int, *, urgent: bool, log: list[str], name: str) -> None:
    """Enter, and say so."""
    await gate.enter(size, urgent=urgent)
    log.append(name)


async def rest() -> None:
    """Let every task that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_both_bounds_hold() -> None:
    """No more reads, and no more bytes, than allowed are inside at once."""
    gate = Gate(reads=2, size=100)
    assert gate.try_enter(60)
    assert not gate.try_enter(60)
    assert gate.try_enter(40)
    gate.leave(60)
    assert gate.try_enter(1)
    assert not gate.try_enter(1)


async def test_a_piece_larger_than_the_bound_is_let_in_alone() -> None:
    """One read larger than all that is allowed does not wait for ever."""
    gate = Gate(reads=8, size=100)
    assert gate.try_enter(1000)
    assert not gate.try_enter(1)
    gate.leave(1000)
    assert gate.try_enter(1)


async def test_faults_pass_prefetches_and_do_not_starve_them() -> None:
    """Urgent pieces go first; of each eight that are let in, one is a patient one, however many urgent ones wait."""
    gate = Gate(reads=1, size=1000)
    await gate.enter(1, urgent=True)
    log: list[str] = []
    tasks = [asyncio.ensure_future(entered(gate, 1, urgent=False, log=log, name="patient")) for _ in range(5)]
    await rest()
    tasks += [asyncio.ensure_future(entered(gate, 1, urgent=True, log=log, name="urgent")) for _ in range(30)]
    await rest()
    for _ in range(35):
        gate.leave(1)
        await rest()
    assert [number for number, name in enumerate(log) if name == "patient"] == [0, 8, 16, 24, 32]
    assert len(log) == 35
    await asyncio.gather(*tasks)


async def test_an_urgent_piece_that_fits_passes_a_patient_one_that_does_not() -> None:
    """It need not wait until somebody leaves."""
    gate = Gate(reads=2, size=100)
    await gate.enter(60, urgent=False)
    log: list[str] = []
    patient = asyncio.ensure_future(entered(gate, 60, urgent=False, log=log, name="patient"))
    await rest()
    gate._turn = 1
    urgent = asyncio.ensure_future(entered(gate, 40, urgent=True, log=log, name="urgent"))
    await rest()
    assert log == ["urgent"]
    assert not gate.try_enter(0)  # nobody passes who waits
    gate.leave(60)
    await rest()
    assert log == ["urgent", "patient"]
    await asyncio.gather(patient, urgent)
    assert (gate.reads, gate.size) == (2, 100)


async def test_canceling_gives_the_place_up() -> None:
    """A canceled waiter neither keeps its place nor takes one."""
    gate = Gate(reads=1, size=10)
    await gate.enter(1, urgent=True)
    log: list[str] = []
    first = asyncio.ensure_future(entered(gate, 1, urgent=True, log=log, name="first"))
    second = asyncio.ensure_future(entered(gate, 1, urgent=True, log=log, name="second"))
    await rest()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    gate.leave(1)
    await second
    assert log == ["second"]
    gate.leave(1)
    assert (gate.reads, gate.size) == (0, 0)


async def test_a_waiter_that_was_let_in_and_canceled_at_once_leaves_again() -> None:
    """Canceled between being let in and running: its place goes to the next."""
    gate = Gate(reads=1, size=10)
    await gate.enter(1, urgent=True)
    waiter = asyncio.ensure_future(gate.enter(1, urgent=True))
    await rest()
    gate.leave(1)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert (gate.reads, gate.size) == (0, 0)


def test_how_far_a_source_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as a read ahead takes while they are few, from the first one on; some quick ones change little."""
    precedence = Precedence()
    gate = Gate(reads=1, size=10, precedence=precedence)
    assert gate.share == 1  # nothing is known: one at once
    for spent in (8_000_000, 80_000_000, 80_000_000):  # they wait for each other
        gate.took(spent)
    assert gate.share == 1_600_000
    monkeypatch.setattr(precedence, "others_fault", lambda: True)
    for _ in range(300):
        for spent in (10_000, 8_000_000, 8_000_000, 8_000_000):
            gate.took(spent)
    assert 1_300_000 < gate.share < 1_800_000
    for _ in range(300):
        gate.took(100_000)
    assert 16_000 < gate.share < 24_000
    for _ in range(600):
        gate.took(8_000_000)
    assert 1_300_000 < gate.share < 1_800_000
