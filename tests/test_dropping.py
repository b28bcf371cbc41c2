"""`engine.dropping`: pages go, of a memfd and of this process, and whoever asked hears which have stayed."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

from pattern import PAGE

from aiouffd.engine.dropping import drop
from aiouffd.kernel.memory import address_of
from aiouffd.kernel.owned_descriptor import OwnedDescriptor

DATA = b"x" * 4 * PAGE


def test_of_a_memfd() -> None:
    """Of all parts, also behind one that cannot go."""
    with OwnedDescriptor(os.memfd_create("pages")) as file:
        os.pwrite(file.fileno(), DATA, 0)
        outcomes = drop(file, [(0, PAGE, []), (PAGE, PAGE, []), (3 * PAGE, 4 * PAGE, [])], [])
        assert [(low, high, error and error.errno) for low, high, error in outcomes] == [
            (0, PAGE, None),
            (PAGE, PAGE, errno.EINVAL),
            (3 * PAGE, 4 * PAGE, None),
        ]
        assert os.pread(file.fileno(), 4 * PAGE, 0) == bytes(PAGE) + DATA[: 2 * PAGE] + bytes(PAGE)
        assert os.fstat(file.fileno()).st_blocks * 512 == 2 * PAGE


class Registered:
    """A space, of whose addresses only some are registered."""

    page_size = PAGE

    def __init__(self, *ranges: tuple[int, int]) -> None:
        self.uffd = self
        self.pages = {page for start, end in ranges for page in range(start & -PAGE, end, PAGE)}

    def try_writeprotect(self, start: int, length: int, _mode: int) -> int:
        """As UFFDIO_WRITEPROTECT."""
        return length if self.pages.issuperset(range(start & -PAGE, start + length, PAGE)) else -errno.ENOENT


def test_of_this_process() -> None:
    """Wherever they are shown, also where memory is locked."""
    with mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        at, libc = address_of(memory), ctypes.CDLL(None, use_errno=True)
        spaces = [Registered((at, at + 4 * PAGE))]
        memory[:] = DATA
        assert libc.mlock(ctypes.c_void_p(at), ctypes.c_size_t(PAGE)) == 0
        shown = [(at, at + PAGE), (at + 2 * PAGE, at + 3 * PAGE)]
        assert drop(None, [(0, PAGE, shown), (PAGE, 2 * PAGE, [])], spaces) == [(0, PAGE, None), (PAGE, 2 * PAGE, None)]
        assert memory[:] == bytes(PAGE) + DATA[:PAGE] + bytes(PAGE) + DATA[:PAGE]
        ((_, _, error),) = drop(None, [(0, PAGE, [(at + 1, at + PAGE)])], spaces)
        assert error is not None
        assert error.errno == errno.EINVAL


def test_other_memory_of_this_process_stays() -> None:
    """Whatever lies around it in the same range."""
    size = 7 * PAGE
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        at = address_of(memory)
        memory[:] = b"x" * size
        spaces = [Registered((at, at + 2 * PAGE), (at + 3 * PAGE, at + 6 * PAGE))]
        assert drop(None, [(0, size, [(at, at + size)])], spaces) == [(0, size, None)]
        other = b"x" * PAGE
        assert memory[:] == bytes(2 * PAGE) + other + bytes(3 * PAGE) + other
