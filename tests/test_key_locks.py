"""`store.key_locks`: a lock for each key, across descriptions of a file as across processes."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.store.key_locks import KeyLocks

if TYPE_CHECKING:
    from pathlib import Path

ONE, OTHER = b"1" * 20, b"2" * 20


def opened(path: Path) -> KeyLocks:
    """Return those of a description of the file of its own, as another process would have."""
    return KeyLocks(OwnedDescriptor(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)))


def test_one_has_a_key(tmp_path: Path) -> None:
    """Neither another process nor another thread of the same; other keys are free."""
    mine, theirs = opened(tmp_path / "keys"), opened(tmp_path / "keys")
    assert mine.try_lock(ONE)
    assert not mine.try_lock(ONE)
    assert not theirs.try_lock(ONE)
    assert theirs.try_lock(OTHER)
    assert not mine.try_lock(OTHER)
    mine.unlock(ONE)
    assert theirs.try_lock(ONE)
    theirs.unlock(ONE)
    assert mine.try_lock(ONE)


def test_the_kernel_unlocks_the_keys_of_the_dead(tmp_path: Path) -> None:
    """However it has ended."""
    code = """
import os, sys, time
from aiouffd.kernel.owned_descriptor import OwnedDescriptor
from aiouffd.store.key_locks import KeyLocks
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
locks = KeyLocks(OwnedDescriptor(fd))
print(locks.try_lock(b"1" * 20), flush=True)
time.sleep(100)
"""
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "keys"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    locks = opened(tmp_path / "keys")
    assert not locks.try_lock(ONE)
    process.kill()
    process.wait()
    process.stdout.close()
    assert locks.try_lock(ONE)


def test_a_file_that_cannot_be_locked(tmp_path: Path) -> None:
    """It is the caller's error."""
    (tmp_path / "keys").touch()
    locks = KeyLocks(OwnedDescriptor(os.open(tmp_path / "keys", os.O_RDONLY)))
    with pytest.raises(OSError, match="Bad file descriptor"):
        locks.try_lock(ONE)
