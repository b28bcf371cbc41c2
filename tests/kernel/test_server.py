"""`aiouffd serve` and `Server` from the outside: microVMs, our own clients, and whoever sends nonsense."""

from __future__ import annotations

import array
import asyncio
import contextlib
import ctypes
import functools
import json
import mmap
import os
import pty
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from pattern import PAGE, Pattern, Slow, content, left_while_touched, word
from scenario import ended, eventually, killed_when_this_thread_waits, next_error, play
from web import serving

import aiouffd
from aiouffd.engine.mappings import Mapping
from aiouffd.handoff import firecracker
from aiouffd.monitor.engines.served_by import ServedByEngine
from aiouffd.server.server import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parent.parent.parent
VM = ROOT / "examples" / "microvm.py"
MIB = 1 << 20
HUGE = 2 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a file of 16 MiB, in which page n consists of words n + 1."""
    path = tmp_path / "memory.bin"
    path.write_bytes(b"".join(word(page) * (PAGE // 8) for page in range(16 * MIB // PAGE)))
    return path


class Serve:
    """A running `aiouffd serve`."""

    def __init__(self, directory: Path, *arguments: object, wait: bool = True, **environment: str) -> None:
        self.path = directory / "uffd.sock"
        self.log = directory / "serve.log"
        command = [sys.executable, "-m", "aiouffd", "serve", *map(str, arguments), "--socket", str(self.path)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stderr=log, env={**os.environ, **environment}
            )
        if wait:
            eventually(self.says_or_ends("listening"), expected=True)
            assert self.process.poll() is None, self.said

    def says_or_ends(self, text: str) -> Callable[[], bool]:
        """Return a function that tells whether it has said so, or has ended."""
        return lambda: text in self.said or self.process.poll() is not None

    @property
    def said(self) -> str:
        """Its log."""
        return self.log.read_text()

    @property
    def pager(self) -> int:
        """Return the keeper's pid."""
        return int(self.said.split("pager ", 1)[1].split('"', 1)[0])

    @property
    def worker(self) -> int:
        """Return the worker's pid; wait for it, since the keeper forks it behind the first line of the log."""
        return worker_of(str(self.log))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        keeper = self.pager if "pager " in self.said else 0
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if keeper:
            assert ended(keeper, 5.0), "the pager has outlived all that it served"

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Have it end, and return its status."""
        self.process.send_signal(number)
        return self.process.wait(10)


def total(pages: range, step: int = 1) -> int:
    """Return what the guest makes of these pages: it adds the first byte of each."""
    return sum((page + 1) & 255 for page in pages[::step]) & 0xFFFFFFFF


def run_vm(serve: Serve, *arguments: str) -> str:
    """Run a guest to its end; return what it said."""
    done = subprocess.run(
        [sys.executable, str(VM), str(serve.path), *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


needs_kvm = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm is missing")


# Virtual machines


@needs_kvm
@pytest.mark.parametrize("readahead", ["0", "2M"])
def test_a_guest_sums_its_memory(image: Path, tmp_path: Path, readahead: str) -> None:
    """Every page right; a second machine beside the first; a balloon that gives back reads as zeros."""
    with Serve(tmp_path, image, "--readahead", readahead) as serve:
        right = total(range(16 * MIB // PAGE))
        assert f"checksum {right}," in run_vm(serve, "--memory", "16")
        machines = [
            subprocess.Popen(
                [sys.executable, str(VM), str(serve.path), "--memory", "16"], stdout=subprocess.PIPE, text=True
            )
            for _ in range(4)
        ]
        for machine in machines:
            output, _ = machine.communicate(timeout=60)
            assert f"checksum {right}," in output
        rest = total(range(4 * MIB // PAGE, 16 * MIB // PAGE))
        assert f"checksum {rest}," in run_vm(serve, "--memory", "16", "--balloon", "4", "--rounds", "2")
        eventually(lambda: serve.said.count("has ended"), 6)
        assert serve.end() == 0


@needs_kvm
@pytest.mark.usefixtures("huge_pages")
def test_a_guest_of_huge_pages(image: Path, tmp_path: Path) -> None:
    """Four pages of 2 MiB."""
    with Serve(tmp_path, image) as serve:
        right = total(range(8 * MIB // PAGE), HUGE // PAGE)
        assert f"checksum {right}, 4 pages" in run_vm(serve, "--memory", "8", "--page-size", str(HUGE))
        rest = total(range(HUGE // PAGE, 8 * MIB // PAGE), HUGE // PAGE)
        assert f"checksum {rest}, 4 pages" in run_vm(serve, "--memory", "8", "--page-size", str(HUGE), "--balloon", "2")


@contextlib.contextmanager
def on_the_web(image: Path) -> Iterator[str]:
    """Serve a file by HTTP; yield its URL."""
    with serving(image.parent) as url:
        yield f"{url}/{image.name}"


@needs_kvm
def test_a_guest_whose_memory_is_on_a_web_server(image: Path, tmp_path: Path) -> None:
    """From an HTTP source."""
    with on_the_web(image) as url, Serve(tmp_path, url) as serve:
        assert f"checksum {total(range(16 * MIB // PAGE))}," in run_vm(serve, "--memory", "16")


def test_a_source_that_is_unplugged(image: Path, tmp_path: Path) -> None:
    """The timeout that was asked for is the web's, too; then the page is an error, in the log as at its toucher."""
    with contextlib.ExitStack() as stack:
        with on_the_web(image) as url:
            serve = stack.enter_context(Serve(tmp_path, url, "--readahead", "0", "--timeout", "1"))
            play(client, str(serve.path), MIB)
        began = time.monotonic()
        play(touch_all, str(serve.path), MIB, status=-signal.SIGBUS)
        assert time.monotonic() - began < 8
        assert "the server refuses connections" in serve.said


