"""What a forked child can do with what it inherits: nothing in its parent's name."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import socket
import stat
from typing import TYPE_CHECKING, Any

import pytest
from pattern import PAGE, Pattern, peek, word
from scenario import eventually, play

import aiouffd
from aiouffd.engine.options import Options, Service
from aiouffd.pager.client.packing import Pack
from aiouffd.pager.process import control

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 1 << 20
_libc = ctypes.PyDLL(None)


class Payload:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"id -u > {self.mark}",)


def sockets() -> list[socket.socket]:
    """Return all connections of this process that keep messages apart, which is what a pager listens to."""
    numbers = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names
        with contextlib.suppress(OSError):  # the list's own
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                numbers.append(int(name))
    found = [socket.socket(fileno=os.dup(number)) for number in numbers]
    return [one for one in found if one.type == socket.SOCK_SEQPACKET]


def attack(mark: str) -> int:
    """Ask whatever can be asked to run code, and to end the parent's memory; return how many could be asked."""
    os.setgid(65534)
    os.setuid(65534)
    asked = 0
    for one in sockets():
        config = os.memfd_create("x")
        os.write(config, pickle.dumps(Payload(mark)))
        service = {"token": "evil", "path": [], "options": {"limits": {}}, "form": "pickle"}
        space = {"token": "evil", "page_size": PAGE, "features": 0, "mappings": []}
        message = {"op": "open", "id": 10**6, "token": "evil", "own": 1, "service": service, "space": space}
        control.send(one, message, [os.pidfd_open(os.getpid()), config, config])
        control.send(one, {"op": "handover", "id": 10**6}, [config])
        control.send(one, {"op": "prepare", "id": 10**6, "service": service}, [config])
        one.send(b"nonsense")
        one.send(b"")
        asked += 1
    return asked


def child_attacks(how: str, mark: str) -> None:
    """Scenario: a child with and without Python's knowledge sends what it can; the parent is served on."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Pattern(SIZE), readahead=0) as monitor:
        assert peek(region.address) == word(0)
        child = os.fork() if how == "os.fork" else _libc.fork()
        if child == 0:
            asked = -1
            try:
                asked = attack(mark)
            finally:
                os._exit(asked & 255)
        asked = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert asked == (0 if how == "os.fork" else 1)
        monitor.prefetch_sync(PAGE, PAGE, 10.0)  # behind what the child has sent
        for page in range(SIZE // PAGE):
            assert peek(region.address + page * PAGE) == word(page)
        assert monitor.statistics().restarts == 0
        monitor.check()
    assert not os.path.exists(mark)  # noqa: PTH110 - a literal came along


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has privileges to drop")
@pytest.mark.parametrize("how", ["os.fork", "fork(2)"])
def test_a_forked_child_cannot_have_code_run_by_the_pager(how: str, tmp_path: Path) -> None:
    """It has no connection; and where C code forked, its messages are dropped."""
    tmp_path.chmod(0o777)
    _, errors = play(child_attacks, how, str(tmp_path / "mark"))
    assert ("was dropped" in errors) == (how != "os.fork")


def a_private_pager() -> None:
    """Scenario: a second pickle is refused; what serves already serves on, also in a worker that begins anew."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Pattern(SIZE), readahead=0) as monitor:
        assert peek(region.address) == word(0)
        for _ in range(2):
            pack = Pack(Service(Pattern(SIZE)), Options())
            with pytest.raises(aiouffd.PagerStartError, match="takes no source"):
                monitor._engine._client.prepare(pack).result(60)  # type: ignore[union-attr]
            pack.close()
            worker = monitor.pids[1]
            os.kill(worker, signal.SIGKILL)
            assert peek(region.address + PAGE) == word(1)
            eventually(lambda: monitor.pids[1] != worker, expected=True)  # noqa: B023 - called at once
        ours = Pack(Service(aiouffd.BufferSource(b"plain values")), Options())
        monitor._engine._client.prepare(ours).result(60)  # type: ignore[union-attr]
        ours.close()


def test_a_private_pager_unpickles_once() -> None:
    """Only what its Monitor has been given; sources of ours are no pickles."""
    play(a_private_pager)


def test_what_a_pager_rebuilds_cannot_be_changed() -> None:
    """A forked child has the descriptor, too; a worker that begins anew reads it again."""
    pack = Pack(Service(Pattern(SIZE)), Options())
    with pytest.raises(PermissionError):
        os.pwrite(pack.config.fileno(), b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(pack.config.fileno(), 0)
    pack.close()
