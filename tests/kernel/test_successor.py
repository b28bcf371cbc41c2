"""`server.successor`: sessions, their sockets and clients, and the control are those of the next server."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from pathlib import Path

from pattern import PAGE, peek, word
from scenario import ended, eventually, play
from served import MIB, Servers, free_port, hand_over, metric

from aiouffd.cli import main


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
    servers.start("second").says("session c takes no clients any more")
    for turn in (1, 2):
        for region, *_ in kept:  # what a client was served from is open still
            assert peek(region.address + turn * PAGE) == word(turn)
        kept += [hand_over(f"{directory}/{name}", MIB) for name in ("a", "b")]  # new clients, at the same sockets
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
    """They are counted on, and can be deleted; a source that is gone costs its own session its new clients only."""
    output, _ = play(sessions, str(tmp_path), str(image))
    pids = json.loads(output.splitlines()[-1])
    os.kill(pids["server"], signal.SIGTERM)
    assert all(map(ended, pids.values()))