@needs_kvm
@pytest.mark.parametrize("where", ["file", "web"])
def test_a_guest_while_the_worker_is_killed(image: Path, tmp_path: Path, where: str) -> None:
    """Five kills that land while the guest still misses pages, one by one: its sum is right, and it is done."""
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(on_the_web(image)) if where == "web" else image
        port = free_port()
        serve = stack.enter_context(Serve(tmp_path, source, "--readahead", "0", "--metrics", port))
        command = [sys.executable, str(VM), str(serve.path), "--memory", "16", "--rounds", "1"]
        landed = rounds = 0
        while landed < 5:
            rounds += 1
            assert rounds <= 40, f"only {landed} kills have landed"
            before = metric(port, 'aiouffd_pages_total{cause="fault"}')
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as machine:
                eventually(functools.partial(handoffs, serve), rounds)
                time.sleep(random.uniform(0.0, 0.03))  # somewhere in the guest's run
                os.kill(serve.worker, signal.SIGKILL)
                # A page that the killed worker was at is counted twice, at most; and the rest was still to come.
                if metric(port, 'aiouffd_pages_total{cause="fault"}') - before < 16 * MIB // PAGE - 1:
                    landed += 1
                assert machine.stdout is not None
                assert f"checksum {total(range(16 * MIB // PAGE))}," in machine.stdout.read()
        assert metric(port, "aiouffd_worker_restarts_total") >= 5


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def metric(port: int, name: str) -> float:
    """Return what Prometheus would read of one metric."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == name)


def handoffs(serve: Serve) -> int:
    """Return how many were taken."""
    return serve.said.count("bytes in 1 regions")


# Our own clients


def client(path: str, size: int, *, kill: str = "") -> None:
    """Scenario: a Monitor that is served by a server; somebody is killed in the middle."""
    region = aiouffd.Region(size)
    pages = list(range(size // PAGE))
    random.Random(3).shuffle(pages)
    with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path)) as monitor:
        monitor.prefetch_sync(0, MIB)
        assert monitor.pids == ()
        for number, page in enumerate(pages):
            assert region[page * PAGE : page * PAGE + 8] == word(page)
            if number == 500 and kill:
                os.kill(int(kill), signal.SIGKILL)
        assert monitor.statistics().pages_prefetch >= 256
        region.madvise(mmap.MADV_DONTNEED, 0, 16 * PAGE)
        assert region[: 16 * PAGE] == bytes(16 * PAGE)
        with pytest.raises(ValueError, match="not within the region"):
            monitor.prefetch_sync(size, 1)
        monitor.check()
    assert region[20 * PAGE] == 21


def test_a_monitor_that_a_server_serves(image: Path, tmp_path: Path) -> None:
    """The handoff is acknowledged, prefetch and statistics work, what is removed is zeros; no process is started."""
    with Serve(tmp_path, image, "--readahead", "0") as serve:
        play(client, str(serve.path), 16 * MIB)
        eventually(lambda: "has left; 0 left" in serve.said, expected=True)


def run_killing(path: str, size: int, pid: str) -> None:
    """Scenario, by position."""
    client(path, size, kill=pid)


@pytest.mark.parametrize("who", ["worker", "pager"])
def test_a_server_whose_pager_is_killed(image: Path, tmp_path: Path, who: str) -> None:
    """Worker or keeper: nobody notices but the log."""
    with Serve(tmp_path, image, "--readahead", "0") as serve:
        play(client, str(serve.path), MIB)
        play(run_killing, str(serve.path), 16 * MIB, str(getattr(serve, who)))
        assert "is replaced" in serve.said


def server_dies(path: str, pids: list[int]) -> None:
    """Scenario: all of the server is killed."""
    region = aiouffd.Region(16 * MIB)
    with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path)) as monitor:
        assert region[0] == 1
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(aiouffd.PagerDiedError, match="have ended"):
            next_error(monitor)
        assert region[0] == 1  # what is there stays
        with pytest.raises(aiouffd.ClosedError):
            monitor.prefetch_sync(0, PAGE)
        sys.stdout.write("told\n")
        sys.stdout.flush()
        sys.stdout.write(str(region[8 * MIB]))


def server_dies_at_once(path: str) -> None:
    """Scenario: a server takes the memory, and is gone before the client knows."""

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            _, fds, _, _ = socket.recv_fds(connection, 64 << 10, 4)
            connection.sendall(b'{"id":0,"ok":{}}\n')
            for fd in fds:
                os.close(fd)

    for _ in range(30):  # every third was never told of it
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            thread = threading.Thread(target=serve, args=(listener,))
            thread.start()
            told = pytest.raises(aiouffd.PagerDiedError, match="have ended")
            with aiouffd.Monitor(aiouffd.Region(MIB), engine=aiouffd.ServedBy(path)) as monitor, told:
                next_error(monitor, 2)
            thread.join()
        os.unlink(path)  # noqa: PTH108 - a literal came along


def test_a_server_that_is_gone_as_soon_as_it_has_answered(tmp_path: Path) -> None:
    """Whoever touches a page must not wait for ever."""
    play(server_dies_at_once, str(tmp_path / "socket"))


def server_dies_while_the_gil_is_held(path: str, pids: list[int]) -> None:
    """Scenario: all of the server is killed when this thread, and with it all of Python, waits for a page."""
    region = aiouffd.Region(16 * MIB)
    with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path, stuck_limit=0.5)):
        assert region[0] == 1
        os.kill(pids[2], signal.SIGSTOP)  # the worker: so that the page does not come first
        with killed_when_this_thread_waits(pids):
            print(region[8 * MIB])


def test_a_server_that_is_killed_while_a_thread_waits_with_the_gil_held(image: Path, tmp_path: Path) -> None:
    """Nothing in Python can run any more: it is said, and the process ends."""
    with Serve(tmp_path, image, "--readahead", "0") as serve:
        _, errors = play(
            server_dies_while_the_gil_is_held,
            str(serve.path),
            [serve.process.pid, serve.pager, serve.worker],
            status=-signal.SIGABRT,
        )
        assert "waits for the page at" in errors
        assert "in server_dies_while_the_gil_is_held" in errors


def test_a_server_that_is_gone_altogether(image: Path, tmp_path: Path) -> None:
    """Listener, keeper and worker killed: an error that says so, then SIGBUS; no hang, and no zeros."""
    with Serve(tmp_path, image, "--readahead", "0") as serve:
        play(client, str(serve.path), MIB)
        output, _ = play(
            server_dies, str(serve.path), [serve.process.pid, serve.pager, serve.worker], status=-signal.SIGBUS
        )
        assert output == "told\n"


def outlives(path: str, pid: int) -> None:
    """Scenario: the listener is killed; the pager serves on."""
    region = aiouffd.Region(16 * MIB)
    with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path)) as monitor:
        os.kill(pid, signal.SIGKILL)
        for page in range(0, 16 * MIB // PAGE, 7):
            assert region[page * PAGE] == (page + 1) & 255
        with pytest.raises(aiouffd.ClosedError, match="gone"):
            monitor.prefetch_sync(0, PAGE, timeout=10)


def test_the_pager_serves_on_when_the_listener_is_killed(image: Path, tmp_path: Path) -> None:
    """Page faults go on being served; what needs the listener is refused."""
    with Serve(tmp_path, image, "--readahead", "0") as serve:
        play(outlives, str(serve.path), serve.process.pid)


def leave_while_touched(path: str, on_exit: str) -> None:
    """Scenario: a thread goes on touching, with the GIL held at each page, while the block is left."""
    region = aiouffd.Region(16 * MIB)
    left_while_touched(region, aiouffd.Monitor(region, engine=aiouffd.ServedBy(path), on_exit=on_exit))  # type: ignore[call-overload]


@pytest.mark.parametrize(("on_exit", "status"), [("sigbus", -signal.SIGBUS), ("zeros", 0)])
def test_leaving_while_a_thread_touches_with_the_gil(image: Path, tmp_path: Path, on_exit: str, status: int) -> None:
    """It gets what `on_exit` says, and does not wait for a server that answers no more. Others are served on."""
    with Serve(tmp_path, image, "--readahead", "0") as serve:
        play(leave_while_touched, str(serve.path), on_exit, status=status)
        play(client, str(serve.path), MIB)


def no_server(path: str) -> None:
    """Scenario."""
    region = aiouffd.Region(MIB)
    with pytest.raises(aiouffd.PagerStartError, match="is `aiouffd serve` running there"):
        aiouffd.Monitor(region, engine=aiouffd.ServedBy(path + ".no")).__enter__()
    with pytest.raises(aiouffd.HandoffError, match="reaches to offset") as caught:
        aiouffd.Monitor(aiouffd.Region(32 * MIB), engine=aiouffd.ServedBy(path)).__enter__()
    # What is said to clients is the reason, and not where in the server it came from, or from what.
    assert not getattr(caught.value, "__notes__", [])
    assert caught.value.__cause__ is None
    assert region.monitor is None
    with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path)):
        assert region[0] == 1
    with pytest.raises(ValueError, match="takes no a source or handler"):
        aiouffd.Monitor(region, Pattern(MIB), engine=aiouffd.ServedBy(path))  # type: ignore[call-overload]


def test_a_monitor_that_is_turned_away(image: Path, tmp_path: Path) -> None:
    """The reason arrives as a typed error, and the region can be served after all."""
    with Serve(tmp_path, image) as serve:
        play(no_server, str(serve.path))
        assert "turned away" in serve.said


def errors_arrive(path: str, image: str) -> None:
    """Scenario: pages that the source cannot give."""
    region = aiouffd.Region(16 * MIB)
    with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path)) as monitor:
        assert region[0] == 1
        os.truncate(image, 4 * MIB)
        with pytest.raises(aiouffd.ShortReadError):
            monitor.prefetch_sync(8 * MIB, PAGE)
        with pytest.raises(OSError, match="Bad address"):  # in place of SIGBUS, for a system call
            os.write(os.memfd_create("x"), memoryview(region)[9 * MIB : 9 * MIB + 8])
        with pytest.raises(aiouffd.ShortReadError, match=str(9 * MIB)):
            next_error(monitor)
    sys.stdout.write("done")


def test_errors_of_the_source_reach_the_client(image: Path, tmp_path: Path) -> None:
    """A prefetch that fails raises at the client."""
    with Serve(tmp_path, image, "--readahead", "0", "--retries", "0") as serve:
        output, _ = play(errors_arrive, str(serve.path), str(image))
        assert output == "done"


def test_many_sources(tmp_path: Path) -> None:
    """--source-for finds each client's by the name that it asks for; a name cannot leave its directory."""
    for number, name in enumerate(("a", "b")):
        (tmp_path / f"{name}.mem").write_bytes(bytes([number + 1]) * MIB)
    with Serve(tmp_path, "--source-for", f"{tmp_path}/{{name}}.mem") as serve:
        play(named, str(serve.path))
    done = subprocess.run(
        [sys.executable, "-m", "aiouffd", "serve", "--source-for", "{nonsense}", "--socket", "x"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "knows name, number, pid, uid, not nonsense" in done.stderr


def named(path: str) -> None:
    """Scenario."""
    for name, byte in (("a", 1), ("b", 2)):
        region = aiouffd.Region(MIB)
        with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path, source=name)):
            assert region[5000] == byte
    for name in ("../a", "", ".hidden", "a?b", "%2e%2e", "a\0b", "a/b", "\ud800", "a" * 300, "a\n"):
        with pytest.raises(aiouffd.HandoffError, match="which is no name"):
            aiouffd.Monitor(aiouffd.Region(MIB), engine=aiouffd.ServedBy(path, source=name)).__enter__()
    with pytest.raises(aiouffd.UffdError, match=r"c\.mem"):
        aiouffd.Monitor(aiouffd.Region(MIB), engine=aiouffd.ServedBy(path, source="c")).__enter__()


