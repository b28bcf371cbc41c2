"""`engine.apart`: a client that holds the lock of its memory file costs the others nothing."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import click
import pytest
from kinds import poke
from pattern import PAGE, content, peek, word
from processes import PATIENCE, kill
from scenario import ended, eventually, play
from served import MIB, Servers, hand_over

import aiouffd
from aiouffd.cli.unix_http import ControlClient
from aiouffd.engine.apart import Apart, StuckError, at_once
from aiouffd.kernel.owned_descriptor import OwnedDescriptor

SIZE = 4 * MIB
_libc = ctypes.CDLL(None, use_errno=True)


class Lock:
    """Holds the lock of a file's inode: by a write(2) from memory that is missing, and that nobody serves."""

    def __init__(self, fd: int) -> None:
        self.uffd = aiouffd.Userfaultfd()
        self.memory = aiouffd.Region(PAGE)
        self.uffd.register(self.memory.address, PAGE, aiouffd.RegisterMode.MISSING)
        self.thread = threading.Thread(target=self._hold, args=(fd,), daemon=True)
        self.thread.start()
        eventually(self._is_held, expected=True)

    def _hold(self, fd: int) -> None:
        _libc.pwrite(fd, ctypes.c_void_p(self.memory.address), ctypes.c_size_t(PAGE), ctypes.c_long(0))

    def _is_held(self) -> bool:
        return any(isinstance(event, aiouffd.PageFault) for event in self.uffd.read())

    def release(self) -> None:
        """Let it go."""
        self.uffd.zeropage(self.memory.address, PAGE)
        self.thread.join()


