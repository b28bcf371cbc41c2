"""`server.residence`: what is there of a client's memory file is bounded, and can be dropped by hand."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import click
import pytest
from kinds import poke
from pattern import PAGE, content, peek, word
from scenario import eventually, play
from served import MIB, Servers, end_server, hand_over

import aiouffd
from aiouffd import Feature, Userfaultfd
from aiouffd.cli import main
from aiouffd.cli.unix_http import ControlClient
from aiouffd.server.residence import lacking
from aiouffd.store import create_sync
from examples.microvm import MicroVM

SIZE = 8 * MIB
LIMIT = 2 * MIB


def resident(region: Any) -> int:
    """Return how many bytes the memory file has, as the kernel counts."""
    return os.fstat(region.fd).st_blocks * 512


def bounded(folder: str) -> None:
    """Scenario: see the test."""
    place, path = Path(folder), str(Path(folder, "vm.sock"))
    control, at = ControlClient(place / "control.sock"), "/v1/sessions/vm"
    os.chdir(place)
    os.environ["AIOUFFD_CONTROL"] = str(place / "control.sock")
    servers = Servers(folder, "--control", place / "control.sock", socket="")
    servers.start("first")
    assert main(["ctl", "create", "vm", "base.snap", "--socket", path, "--max-resident", "2M"]) == 0
    region, *_kept = hand_over(path, SIZE, shared=True, protected=True, first=b"there: w")

    def touch(count: int = SIZE // PAGE) -> int:
        """Read each page; return how many bytes were there at most."""
        most = 0
        assert peek(region.address) == b"there: w"
        for page in range(1, count):
            assert peek(region.address + page * PAGE + 8) == word(page)
            most = max(most, resident(region)) if page % 64 == 0 else most
        return most

    most = touch()
    poke(region.address + 5 * PAGE, b"written!")
    most = max(most, touch())
    eventually(lambda: control.ask("GET", at)["statistics"]["resident"], resident(region))
    os.kill(servers.pids["worker"], signal.SIGKILL)
    most = max(most, touch())
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        with MicroVM((region.address, SIZE)) as vm:
            assert vm.run() == sum(peek(region.address + page * PAGE)[0] for page in range(SIZE // PAGE))
    print(f"at most {most} bytes of {SIZE} were there, with a limit of {LIMIT}")
    assert most <= LIMIT + MIB // 4  # and a window
    assert control.ask("POST", f"{at}/evict")["bytes"] > LIMIT // 2
    assert resident(region) == 2 * PAGE  # what was there at the handoff, and what was written
    assert peek(region.address + 5 * PAGE) == b"written!"
    taken = control.ask("POST", f"{at}/snapshot", {"destination": str(place / "layer.snap")})
    assert taken["bytes"] == 64 << 10  # of one chunk it is known that it was written
    servers.lose()
    servers.start("second")
    touch(64)
    assert control.ask("POST", f"{at}/evict", {"offset": 64 << 10, "length": 16 << 10}) == {"bytes": 16 << 10}
    assert main(["ctl", "evict", "vm", "--offset", "64K", "--length", "16K"]) == 0
    assert peek(region.address + 5 * PAGE) == b"written!"
    touch(64)
    is_refused(control, at, place, region)
    print(json.dumps(servers.pids))


def is_refused(control: ControlClient, at: str, place: Path, region: aiouffd.Region) -> None:
    """Ask for what cannot be; `region`: that of the client of session `vm`."""
    new = {"source": str(place / "base.snap")}
    for name, limit in (("other", None), ("private", LIMIT), ("open", LIMIT)):
        path = str(place / f"{name}.sock")
        control.ask("POST", "/v1/sessions", {"name": name, "socket": path, "max_resident": limit, **new})
    for what, why in (
        (f"{at}/prefetch", rf"length: {SIZE} bytes cannot all be there: max_resident is {LIMIT}"),
        ("/v1/sessions/other/evict", "create it with max_resident"),
    ):
        with pytest.raises(click.ClickException, match=why):
            control.ask("POST", what)
    assert control.ask("POST", f"{at}/complete")["failed"] == {"1": f"it has {SIZE} bytes, and max_resident is {LIMIT}"}
    for session, how, why in (
        ("private", {}, "has handed over no memory file"),
        ("open", {"shared": True}, "UFFDIO_REGISTER_MODE_WP"),
        ("open", {"of": region, "protected": True}, "its memory file is another client's"),
        ("other", {"of": region}, "its memory file is another client's"),
        ("vm", {"shared": True, "protected": True}, "one client at a time"),
    ):
        _, connection, uffd = hand_over(place / f"{session}.sock", MIB, **how)
        rejected = (each for each in control.events(0) if each["kind"] == "client.rejected")
        told = (each["details"]["reason"] for each in rejected if each["session"] == session)
        assert next(reason for reason in told if why in reason)
        connection.close()
        uffd.close()
    is_locked(control, place, region)


def is_locked(control: ControlClient, place: Path, region: aiouffd.Region) -> None:
    """Have no Monitor of a client's memory file that drops pages, or of one of which the server does."""

    def served(other: aiouffd.Region, **limits: Any) -> bool:
        try:
            with aiouffd.Monitor(other, aiouffd.BufferSource(bytes(len(other))), on_exit="zeros", **limits):
                return True
        except aiouffd.BusyError:
            return False

    limits = {"max_resident": MIB // 2}
    assert not served(aiouffd.Region.from_fd(region.fd))
    shown, _connection, uffd = hand_over(place / "other.sock", MIB, shared=True)
    assert peek(shown.address) == word(0)
    other = aiouffd.Region.from_fd(shown.fd)
    assert served(other)
    assert not served(other, **limits)
    assert control.ask("POST", "/v1/sessions/other/complete")["failed"] == {}
    uffd.close()
    shown.close()
    eventually(lambda: served(other, **limits), expected=True)


def test_the_memory_of_a_client_is_bounded(tmp_path: Path) -> None:
    """Pages that were written stay, others are missing again; after a kill, and a loss of all; refused by name."""
    create_sync(content(0, SIZE), tmp_path / "base.snap")
    output, _ = play(bounded, str(tmp_path))
    print(output)
    end_server(output)


def test_what_a_client_lacks() -> None:
    """One reason at a time, with what to do."""
    with Userfaultfd(Feature.PAGEFAULT_FLAG_WP) as plain, Userfaultfd(Feature.WP_ASYNC) as tracked:
        for uffd, size, has_file, why in (
            (plain, PAGE, False, "no memory file: send the memfd"),
            (plain, 2 * MIB, True, "use small ones"),
            (tracked, PAGE, True, "UFFD_FEATURE_WP_ASYNC"),
            (plain, PAGE, True, ""),
        ):
            assert why in lacking(uffd, size, has_file=has_file)
        assert not lacking(plain, PAGE, has_file=True)