def newest(path: str, expected: int) -> None:
    """Scenario: which snapshot is it?"""
    region = aiouffd.Region(MIB)
    with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path, source="a")):
        assert region[5 * PAGE] == expected
        if expected == 1:
            file = Path(path).parent / "a.mem"
            (file.parent / "new").write_bytes(bytes([2]) * MIB)
            (file.parent / "new").rename(file)
            play(newest, path, 2)  # another client gets what lies there now
            assert region[100 * PAGE] == 1  # and this one what it has begun with


def test_a_snapshot_that_is_replaced(tmp_path: Path) -> None:
    """With --source-for, each client gets the file that has the name when it comes."""
    (tmp_path / "a.mem").write_bytes(bytes([1]) * MIB)
    with Serve(tmp_path, "--readahead", "0", "--source-for", f"{tmp_path}/{{name}}.mem") as serve:
        play(newest, str(serve.path), 1)
        before = descriptors(serve)
        for _ in range(3):
            play(newest, str(serve.path), 2)
        eventually(lambda: descriptors(serve) <= before, expected=True)


def working_set(path: str, kind: str) -> None:
    """Scenario: touch, or find the pages there."""
    region = aiouffd.Region(16 * MIB)
    with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path)) as monitor:
        if kind == "replay":
            eventually(lambda: monitor.statistics().pages_replay, 200)
        for page in range(0, 4000, 20):
            assert region[page * PAGE] == (page + 1) & 255
        if kind == "replay":
            assert monitor.statistics().faults == 0


