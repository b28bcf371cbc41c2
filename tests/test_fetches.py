"""`store.fetches`: one fetch of a chunk, however many ask, and whoever dies."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from cached import CHUNK, Far, Hashed, opened, until

import aiouffd
from aiouffd.store.fetches import Fetches


async def test_many_readers_of_a_process(tmp_path: Path) -> None:
    """One read of the source for all who ask at once; neighbors are one read."""
    far = Far()
    source = opened(tmp_path, far)
    results = await asyncio.gather(*(source.read(0, 3 * CHUNK) for _ in range(20)), source.read(CHUNK + 5, 10))
    assert far.asked == [(0, 3 * CHUNK)]
    assert all(bytes(result) == far.bytes_of(0, 3 * CHUNK) for result in results[:-1])
    assert bytes(results[-1]) == far.bytes_of(CHUNK + 5, 10)
    await source.aclose()


async def test_a_reader_that_is_canceled(tmp_path: Path) -> None:
    """What it asked for comes all the same; those who asked as well get it."""
    far = Far()
    far.gate = asyncio.Event()
    source = opened(tmp_path, far)
    one, other = (asyncio.ensure_future(source.read(0, 10)) for _ in range(2))
    await until(lambda: far.asked)
    one.cancel()
    far.gate.set()
    assert bytes(await other) == far.bytes_of(0, 10)
    await until(lambda: 0 in source._places)
    assert len(far.asked) == 1
    assert one.cancelled()
    await source.aclose()


async def test_a_source_that_fails(tmp_path: Path) -> None:
    """All who wait are told; the next who asks tries again; so does another process, at once."""
    far = Far()
    far.failing = True
    source, other = opened(tmp_path, far), opened(tmp_path)
    results = await asyncio.gather(*(source.read(0, 10) for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [aiouffd.SourceError] * 3
    assert bytes(await other.read(0, 10)) == far.bytes_of(0, 10)
    far.failing = False
    assert bytes(await source.read(5, 10)) == far.bytes_of(5, 10)
    assert far.asked == [(0, CHUNK)]  # the other had brought it
    await source.aclose()
    await other.aclose()


async def test_a_source_that_gives_too_little(tmp_path: Path) -> None:
    """It is an error, and not kept."""

    class Short(Far):
        async def read(self, offset: int, length: int) -> bytes:
            """Return less."""
            return (await super().read(offset, length))[:-1]

    source, other = opened(tmp_path, Short()), opened(tmp_path)
    with pytest.raises(aiouffd.ShortReadError, match=r"gave 65535 bytes of 65536"):
        await source.read(0, 10)
    assert bytes(await other.read(0, 10)) == Far().bytes_of(0, 10)
    await source.aclose()
    await other.aclose()


async def test_another_process_waits_for_who_fetches(tmp_path: Path) -> None:
    """And then has the chunk; its other chunks it fetches meanwhile."""
    far, mine = Far(), Far()
    far.gate = asyncio.Event()
    source, other = opened(tmp_path, far), opened(tmp_path, mine)
    first = asyncio.ensure_future(source.read(CHUNK, 10))
    await until(lambda: far.asked)
    second = asyncio.ensure_future(other.read(0, 3 * CHUNK))
    await until(lambda: len(mine.asked) == 2)
    far.gate.set()
    assert bytes(await first) == far.bytes_of(CHUNK, 10)
    assert bytes(await second) == far.bytes_of(0, 3 * CHUNK)
    assert sorted(mine.asked) == [(0, CHUNK), (2 * CHUNK, CHUNK)]
    await source.aclose()
    await other.aclose()
    assert (await asyncio.to_thread(other.cache.statistics))["waits"] == 1


async def test_a_chunk_that_comes_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not fetched again, and not kept locked."""
    source, other = opened(tmp_path), opened(tmp_path)
    real = source.cache.try_lock

    def late(key: bytes) -> Any:
        assert other.cache.add([(key, Far().bytes_of(0, CHUNK))]) != [None]
        return real(key)

    monkeypatch.setattr(source.cache, "try_lock", late)
    assert bytes(await source.read(0, 10)) == Far().bytes_of(0, 10)
    assert source.source.asked == []
    key = source._names.of(0)
    assert await asyncio.to_thread(other.cache.try_lock, key)
    await source.aclose()
    await other.aclose()


