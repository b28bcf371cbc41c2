"""`server.clients`: what our own clients ask and are told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from engine_world import turns
from pattern import PAGE
from scenario import eventually, next_error, play, until
from served import MIB, Serve, client, descriptors

import aiouffd
from aiouffd.engine.mappings import Mapping
from aiouffd.handoff import firecracker
from aiouffd.handoff.own_threads import Unneeded, detach
from aiouffd.handoff.receive import Peer
from aiouffd.monitor.engines.served_by import ServedByEngine
from aiouffd.server.clients import _MAX_REQUESTS, Client, Conversation


def errors_arrive(path: str, image: str) -> None:
    """Scenario: pages that the source cannot give."""
    region = aiouffd.Region(16 * MIB)
    with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path)) as monitor:
        assert region[0] == 1
        os.truncate(image, 4 * MIB)
        with pytest.raises(aiouffd.ShortReadError):
            monitor.prefetch_sync(8 * MIB, PAGE)
        with pytest.raises(OSError, match="Bad address"):  # in place of SIGBUS, for a system call
            os.write(os.memfd_create("x"), memoryview(region)[9 * MIB : 9 * MIB + 8])
        with pytest.raises(aiouffd.ShortReadError, match=str(9 * MIB)):
            next_error(monitor)
    sys.stdout.write("done")


def test_errors_of_the_source_reach_the_client(image: Path, tmp_path: Path) -> None:
    """A prefetch that fails raises at the client."""
    with Serve(tmp_path, image, "--readahead", "0", "--retries", "0") as serve:
        output, _ = play(errors_arrive, str(serve.path), str(image))
        assert output == "done"


def greedy(path: str) -> None:
    """Scenario: one of our own clients asks for more than there can be, thousands of times, and reads no answer."""
    region = aiouffd.Region(MIB)
    uffd = aiouffd.Userfaultfd(aiouffd.Feature.EVENT_REMOVE)
    uffd.register(region.address, region.mapped_length, aiouffd.RegisterMode.MISSING)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        mapping = Mapping(region.address, region.address + MIB, 0)
        extra = {"version": 1, "name": ""}
        socket.send_fds(connection, [firecracker.encode([mapping], PAGE, extra)], [uffd.fileno()])
        assert b'"ok"' in connection.recv(4096)
        connection.settimeout(2.0)
        request = b'{"id": 1, "op": "prefetch", "ranges": [[0, 144115188075855872], [4096, 144115188075855872]]}\n'
        statistics = b'{"id": 2, "op": "statistics"}\n'
        with contextlib.suppress(TimeoutError):  # it is not read from any more
            for _ in range(20_000):
                connection.sendall(request + statistics)
        play(client, path, MIB)


@pytest.mark.unmeasured
def test_a_greedy_client(image: Path, tmp_path: Path) -> None:
    """What it asks for is bounded by what it has; it costs the others nothing, and is forgotten when it has gone."""
    with Serve(tmp_path, image) as serve:
        play(client, str(serve.path), MIB)
        before = descriptors(serve)
        play(greedy, str(serve.path), measured=False)
        eventually(lambda: descriptors(serve) <= before, expected=True)
        used = processor(serve)
        eventually(lambda: processor(serve) - used < 5, expected=True)
        play(client, str(serve.path), MIB)
        assert "Traceback" not in serve.said
        memory = int(Path(f"/proc/{serve.process.pid}/statm").read_text().split()[1]) * PAGE
        assert memory < 100 * MIB


def processor(serve: Serve) -> int:
    """Return the processor time of the worker, in hundredths of a second."""
    return sum(map(int, Path(f"/proc/{serve.worker}/stat").read_text().rpartition(")")[2].split()[11:13]))


def refused(path: str, pid: int, log: str, worker: int) -> None:
    """Scenario: a client that has asked to be refused, as a Monitor that is about to leave, and stays."""
    region = aiouffd.Region(MIB)
    with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path)) as monitor:
        assert region[0] == 1
        engine = monitor._engine
        assert isinstance(engine, ServedByEngine)
        engine.refuse()
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: "filling 1" in Path(log).read_text(), expected=True)
        before, began = processor_time(worker), time.monotonic()
        time.sleep(0.5)  # the time that is measured
        assert processor_time(worker) - before < 0.5 * (time.monotonic() - began)


def processor_time(pid: int) -> float:
    """Return the seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_what_is_refused_is_not_filled(image: Path, tmp_path: Path) -> None:
    """It is left to its owner; nobody asks for it again and again."""
    with Serve(tmp_path, image, "--on-term", "fill") as serve:
        play(refused, str(serve.path), serve.process.pid, str(serve.log), serve.worker)
        assert serve.process.wait(60) == 0
        assert "cannot be filled: its owner is about to leave" in serve.said