def test_record_and_replay(image: Path, tmp_path: Path) -> None:
    """What one client has touched is brought ahead for the next."""
    trace = tmp_path / "trace"
    with Serve(tmp_path, image, "--record", trace) as serve:
        play(working_set, str(serve.path), "record")
        assert serve.end() == 0
    assert list(aiouffd.Trace.load(trace, PAGE).offsets) == [page * PAGE for page in range(0, 4000, 20)]
    with Serve(tmp_path, image, "--replay", trace) as serve:
        play(working_set, str(serve.path), "replay")


def touch_all(path: str, size: int) -> None:
    """Scenario: touch each page, in order."""
    region, _connection, _uffd = hand_over(path, size)
    for page in range(size // PAGE):
        assert region[page * PAGE] == (page + 1) & 255


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_recording_for_which_there_is_no_room(image: Path, tmp_path: Path) -> None:
    """The disk is full: that is said, what was recorded until then can be replayed, and the client is served on."""
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", small], check=True)
    try:
        with Serve(tmp_path, image, "--record", small / "trace") as serve:
            (small / "filler").write_bytes(bytes(900 << 10))
            play(touch_all, str(serve.path), 16 * MIB)
            assert "recorded no longer" in serve.said
            assert "is replaced" not in serve.said
            (small / "filler").unlink()
            assert serve.end() == 0
        assert len(aiouffd.Trace.load(small / "trace", PAGE).offsets) < 4096
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def another_source(path: str) -> None:
    """Scenario: the first client says what is recorded."""
    for name in ("a", "b"):
        region = aiouffd.Region(MIB)
        monitor = aiouffd.Monitor(region, engine=aiouffd.ServedBy(path, source=name))
        if name == "a":
            with monitor:
                assert region[5 * PAGE] == 6
        else:
            with pytest.raises(aiouffd.HandoffError, match="a recording is of one source"):
                monitor.__enter__()


def test_a_recording_is_of_one_source(image: Path, tmp_path: Path) -> None:
    """Offsets of two files in one recording would mean nothing."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.mem").write_bytes(image.read_bytes()[:MIB])
    trace = tmp_path / "trace"
    with Serve(tmp_path, "--source-for", f"{tmp_path}/{{name}}.mem", "--record", trace) as serve:
        play(another_source, str(serve.path))
        assert serve.end() == 0
    assert list(aiouffd.Trace.load(trace, PAGE).offsets) == [5 * PAGE]


# Ending


def waits_for_end(path: str, pid: int, kind: str) -> None:
    """Scenario: the server is told to end while it serves."""
    region, connection, _uffd = hand_over(path, 16 * MIB)
    assert region[0] == 1
    os.kill(pid, signal.SIGTERM)
    connection.settimeout(10)
    if kind == "fill":
        assert connection.recv(1) == b""  # served no longer
        assert bytes(region) == b"".join(word(page) * (PAGE // 8) for page in range(16 * MIB // PAGE))
        region.madvise(mmap.MADV_DONTNEED, 0, PAGE)  # and nobody is asked
        assert region[0] == 0
    else:
        eventually(lambda: Path(path).exists(), expected=False)
        for page in range(0, 16 * MIB // PAGE, 5):
            assert region[page * PAGE] == (page + 1) & 255


@pytest.mark.parametrize("kind", ["keep", "fill"])
def test_sigterm(image: Path, tmp_path: Path, kind: str) -> None:
    """No new clients; those that are there are served until they go, or get all that they miss."""
    with Serve(tmp_path, image, "--readahead", "0", "--on-term", kind) as serve:
        play(waits_for_end, str(serve.path), serve.process.pid, kind)
        assert serve.process.wait(10) == 0
        assert "SIGTERM: no new clients" in serve.said
        assert "ended" in serve.said


def told_twice(path: str, pid: int, log: str) -> None:
    """Scenario: the server is told to end twice, while it serves."""
    region, _connection, _uffd = hand_over(path)
    assert region[0] == 1
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: "no new clients" in Path(log).read_text(), expected=True)
    os.kill(pid, signal.SIGTERM)
    assert ended(pid, 10.0)
    for page in range(0, MIB // PAGE, 3):
        assert region[page * PAGE] == (page + 1) & 255


def test_a_second_signal(image: Path, tmp_path: Path) -> None:
    """The listener ends at once; the pager serves its client on, and ends with it."""
    with Serve(tmp_path, image, "--readahead", "0") as serve:
        play(told_twice, str(serve.path), serve.process.pid, str(serve.log))
        assert serve.process.wait() == 0
        assert "serves 1 clients on by itself" in serve.said


class FailsOnce(Slow):
    """Fails one read of its beginning, when the rest has been read; and reads it well afterwards."""

    def __init__(self, size: int, directory: str) -> None:
        super().__init__(size)
        self.directory = directory
        self.last: asyncio.Event | None = None  # the last bytes have been read

    async def read(self, offset: int, length: int) -> bytes:
        """Return the bytes."""
        failed = Path(self.directory) / "failed"
        self.last = self.last or asyncio.Event()
        if offset < 16 * PAGE and length > PAGE and not failed.exists():
            (Path(self.directory) / "asked").touch()
            await self.last.wait()
            failed.touch()
            raise aiouffd.SourceError(repr(self), offset, length, "a bad moment")
        if offset + length == self.size:
            self.last.set()
        return await super().read(offset, length)


async def filled_in_spite_of_a_failure(directory: str) -> None:
    """Scenario: a window is on its way, and fails when the fill has passed it by."""
    path = Path(directory) / "socket"
    async with Server(FailsOnce(MIB, directory), path) as server:
        region, _connection, uffd = await asyncio.to_thread(hand_over, path)
        touch = ctypes.CDLL(None).memchr
        place = ctypes.c_void_p(region.address)
        toucher = asyncio.create_task(asyncio.to_thread(touch, place, 0, ctypes.c_size_t(1)))
        await asyncio.to_thread(eventually, (Path(directory) / "asked").exists, expected=True)
        await server.fill()
        await toucher
        uffd.close()
        assert bytes(region) == content(0, MIB)


def test_a_fill_whose_reads_fail_for_a_moment(tmp_path: Path, loop: str) -> None:
    """Nothing is given back before all is there: what was taken for present and has failed is brought again."""
    play(filled_in_spite_of_a_failure, str(tmp_path), loop=loop)


def hand_over(path: str | Path, length: int = MIB) -> tuple[aiouffd.Region, socket.socket, aiouffd.Userfaultfd]:
    """Hand over a region as Firecracker does; keep all that is returned."""
    region = aiouffd.Region(length)
    uffd = aiouffd.Userfaultfd(aiouffd.Feature.EVENT_REMOVE)
    uffd.register(region.address, region.mapped_length, aiouffd.RegisterMode.MISSING)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.fspath(path))
    mapping = Mapping(region.address, region.address + region.mapped_length, 0)
    socket.send_fds(connection, [firecracker.encode([mapping], PAGE)], [uffd.fileno()])
    return region, connection, uffd


# Safety


def refused(path: str, pid: int, log: str, worker: int) -> None:
    """Scenario: a client that has asked to be refused, as a Monitor that is about to leave, and stays."""
    region = aiouffd.Region(MIB)
    with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path)) as monitor:
        assert region[0] == 1
        engine = monitor._engine
        assert isinstance(engine, ServedByEngine)
        engine.refuse()
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: "filling 1" in Path(log).read_text(), expected=True)
        before, began = processor_time(worker), time.monotonic()
        time.sleep(0.5)  # the time that is measured
        assert processor_time(worker) - before < 0.5 * (time.monotonic() - began)


def processor_time(pid: int) -> float:
    """Return the seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_what_is_refused_is_not_filled(image: Path, tmp_path: Path) -> None:
    """It is left to its owner; nobody asks for it again and again."""
    with Serve(tmp_path, image, "--on-term", "fill") as serve:
        play(refused, str(serve.path), serve.process.pid, str(serve.log), serve.worker)
        assert serve.process.wait(10) == 0
        assert "cannot be filled: its owner is about to leave" in serve.said


def other_pages(path: str, claimed: int, real: int, present: bool) -> None:
    """Scenario: a client whose memory has other pages than it says."""
    region = aiouffd.Region(2 * HUGE, page_size=real) if real > PAGE else aiouffd.Region(2 * HUGE + HUGE)
    start = (region.address + HUGE - 1) & -HUGE
    if present:
        ctypes.memset(start, 1, 1)
    with aiouffd.Userfaultfd() as uffd, socket.socket(socket.AF_UNIX) as connection:
        uffd.register(start, 2 * HUGE, aiouffd.RegisterMode.MISSING)
        connection.settimeout(10)
        connection.connect(path)
        message = firecracker.encode([Mapping(start, start + 2 * HUGE, 0)], claimed)
        socket.send_fds(connection, [message], [uffd.fileno()])
        assert connection.recv(1) == b""


@pytest.mark.usefixtures("huge_pages")
def test_pages_of_another_size_than_is_said(image: Path, tmp_path: Path) -> None:
    """Turned away, before a page is copied that would meet what is there."""
    with Serve(tmp_path, image) as serve:
        for present in (False, True):
            play(other_pages, str(serve.path), HUGE, PAGE, present)
        assert serve.said.count("has smaller pages than 2097152 bytes") == 2
        play(other_pages, str(serve.path), PAGE, HUGE, False)
        assert "has larger pages than 4096 bytes" in serve.said


def descriptors(serve: Serve) -> int:
    """Return how many the listener and the pager have open."""
    return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in (serve.process.pid, serve.worker))