async def test_a_source_that_does_not_know_the_name_of_a_chunk(tmp_path: Path) -> None:
    """As of a snapshot whose index is damaged: an error, and the other chunks are not kept locked."""

    class Damaged(Hashed):
        damaged = True

        def chunk_key(self, number: int) -> bytes | None:
            """Return none of the third."""
            if number == 2 and self.damaged:
                raise aiouffd.SourceError("index", 0, 0, "it is damaged")
            return super().chunk_key(number)

    source, other = opened(tmp_path, Damaged()), opened(tmp_path, Hashed())
    with pytest.raises(aiouffd.SourceError, match="it is damaged"):
        await source.read(0, 5 * 8192)
    assert await asyncio.to_thread(other.cache.try_lock, other.source.chunk_key(0))
    other.cache.unlock(other.source.chunk_key(0))
    await source.aclose()
    await other.aclose()


async def test_a_source_whose_chunks_are_not_what_their_names_say(tmp_path: Path) -> None:
    """As a snapshot that was made to spoil others: its bytes are its own, and nobody finds them in the cache."""

    class Forged(Hashed):
        def bytes_of(self, offset: int, length: int) -> bytes:
            """Return others than those that the names are of."""
            return b"x" * length

        def chunk_key(self, number: int) -> bytes | None:
            """Return the names of chunks of another source."""
            return Hashed().chunk_key(number)

    bad, good = opened(tmp_path, Forged()), opened(tmp_path, Hashed())
    for source in (bad, bad, good):
        assert bytes(await source.read(0, 3 * 8192)) == source.source.bytes_of(0, 3 * 8192)
    await bad.aclose()
    await good.aclose()


async def test_who_fetches_for_too_long_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was stopped."""
    monkeypatch.setattr("aiouffd.store.fetches._PATIENCE", 0.01)
    far, mine = Far(), Far()
    far.gate = asyncio.Event()
    source, other = opened(tmp_path, far), opened(tmp_path, mine)
    first = asyncio.ensure_future(source.read(CHUNK, 10))
    await until(lambda: far.asked)
    assert bytes(await other.read(CHUNK, 10)) == far.bytes_of(CHUNK, 10)
    assert mine.asked == [(CHUNK, CHUNK)]
    far.gate.set()
    await first
    await source.aclose()
    await other.aclose()


async def test_closing_gives_up_what_is_under_way(tmp_path: Path) -> None:
    """Those who wait are told, and the keys are free for others."""
    far, mine = Far(), Far()
    far.gate = asyncio.Event()
    source, other = opened(tmp_path, far), opened(tmp_path, mine)
    waiting = asyncio.ensure_future(source.read(0, 10))
    await until(lambda: far.asked)
    await source.aclose()
    with pytest.raises(aiouffd.SourceError, match="closed meanwhile"):
        await waiting
    assert bytes(await other.read(0, 10)) == far.bytes_of(0, 10)
    await other.aclose()


FETCHER = """
import asyncio, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from cached import Far, opened

async def main():
    far = Far()
    far.gate = asyncio.Event()
    reading = asyncio.ensure_future(opened(Path(sys.argv[1]), far).read(0, 10))
    while not far.asked:
        await asyncio.sleep(0.001)
    print("fetching", flush=True)
    await reading

