"""`kernel.files`: the kernel's files."""

from __future__ import annotations

import os

import pytest

from aiouffd.kernel import files


def test_a_file_that_has_no_size_is_read_to_its_end() -> None:
    """The kernel makes it when it is read; what is not there is an OSError."""
    assert os.stat("/proc/self/maps").st_size == 0  # noqa: PTH116 - a path as the module takes it
    text = files.read("/proc/self/maps")
    assert text.endswith(b"[vsyscall]\n") or text.count(b"\n") > 10
    with pytest.raises(FileNotFoundError):
        files.read("/proc/self/no-such-file")