def test_a_call_that_does_not_return_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told when one takes long, and goes on when it returns; the file is closed behind it, in the thread."""
    go, told = threading.Event(), list[Any]()

    async def main() -> None:
        monkeypatch.setattr("aiouffd.engine.apart._SOON", PATIENCE)  # on a busy machine no call returns within 2 ms
        apart = Apart(told.append, lambda: told.append("stuck"), 0.01)
        assert apart.call(lambda: 5, told.append)
        with pytest.raises(OSError, match="Bad file"):
            apart.call(lambda: os.close(-1), told.append)
        monkeypatch.undo()
        assert not apart.call(go.wait, told.append)
        while "stuck" not in told:  # noqa: ASYNC110 - a timer of its own
            await asyncio.sleep(0.01)
        go.set()
        while len(told) < 5:  # noqa: ASYNC110 - a thread ends
            await asyncio.sleep(0.01)
        assert told == [5, True, "stuck", True, False]
        file = OwnedDescriptor(os.memfd_create("a"))
        apart.close(file)
        while not file.closed:  # noqa: ASYNC110 - a thread ends
            await asyncio.sleep(0.01)

    asyncio.run(main())


def looked_at_once() -> None:
    """Scenario: a look at a file whose lock is held, and at one that takes long."""
    fd = os.memfd_create("a")
    lock = Lock(fd)
    with pytest.raises(StuckError):
        at_once(lambda: os.lseek(fd, 0, os.SEEK_HOLE), 0.05)
    lock.release()
    assert at_once(lambda: os.lseek(fd, 0, os.SEEK_HOLE), 0.05) == PAGE

    def works() -> int:
        until = time.monotonic() + 0.1
        while time.monotonic() < until:
            pass
        return 7

    assert at_once(works, 0.01) == 7
    with pytest.raises(OSError, match="Bad file"):
        at_once(lambda: os.close(-1), 1.0)


def test_a_look_that_waits_for_a_lock() -> None:
    """It is given up; one that is at work is not."""
    play(looked_at_once)


def holds(path: str, waits: str) -> None:
    """Scenario: a client that holds the lock while its pages are dropped; `waits`: until this file is there."""
    region, _connection, _uffd = hand_over(path, SIZE, shared=True, protected=True)
    for page in range(MIB // PAGE - 40):
        assert peek(region.address + page * PAGE) == word(page)
    poke(region.address + 3 * PAGE, b"written!")
    lock = Lock(region.fd)
    Path(waits).with_suffix(".held").touch()

    def go_on() -> None:
        while not Path(waits).exists():  # whoever gave up would leave the lock held, and all would hang
            time.sleep(0.001)
        lock.release()

    releaser = threading.Thread(target=go_on, daemon=True)
    releaser.start()
    for page in range(1, SIZE // PAGE):
        if page != 3:
            assert peek(region.address + page * PAGE) == word(page)
    releaser.join()
    assert peek(region.address + 3 * PAGE) == b"written!"
    assert os.fstat(region.fd).st_blocks * 512 <= MIB + MIB // 4


def serves_others(directory: str, policy: str, timeout: float, status: int) -> None:
    """Scenario: see the test."""
    place = Path(directory)
    control = ControlClient(place / "control.sock")
    servers = Servers(directory, "--control", place / "control.sock", socket="")
    servers.start("first")
    new = {"source": str(place / "image"), "readahead": 16 * PAGE}
    bounded = {"name": "bad", "socket": f"{directory}/bad.sock", "max_resident": MIB, "timeout": timeout}
    control.ask("POST", "/v1/sessions", {**new, **bounded, "on_failure": policy})
    control.ask("POST", "/v1/sessions", {**new, "name": "good", "socket": f"{directory}/good.sock"})
    region, _connection, _uffd = hand_over(place / "good.sock", SIZE)
    failed: list[BaseException] = []

    def play_bad() -> None:
        try:
            play(holds, str(place / "bad.sock"), str(place / "go"), status=status)
        except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
            failed.append(error)

    bad = threading.Thread(target=play_bad)
    bad.start()
    eventually((place / "go.held").exists, expected=True)
    if status == 0:
        session = "/v1/sessions/bad"
        with pytest.raises(click.ClickException, match="lock is held"):
            control.ask("POST", f"{session}/snapshot", {"destination": str(place / "a.snap")})
    third = SIZE // PAGE // 3
    for page in range(third):
        assert peek(region.address + page * PAGE) == word(page)
    if status == 0:  # its thread waits uninterruptibly: its successor is there all the same, and the next server
        worker = servers.pids["worker"]
        kill(worker)
        for page in range(third, 2 * third):
            assert peek(region.address + page * PAGE) == word(page)
        servers.start("second", "--takeover")
    for page in range(2 * third, SIZE // PAGE):
        assert peek(region.address + page * PAGE) == word(page)
    if status == 0:
        (place / "go").touch()
    bad.join()
    if failed:
        raise failed[0]
    told = (event for event in control.events(0) if event["session"] == "bad")
    if status:
        assert (
            "its lock is held" in next(event for event in told if event["kind"] == "client.failed")["details"]["reason"]
        )
    assert next(event for event in told if event["kind"] == "client.gone")
    pids = servers.pids
    servers.last.process.terminate()
    servers.last.says("no new clients")
    assert servers.last.end() == 0
    del region, _uffd
    assert mmap.PAGESIZE == PAGE
    Path(directory, "pids").write_text(" ".join(map(str, pids.values())))


@pytest.mark.parametrize(
    ("policy", "timeout", "status"), [("poison", 1.0, -signal.SIGBUS), ("kill", 1.0, -signal.SIGKILL), ("hold", 1.0, 0)]
)
def test_a_client_that_holds_the_lock_of_its_file(tmp_path: Path, policy: str, timeout: float, status: int) -> None:
    """It waits, or fails by its session's policy, and loses nothing if it lets go. Others are served meanwhile.

    A worker with a thread that waits for that lock is replaced as any other, and taken over from.
    """
    (tmp_path / "image").write_bytes(content(0, SIZE))
    play(serves_others, str(tmp_path), policy, timeout, int(status))
    assert all(map(ended, map(int, (tmp_path / "pids").read_text().split())))
