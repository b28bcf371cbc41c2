"""`server.server`: clients come, are served, and go, whatever dies meanwhile."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pattern import PAGE, Pattern, Slow, content, left_while_touched, peek, word
from processes import crash
from scenario import eventually, killed_when_this_thread_waits, next_error, play, until
from served import MIB, Serve, client, descriptors, hand_over, worker_of

import aiouffd
from aiouffd.engine.mappings import Mapping
from aiouffd.handoff import firecracker
from aiouffd.pager.client.client import PagerClient
from aiouffd.server import session as module
from aiouffd.server.server import Server


def test_a_monitor_that_a_server_serves(image: Path, tmp_path: Path) -> None:
    """The handoff is acknowledged, prefetch and statistics work, what is removed is zeros; no process is started."""
    with Serve(tmp_path, image, "--readahead", "0") as serve:
        play(client, str(serve.path), 16 * MIB)
        serve.says("has left; 0 left")


def run_killing(path: str, size: int, pid: str) -> None:
    """Scenario, by position."""
    client(path, size, kill=pid)


@pytest.mark.parametrize("who", ["worker", "pager"])
def test_a_server_whose_pager_is_killed(image: Path, tmp_path: Path, who: str) -> None:
    """Worker or keeper: nobody notices but the log."""
    with Serve(tmp_path, image, "--readahead", "0") as serve:
        play(client, str(serve.path), MIB)
        play(run_killing, str(serve.path), 16 * MIB, str(getattr(serve, who)))
        serve.says("is replaced")


def server_dies(path: str, pids: list[int]) -> None:
    """Scenario: all of the server is killed."""
    region = aiouffd.Region(16 * MIB)
    with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path)) as monitor:
        assert region[0] == 1
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(aiouffd.PagerDiedError, match="have ended"):
            next_error(monitor)
        assert region[0] == 1  # what is there stays
        with pytest.raises(aiouffd.ClosedError):
            monitor.prefetch_sync(0, PAGE)
        sys.stdout.write("told\n")
        sys.stdout.flush()
        sys.stdout.write(str(region[8 * MIB]))


def server_dies_at_once(path: str) -> None:
    """Scenario: a server takes the memory, and is gone before the client knows."""

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            _, fds, _, _ = socket.recv_fds(connection, 64 << 10, 4)
            connection.sendall(b'{"id":0,"ok":{}}\n')
            for fd in fds:
                os.close(fd)

    for _ in range(30):  # every third was never told of it
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            thread = threading.Thread(target=serve, args=(listener,))
            thread.start()
            told = pytest.raises(aiouffd.PagerDiedError, match="have ended")
            with aiouffd.Monitor(aiouffd.Region(MIB), engine=aiouffd.ServedBy(path)) as monitor, told:
                next_error(monitor, 2)
            thread.join()
        os.unlink(path)  # noqa: PTH108 - a literal came along


def test_a_server_that_is_gone_as_soon_as_it_has_answered(tmp_path: Path) -> None:
    """Whoever touches a page must not wait for ever."""
    play(server_dies_at_once, str(tmp_path / "socket"))


def server_dies_while_the_gil_is_held(path: str, pids: list[int]) -> None:
    """Scenario: all of the server is killed when this thread, and with it all of Python, waits for a page."""
    region = aiouffd.Region(16 * MIB)
    with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path, stuck_limit=0.5)):
        assert region[0] == 1
        os.kill(pids[2], signal.SIGSTOP)  # the worker: so that the page does not come first
        with killed_when_this_thread_waits(pids):
            print(region[8 * MIB])


def test_a_server_that_is_killed_while_a_thread_waits_with_the_gil_held(image: Path, tmp_path: Path) -> None:
    """Nothing in Python can run any more: it is said, and the process ends."""
    with Serve(tmp_path, image, "--readahead", "0") as serve:
        _, errors = play(
            server_dies_while_the_gil_is_held,
            str(serve.path),
            [serve.process.pid, serve.pager, serve.worker],
            status=-signal.SIGABRT,
        )
        assert "waits for the page at" in errors
        assert "in server_dies_while_the_gil_is_held" in errors


def test_a_server_that_is_gone_altogether(image: Path, tmp_path: Path) -> None:
    """Listener, keeper and worker killed: an error that says so, then SIGBUS; no hang, and no zeros."""
    with Serve(tmp_path, image, "--readahead", "0") as serve:
        play(client, str(serve.path), MIB)
        output, _ = play(
            server_dies, str(serve.path), [serve.process.pid, serve.pager, serve.worker], status=-signal.SIGBUS
        )
        assert output == "told\n"


def outlives(path: str, pid: int) -> None:
    """Scenario: the listener is killed; the pager serves on."""
    region = aiouffd.Region(16 * MIB)
    with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path)) as monitor:
        os.kill(pid, signal.SIGKILL)
        for page in range(0, 16 * MIB // PAGE, 7):
            assert region[page * PAGE] == (page + 1) & 255
        with pytest.raises(aiouffd.ClosedError, match="gone"):
            monitor.prefetch_sync(0, PAGE, timeout=60)


def test_the_pager_serves_on_when_the_listener_is_killed(image: Path, tmp_path: Path) -> None:
    """Page faults go on being served; what needs the listener is refused."""
    with Serve(tmp_path, image, "--readahead", "0") as serve:
        play(outlives, str(serve.path), serve.process.pid)


def leave_while_touched(path: str, on_exit: str) -> None:
    """Scenario: a thread goes on touching, with the GIL held at each page, while the block is left."""
    region = aiouffd.Region(16 * MIB)
    left_while_touched(region, aiouffd.Monitor(region, engine=aiouffd.ServedBy(path), on_exit=on_exit))  # type: ignore[call-overload]


@pytest.mark.parametrize(("on_exit", "status"), [("sigbus", -signal.SIGBUS), ("zeros", 0)])
def test_leaving_while_a_thread_touches_with_the_gil(image: Path, tmp_path: Path, on_exit: str, status: int) -> None:
    """It gets what `on_exit` says, and does not wait for a server that answers no more. Others are served on."""
    with Serve(tmp_path, image, "--readahead", "0") as serve:
        play(leave_while_touched, str(serve.path), on_exit, status=status)
        play(client, str(serve.path), MIB)


class FailsOnce(Slow):
    """Fails one read of its beginning, when the rest has been read; and reads it well afterwards."""

    def __init__(self, size: int, directory: str) -> None:
        super().__init__(size)
        self.directory = directory
        self.last: asyncio.Event | None = None  # the last bytes have been read

    async def read(self, offset: int, length: int) -> bytes:
        """Return the bytes."""
        failed = Path(self.directory) / "failed"
        self.last = self.last or asyncio.Event()
        if offset < 16 * PAGE and length > PAGE and not failed.exists():
            (Path(self.directory) / "asked").touch()
            await self.last.wait()
            failed.touch()
            raise aiouffd.SourceError(repr(self), offset, length, "a bad moment")
        if offset + length == self.size:
            self.last.set()
        return await super().read(offset, length)


async def filled_in_spite_of_a_failure(directory: str) -> None:
    """Scenario: a window is on its way, and fails when the fill has passed it by."""
    path = Path(directory) / "socket"
    async with Server(FailsOnce(MIB, directory), path) as server:
        region, _connection, uffd = await asyncio.to_thread(hand_over, path)
        touch = ctypes.CDLL(None).memchr
        place = ctypes.c_void_p(region.address)
        toucher = asyncio.create_task(asyncio.to_thread(touch, place, 0, ctypes.c_size_t(1)))
        await asyncio.to_thread(eventually, (Path(directory) / "asked").exists, expected=True)
        await server.fill()
        await toucher
        uffd.close()
        assert bytes(region) == content(0, MIB)


def test_a_fill_whose_reads_fail_for_a_moment(tmp_path: Path, loop: str) -> None:
    """Nothing is given back before all is there: what was taken for present and has failed is brought again."""
    play(filled_in_spite_of_a_failure, str(tmp_path), loop=loop)


def come_and_go(path: str, times: int) -> None:
    """Scenario: clients, one after the other; half of them close their connection, the others leave."""
    for number in range(times):
        if number % 2:
            region = aiouffd.Region(MIB)
            with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path)):
                assert region[5 * PAGE] == 6
        else:
            play(comes_and_ends, path)


def comes_and_ends(path: str) -> None:
    """Scenario: hand over, touch, and end."""
    region, _connection, _uffd = hand_over(path)
    assert region[7 * PAGE] == 8


@pytest.mark.unmeasured
def test_clients_that_come_and_go_leave_nothing_behind(image: Path, tmp_path: Path) -> None:
    """Neither descriptors nor memory, in the listener as in the pager; also where each is the only one."""
    with Serve(tmp_path, image) as serve:
        play(come_and_go, str(serve.path), 4)
        eventually(lambda: serve.said.count(' left"'), 4)
        before = descriptors(serve)
        play(come_and_go, str(serve.path), 40)
        eventually(lambda: serve.said.count(' left"'), 44)
        eventually(lambda: descriptors(serve) <= before, expected=True)


def many_regions(path: str) -> None:
    """Scenario: a handoff of as many regions as there may be, which is more than a packet to the pager holds."""
    count = firecracker.MAX_REGIONS
    region = aiouffd.Region(2 * count * PAGE)
    uffd = aiouffd.Userfaultfd(aiouffd.Feature.EVENT_REMOVE)
    uffd.register(region.address, region.mapped_length, aiouffd.RegisterMode.MISSING)
    pages = [count - 1 - number for number in range(count)]
    mappings = [
        Mapping(region.address + 2 * n * PAGE, region.address + (2 * n + 1) * PAGE, page * PAGE)
        for n, page in enumerate(pages)
    ]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        data = firecracker.encode(mappings, PAGE)
        sent = socket.send_fds(connection, [data], [uffd.fileno()])
        connection.sendall(data[sent:])
        for number, page in enumerate(pages):
            assert region[2 * number * PAGE] == (page + 1) & 255


def test_as_many_regions_as_there_may_be(image: Path, tmp_path: Path) -> None:
    """They are served, each page right; and there is room for the next client."""
    with Serve(tmp_path, image, "--readahead", "0") as serve:
        play(many_regions, str(serve.path))
        play(client, str(serve.path), MIB)


def killed_again_and_again(path: str, log: str) -> tuple[aiouffd.Region, socket.socket, aiouffd.Userfaultfd]:
    """Scenario: no worker lives to serve a single page. Return what the client has handed over, and where."""
    region, connection, uffd = hand_over(path)
    assert region[0] == 1
    for deaths in range(1, 6):
        crash(worker_of(log))
        eventually(functools.partial(times_said, log, "died (signal"), deaths)
    return region, connection, uffd


def held_on(path: str, log: str) -> None:
    """Scenario: the same, and pages are touched after it."""
    region, _connection, uffd = killed_again_and_again(path, log)
    eventually(functools.partial(times_said, log, "who touches a missing page waits"), 1)
    waiting = []
    for page in (5, 9):
        thread = threading.Thread(target=peek, args=(region.address + page * PAGE,), daemon=True)
        thread.start()
        sleeps = Path(f"/proc/self/task/{thread.native_id}/wchan").read_text
        eventually(sleeps, expected="handle_userfault")
        eventually(lambda: select.select([uffd], [], [], 0)[0], expected=[])  # its keeper has read of it
        waiting.append(sleeps)
    assert [sleeps() for sleeps in waiting] == ["handle_userfault"] * 2


def times_said(log: str, text: str) -> int:
    """Return how often a log has it."""
    return Path(log).read_text().count(text)


@pytest.mark.parametrize("policy", ["poison", "hold"])
def test_a_server_whose_pager_is_given_up_ends(image: Path, tmp_path: Path, policy: str) -> None:
    """It could serve nobody any more: it says so, and its service manager starts another one. Who is held waits on."""
    with Serve(tmp_path, image, "--readahead", "0", "--on-failure", policy) as serve:
        play(killed_again_and_again if policy == "poison" else held_on, str(serve.path), str(serve.log))
        assert serve.process.wait(60) == 1
        assert "workers died with no fault resolved between them" in serve.said
        assert ("are poisoned" in serve.said) == (policy == "poison")
        assert "Traceback" not in serve.said
        assert not serve.path.exists()


def takes_the_flag_away(path: str) -> None:
    """Scenario: clears O_NONBLOCK of its descriptor again and again, and touches page by page."""
    region, _connection, uffd = hand_over(path, 16 * MIB)
    for page in range(16 * MIB // PAGE):
        os.set_blocking(uffd.fileno(), True)
        peek(region.address + page * PAGE)
        time.sleep(0.002)


def test_a_descriptor_that_is_made_blocking(image: Path, tmp_path: Path) -> None:
    """Whoever shares the open file can clear O_NONBLOCK: it is given up after a while, and costs the others nothing."""
    with Serve(tmp_path, image, "--readahead", "0") as serve, ThreadPoolExecutor(1) as pool:
        taken = pool.submit(play, takes_the_flag_away, str(serve.path), status=-signal.SIGBUS)
        play(client, str(serve.path), MIB)
        taken.result()
        assert "O_NONBLOCK was taken from it" in serve.said
        assert "is replaced" not in serve.said
        assert "has not turned" not in serve.said


def crowd(path: str, count: int) -> None:
    """Scenario: many at once."""
    held = [hand_over(path, PAGE) for _ in range(count)]
    assert all(region[0] == 1 for region, _, _ in held)


def test_more_clients_than_the_soft_limit_of_descriptors(image: Path, tmp_path: Path) -> None:
    """The limit is raised as far as it may be: a client takes some descriptors of the listener."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        serve = Serve(tmp_path, image)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with serve:
        play(crowd, str(serve.path), 200)


