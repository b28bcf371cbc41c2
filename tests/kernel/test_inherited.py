"""`pager.process.inherited`: what a pager inherits from its application, and what it does with it."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import resource
import signal
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from pattern import PAGE, Pattern, content, peek, word
from processes import KNOWN
from scenario import TESTS, eventually, play

import aiouffd
from aiouffd.pager.client.interpreter import SWITCH
from aiouffd.server.server import Server

SIZE = 1 << 20
FOR_THE_APPLICATION = [
    *("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGTSTP"),
    *("SIGTTIN", "SIGTTOU", "SIGIO", "SIGPWR", "SIGXCPU", "SIGPIPE", "SIGSTKFLT"),
]


def children(pid: int) -> list[int]:
    """Return all that a process has started, and what those have started."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            direct = [int(name) for name in path.read_text().split()]
        except OSError:
            continue
        found += [each for child in direct for each in (child, *children(child))]
    return found


def serve_all(region: aiouffd.Region, begin: int = 0) -> None:
    """Touch all pages."""
    for page in range(begin, SIZE // PAGE):
        assert peek(region.address + page * PAGE) == word(page)


def signaled_from_the_start(name: str) -> None:
    """Scenario: each process of the pager is sent a signal all the time, from the moment that it exists."""
    number = signal.Signals[name]
    seen: set[int] = set()
    done = threading.Event()

    def send() -> None:
        while not done.is_set():
            for pid in children(os.getpid()):
                seen.add(pid)
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue

    thread = threading.Thread(target=send)
    thread.start()
    try:
        region = aiouffd.Region(SIZE)
        with aiouffd.Monitor(region, Pattern(SIZE), readahead=0) as monitor:
            serve_all(region)
            eventually(lambda: seen, expected=set(monitor.pids))  # the thread that sends may have had no turn yet
            assert monitor.statistics().restarts == 0
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("name", FOR_THE_APPLICATION)
def test_signals_to_the_whole_group_do_not_end_a_pager(name: str) -> None:
    """Not when it serves, and not when it starts."""
    play(signaled_from_the_start, name)


def dispositions(of: int) -> dict[str, int]:
    """Return the signal masks of a process, as /proc tells them, of the signals that programs know of."""
    lines = (line.split() for line in Path(f"/proc/{of}/status").read_text().splitlines())
    return {words[0]: int(words[1], 16) & KNOWN for words in lines if words[0] in ("SigBlk:", "SigIgn:", "SigCgt:")}


def ignored_and_blocked(killed: bool) -> None:
    """Scenario: the application ignores and blocks whatever it can."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        try:
            signal.signal(number, signal.SIG_IGN)
        except OSError:
            continue
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Pattern(SIZE), readahead=0) as monitor:
        assert peek(region.address) == word(0)
        keeper, worker = monitor.pids
        for pid in (keeper, worker):
            found = dispositions(pid)
            assert found["SigBlk:"] == 0
            assert not found["SigIgn:"] & ~(1 << signal.SIGPIPE - 1)
            assert not found["SigCgt:"] & 1 << signal.SIGCHLD - 1
        if killed:
            os.kill(worker, signal.SIGKILL)
        serve_all(region, 1)
        assert monitor.pids[0] == keeper
        assert monitor.statistics().restarts == killed


@pytest.mark.parametrize("killed", [False, True])
def test_ignored_and_blocked_signals_are_reset(killed: bool) -> None:
    """With SIGCHLD ignored, a keeper could not wait for its worker."""
    play(ignored_and_blocked, killed)


def closed_descriptors(which: list[int]) -> None:
    """Scenario."""
    for fd in which:
        os.close(fd)
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Pattern(SIZE), readahead=0) as monitor:
        serve_all(region)
        for pid in monitor.pids:
            assert all(Path(f"/proc/{pid}/fd/{fd}").readlink() == Path(os.devnull) for fd in which)
        os.kill(monitor.pids[1], signal.SIGKILL)
        region.madvise(4)  # MADV_DONTNEED: the next touch is served by the successor
        assert peek(region.address) == bytes(8)


@pytest.mark.parametrize("which", [[0], [1], [2], [0, 1], [1, 2], [0, 1, 2]])
def test_closed_standard_descriptors(which: list[int]) -> None:
    """No other descriptor gets their numbers, and what is written there is no error."""
    play(closed_descriptors, which)


class Failing:
    """Fails at each odd page."""

    size = SIZE

    async def read(self, offset: int, length: int) -> Any:
        """Return the bytes, or fail."""
        if offset // PAGE % 2:
            raise ValueError("x" * 3000)
        return content(offset, length)


def full_standard_error() -> None:
    """Scenario: nobody reads the pipe that the pager logs to."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, b"x" * PAGE)
    except BlockingIOError:
        os.set_blocking(write, True)
    own = os.dup(2)
    os.dup2(write, 2)
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Failing(), readahead=0, retries=0, on_exit="zeros") as monitor:
        os.dup2(own, 2)
        file = os.memfd_create("copy")

        def fail(page: int) -> None:
            with pytest.raises(OSError, match="Bad address"):  # a system call that touches a poisoned page
                os.pwrite(file, memoryview(region)[page * PAGE : (page + 1) * PAGE], 0)

        for page in range(1, 32, 2):
            fail(page)
            assert peek(region.address + (page + 1) * PAGE) == word(page + 1)
        assert monitor.statistics().restarts == 0
        os.read(read, 1 << 16)
        fail(33)
        monitor.prefetch_sync(0, PAGE, 10.0)
        assert b"messages were lost" in os.read(read, 1 << 16)


