"""`engine.allowance` behind a server: a client that storms waits, the others are served, and nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from pattern import PAGE, content, peek, word
from processes import forked
from scenario import eventually, play

import aiouffd
from aiouffd.engine.mappings import Mappings
from aiouffd.handoff.receive import Peer
from aiouffd.server.clients import Handed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
SIZE = 2 * MIB
_started: list[int] = []


async def serve(path: str, options: dict[str, Any]) -> None:
    """Serve until SIGTERM; SIGUSR1 kills the worker."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with aiouffd.Server(aiouffd.BufferSource(content(0, SIZE)), path, readahead=0, **options) as server:
        loop.add_signal_handler(signal.SIGUSR1, lambda: os.kill(server.pids[1], signal.SIGKILL))
        loop.add_signal_handler(signal.SIGTERM, ended.set)
        await ended.wait()


def process(function: Callable[..., object], *arguments: Any) -> int:
    """Call a function in a process of its own; return its pid."""
    pid = forked(function, *arguments)
    _started.append(pid)
    return pid


def end(pid: int, number: signal.Signals, status: int) -> None:
    """End a process, and wait for that."""
    os.kill(pid, number)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status


@contextlib.contextmanager
def serving(path: str, **options: Any) -> Iterator[int]:
    """Have a process serve; yield its pid."""
    pid = process(lambda: asyncio.run(serve(path, options)))
    eventually(lambda: Path(path).exists(), expected=True)
    try:
        yield pid
    except BaseException:
        for started in _started:  # what waits would keep the test's output open
            with contextlib.suppress(ProcessLookupError):
                os.kill(started, signal.SIGKILL)
        raise
    end(pid, signal.SIGTERM, 0)


def waits(pid: int) -> Callable[[], bool]:
    """Return a function that tells whether a process waits for a page."""
    return lambda: "userfault" in Path(f"/proc/{pid}/wchan").read_text()


def storm(path: str, done: mmap.mmap, ahead: int) -> None:
    """Touch page after page, and note how many; before that, have so many bytes brought."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path)) as monitor:
        monitor.prefetch_sync(0, ahead)
        for page in range(ahead // PAGE, SIZE // PAGE):
            assert peek(region.address + page * PAGE) == word(page)
            done[0] += 1


def quiet(path: str) -> None:
    """Touch one page, and leave."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path), on_exit="zeros"):
        assert peek(region.address + 7 * PAGE) == word(7)
    assert region[PAGE] == 0


def served(path: str) -> None:
    """Have another process be served."""
    assert os.waitstatus_to_exitcode(os.waitpid(process(quiet, path), 0)[1]) == 0


def a_storm_and_others(path: str, name: str, rate: float, ahead: int) -> None:
    """Scenario: a client has used up what it may have for minutes; others come, the worker dies, and it ends."""
    done = mmap.mmap(-1, PAGE)
    with serving(path, **{name: rate}) as server:
        stormy = process(storm, path, done, ahead)
        before = 0 if ahead else 1
        eventually(lambda: done[0], before)
        eventually(waits(stormy), expected=True)
        for _ in range(3):
            served(path)
        assert waits(stormy)()
        assert done[0] == before
        os.kill(server, signal.SIGUSR1)  # a successor knows nothing of the past
        eventually(lambda: done[0] > before, expected=True)
        with aiouffd.Monitor(aiouffd.Region(SIZE), engine=aiouffd.ServedBy(path)) as monitor:
            assert monitor.statistics().clients == 2
            eventually(lambda: monitor.statistics().slowed >= 2, expected=True)
            eventually(waits(stormy), expected=True)
            end(stormy, signal.SIGKILL, -signal.SIGKILL)
            eventually(lambda: (monitor.statistics().clients, monitor.statistics().spaces), (1, 1))


@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize(("name", "rate", "ahead"), [("client_events", 0.01, 0), ("client_bytes", 2.0 * PAGE, MIB)])
def test_who_storms_waits_alone(
    *, name: str, rate: float, ahead: int, native: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its faults wait in the kernel, whoever reads them; it is said who it is."""
    monkeypatch.setenv("AIOUFFD_NATIVE", native)
    _, errors = play(a_storm_and_others, str(tmp_path / "socket"), name, rate, ahead)
    assert "a second, and is slowed" in errors


def forks(path: str, done: mmap.mmap) -> None:
    """Fork, and have both touch a page."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path), fork="serve"):
        child = os.fork()
        done[child > 0] = 1
        assert peek(region.address + PAGE) == word(1)
        done[2] += 1
        os._exit(0)


def a_child_is_its_parent(path: str) -> None:
    """Scenario: the fork itself has used up what a client may have."""
    done = mmap.mmap(-1, PAGE)
    with serving(path, client_events=0.01) as server:
        parent = process(forks, path, done)
        eventually(lambda: done[:2], expected=b"\1\1")
        child = int(Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0])
        for pid in (parent, child):
            eventually(waits(pid), expected=True)
        served(path)
        assert waits(parent)()
        assert waits(child)()
        assert done[2] == 0
        os.kill(server, signal.SIGUSR1)  # a successor serves one of them, and nothing is lost
        eventually(lambda: done[2] > 0, expected=True)
        for pid in (parent, child):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os.waitpid(parent, 0)


def test_a_forked_child_shares_what_its_parent_may_have(tmp_path: Path) -> None:
    """Its own descriptor is held as well."""
    play(a_child_is_its_parent, str(tmp_path / "socket"))


def comes_again(path: str, done: mmap.mmap) -> None:
    """Touch a page, leave, and do so again with other memory."""
    for _ in range(2):
        region = aiouffd.Region(SIZE)
        with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path), on_exit="zeros"):
            assert peek(region.address) == word(0)
            done[0] += 1


def who_comes_again(path: str) -> None:
    """Scenario: a process has used up what it may have, and hands over other memory."""
    done = mmap.mmap(-1, PAGE)
    with serving(path, client_events=0.01) as server:
        pid = process(comes_again, path, done)
        eventually(lambda: done[0], 1)
        eventually(waits(pid), expected=True)
        served(path)
        assert done[0] == 1
        os.kill(server, signal.SIGUSR1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert done[0] == 2


def test_a_process_gains_nothing_by_coming_again(tmp_path: Path) -> None:
    """Whatever it hands over shares what it may have."""
    play(who_comes_again, str(tmp_path / "socket"))


def test_where_the_process_cannot_be_seen_each_memory_is_a_client() -> None:
    """Its pid is 0 then, as that of others may be; a forked child that is opened anew is its parent's still."""
    pack: Any = None
    uffd: Any = SimpleNamespace(features=0)
    seen, unseen = (
        Handed(pack, uffd, [], PAGE, token="1-2/7", peer=Peer(pid, 5, 5)).record(Mappings()) for pid in (9, 0)
    )
    assert (seen["payer"], unseen["payer"]) == ("process 9 of user 5", "client 1-2")
