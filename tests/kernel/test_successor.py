"""`server.successor`: sessions, their sockets and clients, and the control are those of the next server."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pattern import PAGE, Touchers, peek, word
from scenario import ended, eventually, play
from served import MIB, Servers, end_server, free_port, hand_over, metric

from aiouffd.cli import main
from aiouffd.cli.unix_http import ControlClient
from aiouffd.engine.mappings import Mapping
from aiouffd.handoff import firecracker


def memory_files(pid: int) -> int:
    """Return how many descriptors of a region's memfd a process has."""
    found = 0
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += "aiouffd-region" in str(fd.readlink())
    return found


def told_of(name: str) -> list[bool]:
    """Return whether each client of a session has handed over a memory file."""
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert main(["ctl", "show", name]) == 0
    return [client["memory_file"] for client in json.loads(told.getvalue())["clients"]]


def sessions(directory: str, image: str) -> None:
    """Scenario: one with a client, one without, and one whose source is gone by then."""
    control, port = f"{directory}/control", free_port()
    servers = Servers(directory, "--control", control, "--metrics", port, socket="")
    os.environ["AIOUFFD_CONTROL"] = control
    gone = f"{directory}/gone"
    os.link(image, gone)
    servers.start("first")
    for name, source in (("a", image), ("b", image), ("c", gone)):
        assert main(["ctl", "create", name, source, "--socket", f"{directory}/{name}", "--readahead", "0"]) == 0
    kept = [hand_over(f"{directory}/{name}", MIB, shared=name == "a") for name in ("a", "c")]
    for region, *_ in kept:
        assert peek(region.address) == word(0)
    Path(gone).unlink()
    servers.lose()
    second = servers.start("second")
    second.says("session c takes no clients yet")
    for turn in (1, 2):
        for region, *_ in kept:  # what a client was served from is open still
            assert peek(region.address + turn * PAGE) == word(turn)
        if turn == 1:
            os.link(image, gone)
            second.says("session c is restored")
        kept += [hand_over(f"{directory}/{name}", MIB) for name in ("a", "c", "b")]  # new clients, at the same sockets
        assert peek(kept[-1][0].address + 2 * PAGE) == word(2)
        if turn == 1:
            servers.start("third", "--takeover")
    pids = servers.pids
    assert told_of("a") == [True, False, False]
    assert memory_files(pids["worker"]) == 1
    assert metric(port, 'aiouffd_session_clients{session="a"}') == 3
    assert main(["ctl", "complete", "a"]) == main(["ctl", "delete", "a"]) == main(["ctl", "complete", "b"]) == 0
    eventually(lambda: [memory_files(pids[name]) for name in ("server", "worker")], expected=[0, 0])
    print(json.dumps(pids))


def test_sessions(image: Path, tmp_path: Path) -> None:
    """They are counted on, and can be deleted; a source that is gone costs new clients of its own session only."""
    output, _ = play(sessions, str(tmp_path), str(image))
    end_server(output)