def test_standard_error_that_nobody_reads() -> None:
    """The loop does not wait for it; how much was lost is said when there is room again."""
    play(full_standard_error)


def odd_surroundings(directory: str) -> None:
    """Scenario: the working directory is gone, and limits and environment are hostile."""
    os.chdir(directory)
    os.rmdir(directory)  # noqa: PTH106 - a literal came along
    os.environ |= {"PYTHONWARNINGS": "error", "PYTHONINSPECT": "1", "PYTHONASYNCIODEBUG": "1", "PYTHONUTF8": "0"}
    os.environ |= {"LANG": "C", "LC_ALL": "C", "TMPDIR": "/nowhere", "HOME": "/nowhere"}
    os.umask(0o777)
    for what, soft in ((resource.RLIMIT_FSIZE, 1 << 20), (resource.RLIMIT_NOFILE, 64)):
        resource.setrlimit(what, (soft, resource.getrlimit(what)[1]))
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Pattern(SIZE), readahead=0) as monitor:
        serve_all(region)
        assert resource.prlimit(monitor.pids[1], resource.RLIMIT_FSIZE) == (resource.RLIM_INFINITY,) * 2
        soft, most = resource.prlimit(monitor.pids[1], resource.RLIMIT_NOFILE)
        assert soft == most > 64


def test_surroundings_that_are_odd(tmp_path: Path) -> None:
    """A pager starts and serves all the same."""
    directory = tmp_path / "gone"
    directory.mkdir()
    play(odd_surroundings, str(directory))


# What is refused


def start(match: str) -> None:
    """Enter a Monitor, which must fail within seconds with an error that says why."""
    region = aiouffd.Region(SIZE)
    data = aiouffd.BufferSource(bytes(SIZE))
    data.travel()  # a memfd, before there can be none
    yield_to_limits()
    began = time.monotonic()
    with pytest.raises(aiouffd.PagerStartError, match=match), aiouffd.Monitor(region, data):
        pass
    assert time.monotonic() - began < 20  # a bound, not a measure
    assert not children(os.getpid())


def yield_to_limits() -> None:
    """Set the limits that the scenario is about."""
    limits = {"nofile": (resource.RLIMIT_NOFILE, 12), "fsize": (resource.RLIMIT_FSIZE, 1 << 20)}
    what = os.environ.get("LIMIT", "")
    if what in limits:
        resource.setrlimit(limits[what][0], (limits[what][1],) * 2)
    elif what.isdigit():
        deny(int(what))


