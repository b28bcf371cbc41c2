"""Server, keeper and worker are killed at once, and no other server is started: what becomes of a microVM."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from pattern import PAGE, peek, word
from processes import forked
from scenario import ended, eventually, play
from served import Serve, Servers, children_of, hand_over

SLEEPS = "handle_userfault"


def touches(path: str, ready: int, go: int) -> None:
    """Be a client that keeps its own descriptor, as Firecracker does."""
    region, _connection, _uffd = hand_over(path)
    assert peek(region.address) == word(0)
    os.write(ready, b".")
    os.read(go, 1)
    assert peek(region.address + 5 * PAGE) == word(5)


def started(path: str) -> tuple[int, int]:
    """Return the pid of such a client whose first page has come, and where it is told to go on."""
    ready, go = os.pipe(), os.pipe()
    pid = forked(touches, path, ready[1], go[0])
    os.close(ready[1])
    assert os.read(ready[0], 1) == b"."
    return pid, go[1]


def lost(directory: str, image: str, policy: str, held: bool) -> None:
    """Scenario: a client waits for a page, and all who serve are killed; where there is a holder, it is left."""
    options = (image, "--readahead", 0, "--on-failure", policy)
    serve = Servers(directory, *options).start("first") if held else Serve(Path(directory), *options)
    client, go = started(str(serve.path))
    keeper = serve.pager
    eventually(lambda: len(children_of(keeper)), expected=1 + held)
    pids = [serve.process.pid, keeper, children_of(keeper)[-1]]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    os.write(go, b".")
    eventually(lambda: Path(f"/proc/{client}/wchan").read_text(), expected=SLEEPS)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    serve.process.wait()
    if held:
        assert os.waitpid(client, 0)[1] == 0
        return
    assert all(ended(pid) for pid in pids)
    assert Path(f"/proc/{client}/wchan").read_text() == SLEEPS
    os.kill(client, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(client, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("policy", ["poison", "kill", "hold"])
def test_nobody_is_left_to_follow_a_policy(image: Path, tmp_path: Path, policy: str, held: bool) -> None:
    """With a holder it is served on, whatever the policy; without, it waits: it has to be ended."""
    play(lost, str(tmp_path), str(image), policy, held)
