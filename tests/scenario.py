"""Runs a function of a test module in a child process with a deadline: faults are never taken in pytest's own.

A scenario that hangs is killed and fails with the traceback that faulthandler wrote of it; one that dies of a signal
fails with that signal, unless it is what the test expects.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import forkserver
from processes import PATIENCE, ended, unmeasured

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aiouffd import Monitor
    from aiouffd.server.server import Server

__all__ = [
    "brought",
    "ended",
    "eventually",
    "killed_when_this_thread_waits",
    "next_error",
    "open_descriptors",
    "play",
    "replaced",
    "until",
]

HANG = float(os.environ.get("AIOUFFD_TEST_DEADLINE", "300"))
"""Seconds behind which a scenario hangs. It is no promise of the package: a machine may be as busy as it likes, each
line costs more when it is measured, and an emulated processor is slow."""


TESTS = Path(__file__).parent


def play(
    function: Callable[..., Any],
    *arguments: Any,
    deadline: float = HANG,
    status: int = 0,
    loop: str = "asyncio",
    measured: bool = True,
    fresh: bool = False,
) -> tuple[str, str]:
    """Call `function(*arguments)` (literals only) in a child process; return its output and its error output.

    Args:
        function: a function or a coroutine function at a test module's top level.
        *arguments: literals.
        deadline: seconds until it is killed.
        status: the exit status that is expected; negative: the signal.
        loop: the name of the loop that runs a coroutine function.
        measured: False keeps coverage out, whose lock a signal handler that touches missing memory would wait for.
        fresh: True starts an interpreter, for what only its start can show: variables that Python reads itself.
    """
    __tracebackhide__ = True  # what failed is in the scenario
    path = Path(sys.modules[function.__module__].__file__ or "")
    request = {
        "directory": str(path.parent),
        "module": path.stem,
        "function": function.__name__,
        "arguments": repr(arguments),
        "deadline": deadline,
        "loop": loop,
        "environment": {**os.environ} if measured else unmeasured(),
        "cwd": str(Path.cwd()),
    }
    streams = os.pipe(), os.pipe()
    pid, wait = (_start if fresh else _fork_server().start)(request, *(writing for _, writing in streams))
    for _, writing in streams:
        os.close(writing)
    read: list[bytes] = [b"", b""]
    readers = [threading.Thread(target=_read, args=(streams[i][0], read, i)) for i in range(2)]
    for reader in readers:
        reader.start()
    end = time.monotonic() + deadline + 5
    for reader in readers:
        reader.join(end - time.monotonic())
    if hung := any(reader.is_alive() for reader in readers):
        os.killpg(pid, signal.SIGKILL)
    for reader in readers:
        reader.join()
    ended, output, errors = wait(), *(text.decode(errors="replace") for text in read)
    if hung or ended != status:
        how = "hung" if hung else f"ended with {ended}, not {status}"
        raise AssertionError(f"{function.__name__} {how}:\n{output}\n{errors[-6000:]}")
    return output, errors


def _read(descriptor: int, into: list[bytes], index: int) -> None:
    with open(descriptor, "rb") as file:
        into[index] = file.read()


def _start(request: forkserver.Request, output: int, errors: int) -> tuple[int, Callable[[], int]]:
    """Perform the request in a fresh interpreter; return its pid, and what waits for its end."""
    process = subprocess.Popen(
        [sys.executable, forkserver.__file__, json.dumps(request)],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
        start_new_session=True,
        env=request["environment"],
    )
    return process.pid, process.wait


@functools.cache
def _fork_server() -> forkserver.ForkServer:
    return forkserver.ForkServer()


def next_error(monitor: Monitor, seconds: float = PATIENCE) -> None:
    """Wait for the next error, and raise it: it is sent before the page is poisoned, but may arrive after."""
    asyncio.run(asyncio.wait_for(monitor.wait_error(), seconds))


def eventually(value: Callable[[], object], expected: object, seconds: float = PATIENCE) -> None:
    """Wait until `value()` is what is expected: counters are written after the toucher was let go."""
    end = time.monotonic() + seconds
    while (found := value()) != expected:
        assert time.monotonic() < end, f"{found!r} has not become {expected!r}"
        time.sleep(0.001)


def replaced(served: Monitor | Server, *pids: int) -> None:
    """Wait until none of these processes is the pager's any more, or it is given up."""
    client = served._pager if hasattr(served, "_pager") else getattr(served._engine, "_client", None)
    eventually(lambda: getattr(client, "_dead", None) is not None or not set(pids) & set(served.pids), expected=True)


def brought(monitor: Monitor, length: int) -> None:
    """Wait until so many bytes have come: pages are counted before they are copied."""
    eventually(lambda: sum(each.length for each in monitor.residency()) >= length, expected=True)


async def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds, and let the loop run meanwhile."""
    while not condition():  # noqa: ASYNC110 - shared memory makes no event
        await asyncio.sleep(0.001)


_KILLER = """
import os, sys, time
from pathlib import Path
waits = Path(f"/proc/{os.getppid()}/wchan")
while "userfault" not in waits.read_text():
    time.sleep(0.002)
for pid in sys.argv[1:]:
    os.kill(int(pid), 9)
"""


def killed_when_this_thread_waits(pids: Iterable[int]) -> subprocess.Popen[bytes]:
    """Have processes killed with -9 as soon as the main thread waits for a page; return who does it."""
    return subprocess.Popen([sys.executable, "-S", "-c", _KILLER, *map(str, pids)], env=unmeasured())


def open_descriptors() -> int:
    """Return how many descriptors this process has open, without those of objects that nobody has any more."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))
