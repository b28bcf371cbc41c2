"""`engine.owner`: how pages are asked to be dropped, and what is waited for meanwhile."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import threading
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
from pattern import PAGE
from scenario import eventually

import aiouffd
from aiouffd.engine.apart import Apart
from aiouffd.engine.bound import Bound
from aiouffd.engine.flight import Flights
from aiouffd.engine.mappings import Mapping, Mappings
from aiouffd.engine.owner import Owner, take_back
from aiouffd.engine.protect import WrittenPages
from aiouffd.engine.statistics import Counters
from aiouffd.kernel.memory import address_of, map_file
from aiouffd.kernel.pagemap import Pagemap
from aiouffd.monitor.engines.on_demand import may_be_dropped
from aiouffd.pager.process.last_resort import Forsaken, LastResort

pytestmark = pytest.mark.skipif(not may_be_dropped(), reason="it needs the native part")

IDLE, ASKED, TAKEN, ANSWERED = range(4)


class Words:
    """What is asked, and answered by hand, in place of a process."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("words")
        os.ftruncate(self.fd, mmap.PAGESIZE)
        self.words = map_file(self.fd, mmap.PAGESIZE, mmap.ACCESS_WRITE)
        self.gone = False
        pagemap = Pagemap()
        self.owner = Owner(os.dup(self.fd), os.dup(pagemap.fileno()), lambda: self.gone)

    @property
    def state(self) -> int:
        """The first word."""
        return self.words[0]

    @property
    def asked(self) -> list[tuple[int, int]]:
        """The ranges that are asked for."""
        count = int.from_bytes(self.words[12:16], "little")
        words = memoryview(self.words)[16 : 16 + 16 * count].cast("Q").tolist()
        return list(zip(words[::2], words[1::2], strict=True))

    def answer(self, *results: int) -> None:
        """Answer."""
        for at, result in enumerate(results):
            place = 16 + 16 * 64 + 4 * at
            self.words[place : place + 4] = (-result).to_bytes(4, "little", signed=True)
        self.words[0] = ANSWERED


def part(page: int, *places: int) -> tuple[int, int, list[tuple[int, int]]]:
    """Return a part of one page, and where it is shown."""
    return page * PAGE, (page + 1) * PAGE, [(place * PAGE, (place + 1) * PAGE) for place in places]


async def settled(apart: Apart) -> None:
    """Wait until nothing is waited for."""
    while apart.is_waiting:  # noqa: ASYNC110 - there is no event
        await asyncio.sleep(0.001)


def test_an_answer_that_comes_at_once() -> None:
    """Each part has why it stays, wherever it does."""
    asyncio.run(an_answer_that_comes_at_once())  # what blocks the loop for a moment is meant


