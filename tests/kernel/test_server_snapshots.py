"""`server.snapshots`: the memory of clients that run, captured at one moment, and guests that start from it."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import struct
import threading
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from kinds import poke
from pattern import PAGE, content, peek
from scenario import eventually, play
from served import Serve, Servers, end_server, hand_over

import aiouffd
from aiouffd.cli import main
from aiouffd.cli.unix_http import ControlClient, _Connection
from aiouffd.engine.mappings import Mapping
from aiouffd.handoff import firecracker
from aiouffd.kernel import libc
from aiouffd.kernel.memory import address_of
from aiouffd.store import create_sync

PAGES = 1 << 10
SIZE = PAGES * PAGE
NUMBER, STATE = 0x40, 0x48  # of steps, and of the generator that chooses pages: in the first page

# next: rax = state * 5 + 3 mod PAGES; state = rax; rax <<= 12; inc dword [rsi + rax]; inc qword [number]; number < rcx?
STEPS = bytes.fromhex(
    f"488b4648 486bc005 4883c003 25{(PAGES - 1).to_bytes(4, 'little').hex()} 48894648 48c1e00c ff0406 48ff4640"
    " 48394e40 72da f4"
)


def steps(state: int, count: int) -> tuple[int, Any]:
    """Return the state after so many steps of the guest, and how often each page was counted up."""
    counts = np.zeros(PAGES, np.uint32)
    for _ in range(count):
        state = (state * 5 + 3) % PAGES
        counts[state] += 1
    return state, counts


def read(image: Any) -> tuple[int, int, Any]:
    """Return what an image of the guest's memory says: the number of steps, the state, and the count of each page."""
    (number, state), words = struct.unpack_from("2Q", image, NUMBER), np.frombuffer(image, np.uint32)
    return number, state, words[:: PAGE // 4].copy()


def guest(path: str) -> tuple[aiouffd.Region, Any, list[Any]]:
    """Return the memory and the VM of a guest that a server serves, and what must be kept."""
    from examples.microvm import MicroVM

    region, *kept = hand_over(path, SIZE, shared=True, protected=True)
    return region, MicroVM((region.address, SIZE)), kept


def run(vm: Any, until: int) -> None:
    """Have a guest count pages up until it has done so many steps."""
    vm._boot[: len(STEPS)] = STEPS
    vm.run(0, until * PAGE)


def guest_is_captured(folder: str) -> None:
    """Scenario: see the test."""
    place, control = Path(folder), ControlClient(Path(folder, "control.sock"))

    def create(name: str, source: Path) -> str:
        new = {"name": name, "socket": str(place / name), "source": str(source)}
        control.ask("POST", "/v1/sessions", new)
        return str(place / name)

    region, vm, _kept = guest(create("first", place / "base.snap"))
    first = read(create_image())
    runs = threading.Thread(target=run, args=(vm, 1 << 40), daemon=True)
    runs.start()
    eventually(lambda: int.from_bytes(region[NUMBER : NUMBER + 8], "little") > 100, expected=True)
    taken = []
    for number in range(3):
        new = {"destination": str(place / f"{number}.snap"), "rate": 20 * SIZE}
        taken.append(control.ask("POST", "/v1/sessions/first/snapshot", new))
    print(*taken, sep="\n")
    region[NUMBER : NUMBER + 8] = (1 << 41).to_bytes(8, "little")
    runs.join()
    assert sum(each["pages_saved"] for each in taken), "no page was written between the moment and its reading"
    assert all(each["base"] == str(place / "base.snap") for each in taken)
    numbers = []
    for number in range(3):
        with aiouffd.open(place / f"{number}.snap") as found:
            image = found[:]
        done, state, counts = read(image)
        numbers.append(done)
        models = [(at, first[2] + more) for at, more in (steps(first[1], done), steps(first[1], done + 1))]
        # The moment is before or after the count of the step that is being done.
        assert any(
            state == models[one][0] and (counts == models[other][1]).all() for one, other in ((0, 0), (1, 0), (1, 1))
        )
        copy, machine, _more = guest(create(f"copy{number}", place / f"{number}.snap"))
        assert machine.run() == int(np.frombuffer(image, np.uint8)[::PAGE].sum())
        run(machine, done + 2000)
        _, more = steps(state, 2000)
        assert (read(copy)[2] == counts + more).all()
        machine.close()
    assert first[0] < numbers[0] < numbers[1] < numbers[2]
    vm.close()


def create_image() -> bytes:
    """Return the memory that the first guest starts from."""
    image = bytearray(content(0, SIZE))
    struct.pack_into("2Q", image, NUMBER, 0, 0)
    return bytes(image)


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm is missing")
def test_a_guest_that_writes_is_captured(tmp_path: Path) -> None:
    """Each snapshot is of one moment of its steps, and a guest that starts from it goes on from there."""
    create_sync(create_image(), tmp_path / "base.snap")
    with Serve(tmp_path, "--control", tmp_path / "control.sock", socket=""):
        print(play(guest_is_captured, str(tmp_path))[0])


FILE = 64 * PAGE
PARTS = (40 * PAGE, 16 * PAGE), (0, 16 * PAGE)  # offset and length, of what a client maps of its memory file
MADV_REMOVE = 9
WP = aiouffd.RegisterMode.MISSING | aiouffd.RegisterMode.WP


class Parted:
    """A client that maps parts of its memory file at several addresses."""

    def __init__(self, path: str) -> None:
        fd = os.memfd_create("guest")
        os.ftruncate(fd, FILE)
        self.parts = [mmap.mmap(fd, length, offset=offset) for offset, length in PARTS]
        self.mappings = [
            Mapping(address_of(part), address_of(part) + length, offset)
            for part, (offset, length) in zip(self.parts, PARTS, strict=True)
        ]
        self.uffd = aiouffd.Userfaultfd(aiouffd.Feature.EVENT_REMOVE | aiouffd.Feature.WP_HUGETLBFS_SHMEM)
        for mapping in self.mappings:
            self.uffd.register(mapping.start, mapping.end - mapping.start, WP)
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(path)
        socket.send_fds(self.connection, [firecracker.encode(self.mappings, PAGE)], [self.uffd.fileno(), fd])
        self.model = bytearray(content(0, FILE))

    def address(self, page: int) -> int:
        """Return where a page of the file is."""
        return next(
            at.start + page * PAGE - at.offset for at in self.mappings if 0 <= page * PAGE - at.offset < 16 * PAGE
        )

    def write(self, page: int, data: bytes) -> None:
        """Write to a page."""
        poke(self.address(page), data)
        self.model[page * PAGE : page * PAGE + len(data)] = data


def parts_are_captured(folder: str) -> None:
    """Scenario: see the test."""
    place, path = Path(folder), str(Path(folder, "vm.sock"))
    control, at = ControlClient(place / "control.sock"), "/v1/sessions/vm/snapshot"
    servers = Servers(folder, "--control", place / "control.sock", socket="")
    servers.start("first")
    new = {"source": str(place / "base.snap"), "readahead": 0}
    control.ask("POST", "/v1/sessions", {"name": "vm", "socket": path, **new})
    vm = Parted(path)
    assert peek(vm.address(3)) == peek(vm.address(5))[:0] + content(3 * PAGE, 8)
    libc.madvise(vm.address(5), PAGE, MADV_REMOVE)  # a balloon, which the next server hears of by the journal
    vm.model[5 * PAGE : 6 * PAGE] = bytes(PAGE)
    servers.lose()
    servers.start("second")
    vm.write(41, b"one")

    def image(name: str) -> bytes:
        if not name.endswith(".snap"):
            return (place / name).read_bytes()
        with aiouffd.open(place / name) as found:
            return bytes(found[:])

    os.environ["AIOUFFD_CONTROL"] = str(place / "control.sock")
    os.chdir(place)
    assert main(["ctl", "snapshot", "vm", "0.snap", "--client", "1"]) == 0
    assert image("0.snap") == vm.model
    vm.write(41, b"two")
    vm.write(50, b"three")
    taken = control.ask("POST", at, {"destination": str(place / "1.snap"), "base": str(place / "0.snap")})
    # Of four chunks, what was written since the layer before is in two.
    assert (taken["changed"], taken["base"], taken["pages_saved"]) == (0.5, str(place / "0.snap"), 0)
    assert image("1.snap") == vm.model
    vm.write(50, b"four")
    taken = control.ask("POST", at, {"destination": str(place / "2.snap"), "base": str(place / "1.snap")})
    assert taken["changed"] == 0.25
    assert image("2.snap") == vm.model
    control.ask("POST", at, {"destination": str(place / "plain")})
    assert image("plain") == vm.model
    ends(control, at, place)
    is_refused(control, at, place)
    vm.write(2, b"five")
    control.ask("POST", at, {"destination": str(place / "3.snap"), "whole": True})
    assert image("3.snap") == vm.model
    events = [told["kind"] for told in happened(control) if told["session"] == "vm" and "snapshot" in told["kind"]]
    assert events == ["snapshot.written"] * 4 + ["snapshot.failed"] * 3 + ["snapshot.written"]
    print(json.dumps(servers.pids))


def happened(control: ControlClient) -> list[dict[str, Any]]:
    """Return what has happened up to the last snapshot."""
    found = []
    for event in control.events(0):
        found.append(event)
        if event["details"].get("destination", "").endswith("3.snap"):
            break
    return found


def ends(control: ControlClient, at: str, place: Path) -> None:
    """Cancel snapshots, by asking for it and by going away."""
    body, said = {"destination": str(place / "x.snap"), "rate": FILE / 100}, []

    def refused() -> None:
        with pytest.raises(click.ClickException) as caught:
            control.ask("POST", at, body)
        said.append(str(caught.value))

    def captured() -> bool | None:
        with contextlib.suppress(click.ClickException):
            found = control.ask("GET", at)
            assert found["bytes"] <= found["total"] <= FILE
            return bool(found["captured"])
        return None

    waits = threading.Thread(target=refused)
    waits.start()
    eventually(captured, expected=True)
    refused()
    assert main(["ctl", "cancel", "vm"]) == 0
    waits.join()
    assert "has a snapshot under way" in said[0]
    assert "the snapshot was canceled" in said[1]
    connection = _Connection(str(place / "control.sock"), 60.0)
    connection.request("POST", at, json.dumps(body))
    eventually(captured, expected=True)
    connection.close()
    eventually(captured, None)
    assert not list(place.glob("x*"))


def is_refused(control: ControlClient, at: str, place: Path) -> None:
    """Have snapshots refused by name."""
    new = {"source": str(place / "base.snap")}
    for name, shared in (("none", False), ("open", True)):
        path = str(place / f"{name}.sock")
        control.ask("POST", "/v1/sessions", {"name": name, "socket": path, **new})
        with pytest.raises(click.ClickException, match="has no client"):
            control.ask("POST", f"/v1/sessions/{name}/snapshot", {"destination": str(place / "x.snap")})
        kept = hand_over(path, FILE, shared=shared)
        assert kept[0][0] == 1
        other = f"/v1/sessions/{name}/snapshot"
        with pytest.raises(click.ClickException, match={"none": "no memory file", "open": "REGISTER_MODE_WP"}[name]):
            control.ask("POST", other, {"destination": str(place / "x.snap")})
        kept[2].close()
    for body, why in (
        ({"client": 7}, "one must be named: 1"),
        ({"base": "/x.snap", "whole": True}, r"\$\.whole: a snapshot of a base is not whole"),
        ({"destination": "x.snap"}, r"\$\.destination: 'x.snap' is no absolute path"),
        ({"destination": "/x", "metadata": {}}, r"a plain file has no base and no metadata"),
        ({"destination": str(place / "0.snap")}, "there is a snapshot of that name already"),
    ):
        with pytest.raises(click.ClickException, match=why):
            control.ask("POST", at, {"destination": "/x.snap", **body})
    for method in ("GET", "DELETE"):
        with pytest.raises(click.ClickException, match="has no snapshot under way"):
            control.ask(method, at)


def test_parts_of_a_memory_file(tmp_path: Path) -> None:
    """With holes between them; after a loss of all processes; in layers; canceled in each way; refused by name."""
    create_sync(content(0, FILE), tmp_path / "base.snap")
    output, _ = play(parts_are_captured, str(tmp_path))
    end_server(output)
