"""`engine.serve.common`: what one has read, or is reading, the others do not ask for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from engine_world import Held, turns
from pattern import PAGE, content

from aiouffd.engine.serve.bounds import Limits
from aiouffd.engine.serve.common import Common, Shelf, is_far
from aiouffd.engine.serve.reads import Reads
from aiouffd.engine.statistics import Counters
from aiouffd.errors import SourceError, SourceTimeoutError


class Users:
    """Some who read one source.

    Args:
        count: how many.
        room: bytes that are kept.
        limits: of them.
        **attributes: of the source.
    """

    def __init__(self, count: int = 2, room: int = 0, limits: Limits | None = None, **attributes: Any) -> None:
        self.source = Held(1 << 30)
        vars(self.source).update(attributes)
        self.common = Common(self.source, Shelf(room))
        self.counters = [Counters() for _ in range(count)]
        self.reads = [Reads(self.common, counters, limits or Limits()) for counters in self.counters]

    def read(self, user: int, offset: int, length: int, *, urgent: bool = True) -> asyncio.Task[Any]:
        """Have one of them read; sizes are pages."""
        return asyncio.create_task(self.reads[user].read(offset * PAGE, length * PAGE, urgent=urgent))

    @property
    def asked(self) -> list[tuple[int, int]]:
        """What the source was asked for, in pages."""
        return [(offset // PAGE, length // PAGE) for offset, length, _ in self.source.reads]

    def counted(self, word: str) -> list[int]:
        """Return what each has counted."""
        return [getattr(counters.snapshot(), word) for counters in self.counters]


async def test_what_is_on_its_way_is_asked_for_once() -> None:
    """Whole, in part, and beside what is not; each counts what it has asked for. Then it is forgotten."""
    users = Users(3)
    first = users.read(0, 0, 16)
    await turns()
    same, part, more = users.read(1, 0, 16), users.read(2, 4, 2), users.read(1, 8, 16)
    await turns()
    assert users.asked == [(0, 16), (16, 8)]
    users.source.answer(0)
    assert bytes(await first) == bytes(await same) == content(0, 16 * PAGE)
    assert bytes(await part) == content(4 * PAGE, 2 * PAGE)
    users.source.answer(1)
    assert bytes(await more) == content(8 * PAGE, 16 * PAGE)
    assert users.counted("bytes_fetched") == [16 * PAGE, 8 * PAGE, 0]
    assert users.counted("bytes_shared") == [0, 24 * PAGE, 2 * PAGE]
    assert users.counted("source_reads") == [1, 1, 0]
    assert users.counted("in_flight") == [0, 0, 0]
    assert not len(users.common._pieces)
    assert users.common.at_hand(0, PAGE) is None


async def test_one_alone_shares_nothing() -> None:
    """Unless something is kept: another may come. What keeps by itself, and what is written to, is asked each time."""
    others: tuple[tuple[int, int, dict[str, Any]], ...] = ((1, 0, {}), (2, 99, {"keeps": True}), (2, 99, {"write": 1}))
    for count, room, attributes in others:
        users = Users(count, room, **attributes)
        tasks = [users.read(0, 0, 1), users.read(0, 0, 1)]
        await turns()
        assert len(users.asked) == 2
        for task in tasks:
            task.cancel()
    users = Users(1, room=4 * PAGE)
    tasks = [users.read(0, 0, 1), users.read(0, 0, 1)]
    await turns()
    assert len(users.asked) == 1
    users.source.answer()
    await asyncio.gather(*tasks)
    assert bytes(users.common.at_hand(0, PAGE)) == content(0, PAGE)


async def test_what_was_used_last_is_kept() -> None:
    """Up to a bound, of all sources together; with the last user nothing is, and the source is closed."""
    users = Users(1, room=4 * PAGE)
    for page in (0, 2, 4):
        if page == 4:
            assert bytes(users.common.at_hand(0, PAGE)) == content(0, PAGE)  # so 2 goes first
        task = users.read(0, page, 2 if page != 4 else 1)
        await turns()
        users.source.answer()
        await task
    assert bytes(users.common.at_hand(0, 2 * PAGE)) == content(0, 2 * PAGE)
    assert users.common.at_hand(2 * PAGE, PAGE) is None
    assert users.common.at_hand(0, 3 * PAGE) is None
    beside = users.read(0, 1, 4)  # 1 and 4 are kept
    await turns()
    assert users.asked[-1] == (2, 2)
    users.source.answer()
    assert bytes(await beside) == content(PAGE, 4 * PAGE)
    shelf = users.common._shelf
    assert shelf._size <= shelf.room
    await users.reads[0].aclose()
    assert (shelf._size, len(shelf._pieces), len(users.common._pieces)) == (0, 0, 0)


async def test_what_little_lies_between_is_asked_for_along() -> None:
    """A request of its own costs more; what is much is not."""
    users = Users(1, room=1 << 30)
    for offset, length in ((10, 1), (100, 30)):
        task = users.read(0, offset, length)
        await turns()
        users.source.answer()
        await task
    whole = users.read(0, 0, 140)
    await turns()
    assert users.asked[2:] == [(0, 100), (130, 10)]
    users.source.answer(2)
    users.source.answer(3)
    assert bytes(await whole) == content(0, 140 * PAGE)


async def test_who_waits_for_another_depends_on_nobody() -> None:
    """Who is canceled, or fails, costs the others another read of their own, and nothing else."""
    users = Users(3, limits=Limits(retries=0))
    first, second, third = (users.read(user, 0, 1) for user in range(3))
    await turns()
    first.cancel()
    await turns()
    assert users.asked == [(0, 1)] * 3
    users.source.answer(1, SourceError("it", 0, 1, "gone"))
    users.source.answer(2)
    with pytest.raises(SourceError, match="gone"):
        await second
    assert bytes(await third) == content(0, PAGE)
    canceled, waits = users.read(0, 5, 1), users.read(1, 5, 1)
    await turns()
    waits.cancel()  # who waits is no part of the read
    await turns()
    users.source.answer()
    assert bytes(await canceled) == content(5 * PAGE, PAGE)


async def test_a_part_that_fails_ends_the_others() -> None:
    """Nothing of it stays on its way."""
    users = Users(1, room=1 << 20, limits=Limits(retries=0))
    task = users.read(0, 40, 20)
    await turns()
    users.source.answer()
    await task
    task = users.read(0, 0, 100)
    await turns()
    assert users.asked[1:] == [(0, 40), (60, 40)]
    users.source.answer(1, SourceError("it", 0, 1, "gone"))
    with pytest.raises(SourceError):
        await task
    await turns()
    assert users.source.reads[2][2].cancelled()
    assert {piece.start // PAGE for piece in users.common._pieces} == {40}


async def test_another_try_is_made_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What others do has just failed."""
    monkeypatch.setattr("aiouffd.engine.serve.reads._between", lambda *_: 0.0)
    users = Users(2)
    users.reads[0]._retries = 1
    first, second = users.read(0, 0, 1), users.read(1, 0, 1)
    await turns()
    users.source.answer(0, SourceTimeoutError("it", 0, 1, "late"))
    await turns(100)
    assert users.asked == [(0, 1)] * 3
    users.source.answer(1)
    users.source.answer(2)
    assert bytes(await first) == bytes(await second) == content(0, PAGE)


