"""What a pager inherits from the process that starts it, and does not keep.

A pager is no part of its application for whoever manages that. A supervisor sends SIGTERM to each process of a group or
a cgroup: the application takes its time to end in order, and its memory is served meanwhile; the pager ends when nobody
is left to be served. At exec, ignored signals stay ignored and blocked ones blocked: with SIGCHLD ignored, waitpid(2)
says ECHILD. Standard descriptors may be closed, and standard error may be a pipe that nobody reads.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "INTERRUPT_BLOCKED_LOOP",
    "SAY_WHAT_BLOCKS",
    "called",
    "open_standard_descriptors",
    "raise_limits",
    "reset_signals",
    "signals_blocked",
]

SAY_WHAT_BLOCKS: Final = signal.SIGRTMIN + 9
INTERRUPT_BLOCKED_LOOP: Final = signal.SIGRTMIN + 10
"""What the keeper sends to the worker: no signal that an administrator sends to a whole service."""

_PR_SET_NAME: Final = 15
_libc = ctypes.CDLL(None)
_ABORTING: Final = (signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS)
_FAULTS: Final = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
_FATAL: Final = frozenset((signal.SIGKILL, signal.SIGSTOP, *_ABORTING, *_FAULTS))
_DEFAULT: Final = frozenset((signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH))


def _meant_for_the_application() -> set[signal.Signals]:
    """Return the signals that would end or stop a process, and that no defect of its own raises."""
    return {*signal.valid_signals()} - _FATAL - _DEFAULT


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block what is meant for the application while a pager is started, which inherits that until `reset_signals`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _meant_for_the_application())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def reset_signals() -> None:
    """Set all dispositions and the mask, whatever was inherited.

    What is meant for the application is caught and dropped, not ignored: programs that a source starts would inherit
    that.
    """
    for number in (*_DEFAULT, *_ABORTING, *_FAULTS):
        if signal.getsignal(number) is signal.SIG_IGN:  # else it is the default, or faulthandler's
            signal.signal(number, signal.SIG_DFL)
    for other in _meant_for_the_application():
        with contextlib.suppress(OSError, ValueError):  # the C library keeps some for itself
            signal.signal(other, _drop)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python does
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _drop(*_: object) -> None:
    """Do nothing."""


def open_standard_descriptors() -> None:
    """Open /dev/null in place of standard descriptors that are closed: others would get their numbers."""
    while True:
        try:
            fd = os.open(os.devnull, os.O_RDWR)
        except OSError:
            fd = os.pipe()[0]  # there is no /dev
        if fd > 2:
            os.close(fd)
            break
    for name, fd in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "w", closefd=False))  # noqa: SIM115 - for ever


def raise_limits() -> None:
    """Raise soft limits as far as that is allowed.

    A descriptor for each address space and some for each client are open: the soft limit of 1024 is for users of
    select(2). What limits the application's files and processor time is not for the pager, either.
    """
    for what in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_CPU):
        _, most = resource.getrlimit(what)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(what, (most, most))


def called(name: str) -> None:
    """Be shown so by ps(1) and top(1): which of the pager's processes this one is."""
    _libc.prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()), 0, 0, 0)
