"""Runs a function of a test module in a child process with a deadline: faults are never taken in pytest's own.

A scenario that hangs is killed and fails with the traceback that faulthandler wrote of it; one that dies of a signal
fails with that signal, unless it is what the test expects.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from processes import PATIENCE, ended

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aiouffd import Monitor
    from aiouffd.server.server import Server

__all__ = [
    "ended",
    "eventually",
    "killed_when_this_thread_waits",
    "next_error",
    "open_descriptors",
    "play",
    "replaced",
    "until",
]

HANG = 100.0 if "COVERAGE_PROCESS_START" not in os.environ else 300.0  # each line costs more when it is measured
"""Seconds behind which a scenario hangs. It is no promise of the package: a machine may be as busy as it likes."""

TESTS = Path(__file__).parent


def play(
    function: Callable[..., Any],
    *arguments: Any,
    deadline: float = HANG,
    status: int = 0,
    loop: str = "asyncio",
    measured: bool = True,
) -> tuple[str, str]:
    """Call `function(*arguments)` (literals only) in a fresh interpreter; return its output and its error output.

    Args:
        function: a function or a coroutine function at a test module's top level.
        *arguments: literals.
        deadline: seconds until it is killed.
        status: the exit status that is expected; negative: the signal.
        loop: the name of the loop that runs a coroutine function.
        measured: False keeps coverage out, whose lock a signal handler that touches missing memory would wait for.
    """
    environment = {name: value for name, value in os.environ.items() if measured or not name.startswith("COVERAGE")}
    path = Path(sys.modules[function.__module__].__file__ or "")
    call = textwrap.dedent(
        f"""
        import asyncio, faulthandler, inspect, sys
        faulthandler.enable()
        faulthandler.dump_traceback_later({deadline - 1}, exit=True)
        sys.path[:0] = [{str(TESTS)!r}, {str(path.parent)!r}]
        import {path.stem} as module
        result = module.{function.__name__}(*{arguments!r})
        if inspect.iscoroutine(result):
            import blocking
            with asyncio.Runner(loop_factory=blocking.loop_factories()[{loop!r}]) as runner:
                runner.run(result)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", call],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**environment, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    try:
        output, errors = process.communicate(timeout=deadline + 5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        raise AssertionError(f"{function.__name__} hung:\n{output}\n{errors}") from None
    if process.returncode != status:
        raise AssertionError(
            f"{function.__name__} ended with {process.returncode}, not {status}:\n{output}\n{errors[-6000:]}"
        )
    return output, errors


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
    return subprocess.Popen([sys.executable, "-c", _KILLER, *map(str, pids)])


def open_descriptors() -> int:
    """Return how many descriptors this process has open, without those of objects that nobody has any more."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))
