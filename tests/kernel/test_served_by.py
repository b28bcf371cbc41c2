"""`monitor.engines.served_by`: the connection to a server, whatever comes by it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
from pattern import PAGE, Pattern, Slow, peek, word
from scenario import play

import aiouffd
from aiouffd.monitor.engines import served_by
from aiouffd.server.server import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SIZE = 1 << 20


def link_threads() -> int:
    """Return how many connections have their thread."""
    return sum(thread.name == "aiouffd-link" for thread in threading.enumerate())


async def canceled_prefetches(path: str) -> None:
    """Scenario: the answers to a hundred canceled prefetches come; then others are asked for."""
    async with Server(Slow(SIZE, 0.1), path, readahead=0):
        region = aiouffd.Region(SIZE)
        async with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path)) as monitor:
            waiting = [asyncio.ensure_future(monitor.prefetch(page * PAGE, PAGE)) for page in range(100)]
            await asyncio.sleep(0.05)
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)
            await asyncio.wait_for(monitor.prefetch(128 * PAGE, PAGE), 60)
            assert link_threads() == 1
            assert (await asyncio.to_thread(monitor.statistics)).pages_prefetch > 0
        assert link_threads() == 0


def test_a_canceled_prefetch_costs_nobody_else_anything(tmp_path: Path) -> None:
    """Its answer comes late, and is dropped."""
    play(canceled_prefetches, str(tmp_path / "socket"))


@contextlib.contextmanager
def server_that_answers(path: Path, answer: Callable[[dict[str, Any]], bytes]) -> Iterator[None]:
    """A server of one client, which it takes; it answers each later request as it is told."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            _, fds, _, _ = socket.recv_fds(connection, 1 << 16, 4)
            files = [os.fdopen(fd) for fd in fds]
            connection.sendall(b'{"id": 0, "ok": {}}\n')
            with contextlib.suppress(OSError), connection.makefile("rb") as lines:
                for text in lines:
                    connection.sendall(answer(json.loads(text)))
            for file in files:
                file.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        thread.join(60)
        listener.close()


