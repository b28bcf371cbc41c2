"""Caches and stores on disks that are full, can only be read, or have layers: real ones, in a mount namespace."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cached import CHUNK, MIB, Far, opened
from scenario import play
from snapshots import an_image, read_all

import aiouffd
from aiouffd.store import create_sync

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
_libc = ctypes.CDLL(None, use_errno=True)
_READ_ONLY, _REMOUNT = 1, 32


def mount(kind: str, path: Path, options: str, flags: int = 0) -> Path:
    """Mount a file system, and return its path."""
    path.mkdir(exist_ok=True)
    if _libc.mount(kind.encode(), str(path).encode(), kind.encode(), flags, options.encode()):
        raise OSError(ctypes.get_errno(), f"{kind} at {path}")
    return path


def read_through(folder: Path, size: int, name: str = "x") -> int:
    """Read a far source as one more process does, through the cache in a folder; return for how much it was asked."""

    async def read() -> int:
        source = opened(folder, Far(size, name))
        for at in range(0, size, MIB):
            assert bytes(await source.read(at, MIB)) == source.source.bytes_of(at, MIB)
        await source.aclose()
        return sum(length for _, length in source.source.asked)

    return asyncio.run(read())


def on_disks(directory: str) -> None:
    """Read and write there."""
    if _libc.unshare(0x20000) or _libc.mount(b"none", b"/", None, 0x44000, None):  # NEWNS; REC | PRIVATE
        raise OSError(ctypes.get_errno(), "no mount namespace")
    said: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        return False

    logging.getLogger("aiouffd").addFilter(note)
    folder = Path(directory)
    full = mount("tmpfs", folder / "full", "size=4m")
    assert read_through(full, 8 * MIB) == 8 * MIB
    assert [text.rpartition(": ")[2] for text in said] == ["No space left on device"]
    read_through(full, 8 * MIB)
    image = an_image(1, 200)
    small = mount("tmpfs", folder / "small", "size=4m")
    refused(lambda: create_sync(image, small / "x.snap", codec="none"), "No space left on device")
    assert not [path for path in small.rglob("*") if path.is_file()]
    create_sync(image[: 20 * CHUNK], small / "y.snap")
    mount("tmpfs", small, "size=4m", _REMOUNT | _READ_ONLY)
    assert read_all(small / "y.snap") == image[: 20 * CHUNK]
    refused(lambda: create_sync(image, small / "z.snap"), "Read-only file system")
    said.clear()
    assert read_through(small, MIB) == MIB
    assert len(said) == 1
    assert "Read-only file system; sources are read without it" in said[0]
    disk = mount("tmpfs", folder / "disk", "size=16m")
    for name in ("below", "above", "work"):
        (disk / name).mkdir()
    assert read_through(disk / "below", 2 * MIB) == 2 * MIB  # as in a layer of a container's image
    options = f"lowerdir={disk}/below,upperdir={disk}/above,workdir={disk}/work"
    over = mount("overlay", folder / "over", options)
    assert read_through(over, 2 * MIB) == 0
    assert read_through(over, MIB, "y") == MIB
    assert read_through(over, MIB, "y") == 0
    print("all of it is right")


def refused(call: Callable[[], object], reason: str) -> None:
    """Expect a StoreError."""
    with pytest.raises(aiouffd.StoreError, match=reason):
        call()


def test_disks_that_are_full_or_read_only_or_in_layers(tmp_path: Path) -> None:
    """Each byte is right, it is said once, a writer leaves nothing, and what was kept is found again."""
    output, _ = play(on_disks, str(tmp_path))
    assert "all of it is right" in output