async def left_while_opening(directory: str) -> None:
    """Scenario: a server is left when its pager serves a client already, and has not been heard yet."""
    path, loop, opened = Path(directory) / "socket", asyncio.get_running_loop(), asyncio.Event()
    async with Server(Pattern(MIB), path) as server:
        really_open = server._pager.open

        def late(tenant: Any) -> Future[None]:
            answer: Future[None] = Future()

            def tell() -> None:
                opened.set()
                loop.call_later(0.2, answer.set_result, None)

            really_open(tenant).add_done_callback(lambda _: loop.call_soon_threadsafe(tell))
            return answer

        server._pager.open = late  # type: ignore[method-assign]
        region, _connection, _uffd = await asyncio.to_thread(hand_over, path)
        await opened.wait()
    assert await asyncio.to_thread(peek, region.address + PAGE) == word(1)


def test_a_client_that_is_just_being_opened_is_served_on(tmp_path: Path, loop: str) -> None:
    """The pager goes on without the server; it was killed, and the client waited for ever."""
    play(left_while_opening, str(tmp_path), loop=loop, deadline=60)


async def goes_on_early(directory: str) -> None:
    """Scenario: a takeover fails while the server waits for a handoff that has begun."""
    path = str(Path(directory) / "socket")
    async with Server(Pattern(MIB), path) as server:
        session = server.sessions[""]
        async with aiouffd.Monitor(aiouffd.Region(MIB), engine=aiouffd.ServedBy(path)) as monitor:
            await until(lambda: len(session._tasks) == 1)  # its conversation
            begun = socket.socket(socket.AF_UNIX)
            begun.connect(path)
            await until(lambda: session._reception.admitting == 1)
            (conversation,) = session._tasks
            server._yield("1")
            await until(lambda: session._reception._accepting is None)
            server._go_on()
            await until(conversation.done)
            await until(lambda: session._reception._accepting is not None)
            assert len(session._tasks) == 1
            await monitor.prefetch(0, MIB)
            begun.close()
            (conversation,) = session._tasks
            session.stop_listening()  # its clients stay
            server._yield("2")
            await until(conversation.done)
            server._go_on()
            await monitor.prefetch(0, MIB)


