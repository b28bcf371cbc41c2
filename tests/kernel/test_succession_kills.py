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
from served import MIB, ROOT, Serve, Servers, end_server, hand_over

from aiouffd.pager.client.interpreter import SWITCH

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
from aiouffd.server import successor
successor._ENDING = 0.0  # it is about one that ends, not about one that is asked for much
send, (server, *killed) = control.send, map(int, sys.argv[1].split(","))
def and_kill(connection, message, *args, **kwargs):
    send(connection, message, *args, **kwargs)
    if message.get("op") == "take" and killed:
        while any(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4))):  # it is not received
            time.sleep(0.001)
        while killed:
            os.kill(killed.pop() or os.getpid(), 9)
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
    pids = servers.pids
    os.kill(pids["server"], signal.SIGSTOP)
    arguments = ("-c", KILLS, f"{pids['server']},0", "serve", image, "--socket", str(servers.path))
    command = [sys.executable, *arguments, "--hold", str(servers.hold), "--takeover"]
    with (servers.directory / "dying.log").open("w") as log:
        assert subprocess.run(command, stderr=log, timeout=60, check=False).returncode == -signal.SIGKILL
    serve.says("has failed")  # nobody had to wait for the server, which hears of it now, and was not ended
    os.kill(pids["server"], signal.SIGCONT)
    serve.says("serving on")
    servers.last = serve
    assert servers.pids == pids
    print(json.dumps(pids))


def test_holders_that_are_killed_while_they_are_asked(image: Path, tmp_path: Path) -> None:
    """The next holder is asked: by another of these processes, or of a pager that the server before starts.

    A server that asks is killed, too: then none of those that serve is.
    """
    output, _ = play(killed_while_they_are_asked, str(tmp_path), str(image))
    end_server(output)


SILENT = """
import os, signal, sys
from aiouffd.cli import main
from aiouffd.pager.client.holding import Holding
from aiouffd.server import successor
go = Holding.go
def stopped(self):
    os.kill(self._requests.pair.worker_pid, signal.SIGSTOP)
    successor._TIMEOUT = successor._REMINDER = 0.2
    return go(self)
Holding.go = stopped
sys.exit(main(sys.argv[1:]))
"""
TELLS_NOBODY = f"""#!{sys.executable}
import asyncio, os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from aiouffd.pager.process.answers import Answers
from aiouffd.pager.process.journal import Whose
go = Answers._go
async def and_all_are_killed(self, message, fds):
    armed = os.path.exists(os.environ["ARMED"])
    if armed and os.path.exists(os.environ["ARMED"] + "-before"):
        os.unlink(os.environ["ARMED"])
        kill(self._served.journal)
        await asyncio.sleep(3600)
    await go(self, message, fds)
    if armed:
        os.unlink(os.environ["ARMED"])
        kill(self._served.journal)
        os.kill(os.getpid(), 9)
def kill(journal):
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for whose in (Whose.KEEPER, Whose.HOLDER):
            signal.pidfd_send_signal(journal.descriptor(whose), number)
Answers._go = and_all_are_killed
sys.argv = ["aiouffd.pager", *sys.argv[sys.argv.index("aiouffd.pager") + 1 :]]
from aiouffd.pager import __main__
sys.exit(__main__.main())
"""


def told_to_go(directory: str, image: str) -> None:
    """Scenario: a successor's pager does not say that it serves: it is stopped, or it is killed right then."""
    servers = Servers(directory, image, "--readahead", 0)
    before = servers.start("first")
    region, _connection, uffd = hand_over(servers.path, SIZE)
    uffd.close()
    pages = iter(range(SIZE // PAGE))

    def served() -> None:
        touchers = Touchers(region.address, [[next(pages)] for _ in range(4)])
        touchers.join()
        assert not touchers.wrong, touchers.wrong

    served()
    after = servers.start("silent", "--takeover", program=("-c", SILENT), wait=False)
    eventually(after.says_or_ends("it is waited for"), expected=True)
    assert before.process.poll() is after.process.poll() is None
    os.kill(servers.pids["worker"], signal.SIGCONT)
    after.says("listening")
    assert before.process.wait(60) == 0
    served()
    wrapper, armed = servers.directory / "python", servers.directory / "armed"
    wrapper.write_text(TELLS_NOBODY)
    wrapper.chmod(0o755)
    os.environ |= {SWITCH: str(wrapper), "ARMED": str(armed)}
    armed.touch()
    before, after = after, servers.start("killed", "--takeover")
    assert before.process.wait(60) == 0
    assert not armed.exists()
    served()
    armed.touch()
    (servers.directory / "armed-before").touch()
    before, after = after, servers.start("killed-before", "--takeover", wait=False)
    assert after.process.wait(60) == 1
    before.says("serving on")
    served()
    servers.last = before
    print(json.dumps(servers.pids))


def test_a_pager_that_does_not_say_that_it_serves(image: Path, tmp_path: Path) -> None:
    """What it was told cannot be taken back: its server waits, and says so; or goes on with what it has left."""
    output, _ = play(told_to_go, str(tmp_path), str(image))
    end_server(output)
