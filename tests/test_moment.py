"""`engine.moment`: what threads read of a memory is patched by what the loop has kept."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from aiouffd.engine.moment import Moment
from aiouffd.errors import ClosedError
from aiouffd.ranges import Range

PAGE = 4096


class FakeCapture:
    """Has pages 1 to 3 in memory, of which 2 was written since, and 3 is lost; the others are in the source."""

    page = PAGE
    failure = None

    def to_read(self, first: int, last: int) -> list[tuple[int, int]]:
        """Return what is in memory."""
        return [(max(first, 1), min(last, 4))] if first < 4 and last > 1 else []

    async def read(self, first: int, last: int, lost: list[int], *, lifts: bool) -> list[tuple[int, Any]]:
        """Return what is not as in memory."""
        assert lifts
        assert lost == [3] * (first <= 3 < last)
        here = {0: b"source", 2: b"kept", 3: b"source", 4: b"source", 5: b"source"}
        return [(at * PAGE, data.ljust(PAGE)) for at, data in here.items() if first <= at < last]

    def check(self) -> None:
        """Fail."""
        raise ClosedError("it is over")


class FakeMemory:
    """Each page says which it is; the one at index 3 is missing."""

    def read_into(self, view: memoryview, offset: int) -> list[int]:
        """Fill a buffer."""
        first = offset // PAGE
        for at in range(len(view) // PAGE):
            view[at * PAGE : (at + 1) * PAGE] = b"page %d" % (first + at) + bytes(PAGE - 6)
        return [3 * PAGE] if first <= 3 < first + len(view) // PAGE else []


async def test_what_is_read_is_patched() -> None:
    """Bytes of memory, of what was kept, and of the source; the image ends within a page."""
    capture, memory = FakeCapture(), FakeMemory()
    extents = [Range(0, 6 * PAGE), Range(7 * PAGE, PAGE)]  # all may be data, and more than there is
    moment: Any = Moment(capture, memory, 6 * PAGE - 10, None, extents=extents, lifts=True)  # type: ignore[arg-type]
    assert moment.total == 7 * PAGE
    assert list(moment.extents()) == [(0, 6 * PAGE - 10)]
    data = await asyncio.to_thread(moment.read, 0, 6 * PAGE - 10)
    assert len(data) == 6 * PAGE - 10
    assert [bytes(data[at * PAGE : at * PAGE + 6]).strip() for at in range(6)] == [
        *(b"source", b"page 1", b"kept", b"source", b"source", b"source")
    ]
    assert bytes((await asyncio.to_thread(moment.read, PAGE, PAGE))[:6]) == b"page 1"
    assert moment.bytes_read == 7 * PAGE - 10
    with pytest.raises(ClosedError, match="it is over"):
        await asyncio.to_thread(moment.close)


async def test_the_rate_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read waits until those before it have taken their time, unless the snapshot has failed."""
    clock = SimpleNamespace(now=0.0)

    def sleep(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr("aiouffd.engine.moment.time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    moment: Any = Moment(FakeCapture(), FakeMemory(), 6 * PAGE, 10 * PAGE, extents=[], lifts=True)  # type: ignore[arg-type]
    for _ in range(3):
        await asyncio.to_thread(moment.read, PAGE, PAGE)
    assert clock.now == pytest.approx(0.3)
    moment._capture.failure = ClosedError("ended")
    await asyncio.to_thread(moment.read, PAGE, PAGE)
    assert clock.now == pytest.approx(0.3)
