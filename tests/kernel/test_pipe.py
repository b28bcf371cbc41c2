"""`monitor.engines.pipe`: a descriptor with Feature.SIGBUS, used as one that has messages and sleepers."""

from __future__ import annotations

import asyncio
import errno
import os
from typing import TYPE_CHECKING

import pytest
from pattern import PAGE

import aiouffd
from aiouffd.engine.resolver import DONTWAKE
from aiouffd.kernel.abi import Feature, RegisterMode
from aiouffd.kernel.memory import address_of
from aiouffd.monitor.engines.pipe import PipeUserfaultfd
from aiouffd.native import faults

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 64 * PAGE


@pytest.fixture
def woken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return the ranges that were woken."""
    ranges: list[tuple[int, int]] = []
    monkeypatch.setattr(faults, "wake", lambda start, length: ranges.append((start, length)))
    return ranges


@pytest.fixture
def region() -> Iterator[aiouffd.Region]:
    """A region to be registered."""
    made = aiouffd.Region(SIZE)
    yield made
    made.close()


def test_messages_come_by_the_pipe_and_pages_by_the_descriptor(
    region: aiouffd.Region, woken: list[tuple[int, int]]
) -> None:
    """Each operation wakes its range, unless it is told not to; a short and a long COPY are the same."""
    loop = asyncio.new_event_loop()
    reading, writing = os.pipe()
    data = bytes(range(256)) * (SIZE // 256)
    source = address_of(data)
    start = region.address
    with aiouffd.Userfaultfd(Feature.SIGBUS) as uffd:
        uffd.register(start, SIZE, RegisterMode.MISSING)
        piped = PipeUserfaultfd.joined(uffd, reading, loop)
        assert piped.fileno() == reading
        assert piped.try_copy(start, source, PAGE, 0) == PAGE
        assert piped.try_copy(start + PAGE, source + PAGE, 31 * PAGE, 0) == 31 * PAGE
        assert piped.try_zeropage(start + 32 * PAGE, 2 * PAGE, 0) == 2 * PAGE
        assert woken == [(start, PAGE), (start + PAGE, 31 * PAGE), (start + 32 * PAGE, 2 * PAGE)]
        assert piped.try_copy(start + 34 * PAGE, source, PAGE, DONTWAKE) == PAGE
        assert piped.try_copy(start, source, PAGE, 0) == -errno.EEXIST
        assert piped.try_continue(start + 40 * PAGE, PAGE, 0) < 0
        assert len(woken) == 3
        assert piped.try_poison(start + 41 * PAGE, PAGE, 0) == PAGE
        assert len(woken) == 4
        piped.close()
    assert region[: 32 * PAGE] == data[: 32 * PAGE]
    assert region[32 * PAGE : 34 * PAGE] == bytes(2 * PAGE)
    for fd in (reading, writing):
        os.close(fd)
    loop.close()


async def test_wakes_of_a_task_come_after_all_tasks_of_the_turn(woken: list[tuple[int, int]]) -> None:
    """A thread that is woken wants the GIL, which the loop has until it sleeps."""
    reading, writing = os.pipe()
    with aiouffd.Userfaultfd(Feature.SIGBUS) as uffd:
        piped = PipeUserfaultfd.joined(uffd, reading, asyncio.get_running_loop())
        piped.try_wake(PAGE, PAGE)
        piped.try_wake(5 * PAGE, PAGE)
        assert not woken
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert woken == [(PAGE, PAGE), (5 * PAGE, PAGE)]
        asyncio.get_running_loop().call_soon(piped.try_wake, 9 * PAGE, PAGE)
        await asyncio.sleep(0)
        assert woken[-1] == (9 * PAGE, PAGE)
        piped.close()
    for fd in (reading, writing):
        os.close(fd)
