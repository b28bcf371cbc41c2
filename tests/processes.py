"""Processes that a test starts: what they inherit, and that nothing is left of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import signal
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 60.0
"""Seconds after which what is waited for will not come."""
KEPT: set[int] = set()
"""Processes that stay from one test to the next."""
PR_SET_CHILD_SUBREAPER = 36
_NAP = 0.005
KNOWN = sum(1 << (number - 1) for number in signal.valid_signals())
"""Mask of the signals that programs know of. glibc's posix_spawn, which subprocess uses since Python 3.13, has children
ignore the other two, which are glibc's own."""
INTERPRETERS_OWN = {signal.SIGPIPE, signal.SIGXFSZ}
"""Python ignores them, and subprocess gives children their default."""


def unmeasured() -> dict[str, str]:
    """Return this process's environment without what has coverage measure a Python process from its start."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}


def forked(function: Callable[..., Any], *arguments: Any) -> int:
    """Call a function in a forked child; return its pid.

    It ends with 0, unless the function returns False or raises, which it says.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = int(function(*arguments) is False)
        except BaseException:  # noqa: BLE001 - what would go up is the parent's block
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def descendants(pid: int) -> set[int]:
    """Return the processes below one; those that have ended, but have not been waited for, are among them."""
    found: set[int] = set()
    fresh = {pid}
    while fresh:
        children: set[int] = set()
        for parent in fresh:
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{parent}/task").iterdir():
                    children |= set(map(int, (task / "children").read_text().split()))
        fresh = children - found
        found |= fresh
    return found


def has_ended(pid: int) -> bool:
    """Tell whether a process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def ended(pid: int, seconds: float = PATIENCE) -> bool:
    """Wait until a process has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if has_ended(pid):
            return True
        time.sleep(0.005)
    return False


def kill(pid: int) -> bool:
    """Kill -9; tell whether it was there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def crash(pid: int) -> None:
    """Have a process crash, as by a defect of its own: SIGSEGV, without a core dump."""
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
        os.kill(pid, signal.SIGSEGV)


def reaped(pid: int) -> bool:
    """Take a zombie away that may have been adopted; tell whether its pid is free."""
    with contextlib.suppress(ChildProcessError):  # another's child, or waited for already
        os.waitpid(pid, os.WNOHANG)
    return not Path(f"/proc/{pid}").exists()


def adopt_orphans(adopt: bool = True) -> None:  # noqa: FBT002 - says what it does
    """Become the parent of descendants whose parent ends, so that none escapes `descendants`; or leave them to init."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


def default_dispositions() -> None:
    """Give programs that are started from here the default disposition of each signal, and none blocked.

    What this process ignores it ignores on: a handler that does nothing is reset by execve, SIG_IGN is inherited.
    A shell without job control starts background jobs with SIGINT ignored; nohup ignores SIGHUP.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
    for number in signal.valid_signals() - INTERPRETERS_OWN:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def end_all(before: set[int], patience: float) -> set[int]:
    """Kill the descendants of this process that were not there before; return those that had not ended by themselves.

    Args:
        before: processes that are somebody else's.
        patience: seconds that they have for ending. A machine that is busy, or stands still, gives them more: what is
            counted are this process's own naps.
    """
    naps = round(patience / _NAP)
    while (left := _running(before)) and naps > 0:
        time.sleep(_NAP)
        naps -= 1
    killed = left
    while left:  # what is killed may have started another one just before
        for pid in left:
            kill(pid)
        left = {pid for pid in _running(before) if not ended(pid)}
    return killed


def _running(before: set[int]) -> set[int]:
    """Return the new descendants that run, and take away those that have ended."""
    fresh = descendants(os.getpid()) - before - KEPT
    running = {pid for pid in fresh if not has_ended(pid)}
    for pid in fresh - running:
        reaped(pid)
    return running


def command_line(pid: int) -> str:
    """Return what a process runs, for a message."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def slice_of(thread: int) -> int | None:
    """Return for how many nanoseconds a thread wants to run at once; None: the kernel does not tell, or is too old."""
    try:
        lines = Path(f"/proc/{thread}/sched").read_text().splitlines()
    except FileNotFoundError:
        return None
    found = [int(line.split()[-1]) for line in lines if line.startswith("se.slice")]
    release = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))
    return found[0] if found and release >= (6, 12) else None
