"""`server.session`: several sockets of one server, each with its own source, settings and counts."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from pattern import PAGE, Pattern, content, peek, word
from scenario import play, replaced, until
from served import MIB, hand_over

import aiouffd
from aiouffd.engine import reading
from aiouffd.server.listener import SocketFile
from aiouffd.server.server import Server
from aiouffd.server.services import Settings
from aiouffd.sources.object_store import ObjectSource
from examples.page_server import PageServer

if TYPE_CHECKING:
    from aiouffd.server.clients import Client
    from aiouffd.server.session import Session

SHIFTED = 1000
"""So many pages the second source is shifted."""


def settings(readahead: int = 0) -> Settings:
    """Return settings that differ in one thing."""
    return Settings(options=aiouffd.engine.options.Options(readahead))


class Memory:
    """Memory that was handed over to a socket."""

    def __init__(self, path: Path) -> None:
        self.region, self.connection, self.uffd = hand_over(path)

    def word(self, page: int) -> bytes:
        """Touch a page."""
        return peek(self.region.address + page * PAGE)

    def end(self) -> None:
        """Let it go."""
        self.connection.close()
        self.uffd.close()
        self.region.close()


async def of_two_sessions(directory: str) -> None:
    """Scenario: see the test."""
    paths = [Path(directory) / name for name in ("first", "second")]
    async with Server() as server:
        first = await server.create(
            "first", lambda *_: Pattern(MIB), settings(), functools.partial(SocketFile, paths[0])
        )
        image = aiouffd.BufferSource(b"".join(word(page + SHIFTED) * (PAGE // 8) for page in range(MIB // PAGE)))
        second = await server.create(
            "second", image, settings(16 * PAGE), functools.partial(SocketFile, paths[1], mode=0o660)
        )
        assert paths[1].stat().st_mode & 0o777 == 0o660
        with pytest.raises(aiouffd.SessionError, match="'first' is there already"):
            await server.create("first", Pattern(MIB), settings(), functools.partial(SocketFile, paths[0]))
        with pytest.raises(OSError, match="another server listens there"):
            await server.create("third", Pattern(MIB), settings(), functools.partial(SocketFile, paths[0]))
        assert list(server.sessions) == ["first", "second"]
        memories = [await asyncio.to_thread(Memory, path) for path in paths]
        for page in (7, 9):
            assert [await asyncio.to_thread(memory.word, page) for memory in memories] == [
                word(page), word(page + SHIFTED)
            ]  # fmt: skip
        await until(lambda: first.statistics().pages == 2)
        assert second.statistics().pages_readahead >= 2
        assert server.statistics().pages == first.statistics().pages + second.statistics().pages
        assert [str(client) for client in server.clients.values()] == [
            f"session {name}, client 1 (process {os.getpid()} of user {os.geteuid()})" for name in ("first", "second")
        ]
        await counted_on(server, first, paths[0], memories[0])
        with pytest.raises(aiouffd.SessionError, match="serves 1 client,"):
            await server.remove(second)
        await second.fill()
        assert bytes(memories[1].region) == image.read_nowait(0, MIB)
        counted = second.statistics()
        await server.remove(second)
        assert not paths[1].exists()
        assert server.statistics().pages == first.statistics().pages + counted.pages
        second = await server.create("second", image, settings(), functools.partial(SocketFile, paths[1]))
        assert second.state == "listening"
        await counted_once(server, second, paths[1])


async def counted_once(server: Server, session: Session, path: Path) -> None:
    """Nor do they go back where the session has not heard yet that a client has ended, when the next one comes."""
    before = session._counted
    for pages in (1, 2, 3):
        memory = await asyncio.to_thread(Memory, path)
        await asyncio.to_thread(memory.word, pages)
        await until(lambda: session.statistics().pages == pages)  # noqa: B023 - now
        (client,) = session.clients.values()
        await asyncio.wrap_future(server._pager.request("close", client.tenant, poison=False))
        session.gone(client.tenant)
        memory.end()
        session._counted = before


async def counted_on(server: Server, session: Session, path: Path, memory: Memory) -> None:
    """A session's counts go on when its clients change, and when the pager's processes are killed."""
    other = await asyncio.to_thread(Memory, path)  # it has another source, and is counted in the same place
    assert await asyncio.to_thread(other.word, 12) == word(12)
    await until(lambda: session.statistics().pages == 3)
    for number in (1, 0):
        pid = server.pids[number]
        os.kill(pid, signal.SIGKILL)
        assert await asyncio.to_thread(memory.word, 20 + number) == word(20 + number)
        await asyncio.to_thread(replaced, server, pid)
    await until(lambda: session.statistics().pages == 5)
    for client in list(session.clients.values()):
        session.gone(client.tenant)
    memory.end()
    other.end()
    assert session.statistics().pages == 5
    memory = await asyncio.to_thread(Memory, path)
    assert await asyncio.to_thread(memory.word, 30) == word(30)
    await until(lambda: session.statistics().pages == 6)
    session.stop_listening()
    assert session.state == "draining"
    assert not path.exists()
    assert await asyncio.to_thread(memory.word, 31) == word(31)


def test_sessions_of_one_server(tmp_path: Path, loop: str) -> None:
    """Each serves its own source by its own settings, and counts by itself, whoever is killed; names are unique."""
    play(of_two_sessions, str(tmp_path), loop=loop)


def touched(memory: Memory, pages: range) -> list[bytes]:
    """Touch pages one after another."""
    return [memory.word(page) for page in pages]


async def of_one_source(directory: str) -> None:
    """Scenario: see the test."""
    image = Path(directory) / "image"
    await asyncio.to_thread(image.write_bytes, content(0, MIB))
    web = PageServer(image.parent, latency=0.005)
    async with await web.serve("127.0.0.1", 0) as listening, Server(recent=2 * MIB) as server:
        port = listening.sockets[0].getsockname()[1]
        paths = [Path(directory) / name for name in ("first", "second")]
        for path in paths:
            source = ObjectSource(f"http://127.0.0.1:{port}/image")
            await source.prepare()
            listen = functools.partial(SocketFile, path)
            await server.create(path.name, source, settings(16 * PAGE), listen)
        memories = [await asyncio.to_thread(Memory, path) for path in [*paths, *paths]]
        before = web.bytes_sent
        pages = [range(0, 256, step) for step in (3, 5, 7, 2)]
        touches = [functools.partial(touched, *each) for each in zip(memories, pages, strict=True)]
        words = await asyncio.gather(*map(asyncio.to_thread, touches))
        assert words == [[word(page) for page in its] for its in pages]
        for session in server.sessions.values():
            await session.prefetch(0, MIB)
        assert all(bytes(memory.region) == content(0, MIB) for memory in memories)
        assert web.bytes_sent - before == MIB
        counted = server.statistics()
        assert (counted.bytes_fetched, counted.pages) == (MIB, 4 * MIB // PAGE)
        assert counted.bytes_shared >= 3 * MIB
        os.kill(server.pids[1], signal.SIGKILL)  # its successor knows again which are the same
        late = [await asyncio.to_thread(Memory, path) for path in paths]
        await until(lambda: all(len(session.clients) == 3 for session in server.sessions.values()))
        for session in server.sessions.values():
            await session.prefetch(0, MIB)
        assert all(bytes(memory.region) == content(0, MIB) for memory in late)
        assert web.bytes_sent - before == 2 * MIB
        web.latency = 0.2
        os.kill(server.pids[1], signal.SIGKILL)
        slow = await asyncio.to_thread(Memory, paths[1])
        assert await asyncio.to_thread(slow.word, 9) == word(9)
        async with contextlib.aclosing(server.happenings.follow(after=0)) as happenings, asyncio.timeout(60):
            found = await anext(
                item async for item in happenings if item.kind == "client.slow" and item.details["client"] == 4
            )
        assert (found.session, found.details["client"], found.details["cause"]) == ("second", 4, "source")
        assert found.details["took_ns"] >= 200_000_000
        assert server.sessions["second"].slow["cause"] == "source"


def test_equal_sources_are_fetched_once(tmp_path: Path, loop: str) -> None:
    """Whatever clients of whichever session touch at once: each byte of a server is asked for once."""
    play(of_one_source, str(tmp_path), loop=loop)


async def refused_by_the_pager(directory: str) -> None:
    """Scenario: the pager has no room for a second client; and one ends while it is opened."""
    paths = [Path(directory) / name for name in ("a", "b")]
    async with Server() as server:
        first = await server.create("a", Pattern(MIB), settings(), functools.partial(SocketFile, paths[0]))
        memory = await asyncio.to_thread(Memory, paths[0])
        assert await asyncio.to_thread(memory.word, 3) == word(3)
        open_ = server._pager.open

        def full(_: Any) -> Any:
            raise aiouffd.PagerStartError("there is no room")

        def late(tenant: Any) -> Any:
            opening = open_(tenant)
            opening.add_done_callback(lambda _: server._soon(first.gone, tenant))
            return opening

        def came(number: int) -> bool:
            return first._numbers == number and not first._reception.admitting

        kept = []
        for number, opens in enumerate((full, late), 2):
            server._pager.open = opens  # type: ignore[assignment,method-assign]
            kept.append(await asyncio.to_thread(Memory, paths[0]))
            await until(functools.partial(came, number))
            await until(lambda: len(first.clients) == 1)
            assert not first._arriving
        server._pager.open = open_  # type: ignore[method-assign]
        second = await server.create("b", Pattern(MIB), settings(), functools.partial(SocketFile, paths[1]))
        assert first._slot not in {second._slot, *server._pager.slots._next}
        other = await asyncio.to_thread(Memory, paths[1])
        assert await asyncio.to_thread(other.word, 4) == word(4)
        await until(lambda: (first.statistics().pages, second.statistics().pages) == (1, 1))
        assert len(kept) == 2


def test_a_client_that_the_pager_does_not_take(tmp_path: Path) -> None:
    """What counts for its session stays the session's."""
    play(refused_by_the_pager, str(tmp_path))


