"""The kernel's files in /proc and /sys: small, and made when they are read."""

from __future__ import annotations

__all__ = ["read"]


def read(path: str) -> bytes:
    """Return what a file holds. Raises OSError."""
    with open(path, "rb") as file:  # noqa: PTH123 - to import pathlib takes 4 ms, in each process that is started
        return file.read()