def deny(number: int, error: int = errno.EPERM) -> None:
    """Install a seccomp filter that refuses one system call."""
    code = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | error), (0x06, 0, 0, 0x7FFF0000)]
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *item) for item in code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code), ctypes.addressof(instructions)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, program, 0, 0) == 0  # PR_SET_SECCOMP


@pytest.mark.parametrize(
    ("limit", "match"),
    [
        ("nofile", "RLIMIT_NOFILE"),
        ("fsize", "RLIMIT_FSIZE"),
        pytest.param("434", "pidfd_open.*seccomp", id="pidfd_open"),
        pytest.param("319", "memfd|travel.*seccomp", id="memfd_create"),
    ],
)
def test_what_a_pager_needs_and_is_refused(limit: str, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the limit, or the call and who may have forbidden it; no process is left."""
    if limit == "319" and os.uname().machine != "x86_64":
        pytest.skip("the number of memfd_create is the architecture's")
    monkeypatch.setenv("LIMIT", limit)
    play(start, match)


def without_preadv2(error: int, native: str) -> None:
    """Scenario: a seccomp filter refuses preadv2(2)."""
    os.environ["AIOUFFD_NATIVE"] = native
    deny({"x86_64": 327, "aarch64": 286}[os.uname().machine], error)
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Pattern(SIZE), readahead=0):
        serve_all(region)


@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS])
def test_messages_are_read_where_preadv2_is_refused(error: int, native: str) -> None:
    """By readv(2), in both readers."""
    play(without_preadv2, error, native)


NO_FORK = f"""#!{sys.executable}
import os, runpy, sys
sys.path.insert(0, {str(TESTS.parent)!r})
from aiouffd.pager.process import keeper
def refuse(_):
    raise BlockingIOError(11, "Resource temporarily unavailable")
keeper.clone = refuse
sys.argv = sys.argv[sys.argv.index("aiouffd.pager") :]
from aiouffd.pager import __main__
sys.exit(__main__.main())
"""


async def start_server(directory: str) -> None:
    """Scenario: a server whose pager is to have a holder."""
    with pytest.raises(aiouffd.PagerStartError, match=r"no holder could be started.*pids\.max"):
        async with Server(Pattern(SIZE), f"{directory}/socket", hold=f"{directory}/hold") as server:
            await server.wait_dead()


def test_no_process_can_be_started_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pids.max: where nothing has been served yet, nothing is tried for ever."""
    wrapper = tmp_path / "python"
    wrapper.write_text(NO_FORK)
    wrapper.chmod(0o755)
    monkeypatch.setenv(SWITCH, str(wrapper))
    play(start, "no worker could be started.*pids.max")
    play(start_server, str(tmp_path))


def without_proc() -> None:
    """Scenario: /proc is empty."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x20000) == 0  # CLONE_NEWNS
    assert libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None) == 0
    assert libc.mount(b"none", b"/proc", b"tmpfs", 0, None) == 0
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Pattern(SIZE), readahead=0) as monitor:
        assert peek(region.address) == word(0)
        os.kill(monitor.pids[1], signal.SIGKILL)
        serve_all(region, 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_machine_without_proc() -> None:
    """A pager serves, and survives its worker."""
    play(without_proc)


def the_journal_in_core_dumps() -> None:
    """Scenario."""
    region = aiouffd.Region(SIZE)
    with aiouffd.Monitor(region, Pattern(SIZE), readahead=0) as monitor:
        assert peek(region.address) == word(0)
        for pid in (os.getpid(), *monitor.pids):
            pairs = itertools.pairwise(Path(f"/proc/{pid}/smaps").read_text().split("VmFlags:"))
            flags = [after for before, after in pairs if "aiouffd-journal" in before[-2000:]]
            assert flags
            assert all(" dd " in after.splitlines()[0] + " " for after in flags)


def test_a_core_dump_has_no_journal() -> None:
    """It is 129 MiB, mostly holes, which a core dump would write out."""
    play(the_journal_in_core_dumps)
