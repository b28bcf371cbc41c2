"""A process that shares the table of descriptors with the one that has made it.

The descriptor of a forked child of the application arrives in the table of whoever reads the event, and must outlive
him: if it were closed, the child would read zeros. In a shared table who has opened a number closes it, and the end of
a process closes nothing, but for the last one's.
"""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Final

__all__ = ["clone"]

_CLONE_FILES: Final = 0x400
_CLONE_PIDFD: Final = 0x1000
_CLONE_CHILD_CLEARTID: Final = 0x200000
_CLONE_CHILD_SETTID: Final = 0x1000000
_PR_GET_TID_ADDRESS: Final = 40
_SYS_CLONE: Final = {"x86_64": 56}.get(os.uname().machine, 220)

_libc = ctypes.PyDLL(None, use_errno=True)  # PyDLL: the GIL must be held across the clone
_python = ctypes.pythonapi


def clone(pidfd: ctypes.c_int) -> int:
    """fork(2), but with the table of descriptors shared; return the pid.

    The caller has no other thread; or one that writes a log (`loglines`), and has no lock while it waits for the GIL.

    Args:
        pidfd: where the kernel writes the child's pidfd (CLONE_PIDFD, Linux 5.2), before the child runs. In memory that
            is shared, it is known from the child's first moment on, whoever dies. Where the clone fails, it may hold
            anything.
    """
    # glibc keeps the thread's id where set_tid_address points; its fork() has the kernel write the child's there.
    tid = ctypes.c_void_p()
    flags = _CLONE_FILES | _CLONE_PIDFD | signal.SIGCHLD
    if _libc.prctl(_PR_GET_TID_ADDRESS, ctypes.byref(tid), 0, 0, 0) == 0:
        flags |= _CLONE_CHILD_SETTID | _CLONE_CHILD_CLEARTID
    arguments: list[int | None] = [flags, None, ctypes.addressof(pidfd), tid.value, None]
    if os.uname().machine != "x86_64":
        arguments[3:] = [None, tid.value]  # the order of tls and child_tid is the architecture's
    _python.PyOS_BeforeFork()
    pid: int = _libc.syscall(ctypes.c_long(_SYS_CLONE), *(ctypes.c_void_p(item) for item in arguments))
    if pid == 0:
        _python.PyOS_AfterFork_Child()
    else:
        _python.PyOS_AfterFork_Parent()
        if pid < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"clone(CLONE_FILES) was refused: {os.strerror(number)}")
    return pid
