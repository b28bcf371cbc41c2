"""Regions that are served from URLs, through outages and changes, in each engine that has a source."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from typing import Any

import odd_http
import pytest
from scenario import eventually, play

import aiouffd

ENGINES = {"pager": aiouffd.Pager, "thread": aiouffd.InThread, "process": aiouffd.InProcess}
SIZE = len(odd_http.DATA)
PAGE = 4096


async def outage(engine: str) -> None:
    """Scenario: the server fails some times; the reads are repeated, and counted."""
    with odd_http.serving() as server:
        async with aiouffd.open(server.url, engine=ENGINES[engine](), readahead=0) as region:
            monitor: Any = region.monitor
            server.failures = 3
            await monitor.prefetch(0, PAGE)  # came with the size
            assert monitor.statistics().source_retries == 0
            await monitor.prefetch(PAGE, PAGE)
            assert region[: 2 * PAGE] == odd_http.DATA[: 2 * PAGE]
            eventually(lambda: monitor.statistics().source_retries, 3)
            monitor.check()


@pytest.mark.parametrize("engine", ENGINES)
def test_an_outage_is_counted(engine: str, loop: str) -> None:
    """`source_retries` grows while it lasts."""
    play(outage, engine, loop=loop)


async def limits(engine: str) -> None:
    """Scenario: `retries=` and `timeout=` are those of the reads of a URL."""
    with odd_http.serving() as server:
        async with aiouffd.open(server.url, engine=ENGINES[engine](), readahead=0, retries=0) as region:
            monitor: Any = region.monitor
            server.failures = 1
            with pytest.raises(aiouffd.SourceError, match="503"):
                await monitor.prefetch(PAGE, PAGE)
            assert monitor.statistics().source_retries == 0
        source = aiouffd.ObjectSource(server.url)
        region = aiouffd.Region(source.size)
        async with aiouffd.Monitor(region, source, engine=ENGINES[engine](), readahead=0, timeout=0.5) as monitor:
            server.failures = 1000
            with pytest.raises(aiouffd.SourceError):
                await monitor.prefetch(PAGE, PAGE)  # with the timeout of 30 s this scenario would be killed


@pytest.mark.parametrize("engine", ENGINES)
def test_the_monitors_limits_are_a_urls(engine: str, loop: str) -> None:
    """Those of `open`, and those of a Monitor whose source was given none."""
    play(limits, engine, loop=loop, deadline=60)


async def changed(engine: str, habit: str) -> None:
    """Scenario: another object is at the URL when the second page is read."""
    with odd_http.serving(habit) as server:
        async with aiouffd.open(server.url, engine=ENGINES[engine](), readahead=0) as region:
            monitor: Any = region.monitor
            await monitor.prefetch(0, PAGE)
            server.change()
            with pytest.raises(aiouffd.SourceError, match="has changed"):
                await monitor.prefetch(PAGE, PAGE)
            assert region[:PAGE] == odd_http.DATA[:PAGE]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("habit", ["", "modified", "weak", "none"])
def test_no_bytes_of_two_versions(engine: str, habit: str, loop: str) -> None:
    """Whatever the server says of its versions, on the way to the pager too."""
    play(changed, engine, habit, loop=loop)


class Slowly:
    """Needs the network for its size, which answers when it is let."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.answers = threading.Event()

    @property
    def size(self) -> int:
        """Wait for the answer."""
        self.asked.set()
        assert self.answers.wait(60), "nothing else ran while the size was asked for"
        return PAGE

    async def read(self, offset: int, length: int) -> bytes:
        """Return some bytes."""
        return b"x" * length

    def __reduce__(self) -> tuple[Any, ...]:
        return aiouffd.BufferSource, (b"x" * PAGE,)


async def size_is_slow(engine: str) -> None:
    """Scenario: the loop runs while a source finds out its size."""
    source = Slowly()

    async def let() -> None:
        await asyncio.to_thread(source.asked.wait)
        source.answers.set()  # on the loop

    letting = asyncio.ensure_future(let())
    region = aiouffd.Region(PAGE)
    async with aiouffd.Monitor(region, source, engine=ENGINES[engine]()) as monitor:
        await monitor.prefetch(0, PAGE)
        assert region[0] == ord("x")
    await letting


@pytest.mark.parametrize("engine", ENGINES)
def test_a_size_does_not_stop_the_loop(engine: str, loop: str) -> None:
    """It is asked for in a thread, by each engine."""
    play(size_is_slow, engine, loop=loop)


async def through_fsspec(engine: str) -> None:
    """Scenario: a filesystem of functions and one of coroutines; then the object changes."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(odd_http.DATA)
        file.flush()
        async with aiouffd.open(f"local://{file.name}", engine=ENGINES[engine](), readahead=0) as region:
            monitor: Any = region.monitor
            await monitor.prefetch(0, SIZE)
            assert region[:] == odd_http.DATA
    with odd_http.serving() as server:
        source = aiouffd.FsspecSource(server.url)
        async with aiouffd.open(source, engine=ENGINES[engine](), readahead=0) as region:
            monitor = region.monitor
            await monitor.prefetch(0, 10 * PAGE)
            assert region[: 10 * PAGE] == odd_http.DATA[: 10 * PAGE]
            server.change()
            with pytest.raises(aiouffd.SourceError, match="has changed"):
                await monitor.prefetch(20 * PAGE, PAGE)


@pytest.mark.parametrize("engine", ENGINES)
def test_files_of_fsspec(engine: str, loop: str) -> None:
    """They travel to a pager, and a change is an error there, too."""
    play(through_fsspec, engine, loop=loop)
