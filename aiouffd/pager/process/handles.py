"""Descriptors that a pager cannot do without, and errors that say why there are none."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import select
import signal
import time
from typing import TYPE_CHECKING, Final

from aiouffd.errors import PagerStartError
from aiouffd.kernel import files
from aiouffd.kernel.owned_descriptor import inode

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "Stray",
    "close_all",
    "close_strays",
    "code_of",
    "duplicates",
    "explained",
    "grow_table",
    "has_ended",
    "is_open",
    "is_pidfd",
    "known_by",
    "open_descriptors",
    "open_memfd",
    "open_pidfd",
    "pid_of",
    "runs_nothing",
    "send_signal",
    "state_of",
]

_GLANCE: Final = 0.02  # seconds
_MOST: Final = 1 << 16  # descriptors that are looked for, one by one
_TABLE: Final = 1 << 14  # descriptors: 8 bytes each
_OPEN_FOR_A_MOMENT: Final = ("/memfd:aiouffd-journal", "/memfd:aiouffd-message")


def open_pidfd(pid: int) -> int:
    """Return a descriptor of a process (pidfd_open(2), Linux 5.3): a number might be another's by the time it is used.

    Raises:
        PagerStartError: there is none; it says why.
    """
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        raise explained("pidfd_open", error) from error


def is_pidfd(fd: int) -> bool:
    """Tell whether a number is that of a process's descriptor."""
    try:
        signal.pidfd_send_signal(fd, 0)
    except (ProcessLookupError, PermissionError):  # it has ended
        return True
    except OSError:
        return False
    return True


def pid_of(pidfd: int) -> int:
    """Return the process that a pidfd is of; 0: it has ended, and was waited for; or it is no pidfd."""
    try:
        lines = files.read(f"/proc/self/fdinfo/{pidfd}").splitlines()
    except OSError:
        return 0
    return next((max(int(line.split()[1]), 0) for line in lines if line.startswith(b"Pid:")), 0)


def code_of(pidfd: int) -> int | None:
    """Return the code of a child that has ended, as `Popen.returncode`; None: it has not quite, or is no child."""
    try:
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except OSError:
        return None
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def state_of(pidfd: int) -> str:
    """Return the state of a process, as ps(1) shows it; nothing where it cannot be seen."""
    try:
        return _state(f"/proc/{pid_of(pidfd)}/stat")
    except OSError:
        return ""


def send_signal(pidfd: int, number: int) -> None:
    """Send a process a signal, if it lives; -1: there is none."""
    if pidfd >= 0:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number)


def open_memfd(name: str, flags: int = os.MFD_CLOEXEC) -> int:
    """Return a file in memory (memfd_create(2)).

    Raises:
        PagerStartError: there is none; it says why.
    """
    try:
        return os.memfd_create(name, flags)
    except OSError as error:
        raise explained("memfd_create", error) from error