def test_a_takeover_that_fails_early(tmp_path: Path, loop: str) -> None:
    """Each client is heard by one task again: two of them would each get parts of what it says."""
    play(goes_on_early, str(tmp_path), loop=loop, deadline=60)


async def test_entering_that_is_canceled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pager that is just being started ends, and the socket is removed."""
    entered, go = asyncio.Event(), threading.Event()
    loop, start = asyncio.get_running_loop(), PagerClient.start
    pids: list[int] = []

    def slow(client: PagerClient) -> None:
        loop.call_soon_threadsafe(entered.set)
        assert go.wait(60)
        start(client)
        pids.extend(client.pids)

    monkeypatch.setattr(PagerClient, "start", slow)
    server = Server(aiouffd.ZeroSource(PAGE), tmp_path / "s")
    entering = asyncio.create_task(server.__aenter__())
    await entered.wait()
    entering.cancel()
    await asyncio.sleep(0)
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await entering
    assert pids
    for pid in pids:
        await asyncio.to_thread(eventually, Path(f"/proc/{pid}").exists, expected=False)
    assert list(tmp_path.iterdir()) == []


def three(path: str) -> None:
    """Scenario: one process hands over three times; when one of its memories is gone, another is taken."""
    held = [hand_over(path, MIB) for _ in range(2)]
    assert [region[PAGE] for region, _, _ in held] == [0, 0]
    _, connection, _ = hand_over(path, MIB)
    connection.settimeout(10)
    assert connection.recv(1) == b""
    assert [region[2 * PAGE] for region, _, _ in held] == [0, 0]
    region = aiouffd.Region(MIB)
    with pytest.raises(aiouffd.HandoffError, match="is served 2 times already"):
        aiouffd.Monitor(region, engine=aiouffd.ServedBy(path)).__enter__()


async def at_most_two(directory: str) -> None:
    """Scenario: a server that takes two clients of each process."""
    module._MAX_OF_PROCESS = 2
    session: Any = module.Session
    serve, open_it, opening = session._serve, session._open, asyncio.Event()

    async def served_later(session: Any, *handoff: Any) -> None:
        if session._arriving:  # until the one before is being opened
            await opening.wait()
        await serve(session, *handoff)

    async def opened_slowly(session: Any, client: Any) -> None:
        opening.set()
        await asyncio.sleep(0.1)
        await open_it(session, client)

    session._serve, session._open = served_later, opened_slowly
    path = f"{directory}/s"
    async with Server(aiouffd.ZeroSource(MIB), path) as server:
        for _ in range(2):
            await asyncio.to_thread(play, three, path)
            await server.wait_clients()
            assert not server.sessions[""]._arriving


def test_the_clients_of_one_process_are_bounded(tmp_path: Path) -> None:
    """So that one process cannot take all descriptors; it is counted anew when its clients are gone."""
    play(at_most_two, str(tmp_path))


@pytest.mark.parametrize(
    ("extra", "match"),
    [({"version": 9}, "speaks version 9"), ({"version": 1, "name": 7}, "by a name that is not a string")],
)
def test_a_name_is_a_string(extra: dict[str, Any], match: str) -> None:
    """What else is asked for is refused before a source is looked for."""
    regions = SimpleNamespace(extra=extra)
    handoff: Any = SimpleNamespace(regions=regions, peer="a client")
    with pytest.raises(aiouffd.HandoffError, match=match):
        module._name_asked_for(handoff)
