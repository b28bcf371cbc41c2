"""`sources.helped_http`: large answers by two loops."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING

import odd_http
import pytest
from test_second_loop import gone, threads

from aiouffd.sources import helped_http
from aiouffd.sources.helped_http import HelpedHttp
from aiouffd.sources.http_answer import Validator
from aiouffd.sources.store_errors import RequestError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SIZE = len(odd_http.DATA)
PINNED = Validator(SIZE, '"v1"')
STEP = 10_000


@pytest.fixture(autouse=True)
def smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have answers of 10,000 bytes be large."""
    monkeypatch.setattr(helped_http, "_LARGE", STEP)


@contextlib.asynccontextmanager
async def client_of(url: str, seconds: float = 10.0) -> AsyncIterator[HelpedHttp]:
    """Yield a client, and close it."""
    async with odd_http.closing(HelpedHttp(url, seconds, PINNED)) as client:
        yield client
    await gone()


async def all_of(client: HelpedHttp, step: int = STEP) -> None:
    """Ask for everything at once."""
    places = range(0, SIZE - step, step)
    for at, answer in zip(
        places, await asyncio.gather(*(client.get_async(at, at + step) for at in places)), strict=True
    ):
        assert (bytes(answer.data), answer.validator) == (odd_http.DATA[at : at + step], PINNED)
        assert answer.start == at


async def test_most_are_received_by_the_second_loop() -> None:
    """Where several large ones are under way: a third of them is received by the first."""
    with odd_http.serving() as server:
        async with client_of(server.url) as client:
            await all_of(client)
            assert client._second is not None
            here, there = client._http, client._second.held
            assert (here.under_way, there.under_way) == (0, 0)
            assert 0 < len(here._idle) <= 7
            assert 0 < len(there._idle) <= 13
            assert there.rooms is here.rooms


@pytest.mark.parametrize("step", [STEP - 1, STEP])
async def test_small_ones_and_single_ones_need_none(step: int) -> None:
    """Nor a thread."""
    with odd_http.serving() as server:
        async with client_of(server.url) as client:
            if step < STEP:
                await all_of(client, step)
            else:
                for _ in range(3):
                    await client.get_async(0, step)
            assert not threads()


async def test_what_goes_wrong_there_is_raised_here() -> None:
    """With its reason."""
    with odd_http.serving("404") as server:
        async with client_of(server.url) as client:
            failed = await asyncio.gather(*(client.get_async(0, STEP) for _ in range(3)), return_exceptions=True)
            assert client._second is not None
            assert [type(each) for each in failed] == [RequestError] * 3
            assert all("404" in str(each) for each in failed)


async def test_canceling() -> None:
    """It ends the connection, wherever that is."""
    asked, ended = list[object](), list[object]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.append(writer)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        ended.append(writer)
        writer.close()

    quiet = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        async with client_of(f"http://127.0.0.1:{quiet.sockets[0].getsockname()[1]}/x") as client:
            asking = [asyncio.create_task(client.get_async(0, STEP)) for _ in range(3)]
            while len(asked) < 3:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.001)
            assert not ended
            assert client._second is not None
            for task in asking:
                task.cancel()
            await asyncio.wait(asking)
            while len(ended) < 3:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.001)
            assert not client._second.held._idle
    finally:
        quiet.close()


async def test_those_in_use_are_closed_when_their_requests_end() -> None:
    """And the thread ends then."""
    with odd_http.serving() as server:
        async with client_of(server.url) as client:
            asking = [asyncio.create_task(client.get_async(at, at + STEP)) for at in range(0, 10 * STEP, STEP)]
            while client._second is None or not client._second.under_way:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0)
            client.close()
            for number, task in enumerate(asking):
                assert bytes((await task).data) == odd_http.DATA[number * STEP : (number + 1) * STEP]
            await gone()


async def test_one_that_is_not_closed() -> None:
    """Its thread ends with it."""
    with odd_http.serving() as server:
        client = HelpedHttp(server.url, 10.0, PINNED)
        await all_of(client)
        assert threads()
        client._http.close()
        del client
        await gone()


async def test_without_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One loop receives all."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    with odd_http.serving() as server:
        async with client_of(server.url) as client:
            await all_of(client)
            assert not threads()
            assert len(client._http._idle) == 20
