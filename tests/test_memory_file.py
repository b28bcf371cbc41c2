"""`handoff.memory_file`: which of the descriptors that a client sends is the file behind its memory."""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

from pattern import PAGE

from aiouffd.engine.mappings import Mapping
from aiouffd.handoff.firecracker import Regions
from aiouffd.handoff.memory_file import is_memory, memory_file

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

REGIONS = Regions((Mapping(1 << 30, (1 << 30) + PAGE, 0), Mapping(1 << 31, (1 << 31) + PAGE, PAGE)), PAGE, None)


def test_the_file_behind_the_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It has all that the regions show, in their pages, and can be written. What is wrong with another one is said."""
    with contextlib.ExitStack() as stack:

        def made(size: int = 2 * PAGE, seals: int = 0) -> int:
            fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            stack.callback(os.close, fd)
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            return fd

        def opened(path: str, flags: int) -> int:
            fd = os.open(path, flags)
            stack.callback(os.close, fd)
            return fd

        good, bitmap = made(seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW), made(1)
        plain = opened(str(tmp_path / "plain"), os.O_RDWR | os.O_CREAT)
        readable = opened(f"/proc/self/fd/{good}", os.O_RDONLY)
        assert is_memory(good)
        assert not is_memory(plain)
        assert memory_file([plain, bitmap, good], REGIONS, "x") == good
        assert memory_file([plain], REGIONS, "x") == -1
        assert not caplog.text
        huge = Regions(REGIONS.mappings, 512 * PAGE, None)
        for fds, regions, reason in (
            ([good, made()], REGIONS, "2 files may be it"),
            ([made(2 * PAGE - 1)], REGIONS, "it has 0x1fff bytes, and the regions reach to 0x2000"),
            ([good], huge, "it has pages of 4096 bytes, and the regions of 2097152"),
            ([readable], REGIONS, "it is not open for reading and writing"),
            ([made(seals=fcntl.F_SEAL_WRITE)], REGIONS, "it is sealed against writing"),
        ):
            caplog.clear()
            assert memory_file(fds, regions, "process 5") == -1
            assert f"process 5: its memory file is not used: {reason}" in caplog.text
