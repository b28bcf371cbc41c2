"""`kernel.files`: the kernel's files."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from aiouffd.kernel import files

if TYPE_CHECKING:
    from pathlib import Path


def test_a_file_that_has_no_size_is_read_to_its_end() -> None:
    """The kernel makes it when it is read; what is not there is an OSError."""
    assert os.stat("/proc/self/maps").st_size == 0  # noqa: PTH116 - a path as the module takes it
    text = files.read("/proc/self/maps")
    assert text.endswith(b"[vsyscall]\n") or text.count(b"\n") > 10
    with pytest.raises(FileNotFoundError):
        files.read("/proc/self/no-such-file")


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel makes them where a disk becomes full."""
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:3], at))
    with (tmp_path / "x").open("wb") as file:
        files.write_at(file.fileno(), b"0123456789", 5)
    assert (tmp_path / "x").read_bytes() == bytes(5) + b"0123456789"


def test_threads_that_list_one_folder_each_see_all(tmp_path: Path) -> None:
    """By one descriptor."""
    for number in range(3000):
        (tmp_path / str(number)).touch()
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    found: list[int] = []

    def look() -> None:
        for _ in range(10):
            found.append(len(files.names(fd)))  # noqa: PERF401

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)
    assert found == [3000] * 40
