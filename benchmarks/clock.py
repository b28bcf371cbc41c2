"""timerfd_create(2), which Python has from 3.13 on: timers of the kernel's resolution, that a loop can wait for."""

from __future__ import annotations

import ctypes
import os
import struct
import time

_libc = ctypes.CDLL(None, use_errno=True)
_ITIMERSPEC = struct.Struct("=qqqq")  # interval, value: seconds and nanoseconds


def create() -> int:
    """Return a descriptor that becomes readable when its time has come."""
    fd: int = _libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "timerfd_create")
    return fd


def ring(fd: int, seconds: float) -> None:
    """Set it, once."""
    whole, rest = divmod(int(seconds * 1e9), 1_000_000_000)
    if _libc.timerfd_settime(fd, 0, _ITIMERSPEC.pack(0, 0, whole, rest), None) < 0:
        raise OSError(ctypes.get_errno(), "timerfd_settime")