def come_and_go(path: str, times: int) -> None:
    """Scenario: clients, one after the other; half of them close their connection, the others leave."""
    for number in range(times):
        if number % 2:
            region = aiouffd.Region(MIB)
            with aiouffd.Monitor(region, engine=aiouffd.ServedBy(path)):
                assert region[5 * PAGE] == 6
        else:
            play(comes_and_ends, path)


def comes_and_ends(path: str) -> None:
    """Scenario: hand over, touch, and end."""
    region, _connection, _uffd = hand_over(path)
    assert region[7 * PAGE] == 8


def test_clients_that_come_and_go_leave_nothing_behind(image: Path, tmp_path: Path) -> None:
    """Neither descriptors nor memory, in the listener as in the pager; also where each is the only one."""
    with Serve(tmp_path, image) as serve:
        play(come_and_go, str(serve.path), 4)
        eventually(lambda: serve.said.count("; 0 left"), 4)
        before = descriptors(serve)
        play(come_and_go, str(serve.path), 40, deadline=60)
        eventually(lambda: serve.said.count("; 0 left"), 44)
        eventually(lambda: descriptors(serve) <= before, expected=True)


def many_regions(path: str) -> None:
    """Scenario: a handoff of as many regions as there may be, which is more than a packet to the pager holds."""
    count = firecracker.MOST_REGIONS
    region = aiouffd.Region(2 * count * PAGE)
    uffd = aiouffd.Userfaultfd(aiouffd.Feature.EVENT_REMOVE)
    uffd.register(region.address, region.mapped_length, aiouffd.RegisterMode.MISSING)
    pages = [count - 1 - number for number in range(count)]
    mappings = [
        Mapping(region.address + 2 * n * PAGE, region.address + (2 * n + 1) * PAGE, page * PAGE)
        for n, page in enumerate(pages)
    ]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        data = firecracker.encode(mappings, PAGE)
        sent = socket.send_fds(connection, [data], [uffd.fileno()])
        connection.sendall(data[sent:])
        for number, page in enumerate(pages):
            assert region[2 * number * PAGE] == (page + 1) & 255


def test_as_many_regions_as_there_may_be(image: Path, tmp_path: Path) -> None:
    """They are served, each page right; and there is room for the next client."""
    with Serve(tmp_path, image, "--readahead", "0") as serve:
        play(many_regions, str(serve.path))
        play(client, str(serve.path), MIB)


def slow_ones(path: str) -> None:
    """Scenario: a crowd that sends no handoff, or half of one, and keeps its connections open; and a good client."""
    silent = []
    for number in range(300):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        if number % 2:
            connection.send(b'[{"base_host')
        silent.append(connection)
    began = time.monotonic()
    client(path, MIB)
    assert time.monotonic() - began < 5