def nobody_has_them(directory: str, image: str, on_term: str) -> None:
    """Scenario: a session is not there yet when its server is to end; one of its two clients has ended before."""
    port, path, gone = free_port(), f"{directory}/c", f"{directory}/gone"
    os.environ["AIOUFFD_CONTROL"] = control = f"{directory}/control"
    servers = Servers(directory, "--control", control, "--metrics", port, "--on-term", on_term, socket="")
    os.link(image, gone)
    servers.start("first")
    assert main(["ctl", "create", "c", gone, "--socket", path, "--readahead", "0"]) == 0
    heard, said = os.pipe()
    other = os.fork()
    if not other:
        kept = hand_over(path)
        os.write(said, bytes([kept[0][0]]))
        signal.pause()
    region, _connection, uffd = hand_over(path)
    uffd.close()
    assert [peek(region.address), os.read(heard, 1)] == [word(0), word(0)[:1]]
    Path(gone).unlink()
    servers.lose()
    second = servers.start("second")
    second.says("session c takes no clients yet")
    pids = servers.pids
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    eventually(lambda: metric(port, "aiouffd_clients"), expected=1)
    os.kill(pids["server"], signal.SIGTERM)
    if on_term == "fill":
        assert second.process.wait(60) == 0
    else:
        second.says("serving on until they leave: 1")
    assert all(peek(region.address + page * PAGE) == word(page) for page in range(MIB // PAGE))
    print(json.dumps(pids))


@pytest.mark.parametrize("on_term", ["keep", "fill"])
def test_clients_of_a_session_that_is_not_there_yet(image: Path, tmp_path: Path, on_term: str) -> None:
    """They are clients of the server: it does not end before they have ended, or have all their pages."""
    output, _ = play(nobody_has_them, str(tmp_path), str(image), on_term)
    assert all(map(ended, json.loads(output.splitlines()[-1]).values()))


def client_of(path: str, page: int) -> tuple[int, int]:
    """Return the pid of a client that has one page, and where it is told to touch another one; it ends then."""
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        kept = hand_over(path)
        assert peek(kept[0].address) == word(0)
        os.write(ready[1], b".")
        os.read(go[0], 1)
        os._exit(peek(kept[0].address + page * PAGE) != word(page))
    assert os.read(ready[0], 1) == b"."
    return pid, go[1]


def tell(pid: int, go: int) -> int:
    """Have a client touch the other page, if it lives, and return how it ends."""
    with contextlib.suppress(BrokenPipeError):
        os.write(go, b".")
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def shown(ctl: ControlClient, name: str) -> tuple[str, int]:
    """Return the state of a session, and how many clients it has."""
    session = ctl.ask("GET", f"/v1/sessions/{name}")
    return session["state"], len(session["clients"])


def never_comes_back(directory: str, image: str) -> None:
    """Scenario: one session is drained at a takeover, and the source of the others does not come back."""
    control, gone = f"{directory}/control", f"{directory}/gone"
    servers = Servers(directory, "--control", control, socket="")
    ctl = ControlClient(control)
    os.link(image, gone)
    servers.start("first")
    clients = {}
    for name in ("drained", "poison", "kill", "hold", "later"):
        policy = name if name in ("poison", "kill", "hold") else "poison"
        new = {"name": name, "source": image if name == "drained" else gone, "socket": f"{directory}/{name}"}
        ctl.ask("POST", "/v1/sessions", {**new, "on_failure": policy, "readahead": 0})
        clients[name] = client_of(f"{directory}/{name}", 5)
    ctl.ask("POST", "/v1/sessions/drained/drain")
    Path(gone).unlink()
    servers.lose()
    second = servers.start("second")
    second.says("session later takes no clients yet")
    assert shown(ctl, "drained") == ("draining", 1)
    assert shown(ctl, "poison") == shown(ctl, "later") == ("restoring", 1)
    for name in ("drained", "later"):
        ctl.ask("POST", f"/v1/sessions/{name}/prefetch", {"offset": 5 * PAGE, "length": PAGE})
        before = ctl.ask("GET", f"/v1/sessions/{name}")["statistics"]["pages_prefetch"]
        assert before == 1
    ctl.ask("POST", "/v1/sessions/later/drain")
    for name in ("poison", "kill", "hold"):
        ctl.ask("DELETE", f"/v1/sessions/{name}")
        assert not Path(f"{directory}/{name}").exists()
    assert [session["name"] for session in ctl.ask("GET", "/v1/sessions")] == ["later", "drained"]
    ends = {name: tell(*clients.pop(name)) for name in ("poison", "kill")}
    assert ends == {"poison": -signal.SIGBUS, "kill": -signal.SIGKILL}
    pid, go = clients.pop("hold")
    os.write(go, b".")
    eventually(Path(f"/proc/{pid}/wchan").read_text, expected="handle_userfault")
    servers.start("third", "--takeover")
    assert shown(ctl, "drained") == shown(ctl, "later") == ("draining", 1)
    assert [tell(*client) for client in clients.values()] == [0, 0]
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: ctl.ask("GET", "/v1/sessions"), expected=[])
    print(json.dumps(servers.pids))


def test_a_source_that_never_comes_back(image: Path, tmp_path: Path) -> None:
    """Its session is there at once, and is asked, drained and deleted as others; one that was drained is there, too."""
    output, _ = play(never_comes_back, str(tmp_path), str(image))
    end_server(output)


DIES = """
import os, sys
from aiouffd.cli import main
from aiouffd.cli.unix_http import ControlClient
from aiouffd.pager.client.client import PagerClient
do = PagerClient.open
PagerClient.open = lambda self, tenant: os.kill(os.getpid(), 9) if self.tenants else do(self, tenant)
sys.exit(main(sys.argv[1:]))
"""


def lost_handoff(directory: str, image: str) -> None:
    """Scenario: a server is killed when its pager has a client's note, and has not been asked to serve the client."""
    servers = Servers(directory, image, "--readahead", 0)
    options = ("serve", image, "--socket", str(servers.path), "--hold", str(servers.hold))
    with (servers.directory / "log").open("w") as log:
        first = subprocess.Popen([sys.executable, "-c", DIES, *options], stderr=log)
    eventually(lambda: "listening" in (servers.directory / "log").read_text(), expected=True)
    served, *_kept = hand_over(servers.path)
    assert peek(served.address) == word(0)
    region, connection, uffd = hand_over(servers.path)
    toucher = Touchers(region.address, [[1]])
    assert first.wait(60) == -signal.SIGKILL
    servers.start("second")
    connection.settimeout(60)
    assert connection.recv(1) == b""
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(servers.path))
        shown = firecracker.encode([Mapping(region.address, region.address + MIB, 0)], PAGE)
        socket.send_fds(other, [shown], [uffd.fileno()])
        toucher.join()
    assert not toucher.wrong
    assert peek(served.address + PAGE) == word(1)
    print(json.dumps(servers.pids))


def test_a_handoff_that_was_lost(image: Path, tmp_path: Path) -> None:
    """Its connection ends, so that the client hands over again."""
    output, _ = play(lost_handoff, str(tmp_path), str(image))
    end_server(output)
