"""`kernel.file_lock`: a file of memory is one's alone, or any number's."""

from __future__ import annotations

import os

import pytest

from aiouffd.kernel.file_lock import locked_anew


def test_one_alone_or_any_number() -> None:
    """As long as the open file is, or a duplicate of it; it is not that of the descriptor."""
    fd = os.memfd_create("memory")
    first, second = (locked_anew(fd, os.O_RDWR, alone=False) for _ in range(2))
    with pytest.raises(BlockingIOError):
        locked_anew(fd, os.O_RDWR, alone=True)
    second.close()
    kept = os.dup(first.fileno())
    first.close()
    with pytest.raises(BlockingIOError):
        locked_anew(fd, os.O_RDWR, alone=True)
    os.close(kept)
    with locked_anew(fd, os.O_RDONLY, alone=True) as alone:
        with pytest.raises(BlockingIOError):
            locked_anew(fd, os.O_RDONLY, alone=False)
        assert os.fstat(alone.fileno()).st_ino == os.fstat(fd).st_ino
    os.close(fd)
    assert locked_anew(fd, os.O_RDONLY, alone=True).closed  # as where there is no /proc
