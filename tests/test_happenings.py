"""`server.happenings`: who follows sees all in order, and costs nobody anything."""

from __future__ import annotations

import asyncio

from aiouffd.server import happenings as module
from aiouffd.server.happenings import Happenings


async def test_followers() -> None:
    """New ones, or those behind a number; a gap where some were dropped; and an end."""
    happenings = Happenings()
    for number in range(3):
        happenings.tell("client.served", "a", client=number)
    new, old = happenings.follow(), happenings.follow(1)
    first = asyncio.ensure_future(anext(new))
    assert [(await anext(old)).number for _ in range(2)] == [2, 3]
    waiting = asyncio.ensure_future(anext(old))
    await asyncio.sleep(0)
    happenings.tell("client.gone", "b", reason="x")
    for found in (await first, await waiting):
        assert (found.number, found.kind, found.session, found.details) == (4, "client.gone", "b", {"reason": "x"})
    for _ in range(module._KEPT + 5):
        happenings.tell("client.served", "a")
    assert (await anext(old)).number == 4 + 5 + 1
    canceled = asyncio.ensure_future(anext(new))
    await asyncio.sleep(0)
    assert (await canceled).number == 10
    happenings.close()
    assert len([item async for item in old]) == module._KEPT - 1
    assert [item.number async for item in happenings.follow(10**9)] == []


async def test_slow_faults_take_nothing_elses_place() -> None:
    """They may come each second for each client: who comes later still learns who has failed, in order."""
    happenings = Happenings()
    for _ in range(2):
        happenings.tell("client.failed", "a")
        for _ in range(module._KEPT):
            happenings.tell("client.slow", "b")
    happenings.close()
    seen = [item async for item in happenings.follow(0)]
    assert [item.number for item in seen if item.kind == "client.failed"] == [1, 2 + module._KEPT]
    assert len(seen) == 2 + module._KEPT
    assert [item.number for item in seen] == sorted(item.number for item in seen)


async def test_a_follower_that_leaves() -> None:
    """Nothing of it is left."""
    happenings = Happenings()
    waiting = asyncio.ensure_future(anext(happenings.follow()))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert not happenings._waiting