def test_slow_senders_hold_up_nobody(image: Path, tmp_path: Path) -> None:
    """However many they are, and however long they may take: the slowest are turned away, the good one is served."""
    with Serve(tmp_path, image, "--handoff-timeout", "60") as serve:
        play(slow_ones, str(serve.path))
        assert "was slow with its handoff, while many others came" in serve.said


def greedy(path: str) -> None:
    """Scenario: one of our own clients asks for more than there can be, thousands of times, and reads no answer."""
    region = aiouffd.Region(MIB)
    uffd = aiouffd.Userfaultfd(aiouffd.Feature.EVENT_REMOVE)
    uffd.register(region.address, region.mapped_length, aiouffd.RegisterMode.MISSING)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        mapping = Mapping(region.address, region.address + MIB, 0)
        extra = {"version": 1, "name": ""}
        socket.send_fds(connection, [firecracker.encode([mapping], PAGE, extra)], [uffd.fileno()])
        assert b'"ok"' in connection.recv(4096)
        connection.settimeout(2.0)
        request = b'{"id": 1, "op": "prefetch", "offset": 0, "length": 144115188075855872}\n'
        statistics = b'{"id": 2, "op": "statistics"}\n'
        with contextlib.suppress(TimeoutError):  # it is not read from any more
            for _ in range(20_000):
                connection.sendall(request + statistics)
        play(client, path, MIB)


def test_a_greedy_client(image: Path, tmp_path: Path) -> None:
    """What it asks for is bounded by what it has; it costs the others nothing, and is forgotten when it has gone."""
    with Serve(tmp_path, image) as serve:
        play(client, str(serve.path), MIB)
        before = descriptors(serve)
        play(greedy, str(serve.path), deadline=60)
        eventually(lambda: descriptors(serve) <= before, expected=True)
        used = processor(serve)
        eventually(lambda: processor(serve) - used < 5, expected=True)
        play(client, str(serve.path), MIB)
        assert "Traceback" not in serve.said
        memory = int(Path(f"/proc/{serve.process.pid}/statm").read_text().split()[1]) * PAGE
        assert memory < 100 * MIB


def processor(serve: Serve) -> int:
    """Return the processor time of the worker, in hundredths of a second."""
    return sum(map(int, Path(f"/proc/{serve.worker}/stat").read_text().rpartition(")")[2].split()[11:13]))


def crowd(path: str, count: int) -> None:
    """Scenario: many at once."""
    held = [hand_over(path, PAGE) for _ in range(count)]
    assert all(region[0] == 1 for region, _, _ in held)


def test_more_clients_than_the_soft_limit_of_descriptors(image: Path, tmp_path: Path) -> None:
    """The limit is raised as far as it may be: a client takes some descriptors of the listener."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        serve = Serve(tmp_path, image)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with serve:
        play(crowd, str(serve.path), 200)


def killed_again_and_again(path: str, log: str) -> None:
    """Scenario: no worker lives to serve a single page."""
    region, _connection, _uffd = hand_over(path)
    assert region[0] == 1
    for deaths in range(1, 6):
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker_of(log), signal.SIGKILL)
        eventually(functools.partial(times_said, log, "died (signal"), deaths)


def times_said(log: str, text: str) -> int:
    """Return how often a log has it."""
    return Path(log).read_text().count(text)


def worker_of(log: str) -> int:
    """Return the pid of the worker that is there now; wait for it."""
    keeper = int(Path(log).read_text().split("pager ", 1)[1].split('"', 1)[0])
    children = Path(f"/proc/{keeper}/task/{keeper}/children")
    eventually(lambda: bool(children.read_text().split()), expected=True)
    return int(children.read_text().split()[0])


def test_a_server_whose_pager_is_given_up_ends(image: Path, tmp_path: Path) -> None:
    """It could serve nobody any more: it says so, and its service manager starts another one."""
    with Serve(tmp_path, image, "--readahead", "0") as serve:
        play(killed_again_and_again, str(serve.path), str(serve.log), deadline=60)
        assert serve.process.wait(20) == 1
        assert "workers died with no fault resolved between them" in serve.said
        assert "Traceback" not in serve.said
        assert not serve.path.exists()


def takes_the_flag_away(path: str, log: str) -> None:
    """Scenario: clears O_NONBLOCK of its descriptor again and again, while another one is served."""
    region, _connection, uffd = hand_over(path, 16 * MIB)
    assert region[0] == 1
    os.set_blocking(uffd.fileno(), True)
    toucher = threading.Thread(target=touch_behind_a_blocking_descriptor, args=(region, uffd), daemon=True)
    toucher.start()
    play(client, path, MIB, deadline=20)
    eventually(lambda: "O_NONBLOCK was taken from it" in Path(log).read_text(), expected=True)


def touch_behind_a_blocking_descriptor(region: aiouffd.Region, uffd: aiouffd.Userfaultfd) -> None:
    """Touch page by page, for seconds; each time the flag has been cleared."""
    touch = ctypes.CDLL(None).memchr  # without the GIL: in the end nobody brings the page
    for page in range(16 * MIB // PAGE):
        os.set_blocking(uffd.fileno(), True)
        touch(ctypes.c_void_p(region.address + page * PAGE), 0, ctypes.c_size_t(1))
        time.sleep(0.002)


def test_a_descriptor_that_is_made_blocking(image: Path, tmp_path: Path) -> None:
    """Whoever shares the open file can clear O_NONBLOCK: it is given up after a while, and costs the others nothing."""
    with Serve(tmp_path, image, "--readahead", "0") as serve:
        play(takes_the_flag_away, str(serve.path), str(serve.log), deadline=30)
        assert "is replaced" not in serve.said
        assert "has not turned" not in serve.said


def connect_as_nobody(path: str) -> None:
    """Scenario."""
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        assert connection.recv(1) == b""


def test_the_socket_is_its_users_own(image: Path, tmp_path: Path) -> None:
    """Mode 0600 unless asked otherwise; another user is turned away by the kernel, or by the peer's uid."""
    with Serve(tmp_path, image) as serve:
        assert serve.path.stat().st_mode & 0o777 == 0o600
    open_to_all = Path(tempfile.mkdtemp())
    open_to_all.chmod(0o755)
    with Serve(open_to_all, image, "--mode", "666") as serve:
        assert serve.path.stat().st_mode & 0o777 == 0o666
        play(connect_as_nobody, str(serve.path))
        assert "of user 65534: may not use this server" in serve.said
    shutil.rmtree(open_to_all)