def test_a_server_that_takes_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where as many wait as may, connect(2) waits, too: not for ever."""
    monkeypatch.setattr(served_by, "_TIMEOUT", 0.2)
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(path)
        listener.listen(0)
        waiting.connect(path)
        with (
            pytest.raises(aiouffd.PagerStartError, match=r"the server did not answer within 0\.2 s"),
            aiouffd.Monitor(aiouffd.Region(PAGE), engine=aiouffd.ServedBy(path)),
        ):
            pass
    assert link_threads() == 0


def ok(request: dict[str, Any]) -> bytes:
    """Return an answer that is right."""
    return json.dumps({"id": request["id"], "ok": None}).encode() + b"\n"


@pytest.mark.parametrize("noise", [b'{"id": 77, "ok": 1}\n', b'{"id": 0, "ok": 1}\n', b'{"id": 77, "error": 7}\n'])
def test_answers_that_nobody_waits_for_are_dropped(tmp_path: Path, noise: bytes) -> None:
    """Late or repeated: what is asked next is answered."""
    path = tmp_path / "socket"
    with server_that_answers(path, lambda request: noise + ok(request) + noise):
        region = aiouffd.Region(SIZE)
        with aiouffd.Monitor(region, engine=aiouffd.ServedBy(str(path))) as monitor:
            for _ in range(3):
                monitor.prefetch_sync(0, PAGE, 10.0)


@pytest.mark.parametrize(
    "answer", [b"nonsense\n", b"[]\n", b'{"id": 1}\n', b'{"id": "1"}\n', b'{"id": 1, "error": {}}\n', b'{"error": 7}\n']
)
def test_a_malformed_answer_closes_the_connection(tmp_path: Path, answer: bytes) -> None:
    """Each request fails with a typed error that names the server; leaving does not hang."""
    path = tmp_path / "socket"
    with server_that_answers(path, lambda _: answer):
        region = aiouffd.Region(SIZE)
        with aiouffd.Monitor(region, engine=aiouffd.ServedBy(str(path))) as monitor:
            for _ in range(2):
                with pytest.raises(aiouffd.HandoffError, match="the server at"):
                    monitor.prefetch_sync(0, PAGE, 10.0)


async def asked_by_a_child(path: str) -> None:
    """Scenario: C code forks, and the child asks for the end of what its parent is served."""
    async with Server(Pattern(SIZE), path, readahead=0):
        region = aiouffd.Region(SIZE)
        async with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path)) as monitor:
            connection = monitor._engine._connection.fileno()  # type: ignore[union-attr]
            child = ctypes.PyDLL(None).fork()
            if child == 0:
                os.write(connection, b'{"id": 1000, "op": "close", "poison": true}\nno request')
                os._exit(0)
            await asyncio.to_thread(os.waitpid, child, 0)
            await monitor.prefetch(0, PAGE)
            assert await asyncio.to_thread(peek, region.address + 9 * PAGE) == word(9)


def test_a_forked_child_is_not_heard(tmp_path: Path) -> None:
    """A fork that Python does not know of: the server takes requests of the process that it has taken only."""
    play(asked_by_a_child, str(tmp_path / "socket"))


async def tracked(path: str) -> None:
    """Scenario: beside a client that does not track writes; the worker is killed between two looks."""
    async with Server(Pattern(SIZE), path) as server:
        region, plain = aiouffd.Region(SIZE), aiouffd.Region(SIZE)
        by = aiouffd.ServedBy(path)
        async with aiouffd.Monitor(plain, engine=by), aiouffd.Monitor(region, engine=by, track_writes=True) as monitor:
            for page in range(0, 100, 10):
                for place in (region, plain):
                    assert await asyncio.to_thread(peek, place.address + page * PAGE) == word(page)
            assert monitor.collect() == []
            await asyncio.to_thread(poke, region.address + 5 * PAGE)
            os.kill(server.pids[1], signal.SIGKILL)
            await monitor.prefetch(0, SIZE)
            assert monitor.collect() == [aiouffd.Range(5 * PAGE, PAGE)]


def poke(address: int) -> None:
    """Write a byte, without the GIL."""
    ctypes.CDLL(None).memset(ctypes.c_void_p(address), 1, 1)


def test_what_a_server_brings_is_not_written(tmp_path: Path) -> None:
    """`track_writes` with a server: loads do not count as writes."""
    play(tracked, str(tmp_path / "socket"))


def test_a_forked_child_has_no_connection(tmp_path: Path) -> None:
    """It would speak in its parent's name."""
    path = tmp_path / "socket"
    with server_that_answers(path, ok):
        region = aiouffd.Region(SIZE)
        with aiouffd.Monitor(region, engine=aiouffd.ServedBy(str(path))) as monitor:
            connection = monitor._engine._connection  # type: ignore[union-attr]
            child = os.fork()
            if child == 0:
                os._exit(connection.fileno() >= 0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            monitor.prefetch_sync(0, PAGE, 10.0)


def test_statistics_that_are_none(tmp_path: Path) -> None:
    """A well-formed answer with the wrong content is an error for whoever asked; the connection is kept."""
    path = tmp_path / "socket"
    with server_that_answers(path, ok):
        region = aiouffd.Region(SIZE)
        with aiouffd.Monitor(region, engine=aiouffd.ServedBy(str(path))) as monitor:
            with pytest.raises(aiouffd.HandoffError, match="statistics"):
                monitor.statistics()
            monitor.prefetch_sync(0, PAGE, 10.0)


def test_a_server_that_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names it; it is not waited for again."""
    with server_that_answers(tmp_path / "socket", lambda _: b""):
        monitor = aiouffd.Monitor(aiouffd.Region(SIZE), engine=aiouffd.ServedBy(str(tmp_path / "socket")))
        with monitor:
            for patience in (0.05, 100.0):
                monkeypatch.setattr(served_by, "_TIMEOUT", patience)
                with pytest.raises(aiouffd.PagerError, match=r"socket does not answer: see its log"):
                    monitor.statistics()


def test_a_server_that_does_not_answer_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is asked once, and not waited for again."""
    monkeypatch.setattr(served_by, "LAST_REQUEST", 0.05)
    path, asked = tmp_path / "socket", list[str]()

    def silence(request: dict[str, Any]) -> bytes:
        asked.append(request["op"])
        return b""

    with server_that_answers(path, silence):
        region = aiouffd.Region(SIZE)
        with aiouffd.Monitor(region, engine=aiouffd.ServedBy(str(path))):
            pass
    assert asked == ["refuse"]
    assert "does not answer: left without it" in caplog.text