def test_settings_that_exclude_each_other() -> None:
    """A recording sees only what is touched."""
    with pytest.raises(ValueError, match="either record or replay"):
        Settings(record="a", replay="b")
    with pytest.raises(ValueError, match="a source or a handler for the clients"):
        Server(path="a")


class Fails:
    """Fails until a file is there."""

    size = MIB

    def __init__(self, gate: str) -> None:
        self.gate = Path(gate)

    async def read(self, offset: int, length: int) -> bytes:
        """Return the bytes, or fail."""
        if not self.gate.exists():
            raise OSError(5, "a bad moment")
        return content(offset, length)


class Unread(Fails):
    """No message can be read in the pager that serves it, until a file is there."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        reading._preadv = self.preadv

    def preadv(self, *arguments: Any) -> int:
        """As `os.preadv`."""
        if not self.gate.exists():
            raise OSError(5, "")
        return os.preadv(*arguments)


def touches(path: str) -> None:
    """Scenario: a client."""
    region, _connection, _uffd = hand_over(path)
    assert region[5 * PAGE] == 6


async def failing(directory: str, what: str, policy: Literal["poison", "kill", "hold"], status: int) -> None:
    """Scenario: a page cannot be had, or the messages that ask for it cannot be read."""
    os.environ["AIOUFFD_NATIVE"] = str(int(what == "page"))
    path, gate = Path(directory) / "socket", Path(directory) / "gate"
    source = (Fails if what == "page" else Unread)(str(gate))
    async with Server(source, path, on_failure=policy, retries=0) as server:
        client = asyncio.create_task(asyncio.to_thread(play, touches, str(path), status=status))
        told = server.happenings.follow(0)
        while (happening := await anext(told)).kind != "client.failed":
            pass
        assert ("a bad moment" if what == "page" else os.strerror(5)) in happening.details["reason"]
        gate.touch()
        await client
        await told.aclose()


async def ends_first(directory: str) -> None:
    """Scenario: the server sees that a client has ended before it hears why."""
    path, seen = Path(directory) / "socket", threading.Event()
    async with Server(Fails(f"{directory}/gate"), path, retries=0) as server:
        (session,) = server.sessions.values()
        exited, on_error = session._exited, server._pager._on_error

        def exits(client: Client) -> None:
            exited(client)
            seen.set()

        def hears(*told: Any) -> None:
            assert seen.wait(60)
            on_error(*told)

        session._exited, server._pager._on_error = exits, hears  # type: ignore[method-assign]
        await asyncio.to_thread(play, touches, str(path), status=-signal.SIGBUS)
        async with contextlib.aclosing(server.happenings.follow(0)) as told:
            kinds = [(await anext(told)).kind for _ in range(4)]
        assert kinds == ["session.created", "client.served", "client.failed", "client.gone"]


def test_why_a_client_has_ended_is_told_first(tmp_path: Path) -> None:
    """Also where its end is seen before."""
    play(ends_first, str(tmp_path))


@pytest.mark.parametrize(("policy", "status"), [("poison", -signal.SIGBUS), ("kill", -signal.SIGKILL), ("hold", 0)])
@pytest.mark.parametrize("what", ["page", "messages"])
def test_a_page_that_cannot_be_had(tmp_path: Path, what: str, policy: str, status: int) -> None:
    """SIGBUS, the end, or the page as soon as the source has it again; so also where no message can be read."""
    play(failing, str(tmp_path), what, policy, int(status))