def test_a_socket_that_is_taken(image: Path, tmp_path: Path) -> None:
    """A second server is refused; a socket that a killed one has left is replaced; another file is not."""
    with Serve(tmp_path, image) as first:
        (tmp_path / "x").mkdir()
        second = subprocess.run(
            [sys.executable, "-m", "aiouffd", "serve", str(image), "--socket", str(first.path)],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
        assert second.returncode == 1
        assert "Address already in use" in second.stderr
        first.process.kill()
        first.process.wait()
        assert first.path.exists()
    with Serve(tmp_path, image) as third:
        assert third.end() == 0
    third.path.write_text("precious")
    fourth = Serve(tmp_path, image, wait=False)
    assert fourth.process.wait(20) == 1
    assert third.path.read_text() == "precious"


NONSENSE = st.one_of(
    st.binary(min_size=1, max_size=300),
    st.sampled_from([b"[", b"[]", b"[{}]", b'[{"size": 18446744073709551616}]', b"]" * 100]),
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "base_host_virt_addr": st.sampled_from([0, 1, PAGE, 2**47, 2**64 - PAGE, 2**64]),
                "size": st.sampled_from([0, 1, PAGE, MIB, 2**63, 2**64]),
                "offset": st.sampled_from([0, 1, PAGE, 2**63]),
                "page_size": st.sampled_from([0, 1, PAGE, HUGE, 2**64]),
                "aiouffd": st.sampled_from([None, {}, {"version": 1, "name": []}, {"version": 7}, 3]),
            },
        ),
        max_size=3,
    ).map(lambda items: json.dumps(items).encode()),
)
WITH = st.sampled_from(["nothing", "pipe", "memfd", "uffd", "two"])
AFTER = st.sampled_from(["close", "wait", "line", "garbage"])


def bombard(path: str, examples: int, number: int) -> None:
    """Scenario: a process that sends malformed handoffs, and among them some that are good by chance."""
    uffds = [aiouffd.Userfaultfd() for _ in range(2)]
    one, two = (uffd.fileno() for uffd in uffds)
    beside = {
        "nothing": [],
        "pipe": [*os.pipe()],
        "memfd": [os.memfd_create("x")],
        "uffd": [one],
        "two": [one, two],
    }

    @seed(number)
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(NONSENSE, WITH, AFTER)
    def sent(data: bytes, kind: str, after: str) -> None:
        fds = array.array("i", beside[kind])
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(0.2)  # one that is good by chance is served, in silence
            connection.connect(path)
            with contextlib.suppress(ConnectionError, TimeoutError):
                connection.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else [])
                if after == "line":
                    connection.sendall(b'{"id": 1, "op": "prefetch", "offset": 0, "length": 18446744073709551616}\n')
                elif after == "garbage":
                    connection.sendall(b"\0" * 100_000)
                if after != "close":
                    while connection.recv(4096):
                        pass

    sent()


_SENDERS = 4


def survives(image: Path, directory: Path, examples: int) -> None:
    """Have a server be sent so many malformed handoffs; then be served by it."""
    with Serve(directory, image, "--handoff-timeout", "0.05", "--readahead", "0") as serve:
        play(client, str(serve.path), MIB)
        before = descriptors(serve)
        # From several processes: most of the time goes by waiting for the server to be tired of half a handoff.
        with ThreadPoolExecutor() as pool:
            share, deadline = examples // _SENDERS, 30 + examples / 50
            done = [
                pool.submit(play, bombard, str(serve.path), share, number, deadline=deadline)
                for number in range(_SENDERS)
            ]
            for each in done:
                each.result()
        eventually(lambda: descriptors(serve), before, 20.0)
        rss = int(Path(f"/proc/{serve.process.pid}/statm").read_text().split()[1]) * PAGE
        assert rss < 200 * MIB
        play(client, str(serve.path), MIB)
        assert serve.process.poll() is None
        assert "Traceback" not in serve.said
        assert "is replaced" not in serve.said


def test_malformed_handoffs(image: Path, tmp_path: Path) -> None:
    """5,000 of them, with the wrong descriptors and what not: the server still serves, and leaks nothing."""
    survives(image, tmp_path, 5000)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_malformed_handoffs_for_long(image: Path, tmp_path: Path) -> None:
    """100,000 of them."""
    survives(image, tmp_path, 100_000)


# Around it


def test_metrics(image: Path, tmp_path: Path) -> None:
    """What Prometheus reads is what happened."""
    port = free_port()
    with Serve(tmp_path, image, "--readahead", "0", "--metrics", port) as serve:
        play(client, str(serve.path), MIB)
        os.kill(serve.worker, signal.SIGKILL)
        eventually(lambda: "is replaced" in serve.said, expected=True)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}
        assert found['aiouffd_pages_total{cause="prefetch"}'] == 256
        assert found['aiouffd_events_total{event="remove"}'] == 1
        assert found["aiouffd_worker_restarts_total"] == 1
        assert found["aiouffd_clients"] == 0
        assert found["aiouffd_faults_total"] >= 16
        assert found["aiouffd_fetched_bytes_total"] >= MIB
        causes = ("fault", "readahead", "prefetch", "replay", "background")
        wanted = {f'aiouffd_pages_total{{cause="{cause}"}}' for cause in causes}
        wanted |= {
            f'aiouffd_answers_total{{answer="{answer}"}}' for answer in ("eagain", "eexist", "enoent", "partial")
        }
        wanted |= {"aiouffd_in_flight", "aiouffd_in_flight_bytes", "aiouffd_rejected_clients_total"}
        wanted |= {"aiouffd_source_retries_total", "aiouffd_source_errors_total", "aiouffd_fault_latency_seconds_sum"}
        assert wanted <= set(found)
        assert found['aiouffd_fault_latency_seconds_bucket{le="+Inf"}'] == found["aiouffd_fault_latency_seconds_count"]