MALFORMED = [
    *("nonsense", "[]", "5", "{}", '{"op": "statistics"}', '{"id": "x", "op": "statistics"}'),
    *('{"id": [], "op": "close"}', '{"id": 1}', '{"id": 1, "op": 5}', '{"id": 1, "op": {}}', '{"id": 1, "op": "open"}'),
    *('{"id": 1, "op": "prefetch"}', '{"id": 1, "op": "prefetch", "ranges": [[0, 4096, 1]]}'),
]


def malformed(path: str) -> None:
    """Scenario: our own clients send what is no request, one after the other; another client goes on."""
    other = aiouffd.Region(MIB)
    with aiouffd.Monitor(other, engine=aiouffd.ServedBy(path)) as monitor:
        for line in MALFORMED:
            region = aiouffd.Region(MIB)
            uffd = aiouffd.Userfaultfd(aiouffd.Feature.EVENT_REMOVE)
            uffd.register(region.address, MIB, aiouffd.RegisterMode.MISSING)
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(10)
                connection.connect(path)
                mapping = Mapping(region.address, region.address + MIB, 0)
                extra = {"version": 1, "name": ""}
                socket.send_fds(connection, [firecracker.encode([mapping], PAGE, extra)], [uffd.fileno()])
                assert b'"ok"' in connection.recv(4096)
                connection.sendall(line.encode() + b"\n")
                said = connection.recv(4096)
                assert said == b"" or b'"error"' in said, line
        monitor.prefetch_sync(0, MIB)
        assert other[5 * PAGE] == 6
        monitor.check()


def test_a_malformed_request_costs_its_own_client_only(image: Path, tmp_path: Path) -> None:
    """It is answered with an error, or its connection is ended."""
    with Serve(tmp_path, image) as serve:
        play(malformed, str(serve.path))
        assert "Traceback" not in serve.said


async def test_so_many_requests_at_once() -> None:
    """A client that asks faster than it is answered is not read from; in the end all are answered."""
    begun, through = 0, asyncio.Event()

    async def answer(_: dict[str, Any]) -> None:
        nonlocal begun
        begun += 1
        await through.wait()

    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        running = asyncio.create_task(Conversation(ours, answer).run())
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(theirs, b"".join(b'{"id": %d}\n' % number for number in range(1000)))
        await turns(2000)
        assert begun == _MAX_REQUESTS
        through.set()
        answers = b""
        while answers.count(b"\n") < 1000:
            answers += await loop.sock_recv(theirs, 1 << 16)
        theirs.shutdown(socket.SHUT_WR)
        await running


async def test_many_that_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each hears of it at once, and their connections are closed by few threads."""
    begun: list[Any] = []

    def noted(function: Any, *arguments: Any) -> None:
        begun.append(function)
        detach(function, *arguments)

    monkeypatch.setattr("aiouffd.handoff.own_threads.detach", noted)
    nothing: Any = None
    pairs = [socket.socketpair() for _ in range(200)]
    for number, (ours, _) in enumerate(pairs):
        Client(number, Peer(1, 0, 0), nothing, 0, ours).disconnect()
    assert not begun
    for _, theirs in pairs:
        assert theirs.recv(1) == b""
        theirs.close()
    await until(lambda: not Unneeded.here()._fds)
    assert 0 < len(begun) < 20
    ours, theirs = socket.socketpair()
    last = Client(0, Peer(1, 0, 0), nothing, 0, ours)
    last.disconnect()
    last.disconnect()
    Unneeded.here().close()  # as a server that is left
    theirs.close()
    await until(lambda: not Unneeded.here()._fds)
