"""The kernel's files in /proc and /sys: small, and made when they are read. Names in a folder; whole writes."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["names", "read", "write_at"]


def read(path: str) -> bytes:
    """Return what a file holds. Raises OSError."""
    with open(path, "rb") as file:  # noqa: PTH123 - to import pathlib takes 4 ms, in each process that is started
        return file.read()


def names(folder: int) -> list[str]:
    """Return the names in the folder of a descriptor. Raises OSError.

    `os.listdir(folder)` shares the place in the folder with whoever lists by the same descriptor at the same time: both
    miss names.
    """
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    try:
        return os.listdir(fd)  # noqa: PTH208 - a descriptor
    finally:
        os.close(fd)


def write_at(fd: int, data: Any, offset: int) -> None:
    """Write all of a buffer to a place in a file: pwrite(2) writes less where a disk becomes full. Raises OSError."""
    left = memoryview(data).cast("B")
    while left:
        done = os.pwrite(fd, left, offset)
        left, offset = left[done:], offset + done
