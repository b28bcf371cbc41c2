"""`monitor.entered`: what a Monitor says of what has come, and how a prefetch is watched."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from pattern import PAGE, Pattern, Slow
from scenario import play, until

import aiouffd
from aiouffd.errors import SourceError
from aiouffd.monitor.progress import Progress
from aiouffd.ranges import Range

SIZE = 64 * PAGE
ENGINES = {"pager": aiouffd.Pager, "thread": aiouffd.InThread, "process": aiouffd.InProcess}


async def what_has_come(engine: str) -> None:
    """Scenario: pages are prefetched, and what has come is asked for."""
    region = aiouffd.Region(SIZE)
    async with aiouffd.Monitor(region, Pattern(SIZE), engine=ENGINES[engine](), readahead=0) as monitor:
        assert monitor.residency() == []
        assert monitor.progress() == Progress(SIZE, 0, 0.0, None)
        await monitor.prefetch(3 * PAGE, 5 * PAGE)
        await monitor.prefetch([Range(10 * PAGE - 1, 1), Range(3 * PAGE, PAGE), Range(4 * PAGE - 9, 9), Range(SIZE, 0)])
        await asyncio.wrap_future(monitor.ask_for(item for item in monitor.residency()))
        wrong: Any = [((0,), TypeError), (([], 5), TypeError), (([Range(0, 1), Range(SIZE, 1)],), ValueError)]
        for arguments, error in wrong:
            with pytest.raises(error):
                await monitor.prefetch(*arguments)
        assert monitor.residency() == [Range(3 * PAGE, 5 * PAGE), Range(9 * PAGE, PAGE)]
        now = monitor.progress()
        assert (now.total, now.resident) == (SIZE, 6 * PAGE)
        assert now.rate > 0
        assert now.remaining == pytest.approx(58 * PAGE / now.rate)
    assert monitor.residency() == [Range(3 * PAGE, 5 * PAGE), Range(9 * PAGE, PAGE)]


@pytest.mark.kernel
@pytest.mark.parametrize("engine", ENGINES)
def test_what_has_come(engine: str, loop: str) -> None:
    """Exact, whatever the engine, and after the block as well."""
    play(what_has_come, engine, loop=loop)


class Held(Slow):
    """Brings the first half at once, the rest when the test says so, and fails at the last page."""

    def __init__(self) -> None:
        super().__init__(SIZE, 0.0)
        self.go_on = asyncio.Event()

    async def read(self, offset: int, length: int) -> bytes:
        """Return the bytes, later."""
        if offset >= SIZE // 2:
            await self.go_on.wait()
        if offset + length > SIZE - PAGE:
            raise SourceError("Held", offset, length, "the last page is lost")
        return await super().read(offset, length)


async def watched() -> None:
    """Scenario: a prefetch that takes long is watched, one that fails, and one that is canceled."""
    region, source = aiouffd.Region(SIZE), Held()
    seen: list[Progress] = []

    def look(now: Progress) -> None:
        seen.append(now)

    options: Any = {"engine": aiouffd.InProcess(), "readahead": 0}
    async with aiouffd.Monitor(region, source, **options) as monitor:
        await monitor.prefetch(0, 8 * PAGE)
        task = asyncio.create_task(monitor.prefetch(SIZE // 2, 8 * PAGE, progress=look))
        await until(lambda: len(seen) >= 2)
        assert (seen[0].total, seen[0].resident) == (8 * PAGE, 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        source.go_on.set()
        seen.clear()
        await monitor.prefetch(0, SIZE // 2, progress=look)
        assert seen[-1].resident == seen[-1].total == SIZE // 2
        with pytest.raises(TypeError, match=r"a range is an aiouffd.Range\(start, length\), not \(0, 1\)"):
            monitor.ask_for([(0, 1)])  # type: ignore[list-item]
        with pytest.raises(SourceError, match="the last page is lost"):
            await monitor.prefetch(SIZE - PAGE, PAGE, progress=look)
        assert seen[-1].resident == 0


@pytest.mark.kernel
def test_a_prefetch_is_watched(loop: str) -> None:
    """From the beginning to the end, however that comes."""
    play(watched, loop=loop)


def watched_sync() -> None:
    """Scenario: the plain form, with a timeout and without, and on standard error."""
    region = aiouffd.Region(SIZE)
    seen: list[Progress] = []
    with aiouffd.Monitor(region, Slow(SIZE, 0.05), readahead=0, concurrent_reads=1) as monitor:
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"not all there after 0\.01 s"):
            monitor.prefetch_sync(0, SIZE, 0.01, progress=seen.append)
        assert time.monotonic() - began < 30
        assert seen
        monitor.prefetch_sync(0, SIZE, progress=seen.append)
        assert seen[-1] == Progress(SIZE, SIZE, seen[-1].rate, 0.0)
        monitor.prefetch_sync(0, PAGE, 60, progress=True)


@pytest.mark.kernel
def test_a_plain_prefetch_is_watched() -> None:
    """As by a coroutine."""
    _, errors = play(watched_sync)
    assert errors.startswith("aiouffd: [0, 4096): 4.0 KiB of 4.0 KiB (100 %)")
