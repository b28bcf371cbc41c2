"""`engine.serve.handler`: what a handler is given, and what it may ask for."""

from __future__ import annotations

import pytest
from engine_world import BASE, World
from pattern import PAGE

from aiouffd.engine.serve.handler import Batch, Fault, Handler
from aiouffd.kernel.abi import FaultFlag
from aiouffd.ranges import Range


def at(page: int, count: int = 1) -> Range:
    """Return the addresses of some pages."""
    return Range(BASE + page * PAGE, count * PAGE)


async def test_batches_take_whole_pages_and_matching_bytes() -> None:
    """Anything else is the handler's mistake, told where it is made."""
    world = World(0, source=Handler())
    batch = Batch(world.space)
    for wrong in (Range(BASE + 1, PAGE), Range(BASE, PAGE + 1), Range(BASE, 0)):
        for call in (batch.zeropage, batch.poison, batch.protect, batch.unprotect):
            with pytest.raises(ValueError, match="whole pages of 4096 bytes"):
                call(wrong)
        with pytest.raises(ValueError, match="whole pages"):
            batch.copy(wrong, b"")
    with pytest.raises(ValueError, match="100 bytes for a range of 4096"):
        batch.copy(at(0), bytes(100))
    assert not batch._runs


def test_what_a_batch_covers_and_poisons() -> None:
    """Until it is flushed; the last of several counts."""
    world = World(0, source=Handler())
    batch = Batch(world.space)
    batch.copy(at(4, 2), bytes(2 * PAGE))
    assert [batch.covers(at(page).start) for page in (3, 4, 5, 6)] == [False, True, True, False]
    assert not batch.poisons(at(4).start)
    batch.poison(at(4))
    assert [batch.poisons(at(page).start) for page in (3, 4, 5)] == [False, True, False]
    batch.copy(at(4), bytes(PAGE))
    assert not batch.poisons(at(4).start)
    batch.flush()
    assert not batch.covers(at(4).start)
    assert world.uffd.pages[at(5).start] == bytes(PAGE)
    world.space.is_gone = True
    batch.copy(at(9), bytes(PAGE))
    batch.flush()
    assert at(9).start not in world.uffd.pages
    assert [run.op for run in batch._runs] == []


def test_a_fault_says_what_it_is() -> None:
    """For errors and logs."""
    fault = Fault(at(3).start + 5, FaultFlag.WRITE, 7, at(3), 3 * PAGE)
    assert str(fault) == f"the fault of thread 7 at {at(3).start + 5:#x} (offset 0x3000, write)"
    assert str(Fault(64, FaultFlag(0), 0, at(3), 0)) == "the fault at 0x40 (offset 0x0, read)"