asyncio.run(main())
"""


async def test_a_fetcher_that_is_killed_is_replaced(tmp_path: Path) -> None:
    """By the one that waits for it; not before."""
    command = [sys.executable, "-c", FETCHER, str(tmp_path), str(Path(__file__).parent)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"fetching\n"
    mine = Far()
    source = opened(tmp_path, mine)
    reading = asyncio.ensure_future(source.read(0, 10))
    await until(lambda: source.cache._more["waits"])
    assert not mine.asked
    process.kill()
    await process.wait()
    assert bytes(await reading) == mine.bytes_of(0, 10)
    assert mine.asked == [(0, CHUNK)]
    await source.aclose()
    assert os.getpid() != process.pid


@pytest.mark.parametrize("claimed", [False, True])
async def test_closing_before_a_fetch_has_begun(tmp_path: Path, claimed: bool) -> None:
    """Who waits is told, and no other process waits for a chunk that nobody fetches: it is locked by nobody."""
    source, other = opened(tmp_path), opened(tmp_path)
    await source.prepare()
    done = threading.Event()

    async def aside(function: Any, *arguments: Any) -> Any:
        def call() -> Any:
            try:
                return function(*arguments)
            finally:
                done.set()

        return await asyncio.to_thread(call)

    fetches = Fetches(source.source, source._names, source.cache, aside, lambda _: None)
    waiting = asyncio.ensure_future(fetches.get([0], urgent=True))
    await asyncio.sleep(0)
    if claimed:
        await asyncio.sleep(0)
        done.wait(60)  # the loop has not heard yet that it has the lock
    await fetches.aclose()
    with pytest.raises(aiouffd.SourceError, match="closed meanwhile"):
        await asyncio.wait_for(waiting, 60)
    assert await asyncio.to_thread(other.cache.try_lock, source._names.of(0))


async def test_what_is_read_ahead_may_become_urgent(tmp_path: Path) -> None:
    """The source is asked for the chunk that a thread waits for, once, and knows that it reads it already."""

    class Patient(Far):
        ahead = 0

        async def read_ahead(self, offset: int, length: int) -> bytes:
            """Wait until it is let go."""
            self.ahead += 1
            assert self.gate is not None
            await self.gate.wait()
            return self.bytes_of(offset, length)

        async def read(self, offset: int, length: int) -> bytes:
            """Return the bytes at once."""
            self.asked.append((offset, length))
            return self.bytes_of(offset, length)

    far = Patient()
    far.gate = asyncio.Event()
    source = opened(tmp_path, far)
    reading = asyncio.ensure_future(source.read_ahead(0, 3 * CHUNK))
    await until(lambda: far.ahead)
    for _ in range(2):
        assert bytes(await source.read(CHUNK, 10)) == far.bytes_of(CHUNK, 10)
    assert far.asked == [(CHUNK, CHUNK)]
    far.gate.set()
    assert bytes(await reading) == far.bytes_of(0, 3 * CHUNK)
    assert bytes(await source.read_ahead(0, 3 * CHUNK)) == far.bytes_of(0, 3 * CHUNK)
    assert far.ahead == 1
    reading = asyncio.ensure_future(source.read_ahead(5 * CHUNK, 2 * CHUNK))
    await asyncio.sleep(0)  # it is not known yet who is to bring them
    assert far.ahead == 1
    assert bytes(await source.read(6 * CHUNK, 10)) == far.bytes_of(6 * CHUNK, 10)
    assert far.asked[1:] == [(5 * CHUNK, 2 * CHUNK)]
    assert bytes(await reading) == far.bytes_of(5 * CHUNK, 2 * CHUNK)
    await until(lambda: not source._fetches._ahead)
    await source.aclose()


async def test_what_is_slow_to_be_kept_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where many bytes have not been written to the cache yet: memory has an end."""
    monkeypatch.setattr("aiouffd.store.fetches._BEHIND", 0)
    source = opened(tmp_path)
    assert bytes(await source.read(0, 10)) == Far().bytes_of(0, 10)
    assert 0 in source._places  # it was written by then
    await source.aclose()