def test_logs(image: Path, tmp_path: Path) -> None:
    """Each line is one record of key=value, the pager's too; on a terminal they are for people, beside a status."""
    with Serve(tmp_path, image) as serve:
        os.kill(serve.worker, signal.SIGKILL)
        eventually(lambda: "is replaced" in serve.said, expected=True)
        pattern = r'time=[0-9T:.-]+ level=[a-z]+ logger=[a-z_.]+ msg=".*"'
        assert all(re.fullmatch(pattern, line) for line in serve.said.splitlines()), serve.said
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "aiouffd", "serve", str(image), "--socket", str(tmp_path / "s")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    with subprocess.Popen(command, stdin=theirs, stderr=theirs, stdout=theirs, env=environment) as process:
        os.close(theirs)
        said = ""
        while "0 clients" not in said:
            said += os.read(ours, 4096).decode()
        process.terminate()
        with contextlib.suppress(OSError):  # the terminal's other end is closed
            while data := os.read(ours, 4096):
                said += data.decode()
        os.close(ours)
    assert process.returncode == 0
    assert "listening on" in said
    assert "INFO:aiouffd" not in said
    assert "level=" not in said


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing")
def test_the_unit(tmp_path: Path) -> None:
    """The example's units are what systemd understands, and their command line is what `aiouffd serve` does."""
    for kind in ("service", "socket"):
        text = (ROOT / "examples" / "systemd" / f"aiouffd.{kind}").read_text()
        (tmp_path / f"aiouffd.{kind}").write_text(text.replace("/opt/aiouffd/bin/aiouffd", "/bin/true"))
    units = [str(tmp_path / f"aiouffd.{kind}") for kind in ("service", "socket")]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    command = re.search(r"^ExecStart=\S+ (.*)$", (ROOT / "examples/systemd/aiouffd.service").read_text(), re.MULTILINE)
    assert command is not None
    done = subprocess.run(
        [sys.executable, "-m", "aiouffd", *command[1].split()], capture_output=True, text=True, timeout=60, check=False
    )
    assert "--socket PATH says where to listen" in done.stderr  # all of it was understood


@pytest.mark.parametrize("kind", ["two", "internet", "datagram"])
def test_sockets_that_are_not_for_us(image: Path, tmp_path: Path, kind: str) -> None:
    """A socket unit that passes what cannot be served is told so."""
    family, style = {
        "internet": (socket.AF_INET, socket.SOCK_STREAM),
        "datagram": (socket.AF_UNIX, socket.SOCK_DGRAM),
    }.get(kind, (socket.AF_UNIX, socket.SOCK_STREAM))
    with socket.socket(family, style) as given:
        given.bind(("127.0.0.1", 0) if kind == "internet" else str(tmp_path / "s"))
        if kind != "datagram":
            given.listen()
        code = (
            "import os, sys; os.environ['LISTEN_PID'] = str(os.getpid()); os.dup2(int(sys.argv[1]), 3);"
            " from aiouffd.cli import main; sys.exit(main(sys.argv[2:]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(given.fileno()), "serve", str(image)],
            pass_fds=[given.fileno()],
            env={**os.environ, "LISTEN_FDS": "2" if kind == "two" else "1"},
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    assert done.returncode == 1
    assert "exactly one ListenStream=" in done.stderr


def test_socket_activation(image: Path, tmp_path: Path) -> None:
    """As systemd does it: the socket is descriptor 3, and readiness is told."""
    path = tmp_path / "given.sock"
    with (
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified,
    ):
        listener.bind(str(path))
        listener.listen()
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(20)
        code = (
            "import os, sys; os.environ['LISTEN_PID'] = str(os.getpid()); os.dup2(int(sys.argv[1]), 3);"
            " from aiouffd.cli import main; sys.exit(main(sys.argv[2:]))"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(listener.fileno()), "serve", str(image)],
            pass_fds=[listener.fileno()],
            env={**os.environ, "LISTEN_FDS": "1", "NOTIFY_SOCKET": str(tmp_path / "notify")},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert notified.recv(100) == b"READY=1"
            play(client, str(path), MIB)
            process.terminate()
            assert notified.recv(100) == b"STOPPING=1"
            assert process.wait(10) == 0
        finally:
            process.kill()
            process.communicate()


def test_wrong_options(image: Path, tmp_path: Path) -> None:
    """Each says what to do, and nothing is left running."""
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    empty = tmp_path / "empty"
    empty.touch()
    for arguments, words in (
        ([str(image)], "--socket PATH says where to listen"),
        ([], "either SOURCE or --source-for"),
        ([str(image), "--source-for", "x"], "either SOURCE or --source-for"),
        ([str(tmp_path / "none"), "--socket", "s"], "No such file"),
        ([str(image), "--socket", "s", "--record", "r", "--replay", "r"], "either --record or --replay"),
        ([str(image), "--socket", "s", "--replay", str(image)], "no recording"),
        ([str(image), "--socket", "s", "--mode", "888"], "is not a file mode"),
        ([str(image), "--socket", "s", "--metrics", "x"], "is not an address"),
        ([str(image), "--socket", str(tmp_path / "no" / "s")], "No such file or directory"),
        ([str(image), "--socket", str(tmp_path)], "is in the way: it is no socket"),
        ([str(image), "--socket", str(tmp_path / ("x" * 200))], "File name too long"),
        ([str(image), "--socket", "s", "--record", str(tmp_path / "no" / "r")], "No such file or directory"),
        ([str(image), "--socket", "s", "--bytes-in-flight", "0"], "is too little"),
        ([str(image), "--socket", "s", "--metrics", str(port)], f"--metrics 127.0.0.1:{port}: Address already in use"),
        ([str(image), "--socket", "s", "--timeout", "nan"], "is not a number of seconds"),
        (["--source-for", "{", "--socket", "s"], "write for example"),
        (["--source-for", "{}", "--socket", "s"], "knows name, number, pid, uid, not nothing"),
        (["--source-for", "/fixed", "--socket", "s"], "that is SOURCE"),
        (["--source-for", "/{number:5d}", "--socket", "s"], "fields take no format"),
        ([str(empty), "--socket", "s"], "has no bytes"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "aiouffd", "serve", *arguments],
            capture_output=True, text=True, timeout=20, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode in (1, 2), arguments
        assert words in done.stderr, (arguments, done.stderr)
        assert "Traceback" not in done.stderr
    taken.close()
    assert not (tmp_path / "s").exists()
