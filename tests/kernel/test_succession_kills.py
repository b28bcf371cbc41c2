"""Servers that are killed while they start and while they take over, at each step: the next one has all, once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from pattern import PAGE, Touchers, peek, word
from scenario import eventually, play
from served import MIB, Serve, Servers, end_server, hand_over

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 4 * MIB
STEPS = (
    "server.successor.SocketFile.__init__",
    "pager.client.client.PagerClient.start",
    "pager.client.succession.Predecessor.take",
    "pager.client.holding.Holding.restore",
    "pager.client.holding.Holding.go",
    "pager.client.succession.Predecessor.serving",
    "server.session.Session.prepare",
    "server.session.Session.open",
    "pager.client.holding.Holding.listen",
)
"""Each is done, and its process ends behind it, in this order; what was asked of the pager may be under way."""

KILLED = """
import os, sys, importlib
from aiouffd.cli import main
module, name, method = ("aiouffd." + sys.argv[1]).rsplit(".", 2)
owner = getattr(importlib.import_module(module), name)
do = getattr(owner, method)
def then_end(*args, **kwargs):
    do(*args, **kwargs)
    os.kill(os.getpid(), 9)
setattr(owner, method, then_end)
sys.exit(main(sys.argv[2:]))
"""


def is_settled(serve: Serve) -> bool:
    """Tell whether it has ended, or goes on after each takeover that has begun."""
    begun, failed = (serve.said.count(text) for text in ("another server takes over", "serving on"))
    return serve.process.poll() is not None or begun == failed


def killed_behind_each_step(directory: str, image: str, first: str) -> None:
    """Scenario: servers are killed; behind each kill, one that lives serves on, or the next one does."""
    servers = Servers(directory, image, "--readahead", 0)
    options = ("serve", image, "--socket", str(servers.path), "--hold", str(servers.hold), "--readahead", "0")

    def dies(step: str, *more: str) -> None:
        with (servers.directory / "dying.log").open("w") as log:  # no pipe: its pager may have it, and live
            command = [sys.executable, "-c", KILLED, step, *options, *more]
            died = subprocess.run(command, stderr=log, timeout=60, check=False)
        assert died.returncode == -signal.SIGKILL, (step, (servers.directory / "dying.log").read_text())

    serve = servers.start("first")
    region, _connection, uffd = hand_over(servers.path, SIZE)
    assert peek(region.address) == word(0)
    uffd.close()
    pages = iter(range(1, SIZE // PAGE))

    def served() -> None:
        touchers = Touchers(region.address, [[next(pages)] for _ in range(4)])
        touchers.join()
        assert not touchers.wrong, (touchers.wrong, step)

    for number, step in enumerate(STEPS):
        if first == "lost":
            servers.lose()
            dies(step)
            serve = servers.start(f"after-{number}")
        else:
            dies(step, "--takeover")
            eventually(lambda: is_settled(serve), expected=True)  # noqa: B023 - now
            if serve.process.poll() is not None:
                serve = servers.start(f"after-{number}")
        served()
    print(json.dumps(servers.pids))


@pytest.mark.parametrize("first", ["lost", "lives"])
def test_kills_behind_each_step(first: str, image: Path, tmp_path: Path) -> None:
    """Before a successor's pager was told to go, the one before has all; from then on its own pager has."""
    output, _ = play(killed_behind_each_step, str(tmp_path), str(image), first)
    end_server(output)


KILLS = """
import fcntl, os, signal, sys, termios, time
from aiouffd.cli import main
from aiouffd.pager.process import control
send, (server, *killed) = control.send, map(int, sys.argv[1].split(","))
def and_kill(connection, message, *args, **kwargs):
    send(connection, message, *args, **kwargs)
    if message.get("op") == "take" and killed:
        while any(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4))):  # it is not received
            time.sleep(0.001)
        while killed:
            os.kill(killed.pop(), 9)
        os.kill(server, signal.SIGCONT)
control.send = and_kill
sys.exit(main(sys.argv[2:]))
"""


def killed_while_they_are_asked(directory: str, image: str) -> None:
    """Scenario: the holder is killed while a server waits for all that it has; alone, and together with the keeper."""
    servers = Servers(directory, image, "--readahead", 0)
    serve = servers.start("first")
    region, _connection, uffd = hand_over(servers.path, SIZE)
    uffd.close()
    for number, names in enumerate((["holder"], ["holder", "keeper"])):
        pids = servers.pids
        os.kill(pids["server"], signal.SIGSTOP)  # so that it does not yield
        those = ",".join(str(pids[name]) for name in ("server", *names))
        after = servers.start("-".join(names), "--takeover", program=("-c", KILLS, those))
        assert "the next one is asked" in after.said
        assert serve.process.wait(60) == 0
        serve = after
        touchers = Touchers(region.address, [[number + 1], [number + 10]])
        touchers.join()
        assert not touchers.wrong
    print(json.dumps(servers.pids))


def test_holders_that_are_killed_while_they_are_asked(image: Path, tmp_path: Path) -> None:
    """The next holder is asked: by another of these processes, or of a pager that the server before starts."""
    output, _ = play(killed_while_they_are_asked, str(tmp_path), str(image))
    end_server(output)
