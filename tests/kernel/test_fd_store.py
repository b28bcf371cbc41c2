"""`client.fd_store`, with a double of systemd: a service is killed as a whole, restarted, and serves on."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pattern import PAGE, Touchers, peek, word
from scenario import ended, eventually, play
from served import MIB, children_of, hand_over
from systemd_double import SystemdDouble

import aiouffd
from aiouffd.engine.mappings import Mapping
from aiouffd.handoff import firecracker
from aiouffd.pager.client.fd_store import FdStore

if TYPE_CHECKING:
    import subprocess

SIZE = 8 * MIB


def tree(pid: int) -> list[int]:
    """Return a process and all that it has started, as systemd finds them in its cgroup."""
    return [pid, *(below for child in children_of(pid) for below in tree(child))]


def a_service(directory: str, image: str) -> None:
    """Scenario: see the test."""
    place = Path(directory)
    path = place / "uffd.sock"
    with SystemdDouble(place) as systemd, contextlib.ExitStack() as stack:

        def start(name: str) -> subprocess.Popen[bytes]:
            options = ("--socket", str(path), "--hold", "systemd", "--on-term", "leave", "--readahead", "0")
            systemd.said.clear()
            service = systemd.start("serve", image, *options, log=place / name)
            stack.callback(service.wait)
            stack.callback(service.kill)
            eventually(lambda: "READY=1" in systemd.said or service.poll() is not None, expected=True)
            assert service.poll() is None, ((place / name).read_text(), systemd.stored)
            return service

        first = start("first")
        region, connection, uffd = hand_over(path, SIZE)
        assert peek(region.address) == word(0)
        uffd.close()  # nobody but the service has it, and systemd
        mine = hand_over(path, shared=True)  # with a memory file, and another description of the source's
        assert peek(mine[0].address) == word(0)
        region.madvise(mmap.MADV_DONTNEED, 0, PAGE)
        forking = aiouffd.Userfaultfd(aiouffd.Feature.EVENT_FORK)
        refused = aiouffd.Region(PAGE)
        forking.register(refused.address, PAGE, aiouffd.RegisterMode.MISSING)
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(path))
            handoff = firecracker.encode([Mapping(refused.address, refused.address + PAGE, 0)], PAGE)
            socket.send_fds(other, [handoff], [forking.fileno()])
            eventually(lambda: "use --hold PATH" in (place / "first").read_text(), expected=True)
        forking.close()
        kept = {name for name, _ in systemd.stored}
        for pid in tree(first.pid):
            os.kill(pid, signal.SIGKILL)
        touchers = Touchers(region.address, [range(1 + n, 600, 4) for n in range(4)])
        first.wait()
        second = start("second")
        touchers.join()
        assert peek(region.address) == bytes(8)  # as the journal says
        eventually(lambda: {name for name, _ in systemd.stored}, expected=kept)
        second.terminate()  # systemctl restart: the main process ends, then systemd kills what is left
        pids = tree(second.pid)[1:]
        assert second.wait(60) == 0
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        touchers = Touchers(region.address, [range(600 + n, SIZE // PAGE, 4) for n in range(4)])
        third = start("third")
        touchers.join()
        assert not touchers.wrong
        assert peek(mine[0].address + 9 * PAGE) == word(9)
        assert hand_over(path)[0][1] == 0
        connection.close()
        pids = tree(third.pid)
    print(*pids)


def test_a_service_that_systemd_restarts(image: Path, tmp_path: Path) -> None:
    """Memory whose forks are told is refused by name; what is stored is what is served, and no more."""
    output, _ = play(a_service, str(tmp_path), str(image))
    assert all(ended(int(pid)) for pid in output.split()[-3:])


def test_a_systemd_that_is_late(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What it has no room for is sent when it has."""
    address, count = str(tmp_path / "notify"), 40
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(address)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        notified.settimeout(10.0)
        store, sent, room = (
            FdStore.of_systemd(),
            list[int](),
            int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text()),
        )

        def send() -> None:
            for at in range(count):
                sent.append(at)
                store.remove(str(at))

        thread = threading.Thread(target=send)
        thread.start()
        eventually(lambda: len(sent) > room, expected=True)
        found = [notified.recv(100) for _ in range(count)]
        thread.join()
    assert found == [b"FDSTOREREMOVE=1\nFDNAME=aiouffd %d" % at for at in range(count)]


def test_a_file_of_two_notes(tmp_path: Path) -> None:
    """Both are stored, and can be written to: systemd takes no open file twice."""
    file = os.open(tmp_path / "recording", os.O_RDWR | os.O_CREAT)
    with SystemdDouble(tmp_path) as systemd:
        store = FdStore(str(tmp_path / "notify"), {})
        for name in ("one", "two", "two"):
            store.put_note(name, [file])
        store.remove_note("one", [file])
        store.put_note("three", [file])
        names = ["aiouffd note three 0", "aiouffd note two 0"]
        eventually(lambda: [name for name, _ in systemd.stored], expected=names)
        for _, fd in systemd.stored:
            assert os.pwrite(fd, b"x", 0) == 1
    os.close(file)


def test_without_systemd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is said what is missing; and a systemd that has gone takes nothing."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    with pytest.raises(aiouffd.PagerStartError, match="NOTIFY_SOCKET is not set"):
        FdStore.of_systemd()
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    with pytest.raises(aiouffd.PagerStartError, match="systemd takes no descriptor"):
        FdStore.of_systemd().put("name", 0)
