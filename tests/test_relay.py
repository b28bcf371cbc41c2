"""`criu.relay`: a source of another process."""

from __future__ import annotations

import asyncio
import os
import pickle
import struct

import pytest
from pattern import PAGE, Pattern, Sometimes, content

import aiouffd
from aiouffd.criu.relay import Relay, RelaySource
from aiouffd.handoff.receive import Peer

SIZE = 256 * PAGE


async def test_reads_go_through() -> None:
    """Many at once, from several sources; what fails there fails here with its reason, and costs the others nothing."""
    async with Relay() as relay:
        first: RelaySource = pickle.loads(pickle.dumps(relay.add(Sometimes(SIZE))))
        second = relay.add(Pattern(2 * SIZE))
        assert (first.size, second.size) == (SIZE, 2 * SIZE)
        offsets = [page * PAGE for page in range(2, 200)]
        found = await asyncio.gather(*(first.read(offset, PAGE) for offset in offsets))
        assert found == [content(offset, PAGE) for offset in offsets]
        with pytest.raises(aiouffd.SourceError, match="not today"):
            await first.read(PAGE, PAGE)
        assert await second.read(SIZE, 17) == content(SIZE, 17)
        await first.aclose()
        assert await first.read(0, PAGE) == content(0, PAGE)
        await first.aclose()
        await second.aclose()


async def test_a_canceled_read_leaves_no_answer_to_the_next() -> None:
    """Its connection is given up."""
    async with Relay() as relay:
        source = relay.add(Sometimes(SIZE))
        for offset in range(0, 64 * PAGE, 2 * PAGE):
            task = asyncio.create_task(source.read(offset, PAGE))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert await source.read(offset + 2 * PAGE, PAGE) == content(offset + 2 * PAGE, PAGE)
        await source.aclose()


async def test_another_user_is_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """An abstract address has no mode: the peer's user is looked at."""
    monkeypatch.setattr(Peer, "of", lambda _: Peer(1, 65534, 65534))
    async with Relay() as relay:
        source = relay.add(Pattern(SIZE))
        with pytest.raises(aiouffd.SourceError, match="the process with the source is gone"):
            await source.read(0, PAGE)


async def test_whoever_has_it_is_gone() -> None:
    """A SourceError that says so."""
    async with Relay() as relay:
        source = relay.add(Pattern(SIZE))
    with pytest.raises(aiouffd.SourceError, match="the process with the source is gone"):
        await source.read(0, PAGE)


async def test_a_wrong_request_is_an_error() -> None:
    """No such source, bytes behind its end: the error says so, and the connection goes on."""
    async with Relay() as relay:
        source = relay.add(Pattern(SIZE))
        with pytest.raises(aiouffd.SourceError, match=f"it has {SIZE} bytes"):
            await source.read(SIZE, PAGE)
        source.index = 7
        with pytest.raises(aiouffd.SourceError, match="list index"):
            await source.read(0, PAGE)
        source.index = 0
        assert await source.read(0, PAGE) == content(0, PAGE)
        await source.aclose()


@pytest.mark.parametrize(
    "answer", [struct.pack("=?Q", False, 1 << 60), struct.pack("=?Q", True, 1 << 60), struct.pack("=?Q", False, 1)]
)
async def test_an_answer_of_another_length_is_an_error(answer: bytes) -> None:
    """Neither a wait for bytes that do not come, nor bytes that were not asked for."""
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(20)
        writer.write(answer + b"x")
        await reader.read()
        writer.close()
        ended.set()

    address = b"\0aiouffd-test-" + os.urandom(8).hex().encode()
    async with await asyncio.start_unix_server(serve, address.decode("latin-1")), asyncio.timeout(60):
        source = RelaySource(address, 0, SIZE)
        with pytest.raises(aiouffd.SourceError, match="bytes for"):
            await source.read(0, PAGE)
        await ended.wait()