async def test_what_is_urgent_waits_for_nothing_that_is_patient() -> None:
    """Where the source lets others go first; where it does not, it is as soon there as it can be."""
    users = Users(2, read_ahead=Held().read)
    ahead = users.read(0, 0, 4, urgent=False)
    await turns()
    patient, urgent = users.read(1, 0, 4, urgent=False), users.read(1, 1, 1)
    await turns()
    assert users.asked == [(1, 1)]
    users.source.answer()
    assert bytes(await urgent) == content(PAGE, PAGE)
    for task in (ahead, patient):
        task.cancel()
    users = Users(2)
    users.read(0, 0, 4, urgent=False)
    await turns()
    users.read(1, 1, 1)
    await turns()
    assert users.asked == [(0, 4)]


async def test_the_source_begins_once_and_its_tries_count_for_all() -> None:
    """All of them wait for it."""
    begun: list[Any] = []
    users = Users(2, begin=lambda *terms: begun.append(terms), limits=Limits(timeout=7.0, retries=3))
    ((timeout, retries, count),) = begun
    assert (timeout, retries) == (7.0, 3)
    count()
    assert users.counted("source_retries") == [1, 1]


def test_which_sources_are_far() -> None:
    """Those that have nothing at hand, and those that say so."""
    assert is_far(Held())
    held = Held()
    held.locate = None  # type: ignore[attr-defined]
    assert is_far(held)
    held.locate = lambda *_: 0  # type: ignore[attr-defined]
    assert not is_far(held)
    held.local = False  # type: ignore[attr-defined]
    assert is_far(held)
