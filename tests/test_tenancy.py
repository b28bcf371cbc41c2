"""`tenancy`: a source is rebuilt from what was packed, or stands for its failure."""

from __future__ import annotations

import asyncio
import os
import resource
from typing import TYPE_CHECKING, Any

import attrs
import pytest
from engine_world import turns
from scenario import open_descriptors

import aiouffd
from aiouffd.engine.options import Options, Service
from aiouffd.engine.serve.bounds import Limits
from aiouffd.engine.serve.reads import Reads
from aiouffd.engine.statistics import Counters
from aiouffd.pager.client.packing import Pack
from aiouffd.pager.process import tenancy
from aiouffd.pager.process.tenancy import Arrivals, Commons, FailedSource, Tenancy, build
from aiouffd.sources.concat import ConcatSource

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PAGE = 4096


async def test_a_source_is_rebuilt_with_its_options() -> None:
    """Options went through JSON; the bytes are the source's, from a descriptor of its own."""
    data = bytes(range(256)) * 16
    options = Options(readahead=PAGE)
    pack = await asyncio.to_thread(Pack, Service(aiouffd.BufferSource(data)), options)
    record = {**pack.record, "config": pack.fds[0], "fds": pack.fds[1:]}
    origin = await build(Counters(), 5, record, Commons())
    assert (origin.identity, origin.options) == (5, options)
    rebuilt: Any = origin.service.origin
    assert bytes(rebuilt.read_nowait(0, PAGE)) == data
    assert all(os.fstat(fd) for fd in record["fds"])  # those in the record stay
    pack.close()


async def test_a_source_in_memory_is_rebuilt_without_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages wait for a successor, and on a busy machine for each thread that it starts. A file may not answer."""
    path = tmp_path / "file"
    await asyncio.to_thread(path.write_bytes, bytes(PAGE))
    apart: list[object] = []

    async def noted(function: Callable[..., Any], *args: object) -> Any:
        apart.append(function)
        return await asyncio.to_thread(function, *args)

    monkeypatch.setattr(tenancy, "in_own_thread", noted)
    for source, threads in ((aiouffd.BufferSource(bytes(PAGE)), 0), (aiouffd.FileSource(path), 1)):
        pack = await asyncio.to_thread(Pack, Service(source), Options())
        record = {**pack.record, "config": pack.fds[0], "fds": pack.fds[1:]}
        origin = await build(Counters(), 5, record, Commons())
        assert type(origin.service.origin) is type(source)
        assert len(apart) == threads
        await origin.backend.aclose()
        pack.close()


async def test_a_source_that_finds_no_room_for_its_descriptors_takes_none(tmp_path: Path) -> None:
    """Where it did, those that come and fail would use up the table for good."""
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        await asyncio.to_thread(path.write_bytes, bytes(PAGE))
    source = ConcatSource([aiouffd.FileSource(path) for path in paths])
    pack = await asyncio.to_thread(Pack, Service(source), Options())
    record = {**pack.record, "config": pack.fds[0], "fds": pack.fds[1:]}
    before, limits = open_descriptors(), resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 2, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            await build(Counters(), 5, record, Commons())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert open_descriptors() <= before  # what an earlier test has left may go meanwhile
    pack.close()


class Far:
    """A far source of some bytes."""

    size = PAGE

    def __init__(self, identity: str | None) -> None:
        self.identity = identity
        self.closed = False

    async def read(self, offset: int, length: int) -> bytes:
        """Return zeros."""
        return bytes(length)

    async def aclose(self) -> None:
        """Note it."""
        self.closed = True


async def test_far_sources_that_are_the_same_are_one() -> None:
    """By what they are made of, what they say they are, and how patiently they are read; the last user closes it."""
    commons, limits = Commons(), Limits(recent=PAGE)
    first = Far("a")
    known = commons.of(first, "far", limits)
    users = [Reads(known, Counters(), limits)]
    others: list[tuple[str | None, str | None, Limits]] = [
        ("far", "b", limits),
        ("other", "a", limits),
        ("far", "a", Limits(timeout=1.0)),
        (None, "a", limits),
    ]
    others += [("far", "a", Limits(retries=1)), ("far", None, limits)]
    for made_of, identity, its in others:
        other = commons.of(Far(identity), made_of, its)
        assert other is not known
        other.enter(users[0], its)
    again = Far("a")
    assert commons.of(again, "far", limits) is known
    await turns()
    assert again.closed
    users.append(Reads(known, Counters(), limits))
    await users[0].aclose()
    closed = [first.closed]
    await users[1].aclose()
    assert [*closed, first.closed] == [False, True]
    assert commons.of(Far("a"), "far", limits) is not known


async def test_what_could_not_be_opened_again_fails_page_by_page() -> None:
    """With the reason, at once: it is not tried again."""
    source = FailedSource(FileNotFoundError(2, "No such file", "/x"))
    assert source.retries == 0
    with pytest.raises(aiouffd.SourceError, match="No such file") as caught:
        await source.read(PAGE, PAGE)
    assert (caught.value.offset, caught.value.length) == (PAGE, PAGE)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_the_end_of_a_forked_child_is_not_announced() -> None:
    """The client knows only what it has opened itself."""
    origin: Any = object()
    assert Tenancy(origin, "t").announced
    child = Tenancy(origin, "t", is_child=True)
    assert not child.announced
    assert attrs.evolve(child, is_child=False, announced=True).announced


async def test_who_wants_what_is_about_to_be_served_waits() -> None:
    """Until all that were expected by that token have come; for another token nobody waits."""
    arrivals = Arrivals()
    arrivals.expect("a")
    arrivals.expect("a")
    assert "a" in arrivals
    await arrivals.wait("b")
    waiting = asyncio.ensure_future(arrivals.wait("a"))
    await asyncio.sleep(0)
    arrivals.done("a")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not waiting.done()
    arrivals.done("a")
    async with asyncio.timeout(60):
        await waiting
    assert "a" not in arrivals