def explained(call: str, error: OSError) -> PagerStartError:
    """Return an error that names what was called, and which limit or filter is the likely cause."""
    refused = "a seccomp filter, as container runtimes and sandboxes install, can forbid this call"
    no_execution = "it is not executable for this user, or its file system is mounted noexec"
    causes = {
        errno.EPERM: refused,
        errno.ENOSYS: refused,
        errno.EACCES: refused if error.filename is None else no_execution,  # execve(2) names its file
        errno.EMFILE: f"the limit of open files (RLIMIT_NOFILE) is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}",
        errno.EAGAIN: "the limit of processes is reached: pids.max of the cgroup, or RLIMIT_NPROC",
        errno.ENOMEM: "there is no memory: RLIMIT_AS, or the cgroup's limit",
        errno.EFBIG: f"the limit of file sizes (RLIMIT_FSIZE) is {resource.getrlimit(resource.RLIMIT_FSIZE)[0]}",
    }
    cause = causes.get(error.errno or 0)
    return PagerStartError(f"{call}: {error.strerror}" + (f" ({cause})" if cause else ""))


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that are not needed."""
    for fd in fds:
        os.close(fd)


def duplicates(fds: Iterable[int]) -> list[int]:
    """Return a duplicate of each descriptor: of all of them, or of none. Raises OSError."""
    found = list[int]()
    try:
        for fd in fds:
            found.append(os.dup(fd))
    except OSError:
        close_all(found)
        raise
    return found


def has_ended(pidfd: int, seconds: float = 0.0) -> bool:
    """Tell whether a process has ended, or does within so many seconds; -1: there was none."""
    poller = select.poll()
    if pidfd >= 0:
        poller.register(pidfd, select.POLLIN)
    return pidfd < 0 or bool(poller.poll(seconds * 1000))


def runs_nothing(pidfd: int, seconds: float = 0.0) -> bool:
    """As `has_ended`; or all that is left of it is threads that wait uninterruptibly, and end with that."""
    until = time.monotonic() + seconds
    while not has_ended(pidfd, min(_GLANCE, seconds)):
        states = _states(pidfd)
        if states[:1] == "Z" and not set(states) - set("ZXD"):
            return True
        if time.monotonic() >= until:
            return False
    return True


def _states(pidfd: int) -> str:
    """Return a letter for the state of each thread, the first one's first; nothing where that cannot be seen."""
    try:
        pid = pid_of(pidfd)
        tasks = sorted(map(int, os.listdir(f"/proc/{pid}/task")), key=lambda task: task != pid)  # noqa: PTH208 - numbers
        return "".join(_state(f"/proc/{pid}/task/{task}/stat") for task in tasks)
    except OSError:  # it has ended just now, or there is no /proc
        return ""


def _state(stat: str) -> str:
    try:
        return files.read(stat).decode(errors="replace").rpartition(")")[2].split()[0]
    except FileNotFoundError:  # this thread has ended
        return "X"


def open_descriptors() -> set[int]:
    """Return the numbers of all that are open; that of the list itself may be among them."""
    try:
        return {int(name) for name in os.listdir("/proc/self/fd")}  # noqa: PTH208 - names, not paths
    except OSError:  # the table is full, or there is no /proc
        return {fd for fd in range(min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], _MOST)) if is_open(fd)}


def grow_table() -> None:
    """Have the kernel make the table of descriptors large, while no other process or thread shares it.

    Where one does, each time that the table grows waits for an RCU grace period (`expand_fdtable`): 10 ms and more, in
    which a worker reads no fault.
    """
    most = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], _TABLE)
    with contextlib.suppress(OSError):  # nothing is open as 0; or there is no memory
        os.close(fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, most - 1))


def is_open(fd: int) -> bool:
    """Tell whether a number is a descriptor's."""
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def link_of(fd: int) -> str:
    """Return what a descriptor is of, as /proc has it; nothing where there is none, or no /proc."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - no path
    except OSError:
        return ""


def known_by(fd: int) -> str | tuple[int, int] | None:
    """Return by what a descriptor is known again; None: there is none.

    Its inode is asked for where there is no /proc only: a file system that does not answer would keep who asks.
    """
    return link_of(fd) or inode(fd)


Stray = tuple[int, str | tuple[int, int] | None]
"""A descriptor, and what it is `known_by`."""


def close_strays(known: set[int]) -> list[Stray]:
    """Close what a dead worker has left in the shared table: its loop's, half-received ones.

    Not what a holder has just opened, and closes: by then, the number may be another's.

    Returns:
        What may take long to close, a file whose file system does not answer, and what it is `known_by`: a socket may
        be the holder's. Before the next worker has it closed, it looks whether the number is still of that.
    """
    slow = []
    for fd in open_descriptors() - known:
        link = link_of(fd)  # nothing for the list's own
        if link.startswith(_OPEN_FOR_A_MOMENT) or (link.startswith("/proc/") and link.endswith("/fd")):
            continue  # another process of the pager has it
        if link.startswith(("pipe:", "anon_inode:", "/memfd:", "/dev/")):
            os.close(fd)
        elif is_open(fd):
            slow.append((fd, known_by(fd)))
    return slow
