"""A process that locks its memory."""

from __future__ import annotations

import ctypes
import os

import pytest

__all__ = ["MCL_CURRENT", "MCL_FUTURE", "MCL_ONFAULT", "lock_all", "needs_root", "unlock_all"]

MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4

_libc = ctypes.CDLL(None, use_errno=True)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs CAP_IPC_LOCK, to lock more than RLIMIT_MEMLOCK")


def lock_all(flags: int) -> None:
    """mlockall(2)."""
    assert _libc.mlockall(flags) == 0, os.strerror(ctypes.get_errno())


def unlock_all() -> None:
    """munlockall(2)."""
    assert _libc.munlockall() == 0