async def an_answer_that_comes_at_once() -> None:
    """Scenario."""
    words, told, waits = Words(), list[Any](), Mock()
    finish = words.owner.begin([part(0, 8), part(1, 9, 19), part(2)], Apart(waits, Mock(), None), told.extend)
    assert (words.state, words.asked) == (ASKED, [(8 * PAGE, 9 * PAGE), (9 * PAGE, 10 * PAGE), (19 * PAGE, 20 * PAGE)])
    words.answer(0, 0, errno.EBUSY)
    finish()
    assert [(low // PAGE, getattr(error, "errno", 0)) for low, _, error in told] == [(0, 0), (1, errno.EBUSY), (2, 0)]
    waits.assert_not_called()


def test_an_answer_that_comes_late() -> None:
    """It is waited for apart, and more ranges than there is room for are asked for one after the other."""
    asyncio.run(an_answer_that_comes_late())  # what blocks the loop for a moment is meant


async def an_answer_that_comes_late() -> None:
    """Scenario."""
    words, told, waits = Words(), list[Any](), Mock()
    apart = Apart(waits, Mock(), None)
    words.owner.begin([part(page, page) for page in range(100)], apart, told.extend)()
    assert (apart.is_waiting, told) == (True, [])
    waits.assert_called_once_with(True)
    words.answer(*[0] * 64)
    await asyncio.to_thread(eventually, lambda: len(words.asked), 36)
    words.answer(*[errno.EAGAIN] * 36)
    await settled(apart)
    assert [getattr(error, "errno", 0) for _, _, error in told] == [0] * 64 + [errno.EAGAIN] * 36


def test_a_process_that_is_gone() -> None:
    """Nobody waits for its answer."""
    asyncio.run(a_process_that_is_gone())  # what blocks the loop for a moment is meant


async def a_process_that_is_gone() -> None:
    """Scenario."""
    words, told = Words(), list[Any]()
    apart = Apart(Mock(), Mock(), None)
    words.owner.begin([part(0, 0)], apart, told.extend)()
    words.gone = True
    await settled(apart)
    assert [error.errno for _, _, error in told] == [errno.ESRCH]


def test_what_is_put_off_goes_later() -> None:
    """A block that cannot be dropped while the layout is changing is asked for again, and no other in its place."""
    asyncio.run(is_put_off_goes_later())


async def is_put_off_goes_later() -> None:
    """Scenario."""
    words, asked, refused = Words(), list[int](), [errno.EAGAIN]

    def begin(parts: list[Any], _apart: Apart, then: Any) -> Any:
        asked.extend(low // PAGE for low, _, _ in parts)
        failures = [OSError(refused.pop(), "") if refused else None for _ in parts]
        return lambda: then([(low, high, error) for (low, high, _), error in zip(parts, failures, strict=True)])

    space = Mock(closing=False, is_gone=False, mappings=Mappings([Mapping(PAGE, 17 * PAGE, 0)]), page_size=PAGE)
    space.configure_mock(flights=Flights(), remainders=[], deferred=[], capture=None, counters=Counters())
    with WrittenPages.create(16 * PAGE, PAGE) as written, Pagemap() as pagemap:
        bound = Bound(written, PAGE, 8 * PAGE, Counters(), owner=(words.fd, os.dup(pagemap.fileno())))
        bound._owner = Mock(begin=begin, there=lambda _: [])
        bound.enter(space)
        await bound.settled()
        bound.came(0, 8 * PAGE)
        bound.make_room(8 * PAGE, PAGE)
        assert (asked, bound.resident) == ([0], 8 * PAGE)
        bound.make_room(8 * PAGE, PAGE)
        assert (asked[:3], bound.resident <= 7 * PAGE) == ([0, 0, 1], True)


def test_several_that_stay_together() -> None:
    """Of each it is found out what of it has gone, however long that takes."""
    asyncio.run(several_that_stay_together())  # what blocks the loop for a moment is meant


async def several_that_stay_together() -> None:
    """Scenario."""
    words, go = Words(), threading.Event()

    def begin(parts: list[Any], _apart: Apart, then: Any) -> Any:
        return lambda: then([(low, high, OSError(errno.EBUSY, "busy")) for low, high, _ in parts])

    def there(shown: list[Mapping]) -> list[tuple[int, int]]:
        assert go.wait(20)
        return [(at.offset, at.offset + PAGE) for at in shown]

    space = Mock(closing=False, is_gone=False, mappings=Mappings([Mapping(PAGE, 17 * PAGE, 0)]), page_size=PAGE)
    space.configure_mock(flights=Flights(), remainders=[], deferred=[], capture=None, counters=Counters())
    with WrittenPages.create(16 * PAGE, PAGE) as written, Pagemap() as pagemap:
        bound = Bound(written, PAGE, None, Counters(), owner=(words.fd, os.dup(pagemap.fileno())))
        bound._owner = Mock(begin=begin, there=lambda _: [], missing=partial(Owner.missing, Mock(there=there)))
        bound.enter(space)
        await bound.settled()
        bound.came(0, 8 * PAGE)
        bound._begin([(0, 2 * PAGE, []), (4 * PAGE, 7 * PAGE, [])])()
        assert (bound.is_waiting, bound.resident) == (True, 8 * PAGE)
        go.set()
        await bound.settled()
        assert bound.resident == 5 * PAGE


def test_what_a_predecessor_asked_for() -> None:
    """It is taken back where nobody has begun, and waited for where somebody has: nothing is read before."""
    asyncio.run(what_a_predecessor_asked_for())  # what blocks the loop for a moment is meant


async def what_a_predecessor_asked_for() -> None:
    """Scenario."""
    words = Words()
    words.words[0] = ASKED
    page = mmap.mmap(-1, 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    page[PAGE] = 1
    shown = [(address_of(page), address_of(page) + 2 * PAGE, 5 * PAGE)]
    assert await asyncio.to_thread(words.owner.there, shown) == [(6 * PAGE, 7 * PAGE)]
    assert words.state == IDLE
    words.words[0] = ASKED
    with aiouffd.Userfaultfd() as uffd:  # nobody asks any more, and messages are read
        LastResort([Forsaken(uffd, PAGE, [], words=words.fd)]).close()
    assert words.state == IDLE
    other = Words()
    other.words[0] = TAKEN
    await asyncio.to_thread(take_back, other.fd)  # waits for a second
    assert other.state == TAKEN
    looking = asyncio.ensure_future(asyncio.to_thread(other.owner.there, shown))
    done, _ = await asyncio.wait([looking], timeout=0.1)
    assert not done
    other.answer()
    assert await looking == [(6 * PAGE, 7 * PAGE)]
