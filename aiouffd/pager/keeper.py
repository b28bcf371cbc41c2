"""The keeper: forks the worker, and forks it again when it dies. It does nothing else, so that nothing can kill it.

It imports what the worker needs, so that a fork is ready in some milliseconds, and starts no thread, so that it can
fork at all. The worker is made with clone(CLONE_FILES): it shares the keeper's table of descriptors. The descriptor
of a forked child of the application arrives in the table of whoever reads the event, and must outlive him: if it
were closed, the child would read zeros.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import select
import signal
import sys
import time
from typing import TYPE_CHECKING, NoReturn

from aiouffd.engine.statistics import Counter
from aiouffd.errors import PagerDiedError, encode_error
from aiouffd.kernel.userfaultfd import Userfaultfd
from aiouffd.pager import control, worker

if TYPE_CHECKING:
    import socket

    from aiouffd.pager.journal import Journal

__all__ = ["run"]

log = logging.getLogger("aiouffd.keeper")

BLOCKED = 3.0
"""Seconds without a turn of the worker's loop, until that is reported."""
HOPELESS = 20.0
"""Seconds without a turn of the worker's loop, until the worker is killed, and so replaced."""
DEATHS = 5
"""So many deaths with no fault resolved between them are enough."""

_CLONE_FILES = 0x400
_CLONE_CHILD_CLEARTID = 0x200000
_CLONE_CHILD_SETTID = 0x1000000
_PR_GET_TID_ADDRESS = 40
_SYS_CLONE = {"x86_64": 56}.get(platform.machine(), 220)

_libc = ctypes.PyDLL(None)  # PyDLL: the GIL must be held across the clone
_python = ctypes.pythonapi


def _clone() -> int:
    """fork(2), but with the table of descriptors shared. The caller is single-threaded."""
    # glibc keeps the thread's id where set_tid_address points; its fork() has the kernel write the child's there.
    tid = ctypes.c_void_p()
    flags = _CLONE_FILES | signal.SIGCHLD
    if _libc.prctl(_PR_GET_TID_ADDRESS, ctypes.byref(tid), 0, 0, 0) == 0:
        flags |= _CLONE_CHILD_SETTID | _CLONE_CHILD_CLEARTID
    arguments: list[int | None] = [flags, None, None, tid.value, None]
    if platform.machine() != "x86_64":
        arguments[3:] = [None, tid.value]  # the order of tls and child_tid is the architecture's
    _python.PyOS_BeforeFork()
    pid: int = _libc.syscall(ctypes.c_long(_SYS_CLONE), *(ctypes.c_void_p(item) for item in arguments))
    if pid == 0:
        _python.PyOS_AfterFork_Child()
    else:
        _python.PyOS_AfterFork_Parent()
        if pid < 0:
            raise OSError("clone(CLONE_FILES) was refused: does a seccomp filter forbid it?")
    return pid


def run(journal: Journal, connection: socket.socket) -> int:
    """Keep a worker alive until it has nothing left to serve; return the exit status."""
    own = _open_descriptors()
    deaths = 0
    progress = -1
    while True:
        _close_strays(own | worker.descriptors(journal))
        sys.stdout.flush()
        sys.stderr.flush()
        pid = _clone()
        if pid == 0:
            _work(journal, connection)
        status = _wait(pid, journal)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return 0
        resolved = _resolved(journal)
        deaths = 1 if resolved != progress else deaths + 1
        progress = resolved
        reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        log.warning("the worker (pid %d) died (%s) and is replaced", pid, reason)
        journal.counters.words[Counter.RESTARTS] += 1
        if deaths >= DEATHS:
            return _give_up(journal, connection, reason)


def _wait(pid: int, journal: Journal) -> int:
    """Wait for the worker's end; a worker whose loop does not turn any more is told to say where it is, then killed."""
    words = journal.counters.words
    pidfd = os.pidfd_open(pid)
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    beat, since, warned = -1, time.monotonic(), False
    try:
        while not poller.poll(1000):
            now = time.monotonic()
            if words[Counter.HEARTBEAT] != beat:
                beat, since, warned = words[Counter.HEARTBEAT], now, False
            elif now - since > BLOCKED and not warned:
                warned = True
                log.error(
                    "the worker's event loop has not turned for %.0f s: something blocks it, a handler or a source that"
                    " waits without await. Where it is:",
                    now - since,
                )
                os.kill(pid, signal.SIGUSR1)
            elif now - since > HOPELESS:
                log.error("the worker's event loop has not turned for %.0f s: the worker is killed", now - since)
                os.kill(pid, signal.SIGKILL)
    finally:
        os.close(pidfd)
    return os.waitpid(pid, 0)[1]


def _work(journal: Journal, connection: socket.socket) -> NoReturn:
    """Be the worker. Never returns into the keeper's frames; nothing is finalized, since descriptors are shared."""
    status = 1
    try:
        worker.run(journal, connection)
        status = 0
    except BaseException:
        log.exception("the worker failed")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _resolved(journal: Journal) -> int:
    words = journal.counters.words
    return sum(words[at] for at in range(Counter.PAGES_FAULT, Counter.PAGES_BACKGROUND + 1))


def _open_descriptors() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/fd")}  # noqa: PTH208 - names, not paths


def _close_strays(known: set[int]) -> None:
    """Close what a dead worker has left in the shared table: its loop's, half-received ones."""
    for fd in _open_descriptors() - known:
        try:
            os.close(fd)
        except OSError:  # the listing's own
            continue


def _give_up(journal: Journal, connection: socket.socket, reason: str) -> int:
    """Say so, and poison whatever is asked for from now on, until nobody is left: no hang, no zeros."""
    error = PagerDiedError(f"{DEATHS} workers died with no fault resolved between them, the last by {reason}")
    log.error("%s; pages that are touched are poisoned from now on", error)
    try:
        control.send(connection, {"event": "died", "error": encode_error(error)})
    except (control.Closed, OSError):
        log.debug("nobody is there to be told")
    spaces = [(Userfaultfd.from_fd(fd), size, ranges) for fd, size, ranges in worker.spaces(journal)]
    poller = select.poll()
    for uffd, _, ranges in spaces:
        poller.register(uffd.fileno(), select.POLLIN)
        for start, end in ranges:
            uffd.try_wake(start, end - start)
    while spaces:
        poller.poll(500)
        for item in list(spaces):
            uffd, size, _ = item
            os.set_blocking(uffd.fileno(), False)  # whoever has handed it over may have cleared the flag
            for event in uffd.read():
                address = getattr(event, "address", None)
                if address is not None:
                    uffd.try_poison(address & -size, size, 0)
            if uffd.gone() or _hung_up(connection):
                spaces.remove(item)
    return 1


def _hung_up(connection: socket.socket) -> bool:
    poller = select.poll()
    poller.register(connection, 0)
    return bool(poller.poll(0))
